"""Ending a deployment, whoever wants it."""

from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments.models import Payment
from services.deployment_svc.payments.rules import settle


async def close(session: AsyncSession, d: Deployment, why: str) -> None:
    """CANCELED when nothing was paid, CLOSING when something runs or may run, nothing when it is over."""
    if d.state in (state.PENDING, state.EXPIRED):
        repository.move(session, d, state.CANCELED, why)
    elif d.state in state.LIVE:
        repository.move(session, d, state.CLOSING, why)
        payment = await session.get(Payment, d.payment_id) if d.payment_id else None
        if payment is not None:
            # Money for a bot that never ran goes back.
            settle(d, payment)
            payment.due_at = None
