"""Stripe's webhooks: the signature, and what an event means. Pure; knows no HTTP."""

import dataclasses
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clawplane.deployment.v1 import payment_pb2
from gateway.webhooks import event as event_form
from gateway.webhooks.event import CURRENCY, EXTERNAL_ID, TYPE, BadEvent, BadSignature, Ignore

MAX_HEADER_CHARS = 4096
SANDBOX_SESSION_PREFIX = "cs_sandbox_"
SANDBOX_PAYMENT_PREFIX = "pi_sandbox_"
_TIME = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_MAX_SECONDS = 253402300799

_SESSION_KINDS: Mapping[str, payment_pb2.PaymentEventKind.ValueType] = {
    "checkout.session.completed": payment_pb2.PAYMENT_EVENT_KIND_COMPLETED,
    "checkout.session.async_payment_succeeded": payment_pb2.PAYMENT_EVENT_KIND_ASYNC_SUCCEEDED,
    "checkout.session.async_payment_failed": payment_pb2.PAYMENT_EVENT_KIND_ASYNC_FAILED,
    "checkout.session.expired": payment_pb2.PAYMENT_EVENT_KIND_EXPIRED,
}


@dataclasses.dataclass(frozen=True)
class Secret:
    """A signing secret, and the provider that whoever knows it may speak for: "stripe" or "sandbox"."""

    provider: str
    key: bytes


def sign(payload: bytes, key: bytes, at_s: int) -> str:
    """The header ``Stripe-Signature`` for a payload; `at_s` is Unix time in seconds."""
    return f"t={at_s},v1={_digest(payload, key, str(at_s))}"


def verify(payload: bytes, header: str | None, secrets: Sequence[Secret], now_s: float, tolerance_s: int) -> str:
    """The provider whose secret signed the payload; BadSignature otherwise. Stale and future times are refused alike."""
    if not header:
        raise BadSignature("the header Stripe-Signature is missing")
    times, signatures = _parse(header)
    if len(times) != 1 or not _TIME.match(times[0]) or not signatures:
        raise BadSignature("the header Stripe-Signature is malformed")
    provider = ""
    for secret in secrets:
        expected = _digest(payload, secret.key, times[0]).encode()
        # No early exit: the time taken must not tell which secret or signature came close.
        matches = [hmac.compare_digest(expected, signature) for signature in signatures]
        if any(matches) and not provider:
            provider = secret.provider
    if not provider:
        raise BadSignature("no signature matches")
    if abs(now_s - int(times[0])) > tolerance_s:
        raise BadSignature("the signature's time is too far from now")
    return provider


def _parse(header: str) -> tuple[list[str], list[bytes]]:
    times: list[str] = []
    signatures: list[bytes] = []
    if len(header) <= MAX_HEADER_CHARS:
        for part in header.split(","):
            name, _, value = part.strip().partition("=")
            if name == "t":
                times.append(value)
            elif name == "v1":
                signatures.append(value.encode("utf-8", "replace"))
    return times, signatures


def _digest(payload: bytes, key: bytes, at: str) -> str:
    return hmac.new(key, at.encode() + b"." + payload, hashlib.sha256).hexdigest()


def translate(event: Any, provider: str = "stripe") -> payment_pb2.PaymentEvent | Ignore:
    """What an event means, as a payment event of `provider`, or why nobody handles it; BadEvent when it has not the form of one."""
    event = event_form.mapping(event, "event")
    external_id = event_form.match(event.get("id"), EXTERNAL_ID, "id")
    kind = event_form.match(event.get("type"), TYPE, "type")
    result = payment_pb2.PaymentEvent(provider=provider, external_id=external_id, type=kind)
    result.occurred_at.FromSeconds(event_form.integer(event.get("created"), "created", _MAX_SECONDS))
    reason = _fill(result, event, kind)
    if reason:
        return Ignore(external_id, kind, reason)
    check_provider(result)
    return result


def _fill(result: payment_pb2.PaymentEvent, event: Mapping[str, Any], kind: str) -> str:
    """Fills the payment event; returns the reason when nobody handles it."""
    if kind not in _SESSION_KINDS and kind not in ("charge.refunded", "charge.dispute.created"):
        return f"nobody handles events of type {kind}"
    thing = event_form.mapping(event_form.mapping(event.get("data"), "data").get("object"), "data.object")
    # Objects carry the mode themselves, except for some of the older ones.
    result.livemode = event_form.boolean(thing.get("livemode", event.get("livemode", False)), "livemode")
    result.currency = event_form.match(str(thing.get("currency") or "").lower(), CURRENCY, "currency") if thing.get("currency") else ""
    result.payment_id = _identifier(thing.get("payment_intent"), "payment_intent")
    result.deployment_id = _deployment_id(thing)
    if kind in _SESSION_KINDS:
        result.kind = _SESSION_KINDS[kind]
        return _fill_session(result, thing)
    if not result.payment_id:
        return "the charge has no payment intent, so it is not one of our checkouts"
    result.amount_minor = event_form.integer(thing.get("amount"), "amount")
    if kind == "charge.refunded":
        result.kind = payment_pb2.PAYMENT_EVENT_KIND_REFUNDED
        result.refunded_minor = event_form.integer(thing.get("amount_refunded"), "amount_refunded")
    else:
        result.kind = payment_pb2.PAYMENT_EVENT_KIND_DISPUTED
    return ""


def _fill_session(result: payment_pb2.PaymentEvent, session: Mapping[str, Any]) -> str:
    mode = session.get("mode", "payment")
    if mode != "payment":
        return f"checkout sessions of mode {mode} are not payments for deployments" if isinstance(mode, str) else "unknown mode"
    result.session_id = event_form.match(session.get("id"), EXTERNAL_ID, "data.object.id")
    result.amount_minor = event_form.integer(session.get("amount_total") or 0, "amount_total")
    status = session.get("payment_status")
    result.paid = status in ("paid", "no_payment_required")
    return ""


def check_provider(event: payment_pb2.PaymentEvent) -> None:
    """The sandbox speaks for its own sessions only, and nobody else for those; BadEvent otherwise."""
    prefixes = ((event.session_id, SANDBOX_SESSION_PREFIX), (event.payment_id, SANDBOX_PAYMENT_PREFIX))
    for identifier, prefix in prefixes:
        if identifier and identifier.startswith(prefix) != (event.provider == "sandbox"):
            raise BadEvent(f"a secret of {event.provider} cannot sign for {identifier[:100]}")
    if event.provider == "sandbox" and event.livemode:
        raise BadEvent("livemode: no real money moves in the sandbox")


def _deployment_id(thing: Mapping[str, Any]) -> str:
    intent = thing.get("payment_intent")
    for holder in (thing, intent if isinstance(intent, dict) else {}):
        metadata = holder.get("metadata")
        if isinstance(metadata, dict) and event_form.is_deployment_id(found := metadata.get("deployment_id")):
            return str(found)
    reference = thing.get("client_reference_id")
    return reference if isinstance(reference, str) and event_form.is_deployment_id(reference) else ""


def _identifier(value: Any, name: str) -> str:
    """An id, given by itself or as the expanded object; empty for null."""
    if isinstance(value, dict):
        value = value.get("id")
    return "" if value is None else event_form.match(value, EXTERNAL_ID, name)
