"""Checkout without money: the same contract as Stripe's, kept in our own tables."""

import secrets as random
from datetime import timedelta
from typing import Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.sandbox_session_pb2 import SandboxSessionStatus
from services.deployment_svc.payments.checkout import Charge, CheckoutError, Session, Wish
from services.deployment_svc.sandbox.models import SandboxSession
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.db import ALL, Database, insert_for

OPEN, COMPLETE = SandboxSessionStatus.SANDBOX_SESSION_STATUS_OPEN, SandboxSessionStatus.SANDBOX_SESSION_STATUS_COMPLETE
EXPIRED = SandboxSessionStatus.SANDBOX_SESSION_STATUS_EXPIRED


class SandboxCheckout:
    """Implements Checkout on the table of sandbox sessions."""

    name = "sandbox"
    livemode = False

    def __init__(self, db: Database, settings: DeploymentSettings) -> None:
        self.db, self.settings = db, settings

    async def create(self, wish: Wish) -> Session:
        key = wish.idempotency_key()
        async with self.db.transaction(ALL) as session:
            insert = insert_for(session)
            await session.execute(
                insert(SandboxSession)
                .values(
                    id=f"cs_sandbox_{random.token_hex(24)}", idempotency_key=key, deployment_id=wish.deployment_id, user_id=wish.user_id,
                    status=OPEN, description=wish.description, amount_minor=wish.amount_minor, currency=wish.currency,
                    success_url=wish.success_url, expires_at=wish.closes_at or now() + timedelta(days=1),
                )
                .on_conflict_do_nothing(index_elements=["idempotency_key"])
            )  # fmt: skip
            row = await session.scalar(select(SandboxSession).where(SandboxSession.idempotency_key == key))
        assert row is not None
        return self._facts(row)

    async def retrieve(self, session_id: str) -> Session:
        async with self.db.transaction(ALL) as session:
            row = await locked(session, session_id)
        if row is None:
            raise CheckoutError("the sandbox has no such session")
        return self._facts(row)

    async def expire(self, session_id: str) -> Session:
        async with self.db.transaction(ALL) as session:
            row = await locked(session, session_id)
            if row is not None and row.status == OPEN:
                row.status = EXPIRED
        if row is None:
            raise CheckoutError("the sandbox has no such session")
        return self._facts(row)

    async def charge(self, payment_id: str) -> Charge:
        async with self.db.read(ALL) as session:
            row = await session.scalar(select(SandboxSession).where(SandboxSession.payment_intent_id == payment_id))
        if row is None:
            raise CheckoutError("the sandbox has no such payment")
        return Charge(payment_id, row.amount_minor, row.currency, False, row.refunded_minor, False)

    def _facts(self, row: SandboxSession) -> Session:
        words: dict[int, Literal["open", "complete", "expired"]] = {OPEN: "open", COMPLETE: "complete", EXPIRED: "expired"}
        status = words[row.status]
        return Session(
            row.id, status, f"{self.settings.public_url.rstrip('/')}/sandbox/checkout/{row.id}", status == "complete",
            row.payment_intent_id or "", False, row.amount_minor, row.currency, False, row.expires_at,
        )  # fmt: skip


async def locked(session: AsyncSession, session_id: str) -> SandboxSession | None:
    """The row, locked; an open one whose time has passed expires now, as at Stripe."""
    row = await session.get(SandboxSession, session_id, with_for_update=True)
    if row is not None and row.status == OPEN and row.expires_at <= now():
        row.status = EXPIRED
    return row
