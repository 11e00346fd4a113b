"""The sandbox's webhooks: Stripe's form, signed with the sandbox's secret, sent over HTTP like anybody's."""

import asyncio
import dataclasses
import secrets
import ssl
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx
import orjson
import structlog

from clawplane.deployment.v1 import sandbox_service_pb2, sandbox_session_pb2
from gateway.webhooks import stripe

TRY_DELAYS_S = (0.0, 0.2, 0.6, 1.5)
TRY_TIMEOUT_S = 15.0
log = structlog.get_logger("gateway.sandbox")


@dataclasses.dataclass(frozen=True)
class Action:
    """What a button does: the RPC's action, and the event and payment status that follow from it."""

    action: sandbox_service_pb2.SandboxAction.ValueType
    event_type: str
    payment_status: str


ACTIONS: Mapping[str, Action] = {
    "pay": Action(sandbox_service_pb2.SANDBOX_ACTION_PAY, "checkout.session.completed", "paid"),
    "fail": Action(sandbox_service_pb2.SANDBOX_ACTION_FAIL, "checkout.session.async_payment_failed", "unpaid"),
    "expire": Action(sandbox_service_pb2.SANDBOX_ACTION_EXPIRE, "checkout.session.expired", "unpaid"),
    "refund": Action(sandbox_service_pb2.SANDBOX_ACTION_REFUND, "charge.refunded", "paid"),
}


def status_word(session: sandbox_session_pb2.SandboxSession) -> str:
    """The session's status in Stripe's words: "open", "complete" or "expired"."""
    return sandbox_session_pb2.SandboxSessionStatus.Name(session.status).removeprefix("SANDBOX_SESSION_STATUS_").lower()


def build(session: sandbox_session_pb2.SandboxSession, action: Action, now_s: int) -> dict[str, Any]:
    """The event, in Stripe's form, that follows from an action."""
    thing = _charge(session) if action.event_type == "charge.refunded" else _session(session, action)
    return {
        "id": f"evt_sandbox_{secrets.token_hex(12)}",
        "object": "event",
        "type": action.event_type,
        "created": now_s,
        "livemode": False,
        "data": {"object": thing},
    }


def _session(session: sandbox_session_pb2.SandboxSession, action: Action) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "checkout.session",
        "mode": "payment",
        "status": status_word(session),
        "payment_status": action.payment_status,
        "payment_intent": session.payment_intent_id or None,
        "client_reference_id": session.deployment_id or None,
        "amount_total": session.amount_minor,
        "currency": session.currency,
        "livemode": False,
        "metadata": {"deployment_id": session.deployment_id},
    }


def _charge(session: sandbox_session_pb2.SandboxSession) -> dict[str, Any]:
    return {
        "id": session.payment_intent_id.replace("pi_", "ch_", 1),
        "object": "charge",
        "payment_intent": session.payment_intent_id,
        "amount": session.amount_minor,
        "amount_refunded": session.refunded_minor,
        "refunded": session.refunded_minor >= session.amount_minor,
        "currency": session.currency,
        "livemode": False,
        "metadata": {"deployment_id": session.deployment_id},
    }


@cache
def _tls() -> ssl.SSLContext:
    """Made once: to read all certificates takes longer than to post an event."""
    return httpx.create_ssl_context(trust_env=False)


async def deliver(url: str, event: Mapping[str, Any], key: bytes) -> bool:
    """Signs and posts an event, again after errors that may pass; whether it was taken. It takes a few seconds at most to give up
    on a gateway that answers at once."""
    payload = orjson.dumps(event)
    async with httpx.AsyncClient(trust_env=False, timeout=TRY_TIMEOUT_S, verify=_tls()) as client:
        for delay_s in TRY_DELAYS_S:
            await asyncio.sleep(delay_s)
            headers = {"Content-Type": "application/json", "Stripe-Signature": stripe.sign(payload, key, int(time.time()))}
            try:
                status = (await client.post(url, content=payload, headers=headers)).status_code
            except httpx.HTTPError as error:
                log.warning("sandbox_webhook_failed", event_id=event["id"], error=type(error).__name__)
                continue
            if status < 500:
                return status < 300
            log.warning("sandbox_webhook_failed", event_id=event["id"], status=status)
    return False
