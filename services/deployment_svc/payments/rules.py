"""How facts about payments add up, whatever the order in which they arrive: pure functions on rows."""

from dataclasses import dataclass
from datetime import datetime

from clawplane.deployment.v1.payment_pb2 import PaymentEvent, PaymentEventKind, PaymentStatus
from services.deployment_svc.deployments import state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments import models
from services.deployment_svc.payments.models import Payment, PaymentSession

PROCESSING, FAILED = PaymentStatus.PAYMENT_STATUS_PROCESSING, PaymentStatus.PAYMENT_STATUS_FAILED
SUCCEEDED, REFUNDED = PaymentStatus.PAYMENT_STATUS_SUCCEEDED, PaymentStatus.PAYMENT_STATUS_REFUNDED

_K = PaymentEventKind
COMPLETED, ASYNC_SUCCEEDED = _K.PAYMENT_EVENT_KIND_COMPLETED, _K.PAYMENT_EVENT_KIND_ASYNC_SUCCEEDED
ASYNC_FAILED, EXPIRED = _K.PAYMENT_EVENT_KIND_ASYNC_FAILED, _K.PAYMENT_EVENT_KIND_EXPIRED
REFUND, DISPUTE = _K.PAYMENT_EVENT_KIND_REFUNDED, _K.PAYMENT_EVENT_KIND_DISPUTED


@dataclass(frozen=True)
class Outcome:
    """What follows for the deployment."""

    to: int | None
    """The state to move to; None: it stays."""
    text: str


def merge_session(session: PaymentSession, event: PaymentEvent) -> None:
    """A page only ever goes from open to complete or expired; complete is the last word, since it was paid."""
    if event.kind in (COMPLETED, ASYNC_SUCCEEDED):
        session.status = models.COMPLETE
    elif event.kind == EXPIRED and session.status != models.COMPLETE:
        session.status = models.EXPIRED


def merge_payment(payment: Payment, event: PaymentEvent, at: datetime) -> None:
    """Adds an event to what is known of a payment. Success is the last word whatever its age, and only a full refund comes after
    it; before that the later event counts, and of two in the same second the one of higher rank."""
    if event.kind in (COMPLETED, ASYNC_SUCCEEDED):
        payment.amount_minor, payment.currency, payment.livemode = event.amount_minor, event.currency.lower(), event.livemode
    wanted = {
        COMPLETED: SUCCEEDED if event.paid else PROCESSING,
        ASYNC_SUCCEEDED: SUCCEEDED,
        ASYNC_FAILED: FAILED,
    }.get(event.kind)
    if wanted == SUCCEEDED:
        payment.status = max(payment.status, SUCCEEDED)
    elif wanted is not None and payment.status < SUCCEEDED and (at, wanted) > (payment.last_event_at, payment.status):
        payment.status, payment.last_event_at = wanted, at
    if event.kind == REFUND:
        payment.refunded_minor = max(payment.refunded_minor, event.refunded_minor)
    if event.kind == DISPUTE:
        payment.disputed = True
    if event.session_id:
        payment.session_id = event.session_id
    if payment.amount_minor and payment.refunded_minor >= payment.amount_minor:
        payment.status = REFUNDED


def agrees(d: Deployment, payment: Payment) -> bool:
    """Whether a payment is what was agreed: amount, currency, and real money or not."""
    return (payment.amount_minor, payment.currency, payment.livemode) == (d.price_minor, d.currency, d.livemode)


def settle(d: Deployment, payment: Payment) -> Outcome:
    """What a payment, as it is known now, means for its deployment. Also sets what needs a person's attention."""
    payment.refund_due = payment.payment_mismatch = False
    payment.attention = "the customer disputes the payment" if payment.disputed else ""
    if payment.status == REFUNDED:
        return _settle_refund(d, payment)
    if payment.status == FAILED:
        return Outcome(None, "the payment failed")
    if payment.status != SUCCEEDED:
        return Outcome(None, "the payment is being processed")
    if not agrees(d, payment):
        payment.payment_mismatch = True
        payment.attention = (
            f"paid {payment.amount_minor} {payment.currency} {'live' if payment.livemode else 'test'}, "
            f"agreed {d.price_minor} {d.currency} {'live' if d.livemode else 'test'}"
        )
        return Outcome(None, "the payment does not match what was agreed")
    if d.payment_id == payment.id:
        if d.activated_at is None and d.state in (state.CLOSING, state.CLOSED):
            return _refund_due(payment, "closed before the bot ever ran")
        return Outcome(None, "already started on this payment")
    if d.payment_id is not None:
        return _refund_due(payment, "a second payment for the same deployment")
    if d.state in (state.PENDING, state.EXPIRED):
        d.payment_id = payment.id
        return Outcome(state.DEPLOYING, "paid" if d.state == state.PENDING else "paid after the page had closed")
    return _refund_due(payment, "paid after the deployment was given up")


def _settle_refund(d: Deployment, payment: Payment) -> Outcome:
    if d.payment_id == payment.id:
        return Outcome(state.CLOSING if d.state in state.LIVE else None, "the payment was refunded")
    if d.payment_id is None and d.state in (state.PENDING, state.EXPIRED) and agrees(d, payment):
        # The refund overtook its own success, which will start nothing any more.
        return Outcome(state.CANCELED, "the payment was refunded before it was heard of")
    return Outcome(None, "a payment that started nothing was refunded")


def _refund_due(payment: Payment, why: str) -> Outcome:
    payment.refund_due, payment.attention = True, why
    return Outcome(None, f"refund due: {why}")
