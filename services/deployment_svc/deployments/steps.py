"""The steps of provisioning. Each asks the market one thing outside any transaction and writes the answer down."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.blacklist.repository import excluded
from services.deployment_svc.claw_keys import repository as claw_keys
from services.deployment_svc.deployments import repository, secrets, state
from services.deployment_svc.deployments.blame import judge
from services.deployment_svc.deployments.models import CHANNEL, Deployment
from services.deployment_svc.deployments.orphans import name_of
from services.deployment_svc.deployments.state import Step
from services.deployment_svc.markets.driver import Blame, Driver, Observation, Offer, Order, ProviderError, Secrets, Spec
from services.deployment_svc.providers import repository as providers
from services.deployment_svc.providers.rules import Choice
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.users import Users
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.secrets import SecretBox

T = TypeVar("T")
_QUEUED = "waits for its turn: as many as allowed are being brought up"
Next = tuple[Deployment, float]
"""The row as it is now, and how long to wait before its next step, in seconds."""


class Lost(Exception):
    """Another process holds the deployment now; this one must not write."""


class Steps:
    """Takes one step at a time for deployments that the caller has claimed."""

    def __init__(self, db: Database, settings: DeploymentSettings, box: SecretBox, driver: Driver, users: Users) -> None:
        self.db, self.settings, self.box, self.driver, self.users = db, settings, box, driver, users
        self._failures: Counter[str] = Counter()
        """Failures of the market in a row, by deployment; only for the pause, so a restart may forget them."""

    async def take(self, step: Step, d: Deployment, token: str) -> Next:
        """Takes the given step. ProviderError says that the market did not do its part."""
        steps: dict[Step, Callable[[Deployment, str], Awaitable[Next]]] = {
            Step.INTEND: self._intend, Step.CREATE: self._create, Step.CHOOSE: self._choose, Step.LEASE: self._lease,
            Step.READY: self._ready, Step.WATCH: self._watch, Step.UNDO: self._undo, Step.CLOSE: self._close,
        }  # fmt: skip
        result = await steps[step](d, token)
        self._failures.pop(d.id, None)
        return result

    async def _intend(self, d: Deployment, token: str) -> Next:
        async def write(session: AsyncSession, row: Deployment) -> None:
            in_org, in_all = await repository.deploying(session, row.org_id)
            if in_org >= self.settings.org_deploying or in_all >= self.settings.all_deploying:
                row.error_message = _QUEUED
                return
            row.error_message = "" if row.error_message == _QUEUED else row.error_message
            row.order_intended = True
            row.attempts += 1
            row.attempting_since = row.attempting_since or now()
            repository.note(session, row, "attempt.started", f"attempt {row.attempts} on {self.driver.name}")

        d = await self._write(d, token, write)
        return d, 0 if d.order_intended else self.settings.poll_s * random.uniform(0.5, 1)

    async def _create(self, d: Deployment, token: str) -> Next:
        # Creating is not idempotent: what an earlier, lost call made carries our name and is closed first.
        await self._close_orders(d)

        async def intend(session: AsyncSession, row: Deployment) -> None:
            # Written down before the key is made, so that no key is ever made that nobody can name, and greater than any before it.
            row.claw_key_id = ids.new_after("key", row.claw_key_id or "")
            await claw_keys.revoke_old(session, row.id)

        opened = [secrets.open_column(self.box, d, column) for column in ("channel_token", "channel_api_key")]
        d = await self._write(d, token, intend)
        claw_key = await self._ask(self.users.mint_claw_key(d.claw_key_id or "", d.id, d.org_id, d.user_id))
        order = await self._ask(self.driver.create(self._spec(d), Secrets(claw_key, *opened), d.claw_key_id or ""))

        async def write(session: AsyncSession, row: Deployment) -> None:
            row.akash_deployment_id, row.offers_since = order.id, now()
            row.manifest_sealed = secrets.seal(self.box, row.id, "manifest", order.manifest)
            repository.note(session, row, "order.created", f"order {order.id}")

        return await self._write(d, token, write), 0

    async def _choose(self, d: Deployment, token: str) -> Next:
        offers = await self._ask(self.driver.offers(self._order(d)))
        waited = now() - (d.offers_since or now())
        if waited < timedelta(seconds=self.settings.bid_window_s):
            return d, self._pause(d.offers_since)

        async def write(session: AsyncSession, row: Deployment) -> Choice:
            choice = await providers.take_offer(session, offers, row.tried_providers, self.settings)
            if choice.offer is None:
                row.error_message = f"waiting: {choice.why}" if choice.wait else row.error_message
                return choice
            row.error_message = "" if row.error_message.startswith("waiting:") else row.error_message
            row.provider, row.offer_reference = choice.offer.provider, choice.offer.reference
            row.bidders = sorted({offer.provider for offer in offers})
            await providers.note_offers(session, row.bidders)
            repository.note(session, row, "provider.chosen", choice.why)
            return choice

        d, choice = await self._write_and_get(d, token, write)
        if choice.offer is None and not choice.wait and waited > timedelta(seconds=self.settings.bid_timeout_s):
            raise ProviderError(choice.why, "provider")
        return d, 0 if choice.offer else self._pause(d.offers_since)

    async def _lease(self, d: Deployment, token: str) -> Next:
        # May be asked for again after a crash: for one order, it starts one bot.
        lease = await self._ask(self.driver.lease(self._order(d), Offer(d.provider, Decimal(0), reference=d.offer_reference)))

        async def write(session: AsyncSession, row: Deployment) -> None:
            row.akash_lease_id, row.leased_at = lease.id, now()
            await providers.went_well(session, row.provider, row.id, providers.LEASE, self.settings)
            repository.note(session, row, "lease.created", f"started at {row.provider}, lease {lease.id}")

        return await self._write(d, token, write), 0

    async def _ready(self, d: Deployment, token: str) -> Next:
        seen = await self._ask(self.driver.observe(d.akash_deployment_id or ""))
        if seen.phase in ("absent", "lost", "ordered"):
            blame: Blame = "order" if seen.is_ours or seen.phase == "absent" else "provider"
            raise ProviderError(f"the bot did not come up at {d.provider}: {seen.reason or seen.phase}", blame)
        if seen.phase != "ready":
            if now() - (d.leased_at or now()) > timedelta(seconds=self.settings.ready_timeout_s):
                raise ProviderError(f"the bot at {d.provider} did not answer in time", "provider")
            return d, self._pause(d.leased_at)
        if seen.start_id and seen.start_id[-32:] != (d.claw_key_id or "")[-32:]:
            raise ProviderError(f"the bot that came up at {d.provider} is an earlier start, whose key has ended", "order")
        # An order that was placed twice, since the answer came too late, is given back.
        await self._close_orders(d, but=d.akash_deployment_id or "")
        return await self._write(d, token, lambda session, row: self._activate(session, row, seen)), self.settings.watch_s

    async def _activate(self, session: AsyncSession, row: Deployment, seen: Observation) -> None:
        # Wished anew meanwhile: what came up is the old wish.
        if row.state != state.DEPLOYING or row.undoing:
            return
        row.observed_generation = row.generation
        row.provider_url, row.error_message = seen.url, ""
        state.begin_anew(row)
        row.activated_at = row.activated_at or now()
        row.manifest_sealed = row.silent_since = None
        await providers.went_well(session, row.provider, row.id, providers.READY, self.settings)
        await claw_keys.revoke_old(session, row.id, but=row.claw_key_id or "")
        repository.move(session, row, state.ACTIVE, f"the bot answers at {row.provider}")

    async def _watch(self, d: Deployment, token: str) -> Next:
        seen = await self._ask(self.driver.observe(d.akash_deployment_id or ""))
        if seen.phase == "starting" and d.silent_since and now() - d.silent_since > timedelta(seconds=self.settings.silent_timeout_s):
            seen = replace(seen, phase="lost", reason=f"it has not answered for {self.settings.silent_timeout_s / 60:g} minutes")
        silent = "" if seen.phase == "ready" else f"the bot at {d.provider} does not answer right now"
        known = (d.provider_url, d.error_message)
        if seen.phase in ("starting", "ready") and known == (seen.url or d.provider_url, silent):
            return d, self.settings.watch_s

        async def write(session: AsyncSession, row: Deployment) -> None:
            if row.state != state.ACTIVE:
                return
            if seen.phase in ("starting", "ready"):
                row.provider_url, row.error_message = seen.url or row.provider_url, silent
                row.silent_since = (row.silent_since or now()) if silent else None
                return
            why = seen.reason or seen.phase
            row.undoing, row.provider_url, row.silent_since = True, "", None
            row.error_message = f"the bot at {row.provider} is gone: {why}; it is started again"
            if seen.phase == "lost" and not seen.is_ours:
                await providers.went_wrong(session, row.provider, row.id, providers.LOST, why, self.settings)
            repository.move(session, row, state.DEPLOYING, row.error_message)

        d = await self._write(d, token, write)
        return d, self.settings.watch_s if d.state == state.ACTIVE else 0

    async def _undo(self, d: Deployment, token: str) -> Next:
        await self._take_down(d)

        async def write(session: AsyncSession, row: Deployment) -> None:
            state.forget_order(row)
            await claw_keys.revoke_old(session, row.id)

        d = await self._write(d, token, write)
        wait = (d.due_at - now()).total_seconds() if d.due_at and d.state == state.DEPLOYING else 0
        return d, max(0.0, wait)

    async def _close(self, d: Deployment, token: str) -> Next:
        await self._take_down(d)

        async def write(session: AsyncSession, row: Deployment) -> None:
            state.forget_order(row)
            row.error_message = ""
            # Nothing will need them again.
            row.channel_token_sealed = row.channel_api_key_sealed = None
            await claw_keys.revoke_old(session, row.id)
            repository.move(session, row, state.CLOSED, "taken down")

        return await self._write(d, token, write), 0

    async def _close_orders(self, d: Deployment, but: str = "") -> None:
        """Closes the deployment's order and whatever else carries its name, except ``but``."""
        ours = [d.akash_deployment_id] if d.akash_deployment_id else []
        named = await self._ask(self.driver.find(self._spec(d).name))
        for order_id in dict.fromkeys([*ours, *named]):
            if order_id != but:
                await self._ask(self.driver.close(order_id))

    async def _take_down(self, d: Deployment) -> None:
        """Closes whatever carries the deployment's name, then ends what it called with."""
        await self._close_orders(d)
        if d.claw_key_id:
            await self._ask(self.users.revoke_claw_keys(d.claw_key_id, d.id, d.org_id, d.user_id))

    async def failed(self, step: Step, d: Deployment, token: str, error: Exception) -> Next:
        """What follows when a step failed: wait and repeat it, or undo the attempt and make another, or give up."""
        self._failures[d.id] += 1
        blame, text, pause = judge(step, d, error, self._failures[d.id], self.settings)
        if blame == "market" or step in (Step.WATCH, Step.UNDO, Step.CLOSE):

            async def remember(session: AsyncSession, row: Deployment) -> None:
                if row.state not in (state.FAILED, state.SUSPENDED):  # Its reason says more.
                    row.error_message = f"waiting: {text}"

            return await self._write(d, token, remember), pause
        async with self.db.read(ALL) as session:
            barred = await excluded(session, d.bidders)
        untried = blame in ("provider", "patience") and bool({*d.bidders} - {*d.tried_providers, d.provider} - barred)

        async def write(session: AsyncSession, row: Deployment) -> None:
            if row.state != state.DEPLOYING:
                return
            if row.provider and row.provider not in row.tried_providers:
                row.tried_providers = [*row.tried_providers, row.provider]
            kind = providers.LEASE if step is Step.LEASE else providers.READY
            if blame == "provider" and row.provider:
                excluded = await providers.went_wrong(session, row.provider, row.id, kind, text, self.settings)
                if excluded:
                    repository.note(session, row, "provider.excluded", excluded)
            verdict = state.after_failure(row, untried, now(), self.settings)
            row.undoing, row.error_message = True, f"attempt {row.attempts} failed: {text}"
            repository.note(session, row, "attempt.failed", row.error_message)
            if untried:
                # It was the provider's failure, and another one is there to be asked: the attempt is not used up.
                row.attempts -= 1
            if verdict.give_up:
                repository.move(session, row, state.FAILED, row.error_message)
            else:
                row.due_at = verdict.retry_at

        return await self._write(d, token, write), 0

    def _pause(self, since: datetime | None) -> float:
        """Before asking again for what was not there yet, in seconds: short at first, longer the longer it takes."""
        waited_s = (now() - since).total_seconds() if since else 0
        return min(self.settings.watch_s, max(0.05, waited_s / 5))

    async def _ask(self, request: Awaitable[T]) -> T:
        return await asyncio.wait_for(request, self.settings.step_timeout_s)

    async def _write(self, d: Deployment, token: str, change: Callable[[AsyncSession, Deployment], Awaitable[None]]) -> Deployment:
        row, _ = await self._write_and_get(d, token, change)
        return row

    async def _write_and_get(
        self, d: Deployment, token: str, change: Callable[[AsyncSession, Deployment], Awaitable[T]]
    ) -> tuple[Deployment, T]:
        """Writes to the row if this process still holds it, and returns it as it is then."""

        async def work(session: AsyncSession) -> tuple[Deployment, T]:
            row = await repository.locked(session, d.id)
            if row is None or row.lease_token != token:
                raise Lost
            return row, await change(session, row)

        return await self.db.run(work, ALL)

    def _spec(self, d: Deployment) -> Spec:
        return Spec(name_of(d.id), d.id, d.org_id, d.model, CHANNEL.words[d.channel])

    def _order(self, d: Deployment) -> Order:
        return Order(d.akash_deployment_id or "", name_of(d.id), secrets.open_column(self.box, d, "manifest"))
