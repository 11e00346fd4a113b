"""Checkout at Stripe."""

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx
import stripe
import structlog

from services.deployment_svc.payments.checkout import Charge, CheckoutError, Session, Wish
from services.deployment_svc.settings import DeploymentSettings

log = structlog.get_logger()
# It would write a file into the home directory and send timings of calls.
stripe.enable_telemetry = False
T = TypeVar("T")


class StripeCheckout:
    """Implements Checkout with the stripe library."""

    name = "stripe"

    def __init__(self, settings: DeploymentSettings) -> None:
        key = settings.stripe_api_key.get_secret_value()
        if not key:
            raise ValueError("CLAWPLANE_STRIPE_API_KEY is needed when CLAWPLANE_PAYMENT_PROVIDER is stripe")
        self.livemode = "_live_" in key
        self._client = stripe.StripeClient(
            key,
            http_client=stripe.HTTPXClient(timeout=httpx.Timeout(settings.checkout_timeout_s)),
            base_addresses={"api": settings.stripe_api_base.rstrip("/")},
            max_network_retries=1,
        )
        self._timeout_s = settings.checkout_timeout_s

    async def create(self, wish: Wish) -> Session:
        metadata = {"deployment_id": wish.deployment_id, "org_id": wish.org_id, "user_id": wish.user_id}
        parameters: Any = {
            "mode": "payment",
            "customer_email": wish.email,
            "client_reference_id": wish.deployment_id,
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {
                        "currency": wish.currency,
                        "unit_amount": wish.amount_minor,
                        "product_data": {"name": wish.description},
                    },
                }
            ],
            "metadata": metadata,
            # A session's metadata does not reach its payment: without this a refund could not be routed.
            "payment_intent_data": {"metadata": metadata},
            "success_url": wish.success_url,
            "cancel_url": wish.cancel_url,
        }
        if wish.closes_at is not None:
            parameters["expires_at"] = int(wish.closes_at.timestamp())
        options: Any = {"idempotency_key": wish.idempotency_key()}
        return _session(await self._ask("create", self._client.v1.checkout.sessions.create_async(parameters, options)))

    async def retrieve(self, session_id: str) -> Session:
        parameters: Any = {"expand": ["payment_intent"]}
        return _session(await self._ask("retrieve", self._client.v1.checkout.sessions.retrieve_async(session_id, parameters)))

    async def expire(self, session_id: str) -> Session:
        try:
            await self._ask("expire", self._client.v1.checkout.sessions.expire_async(session_id))
        except CheckoutError as error:
            # Not open any more: the page itself says what it is.
            if not error.is_final:
                raise
        return await self.retrieve(session_id)

    async def charge(self, payment_id: str) -> Charge:
        parameters: Any = {"expand": ["latest_charge"]}
        intent = await self._ask("charge", self._client.v1.payment_intents.retrieve_async(payment_id, parameters))
        charge: Any = intent.latest_charge
        known = charge is not None and not isinstance(charge, str)
        return Charge(
            intent.id, charge.amount if known else intent.amount, intent.currency, intent.livemode,
            charge.amount_refunded if known else 0, bool(charge.disputed) if known else False,
        )  # fmt: skip


    async def _ask(self, what: str, request: Awaitable[T]) -> T:
        try:
            # The library's own limit counts for each of its tries.
            async with asyncio.timeout(self._timeout_s * 1.5):
                return await request
        except stripe.StripeError as error:
            raise _failure(what, error) from None
        except TimeoutError:
            log.warning("stripe.failed", call=what, error="timeout")
            raise CheckoutError("the payment provider does not answer; try again") from None


def _failure(what: str, error: stripe.StripeError) -> CheckoutError:
    # Stripe's texts quote parameters: only its kind of error and its own request id are logged.
    status = error.http_status or 0
    log.warning("stripe.failed", call=what, error=type(error).__name__, status=status, param=getattr(error, "param", None),
                stripe_request=error.request_id)  # fmt: skip
    # Stripe keeps what it answered under an idempotency key, errors of its own included; only 409 and 429 pass.
    is_final = status >= 500 or status in (400, 404)
    return CheckoutError("the payment provider did not answer as expected; try again", is_final=is_final)


def _session(session: Any) -> Session:
    intent = session.payment_intent
    failed = False
    if intent is not None and not isinstance(intent, str):
        failed = intent.status in {"requires_payment_method", "canceled"}
        intent = intent.id
    return Session(
        session.id, session.status, session.url or "", session.payment_status in {"paid", "no_payment_required"}, intent or "",
        failed, session.amount_total or 0, session.currency or "", session.livemode, datetime.fromtimestamp(session.expires_at, UTC),
    )  # fmt: skip
