"""What Polar's events mean. Pure; knows no HTTP.

A checkout is paid at most once, so its id stands for the payment as well: the order, which Polar makes afterwards, names its checkout.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from clawplane.deployment.v1 import payment_pb2
from clawplane.user.v1 import subscription_service_pb2 as rpc
from clawplane.user.v1 import user_pb2
from gateway.webhooks import event as form
from gateway.webhooks.event import BadEvent, Ignore

_K = payment_pb2.PaymentEventKind
# "confirmed" comes before the money, and before a failure too: nothing may start on it.
_CHECKOUT_KINDS: Mapping[str, payment_pb2.PaymentEventKind.ValueType] = {
    "succeeded": _K.PAYMENT_EVENT_KIND_COMPLETED,
    "failed": _K.PAYMENT_EVENT_KIND_ASYNC_FAILED,
    "expired": _K.PAYMENT_EVENT_KIND_EXPIRED,
}
_ORDER_KINDS: Mapping[str, payment_pb2.PaymentEventKind.ValueType] = {
    "order.paid": _K.PAYMENT_EVENT_KIND_COMPLETED,
    "order.refunded": _K.PAYMENT_EVENT_KIND_REFUNDED,
}


_CUSTOMER_TYPES = ("customer.created", "customer.updated", "customer.deleted")
_SUBSCRIPTION_TYPES = tuple(
    f"subscription.{what}"
    for what in ("created", "updated", "active", "canceled", "uncanceled", "cycled", "revoked", "past_due", "paused", "resumed")
)
_S = user_pb2.SubscriptionStatus
_STATUSES: Mapping[str, user_pb2.SubscriptionStatus.ValueType] = {
    "active": _S.SUBSCRIPTION_STATUS_ACTIVE,
    "trialing": _S.SUBSCRIPTION_STATUS_ACTIVE,
    "incomplete": _S.SUBSCRIPTION_STATUS_INCOMPLETE,
    "past_due": _S.SUBSCRIPTION_STATUS_PAST_DUE,
    "canceled": _S.SUBSCRIPTION_STATUS_CANCELED,
    # Neither is in force, and neither is missing a payment.
    "paused": _S.SUBSCRIPTION_STATUS_CANCELED,
    "incomplete_expired": _S.SUBSCRIPTION_STATUS_CANCELED,
    "unpaid": _S.SUBSCRIPTION_STATUS_UNPAID,
}
_USER_ID = re.compile(r"usr_[0-9a-f]{32}\Z")

Meaning = payment_pb2.PaymentEvent | rpc.ApplyCustomerEventRequest | rpc.ApplySubscriptionEventRequest | Ignore


def translate(event: Any, message_id: str, now_s: float, *, livemode: bool) -> Meaning:
    """What an event means, or why nobody handles it; BadEvent when it has not the form of one. ``now_s`` counts when it has no time."""
    event = form.mapping(event, "event")
    kind = form.match(event.get("type"), form.TYPE, "type")
    if kind in _CUSTOMER_TYPES:
        return _customer(event, kind, message_id, now_s)
    if kind in _SUBSCRIPTION_TYPES:
        return _subscription(event, kind, message_id, now_s)
    if kind not in _ORDER_KINDS and kind not in ("checkout.updated", "checkout.expired"):
        return Ignore(message_id, kind, f"nobody handles events of type {kind}")
    thing = form.mapping(event.get("data"), "data")
    result = payment_pb2.PaymentEvent(provider="polar", external_id=message_id, type=kind, livemode=livemode)
    result.occurred_at.FromMilliseconds(int(_time(event.get("timestamp"), now_s) * 1000))
    metadata = thing.get("metadata")
    if isinstance(metadata, dict) and form.is_deployment_id(metadata.get("deployment_id")):
        result.deployment_id = metadata["deployment_id"]
    # Tax comes on top of what was agreed, and is Polar's to collect.
    result.amount_minor = form.integer(thing.get("net_amount") or 0, "data.net_amount")
    currency = str(thing.get("currency") or "").lower()
    result.currency = form.match(currency, form.CURRENCY, "data.currency") if currency else ""
    reason = _order(result, thing) if kind in _ORDER_KINDS else _checkout(result, thing)
    return Ignore(message_id, kind, reason) if reason else result


def _order(result: payment_pb2.PaymentEvent, order: Mapping[str, Any]) -> str:
    if order.get("checkout_id") is None:
        return "the order comes from no checkout, so it is not one of ours"
    result.session_id = result.payment_id = form.match(order["checkout_id"], form.EXTERNAL_ID, "data.checkout_id")
    result.kind = _ORDER_KINDS[result.type]
    result.paid = result.kind == _K.PAYMENT_EVENT_KIND_COMPLETED
    if result.kind == _K.PAYMENT_EVENT_KIND_REFUNDED:
        result.refunded_minor = form.integer(order.get("refunded_amount") or 0, "data.refunded_amount")
    return ""


def _checkout(result: payment_pb2.PaymentEvent, checkout: Mapping[str, Any]) -> str:
    status = form.match(checkout.get("status"), form.TYPE, "data.status")
    if status not in _CHECKOUT_KINDS:
        return f"a checkout that is {status} is not paid yet"
    result.session_id = form.match(checkout.get("id"), form.EXTERNAL_ID, "data.id")
    result.kind = _CHECKOUT_KINDS[status]
    if result.kind != _K.PAYMENT_EVENT_KIND_EXPIRED:
        result.payment_id = result.session_id
    result.paid = result.kind == _K.PAYMENT_EVENT_KIND_COMPLETED
    return ""


def _customer(event: Mapping[str, Any], kind: str, message_id: str, now_s: float) -> rpc.ApplyCustomerEventRequest:
    customer = form.mapping(event.get("data"), "data")
    deleted = kind == "customer.deleted"
    result = rpc.ApplyCustomerEventRequest(
        provider="polar", external_id=message_id, type=kind, user_id=_user_id(customer), deleted=deleted,
        customer_id=form.match(customer.get("id"), form.EXTERNAL_ID, "data.id"),
    )  # fmt: skip
    changed = None if deleted else customer.get("modified_at") or customer.get("created_at")
    result.occurred_at.FromMilliseconds(int(_time(changed or event.get("timestamp"), now_s) * 1000))
    return result


def _subscription(event: Mapping[str, Any], kind: str, message_id: str, now_s: float) -> rpc.ApplySubscriptionEventRequest | Ignore:
    found = form.mapping(event.get("data"), "data")
    status = form.match(found.get("status"), form.TYPE, "data.status")
    if status not in _STATUSES:
        return Ignore(message_id, kind, f"a subscription cannot be {status}, as far as is known")
    customer = found.get("customer")
    result = rpc.ApplySubscriptionEventRequest(
        provider="polar", external_id=message_id, type=kind, status=_STATUSES[status],
        subscription_id=form.match(found.get("id"), form.EXTERNAL_ID, "data.id"),
        customer_id=form.match(found.get("customer_id"), form.EXTERNAL_ID, "data.customer_id"),
        product_id=form.match(found.get("product_id"), form.EXTERNAL_ID, "data.product_id"),
        user_id=_user_id(customer) if isinstance(customer, dict) else "",
        cancel_at_period_end=found.get("cancel_at_period_end") is True,
    )  # fmt: skip
    # When the subscription became so; when the message was sent says less, since messages overtake each other.
    changed = found.get("modified_at") or found.get("created_at") or event.get("timestamp")
    result.occurred_at.FromMilliseconds(int(_time(changed, now_s) * 1000))
    if found.get("current_period_end") is not None:
        result.current_period_end.FromMilliseconds(int(_time(found["current_period_end"], now_s) * 1000))
    return result


def _user_id(customer: Mapping[str, Any]) -> str:
    """Our id of the customer's user, which Polar got from us; "" when there is none."""
    given = customer.get("external_id")
    return given if isinstance(given, str) and _USER_ID.match(given) else ""


def _time(text: Any, now_s: float) -> float:
    if text is None:
        return now_s
    try:
        at = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise BadEvent("a time must be as in RFC 3339") from None
    if at.tzinfo is None or not 2000 <= at.year < 9999:
        raise BadEvent("a time must be as in RFC 3339")
    return at.timestamp()
