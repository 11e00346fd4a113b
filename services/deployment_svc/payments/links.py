"""The one open payment page of a wish: reused while open, replaced on the same row when not."""

import asyncio
from datetime import timedelta
from weakref import WeakValueDictionary

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments import models
from services.deployment_svc.payments.apply import apply, page_events
from services.deployment_svc.payments.checkout import Checkout, CheckoutError, Session, Wish
from services.deployment_svc.payments.models import PaymentSession
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import Conflict, Unavailable

_TRIES = 4


class Links:
    """Payment pages of deployments, over the checkouts that this process knows."""

    def __init__(self, db: Database, settings: DeploymentSettings, checkouts: dict[str, Checkout]) -> None:
        self.db, self.settings, self.checkouts = db, settings, checkouts
        # Callers of one process take turns; between processes the idempotency key and the indexes decide.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def checkout(self, provider: str) -> Checkout:
        """The checkout of a row, which may not be the one that new rows get."""
        checkout = self.checkouts.get(provider)
        if checkout is None:
            raise Unavailable(f"the payment provider {provider} is not configured here", retry_after_s=60)
        return checkout

    async def ensure(self, deployment_id: str, price_minor: int, currency: str) -> Deployment:
        """The deployment with an open page at this price, if it still waits for payment. Any number of callers get the same page."""
        turn = self._turns.setdefault(deployment_id, asyncio.Lock())
        async with turn:
            for _ in range(_TRIES):
                d, link = await self._current(deployment_id)
                if d.state != state.PENDING:
                    return d
                if link is not None and not await self._reusable(d, link, price_minor, currency):
                    continue  # Something was learnt about the old page: look again.
                if link is None:
                    link = await self._next(d, price_minor, currency)
                if link.status == models.CREATING:
                    await self.create(d, link)
                if link.status == models.COMPLETE:
                    return d  # Paid, and the bank still works on it: a second page would ask for the money twice.
                d, link = await self._current(deployment_id)
                if d.state != state.PENDING or (link is not None and link.url):
                    return d
        raise Conflict("the payment page is being changed by someone else; try again", retry_after_s=0.5)

    async def close(self, deployment_id: str) -> Deployment:
        """Closes the open page, if there is one, at the provider. When it was paid already, the deployment starts instead."""
        turn = self._turns.setdefault(deployment_id, asyncio.Lock())
        async with turn:
            d, link = await self._current(deployment_id)
            if d.state != state.PENDING or link is None or link.status == models.EXPIRED:
                return d
            if link.external_id is None:
                # It may exist at the provider, made by a call that died: the same key gives it back.
                await self.create(d, link)
            if link.external_id is not None:
                await self.learn(d, await self.checkout(d.payment_provider).expire(link.external_id))
            d, _ = await self._current(deployment_id)
            return d

    async def learn(self, d: Deployment, page: Session) -> None:
        """Applies what a provider said of a page."""
        for event in page_events(d, page):

            async def work(session: AsyncSession, event: object = event) -> None:
                await apply(session, event, self.settings.refund_check_s)  # type: ignore[arg-type]

            await self.db.run(work, ALL)

    async def _current(self, deployment_id: str) -> tuple[Deployment, PaymentSession | None]:
        """The deployment and its latest page unless that is expired."""
        async with self.db.read(ALL) as session:
            d = await session.get(Deployment, deployment_id)
            link = await session.scalar(
                select(PaymentSession)
                .where(PaymentSession.deployment_id == deployment_id, PaymentSession.status != models.EXPIRED)
                .order_by(PaymentSession.link_number.desc())
                .limit(1)
            )
        assert d is not None
        return d, link

    async def _reusable(self, d: Deployment, link: PaymentSession, price_minor: int, currency: str) -> bool:
        """Asks the provider. False when the page is no longer the one to use, and that has been written down."""
        if link.status != models.OPEN or link.external_id is None:
            return True
        checkout = self.checkout(d.payment_provider)
        page = await checkout.retrieve(link.external_id)
        same_price = (link.amount_minor, link.currency) == (price_minor, currency)
        lasts = page.expires_at - now() > timedelta(seconds=self.settings.checkout_min_left_s)
        if page.status == "open" and same_price and lasts:
            return True
        if page.status == "open":
            page = await checkout.expire(link.external_id)
        if page.status != "complete":
            # Not applied as an event: the wish lives on, with a new page on the same row. Not every provider can close a page; should
            # somebody pay on the old one, the payment finds the wish all the same.
            await self._retire(link.id)
        else:
            await self.learn(d, page)
        return False

    async def _retire(self, link_id: str) -> None:
        async with self.db.transaction(ALL) as session:
            link = await session.get(PaymentSession, link_id, with_for_update=True)
            if link is not None and link.status in (models.OPEN, models.CREATING):
                link.status, link.due_at = models.EXPIRED, None

    async def _next(self, d: Deployment, price_minor: int, currency: str) -> PaymentSession:
        """The row of the next page; the one that another caller has just made, if there is one."""

        async def work(session: AsyncSession) -> PaymentSession:
            row = await repository.locked(session, d.id)
            assert row is not None
            undecided = await session.scalar(
                select(PaymentSession).where(
                    PaymentSession.deployment_id == d.id, PaymentSession.status.in_([models.CREATING, models.OPEN, models.COMPLETE])
                )
            )
            if undecided is not None:
                return undecided
            last = await session.scalar(select(func.max(PaymentSession.link_number)).where(PaymentSession.deployment_id == d.id))
            link = PaymentSession(
                org_id=d.org_id, deployment_id=d.id, provider=d.payment_provider, link_number=(last or 0) + 1,
                status=models.CREATING, amount_minor=price_minor, currency=currency, url="",
                due_at=now() + timedelta(seconds=self.settings.payment_check_s),
            )  # fmt: skip
            session.add(link)
            if row.state == state.PENDING:
                row.link_number, row.price_minor, row.currency = link.link_number, price_minor, currency
            return link

        return await self.db.run(work, ALL)

    async def create(self, d: Deployment, link: PaymentSession) -> None:
        """Makes the page at the provider and writes it down. ``link`` is brought up to date."""
        wish = Wish.of(d, link, self.settings.public_url.rstrip("/"), self.settings.checkout_ttl_s)
        try:
            page = await self.checkout(d.payment_provider).create(wish)
        except CheckoutError as error:
            if error.is_final:
                # The next try needs another key, and so another link. Should the page exist after all, its payment still finds us.
                await self._retire(link.id)
            raise

        async def work(session: AsyncSession) -> None:
            row = await repository.locked(session, d.id)
            stored = await session.get(PaymentSession, link.id, populate_existing=True)
            assert row is not None and stored is not None
            if stored.external_id is None or stored.status == models.CREATING:
                stored.external_id, stored.url, stored.expires_at = page.id, page.url, page.expires_at
                if stored.status == models.CREATING:
                    stored.status = models.OPEN
                stored.due_at = now() + timedelta(seconds=self.settings.payment_check_s)
            if row.state == state.PENDING and row.link_number == stored.link_number and stored.status == models.OPEN:
                row.payment_url, row.payment_expires_at = stored.url, stored.expires_at
                if row.payment_provider == "polar":
                    row.polar_id = stored.external_id
                else:
                    row.stripe_session_id = stored.external_id
                repository.note(session, row, "payment.link", f"payment page {stored.link_number} is open")
            link.status, link.external_id, link.url = stored.status, stored.external_id, stored.url

        await self.db.run(work, ALL)
