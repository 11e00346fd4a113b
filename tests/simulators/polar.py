"""Polar's checkouts and orders as a server in its own process, with signed webhooks and faults."""

import base64
import hashlib
import hmac
import json
import secrets
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.simulators.market import NO_TLS, Faults, Json, SimulatorProcess, cut, never, serve

TOKEN, PRODUCT, SECRET = "polar_oat_simulated_0123456789", "0b9d1c7e-product", "polar_whs_simulated_0123456789"
_TAX = 19


def stamp(at: datetime) -> str:
    """A time as Polar writes it."""
    return at.isoformat().replace("+00:00", "Z")


class Account:
    """Everything that this Polar knows."""

    def __init__(self) -> None:
        self.checkouts: dict[str, Json] = {}
        self.orders: dict[str, Json] = {}
        self.webhook_url = ""
        self.faults = Faults()

    def create(self, body: Json, base: str) -> Json | str:
        """A new checkout, or what is wrong."""
        if body.get("products") != [PRODUCT]:
            return "products"
        (price,) = body["prices"][PRODUCT]
        if price["amount_type"] != "fixed" or price["price_amount"] < 50 or len(price["price_currency"]) != 3:
            return "prices"
        if not all(isinstance(value, str | int | float | bool) for value in body.get("metadata", {}).values()):
            return "metadata"
        now, identity = datetime.now(UTC), str(uuid.uuid4())
        net = price["price_amount"]
        self.checkouts[identity] = {
            "id": identity, "status": "open", "url": f"{base}checkout/{identity}", "created_at": stamp(now), "modified_at": stamp(now),
            "expires_at": stamp(now + timedelta(days=1)), "amount": net, "discount_amount": 0, "net_amount": net, "tax_amount": None,
            "total_amount": net, "currency": price["price_currency"], "customer_email": body.get("customer_email"),
            "external_customer_id": body.get("external_customer_id"), "metadata": body.get("metadata", {}), "product_id": PRODUCT,
        }  # fmt: skip
        return self.checkouts[identity]

    def confirm(self, checkout: Json) -> Json:
        """The customer has clicked "pay": the money is not there yet."""
        tax = checkout["net_amount"] * _TAX // 100
        checkout |= {"status": "confirmed", "tax_amount": tax, "total_amount": checkout["net_amount"] + tax}
        return checkout

    def succeed(self, checkout: Json) -> Json:
        """The money is there; the order."""
        self.confirm(checkout)["status"] = "succeeded"
        order = {
            "id": str(uuid.uuid4()), "checkout_id": checkout["id"], "status": "paid", "paid": True, "refunded_amount": 0, "refunded_tax_amount": 0,
            "billing_reason": "purchase", "metadata": checkout["metadata"], "product_id": PRODUCT,
            **{name: checkout[name] for name in ("net_amount", "tax_amount", "total_amount", "currency")},
        }  # fmt: skip
        return self.orders.setdefault(checkout["id"], order)

    async def tell(self, kind: str, thing: Json, message_id: str = "") -> int:
        """Delivers a signed webhook; the status of the answer."""
        message_id, at = message_id or f"msg_{secrets.token_hex(12)}", str(int(time.time()))
        payload = json.dumps({"type": kind, "timestamp": stamp(datetime.now(UTC)), "data": thing}).encode()
        digest = hmac.new(SECRET.encode(), f"{message_id}.{at}.".encode() + payload, hashlib.sha256).digest()
        headers = {"webhook-id": message_id, "webhook-timestamp": at, "webhook-signature": f"v1,{base64.b64encode(digest).decode()}"}
        async with httpx.AsyncClient(verify=NO_TLS, timeout=20) as client:
            return (await client.post(self.webhook_url, content=payload, headers=headers)).status_code


ACCOUNT = Account()


async def checkouts(request: Request) -> Response:
    """``POST /v1/checkouts/`` and ``GET /v1/checkouts/{id}``."""
    refused = await _fault(request, "create" if request.method == "POST" else "retrieve")
    if refused is not None:
        return refused
    if request.method == "GET":
        found = ACCOUNT.checkouts.get(request.path_params["id"])
        return JSONResponse(found) if found else JSONResponse({"error": "ResourceNotFound"}, 404)
    made = ACCOUNT.create(await request.json(), str(request.base_url))
    if isinstance(made, str):
        return JSONResponse({"error": "RequestValidationError", "detail": [{"loc": ["body", made]}]}, 422)
    if ACCOUNT.faults.take("create.lost"):
        await cut(request)
    return JSONResponse(made, 201)


async def orders(request: Request) -> Response:
    """``GET /v1/orders/?checkout_id=``."""
    refused = await _fault(request, "orders")
    found = [order for order in ACCOUNT.orders.values() if order["checkout_id"] == request.query_params.get("checkout_id")]
    return refused or JSONResponse({"items": found, "pagination": {"total_count": len(found), "max_page": 1}})


async def _fault(request: Request, call: str) -> Response | None:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        return JSONResponse({"error": "invalid_token"}, 401)
    fault = ACCOUNT.faults.take(call)
    if not fault:
        return None
    if fault["kind"] == "hang":
        return await never(request)
    if fault["kind"] == "html":
        return Response("<html>Bad gateway</html>", 200, media_type="text/html")
    return JSONResponse({"error": "simulated"}, fault["status"], {"Retry-After": "1"})


async def control(request: Request) -> Response:
    """``POST /_sim/{what}``: what customers and time do, and faults."""
    what, body = request.path_params["what"], await request.json()
    said: Any = {}
    if what == "faults":
        ACCOUNT.faults.arm(body.pop("call"), body)
    elif what == "webhooks":
        ACCOUNT.webhook_url = body["url"]
    elif what == "confirm":
        said = await ACCOUNT.tell("checkout.updated", ACCOUNT.confirm(ACCOUNT.checkouts[body["id"]]))
    elif what == "succeed":
        order = ACCOUNT.succeed(ACCOUNT.checkouts[body["id"]])
        events = [("checkout.updated", ACCOUNT.checkouts[body["id"]]), ("order.created", order), ("order.paid", order)]
        said = [] if body.get("silent") else [await ACCOUNT.tell(kind, thing) for kind, thing in events for _ in range(body.get("times", 1))]
    elif what == "refund":
        order = ACCOUNT.orders[body["id"]]
        order["refunded_amount"] += body.get("amount", order["net_amount"])
        said = await ACCOUNT.tell("order.refunded", order)
    elif what == "tell":
        said = await ACCOUNT.tell(body["type"], body["data"], body.get("id", ""))
    elif what == "checkouts":
        said = list(ACCOUNT.checkouts.values())
    return JSONResponse(said)


APP = Starlette(
    routes=[
        Route("/v1/checkouts/", checkouts, methods=["POST"]),
        Route("/v1/checkouts/{id}", checkouts),
        Route("/v1/orders/", orders),
        Route("/_sim/{what}", control, methods=["POST"]),
    ]
)


class PolarSimulator(SimulatorProcess):
    """The simulator as a process."""

    module = "tests.simulators.polar"

    async def do(self, what: str, **body: Any) -> Any:
        """What a customer, time or a fault does."""
        async with httpx.AsyncClient(verify=NO_TLS, timeout=60) as client:
            answer = await client.post(f"{self.url}/_sim/{what}", json=body)
            answer.raise_for_status()
            return answer.json()


if __name__ == "__main__":
    serve(APP)
