"""Checkout at Polar, over its HTTP API.

Unlike Stripe, Polar knows no idempotency keys and cannot close a page: a page that nobody needs any more stays open for its day, and a
payment on it finds the deployment by its metadata and is listed as due for refund. A checkout is paid at most once, so its id stands
for the payment as well.
"""

from datetime import datetime
from typing import Any

import httpx
import structlog

from services.deployment_svc.payments.checkout import Charge, CheckoutError, Session, Wish
from services.deployment_svc.settings import DeploymentSettings

log = structlog.get_logger()
_BASES = {True: "https://sandbox-api.polar.sh", False: "https://api.polar.sh"}
_STATUSES = {"open": "open", "confirmed": "complete", "succeeded": "complete", "failed": "complete", "expired": "expired"}


class PolarCheckout:
    """Implements Checkout."""

    name = "polar"

    def __init__(self, settings: DeploymentSettings) -> None:
        token = settings.polar_access_token.get_secret_value()
        if not (token and settings.polar_product_id):
            raise ValueError(
                "CLAWPLANE_POLAR_ACCESS_TOKEN and CLAWPLANE_POLAR_PRODUCT_ID are needed when CLAWPLANE_PAYMENT_PROVIDER is polar"
            )
        self.livemode = not settings.polar_sandbox
        self._product = settings.polar_product_id
        self._client = httpx.AsyncClient(
            base_url=settings.polar_api_base or _BASES[settings.polar_sandbox],
            headers={"Authorization": f"Bearer {token}"},
            timeout=settings.checkout_timeout_s,
            follow_redirects=False,
        )

    async def create(self, wish: Wish) -> Session:
        price = {"amount_type": "fixed", "price_amount": wish.amount_minor, "price_currency": wish.currency}
        body = {
            "products": [self._product],
            # The price is ours, of the tier and the moment, whatever the product's own one is.
            "prices": {self._product: [price]},
            "customer_email": wish.email,
            "external_customer_id": wish.user_id,
            "success_url": wish.success_url,
            "return_url": wish.cancel_url,
            "allow_discount_codes": False,
            "metadata": {"deployment_id": wish.deployment_id, "org_id": wish.org_id, "user_id": wish.user_id, "link": wish.link_number},
        }
        return self._session(await self._ask("create", "POST", "/v1/checkouts/", json=body))

    async def retrieve(self, session_id: str) -> Session:
        return self._session(await self._ask("retrieve", "GET", f"/v1/checkouts/{session_id}"))

    async def expire(self, session_id: str) -> Session:
        return await self.retrieve(session_id)

    async def charge(self, payment_id: str) -> Charge:
        found = await self._ask("charge", "GET", "/v1/orders/", params={"checkout_id": payment_id})
        try:
            order = next(one for one in found["items"] if one["checkout_id"] == payment_id)
            return Charge(
                payment_id, int(order["net_amount"]), str(order["currency"]).lower(), self.livemode, int(order["refunded_amount"]), False
            )
        except (StopIteration, KeyError, TypeError, ValueError):
            raise _unexpected("charge") from None

    async def _ask(self, what: str, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            answer = await self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            log.warning("polar.failed", call=what, error=type(error).__name__)
            raise CheckoutError("the payment provider does not answer; try again") from None
        if answer.status_code >= 300:
            log.warning("polar.failed", call=what, status=answer.status_code)
            pause = answer.headers.get("retry-after", "")
            raise CheckoutError(
                "the payment provider did not answer as expected; try again", float(pause) if pause.isdigit() else 2,
                is_final=answer.status_code in (400, 404, 422),
            )  # fmt: skip
        try:
            found: Any = answer.json()
        except ValueError:
            raise _unexpected(what) from None
        if not isinstance(found, dict):
            raise _unexpected(what)
        return found

    def _session(self, found: dict[str, Any]) -> Session:
        try:
            status = found["status"]
            return Session(
                str(found["id"]), _STATUSES[status], str(found["url"]), status == "succeeded", str(found["id"]),  # type: ignore[arg-type]
                status == "failed", int(found["net_amount"]), str(found["currency"]).lower(), self.livemode,
                datetime.fromisoformat(found["expires_at"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise _unexpected("page") from None

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def _unexpected(what: str) -> CheckoutError:
    log.warning("polar.failed", call=what, error="unexpected answer")
    return CheckoutError("the payment provider did not answer as expected; try again")
