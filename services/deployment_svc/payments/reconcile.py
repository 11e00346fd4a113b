"""Asks payment providers about what webhooks may have lost."""

import asyncio
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments import state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments import models
from services.deployment_svc.payments.apply import apply, charge_events
from services.deployment_svc.payments.links import Links
from services.deployment_svc.payments.models import Payment, PaymentSession
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.errors import Error
from services.kit.loops import claim

log = structlog.get_logger()
_BATCH = 20
_AFTER_CLOSE_S = 30
"""A page is asked about once more this long after it closes."""


class PaymentChecker:
    """Ticks of the loop that asks providers about open pages and about the payments of live deployments."""

    def __init__(self, links: Links) -> None:
        self.links, self.db, self.settings = links, links.db, links.settings

    async def tick(self) -> bool:
        """Asks about a batch of each; True when there may be more."""
        lease_s = 6 * self.settings.checkout_timeout_s
        pages = await claim(self.db, PaymentSession, limit=_BATCH, lease_s=lease_s)
        payments = await claim(self.db, Payment, limit=_BATCH, lease_s=lease_s)
        await asyncio.gather(*(self._page(row) for row in pages), *(self._payment(row) for row in payments))
        return _BATCH in (len(pages), len(payments))

    async def _page(self, link: PaymentSession) -> None:
        async with self.db.read(ALL) as session:
            d = await session.get(Deployment, link.deployment_id)
        if d is None:
            return
        try:
            if link.external_id is None:
                # Made by a call that died before it wrote down the answer; the same key finds or makes it.
                await self.links.create(d, link)
            if link.external_id is not None:
                await self.links.learn(d, await self.links.checkout(link.provider).retrieve(link.external_id))
        except Error as error:
            log.warning("payment.check_failed", deployment_id=d.id, error=error.message)
        await self._next_look(link)

    async def _next_look(self, link: PaymentSession) -> None:
        async with self.db.transaction(ALL) as session:
            row = await session.get(PaymentSession, link.id, with_for_update=True)
            if row is None or row.lease_token != link.lease_token:
                return
            row.lease_until = row.lease_token = None
            if row.due_at is not None:
                row.due_at = self._after(row.expires_at if row.status == models.OPEN else None)

    def _after(self, closes: datetime | None) -> datetime:
        later = now() + timedelta(seconds=self.settings.payment_check_s)
        if closes is None or later < closes:
            return later
        return max(closes + timedelta(seconds=_AFTER_CLOSE_S), now() + timedelta(seconds=min(60, self.settings.payment_check_s)))

    async def _payment(self, payment: Payment) -> None:
        async with self.db.read(ALL) as session:
            d = await session.get(Deployment, payment.deployment_id)
        if d is not None and d.state in state.LIVE:
            try:
                charge = await self.links.checkout(payment.provider).charge(payment.external_id)
                for event in charge_events(d, charge):

                    async def work(session: AsyncSession, event: object = event) -> None:
                        await apply(session, event, self.settings.refund_check_s)  # type: ignore[arg-type]

                    await self.db.run(work, ALL)
            except Error as error:
                log.warning("payment.check_failed", deployment_id=d.id, error=error.message)
        async with self.db.transaction(ALL) as session:
            row = await session.scalar(select(Payment).where(Payment.id == payment.id).with_for_update())
            if row is None or row.lease_token != payment.lease_token:
                return
            row.lease_until = row.lease_token = None
            live = d is not None and d.state in state.LIVE
            row.due_at = now() + timedelta(seconds=self.settings.refund_check_s) if live and row.due_at is not None else None
