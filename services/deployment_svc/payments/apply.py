"""Applies what a provider says to the rows. Webhooks and the loop that asks the provider both end here."""

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.payment_pb2 import PaymentEvent
from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments import models, rules
from services.deployment_svc.payments.checkout import Charge, Session
from services.deployment_svc.payments.models import Payment, PaymentSession
from services.kit.columns import now
from services.kit.proto import to_datetime


class NotOurs(Exception):
    """An event that means none of our deployments: another product on the same account, or another environment."""


async def apply(session: AsyncSession, event: PaymentEvent, refund_check_s: float) -> tuple[Deployment, str]:
    """Applies an event in the given transaction. Returns the deployment and what happened; NotOurs when none of ours is meant."""
    link, payment, d = await _find(session, event)
    at = to_datetime(event.occurred_at, "occurred_at")
    if link is not None:
        rules.merge_session(link, event)
    text = "noted"
    payment_id = event.payment_id or (event.session_id if event.kind in (rules.COMPLETED, rules.ASYNC_SUCCEEDED) else "")
    if payment is None and payment_id and event.kind != rules.EXPIRED:
        payment = await _new_payment(session, d, event, payment_id, at)
    if payment is not None and event.kind != rules.EXPIRED:
        rules.merge_payment(payment, event, at)
        text = _settle(session, d, payment, refund_check_s)
    text = _close_page(session, d, link, payment) or text
    if link is not None and _is_settled(link, payment):
        link.due_at = None
    return d, text


def _settle(session: AsyncSession, d: Deployment, payment: Payment, refund_check_s: float) -> str:
    outcome = rules.settle(d, payment)
    if d.payment_id == payment.id and outcome.to == state.DEPLOYING:
        if payment.provider == "polar":
            d.polar_id = payment.external_id
        else:
            d.stripe_session_id, d.stripe_payment_intent_id = payment.session_id or d.stripe_session_id, payment.external_id
        payment.due_at = now() + timedelta(seconds=refund_check_s)
        d.error_message = ""
        state.begin_anew(d)
    if outcome.to is not None:
        if outcome.to == state.CLOSING:
            payment.due_at = None
        repository.move(session, d, outcome.to, outcome.text)
    elif payment.attention:
        repository.note(session, d, "payment.attention", payment.attention)
    return outcome.text


def _close_page(session: AsyncSession, d: Deployment, link: PaymentSession | None, payment: Payment | None) -> str:
    """A pending deployment whose latest page can no longer be paid expires."""
    if link is None or d.state != state.PENDING or link.link_number != d.link_number:
        return ""
    failed = link.status == models.COMPLETE and payment is not None and payment.status == rules.FAILED
    if link.status == models.EXPIRED or failed:
        text = "the payment failed" if failed else "the payment page closed without payment"
        d.error_message = text
        repository.move(session, d, state.EXPIRED, text)
        return text
    return ""


def _is_settled(link: PaymentSession, payment: Payment | None) -> bool:
    """Whether nothing more can come of a page, so that the provider need not be asked again."""
    if link.status == models.EXPIRED:
        return True
    return link.status == models.COMPLETE and payment is not None and payment.status != rules.PROCESSING


async def _find(session: AsyncSession, event: PaymentEvent) -> tuple[PaymentSession | None, Payment | None, Deployment]:
    """The rows that an event is about, the deployment locked."""
    link = payment = None
    if event.session_id:
        link = await session.scalar(
            select(PaymentSession).where(PaymentSession.provider == event.provider, PaymentSession.external_id == event.session_id)
        )
    payment_key = event.payment_id or event.session_id
    deployment_id = link.deployment_id if link else event.deployment_id
    if not deployment_id and payment_key:
        deployment_id = await session.scalar(select(Payment.deployment_id).where(*_is_payment(event, payment_key))) or ""
    d = await repository.locked(session, deployment_id) if deployment_id else None
    if d is None or d.payment_provider != event.provider:
        raise NotOurs("no deployment of ours is paid by this")
    # Read again under the lock: another transaction may have written them meanwhile.
    if link is not None:
        await session.refresh(link)
    elif event.session_id:
        link = await _adopt_page(session, d, event)
    if payment_key:
        payment = await session.scalar(select(Payment).where(*_is_payment(event, payment_key)).execution_options(populate_existing=True))
    if payment is not None and payment.deployment_id != d.id:
        raise NotOurs("the payment belongs to another deployment")
    return link, payment, d


async def _adopt_page(session: AsyncSession, d: Deployment, event: PaymentEvent) -> PaymentSession | None:
    """A page whose id was lost in a crash after the provider had made it is known again by our id in its metadata."""
    link = await session.scalar(
        select(PaymentSession).where(
            PaymentSession.deployment_id == d.id, PaymentSession.status == models.CREATING, PaymentSession.external_id.is_(None)
        )
    )
    if link is not None:
        link.external_id = event.session_id
    return link


def _is_payment(event: PaymentEvent, key: str) -> tuple[ColumnElement[bool], ...]:
    return (Payment.provider == event.provider, Payment.external_id == key)


async def _new_payment(session: AsyncSession, d: Deployment, event: PaymentEvent, external_id: str, at: datetime) -> Payment:
    payment = Payment(
        org_id=d.org_id, deployment_id=d.id, provider=event.provider, external_id=external_id, session_id=event.session_id,
        status=rules.PROCESSING, amount_minor=event.amount_minor, currency=event.currency.lower(), livemode=event.livemode,
        refunded_minor=0, disputed=False, last_event_at=at,
    )  # fmt: skip
    session.add(payment)
    await session.flush()
    return payment


def page_events(d: Deployment, page: Session) -> list[PaymentEvent]:
    """What a page that we asked about means, as the events that would have said so; none while it is open."""
    if page.status == "open":
        return []
    first = _event(d, f"page:{page.id}", page.amount_minor, page.currency, page.livemode)
    first.session_id, first.payment_id, first.paid = page.id, page.payment_id, page.paid
    first.kind = rules.EXPIRED if page.status == "expired" else rules.COMPLETED
    if not (page.status == "complete" and page.payment_failed and not page.paid):
        return [first]
    failed = PaymentEvent()
    failed.CopyFrom(first)
    failed.kind = rules.ASYNC_FAILED
    return [first, failed]


def charge_events(d: Deployment, charge: Charge) -> list[PaymentEvent]:
    """What a payment that we asked about means: refunds and disputes so far."""
    events = []
    for kind, happened in ((rules.REFUND, charge.refunded_minor > 0), (rules.DISPUTE, charge.disputed)):
        if happened:
            event = _event(d, f"charge:{charge.payment_id}", charge.amount_minor, charge.currency, charge.livemode)
            event.kind, event.payment_id, event.refunded_minor = kind, charge.payment_id, charge.refunded_minor
            events.append(event)
    return events


def _event(d: Deployment, external_id: str, amount_minor: int, currency: str, livemode: bool) -> PaymentEvent:
    event = PaymentEvent(
        provider=d.payment_provider, external_id=external_id, type="asked", deployment_id=d.id,
        amount_minor=amount_minor, currency=currency, livemode=livemode,
    )  # fmt: skip
    event.occurred_at.FromDatetime(now())
    return event
