"""Stripe's HTTP API in its own process: Checkout Sessions, payment intents, events; /_sim plays the customer and faults."""

import asyncio
import copy
import hashlib
import hmac
import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tests.simulators.market import Faults, SimulatorProcess, cut, never, serve

VERSION = "2026-10-28.endive"
PARAMETERS = {
    "after_expiration", "allow_promotion_codes", "automatic_tax", "billing_address_collection", "cancel_url",
    "client_reference_id", "custom_text", "customer", "customer_creation", "customer_email", "expand", "expires_at",
    "line_items", "locale", "metadata", "mode", "payment_intent_data", "payment_method_types", "phone_number_collection",
    "submit_type", "success_url", "ui_mode",
}  # fmt: skip
Json = dict[str, Any]


class StripeSimulator(SimulatorProcess):
    """The running simulator: ``url`` is the API base; ``await post("/_sim/...")`` and ``await get("/_sim/...")`` control it."""

    module = "tests.simulators.stripe"


def start_stripe() -> StripeSimulator:
    """Starts a simulator; also a context manager, otherwise ``stop()`` it."""
    return StripeSimulator()


def sign(payload: bytes, secret: str, timestamp: int | None = None) -> str:
    """The ``Stripe-Signature`` header of a webhook body; ``timestamp`` in seconds, now when absent."""
    moment = int(time.time()) if timestamp is None else timestamp
    return f"t={moment},v1={hmac.new(secret.encode(), b'%d.' % moment + payload, hashlib.sha256).hexdigest()}"


@dataclass
class Refused(Exception):
    """An error answer. ``executed``: the endpoint had begun, so that an idempotency key replays it."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    kind: str = "invalid_request_error"
    executed: bool = False

    def body(self) -> Json:
        error = {"type": self.kind, "code": self.code, "message": self.message, "param": self.param}
        return {"error": {name: value for name, value in error.items() if value is not None}}


def nested(encoded: str) -> Json:
    """``a[b][0]=c`` becomes {"a": {"b": {"0": "c"}}}; lists are dictionaries by index."""
    tree: Json = {}
    for index, (name, value) in enumerate(parse_qsl(encoded, keep_blank_values=True)):
        *path, last = (part.removesuffix("]") or str(index) for part in name.split("["))
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise Refused("Invalid parameter encoding", name)
        node[last] = value
    return tree


def whole(value: Any, param: str, least: int = 0) -> int:
    if not isinstance(value, str) or not value.lstrip("-").isdigit():
        raise Refused(f"Invalid integer: {value}", param, "parameter_invalid_integer")
    if int(value) < least:
        raise Refused(f"This value must be greater than or equal to {least}.", param, "parameter_invalid_integer")
    return int(value)


def labels(form: Json, param: str) -> Json:
    """Checks metadata against Stripe's limits."""
    metadata = form.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Refused("Invalid hash", param)
    if len(metadata) > 50:
        raise Refused("Metadata can have at most 50 keys", param)
    for name, value in metadata.items():
        if len(name) > 40 or len(value) > 500:
            raise Refused("Metadata keys have at most 40 characters, values at most 500", f"{param}[{name}]")
    return {name: value for name, value in metadata.items() if value != ""}


def priced(form: Json) -> tuple[int, str]:
    """The sum of the lines in minor units, and the currency."""
    total, currencies = 0, set()
    for index, line in form.get("line_items", {}).items():
        at = f"line_items[{index}]"
        price = line.get("price_data") or {}
        for name in ("currency", "product_data", "unit_amount"):
            if name not in price:
                raise Refused(
                    f"Missing required param: {at}[price_data][{name}].", f"{at}[price_data][{name}]", "parameter_missing"
                )
        if not price["product_data"].get("name"):
            raise Refused("Missing required param: name.", f"{at}[price_data][product_data][name]", "parameter_missing")
        amount = whole(price["unit_amount"], f"{at}[price_data][unit_amount]")
        total += amount * whole(line.get("quantity"), f"{at}[quantity]", 1)
        currencies.add(price["currency"].lower())
    if len(currencies) != 1 or not all(len(one) == 3 and one.isalpha() for one in currencies):
        raise Refused("Payment mode needs line items in one valid currency", "line_items")
    if 0 < total < 50:
        raise Refused("The Checkout Session's total amount must convert to at least 50 cents.", None, "amount_too_small")
    return total, currencies.pop()


def checked(form: Json, now: int) -> None:
    """Raises Refused for what Stripe refuses of a new session (payment mode only)."""
    for name, value in form.items():
        if name not in PARAMETERS:
            raise Refused(f"Received unknown parameter: {name}", name, "parameter_unknown")
        if value == "":
            raise Refused(f"You passed an empty string for '{name}'.", name, "parameter_invalid_empty")
    if form.get("mode") != "payment":
        raise Refused("Only mode `payment` is simulated", "mode")
    if "success_url" not in form:
        raise Refused("Missing required param: success_url.", "success_url", "parameter_missing")
    for name in ("success_url", "cancel_url"):
        if not form.get(name, "http://").startswith(("http://", "https://")):
            raise Refused("Not a valid URL", name, "url_invalid")
    if "@" not in form.get("customer_email", "@"):
        raise Refused(f"Invalid email address: {form['customer_email']}", "customer_email", "email_invalid")
    if len(form.get("client_reference_id", "")) > 200:
        raise Refused("client_reference_id has at most 200 characters", "client_reference_id")
    closes = whole(form.get("expires_at", str(now + 86400)), "expires_at")
    if not now + 1800 <= closes <= now + 86400:
        bound = "at least 30 minutes" if closes < now + 1800 else "less than 24 hours"
        raise Refused(f"The `expires_at` timestamp must be {bound} from Checkout Session creation.", "expires_at")


def fresh(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


class Account:
    """Everything that this Stripe knows."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.events: list[Json] = []
        self.intent_metadata: dict[str, Json] = {}
        self.replies: dict[str, tuple[str, int, bytes]] = {}
        self.running: set[str] = set()
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.faults = Faults()

    def find(self, kind: str, identity: str) -> Json:
        found = self.objects.get(identity)
        if found is None or found["object"] != kind:
            param = {"checkout.session": "session", "payment_intent": "intent"}.get(kind, "id")
            raise Refused(f"No such {kind}: '{identity}'", param, "resource_missing", 404)
        return found

    def all(self, kind: str) -> list[Json]:
        """Newest first."""
        return [one for one in reversed(self.objects.values()) if one["object"] == kind]

    def emit(self, kind: str, thing: Json, options: Json, previous: Json | None = None) -> list[Json]:
        data = {"object": copy.deepcopy(thing)} | ({"previous_attributes": previous} if previous else {})
        event = {
            "id": fresh("evt"), "object": "event", "api_version": VERSION, "created": int(options.get("created") or time.time()),
            "data": data, "livemode": thing["livemode"], "pending_webhooks": 1, "request": {"id": None, "idempotency_key": None},
            "type": kind,
        }  # fmt: skip
        self.events.append(event)
        return [event]

    def create(self, form: Json, base: str) -> Json:
        now = int(time.time())
        checked(form, now)
        total, currency = priced(form)
        metadata, intent_metadata = (
            labels(form, "metadata"),
            labels(form.get("payment_intent_data", {}), "payment_intent_data[metadata]"),
        )
        identity = fresh("cs_test")
        self.intent_metadata[identity] = intent_metadata
        self.objects[identity] = {
            "id": identity, "object": "checkout.session", "amount_subtotal": total, "amount_total": total, "currency": currency,
            "cancel_url": form.get("cancel_url"), "client_reference_id": form.get("client_reference_id"), "created": now,
            "customer": None, "customer_email": form.get("customer_email"),
            "expires_at": int(form.get("expires_at", now + 86400)), "livemode": False, "metadata": metadata, "mode": "payment",
            "payment_intent": None, "payment_method_types": ["card"], "payment_status": "unpaid", "status": "open",
            "success_url": form["success_url"], "ui_mode": "hosted", "url": f"{base}pay/{identity}",
        }  # fmt: skip
        return self.objects[identity]

    def expire(self, identity: str, options: Json) -> list[Json]:
        session = self.find("checkout.session", identity)
        if session["status"] != "open":
            was = f"This Checkout Session has a status of `{session['status']}`."
            raise Refused(f'Only Checkout Sessions with a status in ["open"] can be expired. {was}', executed=True)
        session.update(status="expired", url=None)
        return self.emit("checkout.session.expired", session, options)

    def pay(self, identity: str, options: Json) -> list[Json]:
        session = self.find("checkout.session", identity)
        if session["status"] != "open":
            raise Refused(f"The session is {session['status']}: nobody can pay it", "session")
        session["amount_total"] = session["amount_subtotal"] = int(options.get("amount") or session["amount_total"])
        session["currency"] = options.get("currency", session["currency"])
        session["livemode"] = options.get("livemode", "0").lower() in {"1", "true"}
        intent = {
            "id": fresh("pi"), "object": "payment_intent", "amount": session["amount_total"], "amount_received": 0,
            "created": int(time.time()), "currency": session["currency"], "latest_charge": None, "livemode": session["livemode"],
            "metadata": dict(self.intent_metadata[identity]), "status": "processing",
        }  # fmt: skip
        self.objects[intent["id"]] = intent
        session.update(status="complete", url=None, payment_intent=intent["id"])
        if options.get("async", "0") not in {"1", "true"}:
            self._succeed(session, intent)
        return self.emit("checkout.session.completed", session, options)

    def _succeed(self, session: Json, intent: Json) -> None:
        charge = {
            "id": fresh("ch"), "object": "charge", "amount": intent["amount"], "amount_captured": intent["amount"],
            "amount_refunded": 0, "captured": True, "created": int(time.time()), "currency": intent["currency"],
            "disputed": False, "livemode": intent["livemode"], "metadata": dict(intent["metadata"]), "paid": True,
            "payment_intent": intent["id"], "refunded": False, "status": "succeeded",
        }  # fmt: skip
        self.objects[charge["id"]] = charge
        intent.update(status="succeeded", amount_received=intent["amount"], latest_charge=charge["id"])
        session["payment_status"] = "paid"

    def _delayed(self, identity: str) -> tuple[Json, Json]:
        session = self.find("checkout.session", identity)
        intent = self.objects.get(session["payment_intent"] or "")
        if intent is None or intent["status"] != "processing":
            raise Refused("No delayed payment is under way", "session")
        return session, intent

    def settle(self, identity: str, options: Json) -> list[Json]:
        session, intent = self._delayed(identity)
        self._succeed(session, intent)
        return self.emit("checkout.session.async_payment_succeeded", session, options)

    def fail(self, identity: str, options: Json) -> list[Json]:
        session, intent = self._delayed(identity)
        intent["status"] = "requires_payment_method"
        return self.emit("checkout.session.async_payment_failed", session, options)

    def _charge(self, intent_id: str) -> Json:
        return self.find("charge", self.find("payment_intent", intent_id)["latest_charge"] or "none")

    def refund(self, identity: str, options: Json) -> list[Json]:
        charge = self._charge(identity)
        before = charge["amount_refunded"]
        amount = int(options.get("amount") or charge["amount"] - before)
        if not 0 < amount <= charge["amount"] - before:
            raise Refused("The refund is greater than what is left of the charge", "amount", "charge_already_refunded")
        charge.update(amount_refunded=before + amount, refunded=before + amount == charge["amount"])
        return self.emit("charge.refunded", charge, options, {"amount_refunded": before})

    def dispute(self, identity: str, options: Json) -> list[Json]:
        charge = self._charge(identity)
        charge["disputed"] = True
        dispute = {
            "id": fresh("du"), "object": "dispute", "amount": int(options.get("amount") or charge["amount"]),
            "charge": charge["id"], "created": int(time.time()), "currency": charge["currency"], "is_charge_refundable": False,
            "livemode": charge["livemode"], "metadata": {}, "payment_intent": identity, "reason": "fraudulent",
            "status": "needs_response",
        }  # fmt: skip
        return self.emit("charge.dispute.created", dispute, options)

    def expanded(self, thing: Json, paths: list[str]) -> Json:
        answer = dict(thing)
        for path in sorted(paths):
            head, _, rest = path.partition(".")
            identity = thing.get(head)
            if head not in thing:
                raise Refused(f"This property cannot be expanded ({head}).", "expand")
            if identity in self.objects:
                answer[head] = self.expanded(self.objects[identity], [rest] if rest else [])
        return answer

    def page(self, things: list[Json], form: Json, url: str) -> Json:
        """A list answer: things are newest first; ``created[gte]`` and its like, ``starting_after``, ``limit``."""
        tests = {"gt": int.__gt__, "gte": int.__ge__, "lt": int.__lt__, "lte": int.__le__}
        for name, bound in form.get("created", {}).items():
            things = [one for one in things if tests[name](one["created"], int(bound))]
        if "starting_after" in form:
            ids = [one["id"] for one in things]
            things = things[ids.index(form["starting_after"]) + 1 :]
        limit = whole(form.get("limit", "10"), "limit", 1)
        return {"object": "list", "url": url, "has_more": len(things) > limit, "data": things[:limit]}

    def route(self, method: str, path: str, form: Json, base: str) -> Json:
        """The API's own endpoints."""
        expand = list(form.get("expand", {}).values())
        match method, path.strip("/").split("/")[1:]:
            case "POST", ["checkout", "sessions"]:
                return self.expanded(self.create(form, base), expand)
            case "GET", ["checkout", "sessions"]:
                found = [
                    one
                    for one in self.all("checkout.session")
                    if form.get("payment_intent", one["payment_intent"]) == one["payment_intent"]
                ]
                return self.page(found, form, path)
            case "GET", ["checkout", "sessions", identity]:
                return self.expanded(self.find("checkout.session", identity), expand)
            case "POST", ["checkout", "sessions", identity, "expire"]:
                self.expire(identity, {})
                return self.expanded(self.find("checkout.session", identity), expand)
            case "GET", ["payment_intents", identity]:
                return self.expanded(self.find("payment_intent", identity), expand)
            case "GET", ["charges", identity]:
                return self.expanded(self.find("charge", identity), expand)
            case "GET", ["events"]:
                types = set(form.get("types", {}).values()) | ({form["type"]} if "type" in form else set())
                newest = sorted(self.events, key=lambda one: int(one["created"]))[::-1]
                return self.page([one for one in newest if not types or one["type"] in types], form, path)
        raise Refused(f"Unrecognized request URL ({method}: {path}).", status=404)


account = Account()


def answer(status: int, body: bytes, extra: dict[str, str] | None = None) -> Response:
    return Response(body, status, {"Request-Id": fresh("req"), "Stripe-Version": VERSION, **(extra or {})}, "application/json")


def encoded(refused: Refused) -> tuple[int, bytes]:
    return refused.status, json.dumps(refused.body()).encode()


def authorised(header: str) -> None:
    key = header.removeprefix("Bearer ")
    if not header.startswith("Bearer "):
        raise Refused("You did not provide an API key.", status=401)
    if not key.startswith("sk_test_"):
        raise Refused(f"Invalid API Key provided: {key[:8]}****", status=401)


async def executed(request: Request, form: Json, kind: str, fault: Json) -> tuple[int, bytes, bool]:
    """Status, body, and whether an idempotency key keeps them."""
    await asyncio.sleep(fault.get("seconds", 1) if kind == "slow" else 0)
    if kind == "error500":
        return *encoded(Refused("An unknown error occurred", status=500, kind="api_error")), True
    try:
        return 200, json.dumps(account.route(request.method, request.url.path, form, str(request.base_url))).encode(), True
    except Refused as refused:
        return *encoded(refused), refused.executed


async def once(request: Request, form: Json, kind: str, fault: Json) -> Response:
    """Answers, or replays what the same idempotency key answered before."""
    name = request.headers.get("idempotency-key", "") if request.method == "POST" else ""
    if len(name) > 255:
        raise Refused("Idempotency keys have at most 255 characters")
    print_of = json.dumps([request.url.path, form], sort_keys=True)
    if name in account.running:
        text = "There is currently another in-progress request using this Idempotent Key (that probably means you submitted twice)"
        raise Refused(f"{text}: {name}. Please try again later.", None, "idempotency_key_in_use", 409, "idempotency_error")
    if name in account.replies:
        known, status, body = account.replies[name]
        if known != print_of:
            same = "Keys for idempotent requests can only be used with the same parameters they were first used with"
            raise Refused(f"{same}. Try using a key other than '{name}'.", kind="idempotency_error")
        return answer(status, body, {"Idempotent-Replayed": "true", "Original-Request": "req_first"} | no_retry(status))
    account.running.update({name} - {""})
    try:
        status, body, keep = await executed(request, form, kind, fault)
        if name and keep:
            account.replies[name] = (print_of, status, body)
    finally:
        account.running.discard(name)
    return answer(status, body, no_retry(status))


def no_retry(status: int) -> dict[str, str]:
    # Stripe says so of most errors that its idempotency would only replay.
    return {"Stripe-Should-Retry": "false"} if status >= 500 else {}


async def api(request: Request) -> Response:
    """Everything under /v1."""
    key = request.headers.get("idempotency-key", "")
    account.calls[request.method, request.url.path, key] += 1
    fault = account.faults.take(f"{request.method} {request.url.path}")
    kind = fault.get("kind", "")
    try:
        authorised(request.headers.get("authorization", ""))
        form = nested((await request.body()).decode() if request.method == "POST" else request.url.query)
        if kind == "rate_limit":
            raise Refused("Request rate limit exceeded.", None, "rate_limit", 429)
        if kind == "html":
            return HTMLResponse("<html><body><h1>502 Bad Gateway</h1></body></html>", fault.get("status", 502))
        if kind == "hang":
            return await never(request)
        response = await once(request, form, kind, fault)
    except Refused as refused:
        response = answer(*encoded(refused))
    if kind == "hang_after":
        return await never(request)
    if kind == "drop_after":
        await cut(request)
    return response


ACTIONS = {
    "sessions": {"pay": Account.pay, "settle": Account.settle, "fail": Account.fail, "expire": Account.expire},
    "payment_intents": {"refund": Account.refund, "dispute": Account.dispute},
}


async def act(request: Request) -> Response:
    """POST /_sim/{sessions|payment_intents}/{id}/{action}: the events that came of it."""
    at = request.path_params
    action = ACTIONS.get(at["kind"], {}).get(at["action"])
    try:
        if action is None:
            raise Refused("No such action", status=404)
        return JSONResponse(action(account, at["id"], dict(request.query_params)))
    except Refused as refused:
        return JSONResponse(refused.body(), refused.status)


async def listing(request: Request) -> Response:
    """GET /_sim/{sessions|requests|events}, oldest first."""
    match request.path_params["what"]:
        case "sessions":
            return JSONResponse(account.all("checkout.session")[::-1])
        case "events":
            return JSONResponse(account.events)
        case "requests":
            names = ("method", "path", "idempotency_key")
            return JSONResponse([dict(zip(names, call, strict=True)) | {"count": count} for call, count in account.calls.items()])
    return JSONResponse({"error": "no such list"}, 404)


async def arm(request: Request) -> Response:
    """POST /_sim/faults {"match": "POST /v1/checkout/sessions", "kind": ..., "times": n}; ``match`` may hold ``*``."""
    fault = await request.json()
    if fault["kind"] not in {"error500", "drop_after", "hang", "hang_after", "rate_limit", "html", "slow"}:
        return JSONResponse({"error": "no such kind"}, 400)
    account.faults.arm(fault["match"], fault)
    return JSONResponse({})


async def reset(_request: Request) -> Response:
    """POST /_sim/reset: forgets everything."""
    account.__init__()  # type: ignore[misc]
    return JSONResponse({})


async def paying(request: Request) -> Response:
    """The page that a session's ``url`` names."""
    return HTMLResponse(f"<html><body>Pay {request.path_params['id']}</body></html>")


app = Starlette(
    routes=[
        Route("/v1/{path:path}", api, methods=["GET", "POST", "DELETE"]),
        Route("/_sim/faults", arm, methods=["POST"]),
        Route("/_sim/reset", reset, methods=["POST"]),
        Route("/_sim/{kind}/{id}/{action}", act, methods=["POST"]),
        Route("/_sim/{what}", listing),
        Route("/pay/{id}", paying),
    ]
)

if __name__ == "__main__":
    serve(app)
