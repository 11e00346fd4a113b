"""Checkout at Stripe."""

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx
import stripe
import structlog

from services.deployment_svc.payments.checkout import Charge, CheckoutError, Session, Wish
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now

log = structlog.get_logger()
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
            http_client=stripe.HTTPXClient(timeout=httpx.Timeout(settings.checkout_timeout_s), trust_env=False),
            base_addresses={"api": settings.stripe_api_base.rstrip("/")},
            max_network_retries=2,
        )

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
        if wish.ttl_s < 24 * 3600:
            # Rounded to the hour so that a repeated call has the same parameters; a day is Stripe's own default.
            closes = (now() + timedelta(seconds=wish.ttl_s)).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
            parameters["expires_at"] = int(closes.timestamp())
        options: Any = {"idempotency_key": wish.idempotency_key()}
        return _session(await _ask("create", self._client.v1.checkout.sessions.create_async(parameters, options)))

    async def retrieve(self, session_id: str) -> Session:
        parameters: Any = {"expand": ["payment_intent"]}
        return _session(await _ask("retrieve", self._client.v1.checkout.sessions.retrieve_async(session_id, parameters)))

    async def expire(self, session_id: str) -> Session:
        try:
            await self._client.v1.checkout.sessions.expire_async(session_id)
        except stripe.InvalidRequestError:
            pass  # Not open any more: the page itself says what it is.
        except stripe.StripeError as error:
            raise _failure("expire", error) from None
        return await self.retrieve(session_id)

    async def charge(self, payment_id: str) -> Charge:
        parameters: Any = {"expand": ["latest_charge"]}
        intent = await _ask("charge", self._client.v1.payment_intents.retrieve_async(payment_id, parameters))
        charge: Any = intent.latest_charge
        known = charge is not None and not isinstance(charge, str)
        return Charge(
            intent.id, charge.amount if known else intent.amount, intent.currency, intent.livemode,
            charge.amount_refunded if known else 0, bool(charge.disputed) if known else False,
        )  # fmt: skip


async def _ask(what: str, request: Awaitable[T]) -> T:
    try:
        return await request
    except stripe.StripeError as error:
        raise _failure(what, error) from None


def _failure(what: str, error: stripe.StripeError) -> CheckoutError:
    # Stripe's texts quote parameters: only its kind of error and its own request id are logged.
    log.warning("stripe.failed", call=what, error=type(error).__name__, code=error.code, stripe_request=error.request_id)
    return CheckoutError("the payment provider did not answer as expected; try again", retry_after_s=2)


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
