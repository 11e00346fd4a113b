"""What is known of providers, and the one place where outcomes are written down and the rule is applied to them.

Everything here runs under one lock, so that two deployments cannot take the last free place at a provider, nor two failures exclude
more providers than the cap allows.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.provider_pb2 import OutcomeKind
from services.deployment_svc.blacklist.models import BlacklistEntry
from services.deployment_svc.blacklist.repository import in_force
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.state import DEPLOYING
from services.deployment_svc.markets.driver import Offer
from services.deployment_svc.providers.models import KIND, Provider, ProviderOutcome
from services.deployment_svc.providers.rules import Choice, Record, Standing, choose, exclusion
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.db import alone, insert_for

log = structlog.get_logger()
LEASE, READY, LOST = OutcomeKind.OUTCOME_KIND_LEASE, OutcomeKind.OUTCOME_KIND_READY, OutcomeKind.OUTCOME_KIND_LOST
_COUNTERS = {LEASE: Provider.leases, READY: Provider.readies, LOST: Provider.losses}
_MAX_EVIDENCE = 10


async def take_offer(session: AsyncSession, offers: Sequence[Offer], tried: Sequence[str], s: DeploymentSettings) -> Choice:
    """Chooses among the offers. The place at the provider is the caller's as soon as its row names the provider."""
    await alone(session, "providers")
    return choose(offers, await standings(session, {offer.provider for offer in offers}, s), tried, s)


async def note_offers(session: AsyncSession, providers: Collection[str]) -> None:
    """Counts an offer of each."""
    at = now()
    counts = {"offers": 1, "leases": 0, "readies": 0, "losses": 0, "failures": 0, "last_failure": "", "last_offer_at": at}
    rows = insert_for(session)(Provider).values([{"address": address} | counts for address in sorted(providers)])
    again = {"offers": Provider.offers + 1, "last_offer_at": at, "updated_at": at}
    await session.execute(rows.on_conflict_do_update(index_elements=["address"], set_=again))


async def standings(session: AsyncSession, addresses: Collection[str], s: DeploymentSettings) -> dict[str, Standing]:
    """What is known of the providers now."""
    recent = now() - timedelta(seconds=s.score_window_s)
    good, bad = (func.count().filter(ProviderOutcome.is_good.is_(one)) for one in (True, False))
    records = await session.execute(
        select(ProviderOutcome.provider_address, good, bad)
        # Of what went well only the last step counts, or one bot would count twice.
        .where(ProviderOutcome.provider_address.in_(addresses), ProviderOutcome.created_at > recent)
        .where(ProviderOutcome.is_good.is_(False) | (ProviderOutcome.kind == READY))
        .group_by(ProviderOutcome.provider_address)
    )
    outcomes = {address: (ups, downs) for address, ups, downs in records}
    seen = await session.execute(select(Provider.address, Provider.last_ready_at).where(Provider.address.in_(addresses)))
    was_ready = {address for address, ready_at in seen if ready_at is not None}
    busy = await session.execute(
        select(Deployment.provider, func.count())
        .where(Deployment.state == DEPLOYING, Deployment.undoing.is_(False), Deployment.provider.in_(addresses))
        .group_by(Deployment.provider)
    )
    in_flight: dict[str, int] = {row[0]: row[1] for row in busy}
    entries = await session.scalars(select(BlacklistEntry).where(BlacklistEntry.provider_address.in_(addresses)))
    listed = {entry.provider_address: entry for entry in entries}
    return {
        address: Standing(
            *outcomes.get(address, (0, 0)), address in was_ready, in_flight.get(address, 0),
            excluded=address in listed and _excludes(listed[address]), probing=address in listed and listed[address].on_probation,
        )
        for address in addresses
    }  # fmt: skip


def _excludes(entry: BlacklistEntry) -> bool:
    return entry.expires_at is None or entry.expires_at > now()


async def went_well(session: AsyncSession, address: str, deployment_id: str, kind: "OutcomeKind.ValueType", s: DeploymentSettings) -> None:
    """A step at a provider succeeded. A bot that came up takes back one doubling of its next exclusion, and ends its probation."""
    await alone(session, "providers")
    provider = await _noted(session, address, deployment_id, kind, True, "", s)
    if kind != READY:
        return
    provider.last_ready_at = now()
    entry = await session.get(BlacklistEntry, address)
    if entry is not None and entry.by_rule and not _excludes(entry):
        entry.on_probation = False
        entry.strikes = max(0, entry.strikes - 1)


async def went_wrong(
    session: AsyncSession, address: str, deployment_id: str, kind: "OutcomeKind.ValueType", reason: str, s: DeploymentSettings
) -> str:
    """A step at a provider failed by the provider's fault: what the rule made of it, in words, or ""."""
    await alone(session, "providers")
    provider = await _noted(session, address, deployment_id, kind, False, reason, s)
    provider.failures += 1
    provider.last_failure, provider.last_failure_at = reason[:500], now()
    await session.flush()
    entry = await session.get(BlacklistEntry, address)
    if entry is not None and _excludes(entry):
        return ""
    by_rule = entry is not None and entry.by_rule
    record = await _record(session, address, entry.strikes if entry and by_rule else 0, bool(entry and entry.on_probation), s)
    term = exclusion(record, s)
    if term is None:
        return ""
    if entry is None:
        entry = BlacklistEntry(provider_address=address)
        session.add(entry)
    entry.by_rule, entry.on_probation, entry.strikes, entry.expires_at = True, True, record.strikes + 1, now() + term
    entry.reason = f"{record.failures} failures of {record.deployments} deployments within {s.blacklist_window_s / 3600:g} h"
    entry.evidence = await _evidence(session, address, s)
    hours = term.total_seconds() / 3600
    log.warning("provider.excluded", provider=address, hours=round(hours, 2), strikes=entry.strikes, reason=entry.reason)
    return f"{address} is excluded for {hours:g} h: {entry.reason}"


async def _noted(
    session: AsyncSession, address: str, deployment_id: str, kind: "OutcomeKind.ValueType", is_good: bool, reason: str,
    s: DeploymentSettings,
) -> Provider:  # fmt: skip
    expires = now() + timedelta(seconds=s.outcome_kept_s)
    session.add(
        ProviderOutcome(
            provider_address=address, deployment_id=deployment_id, kind=kind, is_good=is_good, reason=reason[:500], expires_at=expires
        )
    )
    provider = await session.get(Provider, address)
    if provider is None:
        provider = Provider(address=address, offers=0, leases=0, readies=0, losses=0, failures=0)
        session.add(provider)
    if is_good or kind == LOST:
        column = _COUNTERS[kind].key
        setattr(provider, column, getattr(provider, column) + 1)
    return provider


async def _record(session: AsyncSession, address: str, strikes: int, probing: bool, s: DeploymentSettings) -> Record:
    since = now() - timedelta(seconds=s.blacklist_window_s)
    against = select(func.count(), func.count(ProviderOutcome.deployment_id.distinct())).where(
        ProviderOutcome.provider_address == address, ProviderOutcome.is_good.is_(False), ProviderOutcome.created_at > since
    )
    failures, deployments = (await session.execute(against)).one()
    recent = select(Provider.address).where(Provider.last_offer_at > since)
    bidders = await session.scalar(select(func.count()).select_from(recent.subquery())) or 0
    barred = in_force().where(BlacklistEntry.provider_address.in_(recent)).subquery()
    excluded = await session.scalar(select(func.count()).select_from(barred)) or 0
    return Record(failures, deployments, probing, strikes, bidders, excluded)


async def _evidence(session: AsyncSession, address: str, s: DeploymentSettings) -> list[str]:
    since = now() - timedelta(seconds=s.blacklist_window_s)
    rows = await session.scalars(
        select(ProviderOutcome)
        .where(ProviderOutcome.provider_address == address, ProviderOutcome.is_good.is_(False), ProviderOutcome.created_at > since)
        .order_by(ProviderOutcome.id.desc())
        .limit(_MAX_EVIDENCE)
    )
    return [f"{row.created_at:%Y-%m-%dT%H:%M:%SZ} {row.deployment_id} {KIND.words[row.kind]}: {row.reason}" for row in rows]
