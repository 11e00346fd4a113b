"""A counting market of providers as a server in its own process, its driver, and what every simulator runs by."""

import argparse
import asyncio
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.deployment_svc.markets.driver import Lease, Observation, Offer, Order, ProviderError, Secrets, Spec

Json = dict[str, Any]
# Plain HTTP only; httpx's own context would read a file of certificates for every client.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Faults:
    """Armed faults; each is used for ``times`` (1) matching calls after letting ``skip`` (0) pass. With ``name`` only for calls about it."""

    def __init__(self) -> None:
        self._armed: list[tuple[str, Json]] = []

    def arm(self, pattern: str, fault: Json) -> None:
        self._armed.append((pattern, {"times": 1, "skip": 0} | fault))

    def take(self, call: str, about: str = "") -> Json:
        """The fault for this call, or nothing."""
        self._armed = [one for one in self._armed if one[1]["times"] > 0]
        for pattern, fault in self._armed:
            if fnmatchcase(call, pattern) and fault.get("name", about) == about:
                if fault["skip"] > 0:
                    fault["skip"] -= 1
                    return {}
                fault["times"] -= 1
                return fault
        return {}


async def cut(request: Request) -> None:
    """Closes the connection with no answer."""
    # ASGI knows no such thing: the bound receive of uvicorn is the only way to its transport.
    cast(Any, request.receive).__self__.transport.abort()
    await asyncio.sleep(0.01)


async def never(request: Request) -> Response:
    """Holds the connection until the client gives up; the answer goes nowhere."""
    await request.body()
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response()


def serve(app: Starlette) -> None:
    """The command line of a simulator: serves on 127.0.0.1 until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="end when stdin closes")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", options.port), backlog=1024)
    if options.with_parent:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    if options.ready_file:
        # Renamed, so that a reader never sees half a number.
        part = options.ready_file.with_suffix(".part")
        part.write_text(str(listener.getsockname()[1]))
        part.rename(options.ready_file)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_keep_alive=300, backlog=1024)
    uvicorn.Server(config).run(sockets=[listener])


class SimulatorProcess:
    """A simulator in its own process, started by the constructor; ends with ``stop()``, the ``with`` block, or this process."""

    module: ClassVar[str]

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "port"
            command = [sys.executable, "-m", self.module, "--port", "0", "--ready-file", str(ready), "--with-parent"]
            self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE)
            deadline = time.monotonic() + 30
            while not ready.exists():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"{self.module} did not start")
                time.sleep(0.01)
            self.url = f"http://127.0.0.1:{ready.read_text()}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        cast(Any, self._process.stdin).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        self.stop()

    async def post(self, path: str, body: Json | None = None, **query: Any) -> Any:
        return await self._ask("POST", path, body, query)

    async def get(self, path: str, **query: Any) -> Any:
        return await self._ask("GET", path, None, query)

    async def _ask(self, method: str, path: str, body: Json | None, query: Json) -> Any:
        async with httpx.AsyncClient(trust_env=False, verify=NO_TLS, timeout=10) as http:
            response = await http.request(method, self.url + path, json=body, params=query)
            response.raise_for_status()
            return response.json()


class MarketDriver:
    """A Driver of the simulated market. ``timeout_s`` bounds every call."""

    name = "market"

    def __init__(self, url: str, timeout_s: float = 5) -> None:
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, verify=NO_TLS, timeout=timeout_s)
        # httpx walks its whole queue for every request, so the queue is kept here.
        self._turn = asyncio.Semaphore(20)

    async def create(self, spec: Spec, secrets: Secrets, start_id: str) -> Order:
        body = {"name": spec.name, "spec": asdict(spec), "secrets": asdict(secrets), "start_id": start_id}
        placed = await self._call("POST", "/orders", body)
        return Order(placed["id"], placed["name"], placed["manifest"])

    async def find(self, name: str) -> list[str]:
        return [one["id"] for one in await self._call("GET", "/orders", name=name)]

    async def offers(self, order: Order) -> list[Offer]:
        bids = await self._call("GET", f"/orders/{order.id}/bids")
        uptimes = [None if bid["uptime"] is None else Decimal(bid["uptime"]) for bid in bids]
        return [Offer(bid["provider"], Decimal(bid["price"]), up, bid["id"]) for bid, up in zip(bids, uptimes, strict=True)]

    async def lease(self, order: Order, offer: Offer) -> Lease:
        body = {"provider": offer.provider, "manifest": order.manifest}
        lease = await self._call("POST", f"/orders/{order.id}/lease", body)
        return Lease(lease["id"], lease["provider"])

    async def observe(self, order_id: str) -> Observation:
        return Observation(**await self._call("GET", f"/orders/{order_id}"))

    async def close(self, order_id: str) -> None:
        await self._call("DELETE", f"/orders/{order_id}")

    async def shutdown(self) -> None:
        await self._http.aclose()

    async def _call(self, method: str, path: str, body: Json | None = None, **query: str) -> Any:
        try:
            async with self._turn:
                response = await self._http.request(method, path, json=body, params=query or None)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ProviderError(f"{method} {path}: {type(error).__name__}", "market") from error
        if response.is_success:
            return answer
        text = f"{method} {path}: {response.status_code} {answer.get('error')}"
        if response.status_code >= 500 or response.status_code == 429:
            raise ProviderError(text, "market", float(response.headers.get("retry-after", 0)))
        raise ProviderError(text, "provider" if answer.get("error") == "refused" else "request")


@dataclass
class Placed:
    """An order as the market keeps it; ``state`` is open, leased, lost or closed."""

    id: str
    name: str
    manifest: str
    spec: Json
    secrets: Json
    start_id: str
    state: str = "open"
    lease: Json | None = None
    starts: int = 0

    def public(self) -> Json:
        return {"id": self.id, "name": self.name, "manifest": self.manifest, "state": self.state}


@dataclass
class Market:
    """Everything that the market knows; times in seconds since the epoch."""

    orders: dict[str, Placed] = field(default_factory=dict)
    live: dict[str, dict[str, Placed]] = field(default_factory=dict)
    providers: dict[str, Json] = field(default_factory=lambda: {f"p{n}": {"price": f"0.0{n}"} for n in range(1, 6)})
    starts: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    log: list[Json] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    ready_delay: float = 0

    def running(self, name: str) -> int:
        return sum(order.state == "leased" for order in self.live.get(name, {}).values())

    def create(self, body: Json) -> Placed:
        number = len(self.orders) + 1
        order = Placed(f"order-{number}", body["name"], f"manifest-{number}", body["spec"], body["secrets"], body["start_id"])
        self.orders[order.id] = order
        self.live.setdefault(order.name, {})[order.id] = order
        return order

    def offers(self, order: Placed) -> list[Json]:
        bidding = [(name, one) for name, one in self.providers.items() if one.get("offers", True)] if order.state == "open" else []
        return [
            {"id": f"{order.id}/{name}", "provider": name, "price": one.get("price", "0.01"), "uptime": one.get("uptime")}
            for name, one in bidding
        ]

    def lease(self, order: Placed, body: Json) -> tuple[int, Json]:
        if order.state == "leased" and order.lease:
            return 200, order.lease
        provider = self.providers.get(body["provider"])
        if order.state != "open" or provider is None or body["manifest"] != order.manifest:
            return 400, {"error": f"order is {order.state}, or unknown provider, or wrong manifest"}
        if provider.get("lease_fails"):
            return 409, {"error": "refused"}
        order.starts += 1
        order.state = "leased"
        order.lease = {"id": f"lease-{order.id}", "provider": body["provider"], "start_id": order.start_id, "at": time.time()}
        self.starts[order.name] += 1
        self.peaks[order.name] = max(self.peaks[order.name], self.running(order.name))
        return 200, order.lease

    def observe(self, order: Placed | None) -> Json:
        if order is None or order.state == "closed":
            return {"phase": "absent"}
        if order.lease is None:
            return {"phase": "ordered"}
        known = {"lease_id": order.lease["id"], "provider": order.lease["provider"], "start_id": order.lease["start_id"]}
        if order.state == "lost":
            return known | {"phase": "lost", "reason": "the provider's host died"}
        late = time.time() < order.lease["at"] + self.ready_delay
        if late or self.providers.get(order.lease["provider"], {}).get("never_ready"):
            return known | {"phase": "starting"}
        return known | {"phase": "ready", "url": f"http://{order.id}.market.test"}

    def close(self, order: Placed | None) -> None:
        if order is not None:
            order.state = "closed"
            self.live[order.name].pop(order.id, None)


market = Market()


def perform(step: str, order: Placed | None, body: Json, name: str, bids: bool) -> tuple[int, Any]:
    """Does a step: status and answer."""
    match step:
        case "create":
            return 201, market.create(body).public()
        case "find":
            return 200, [one.public() for one in market.live.get(name, {}).values()]
        case "observe":
            return 200, market.observe(order)
        case "close":
            market.close(order)
            return 200, {}
    if order is None or order.state == "closed":
        return 404, {"error": "no such order"}
    return market.lease(order, body) if step == "lease" else (200, market.offers(order) if bids else [])


async def api(step: str, request: Request) -> Response:
    """Every call of a driver: logs it, does it, and breaks where a fault is armed."""
    body = await request.json() if request.method == "POST" else {}
    order = market.orders.get(request.path_params.get("id", ""))
    name = order.name if order else body.get("name", request.query_params.get("name", ""))
    fault = market.faults.take(step, name)
    kind = fault.get("kind", "")
    entry: Json = {"at": time.time(), "step": step, "name": name, "order": order.id if order else "", "fault": kind, "status": 0}
    entry |= {one: body[one] for one in ("provider", "start_id") if one in body}
    market.log.append(entry)
    if kind == "hang":
        return await never(request)
    if kind == "error":
        status, answer = 503, {"error": "unavailable"}
    elif kind == "refuse":
        status, answer = (409, {"error": "refused"}) if step == "lease" else (400, {"error": "bad request"})
    else:
        status, answer = perform(step, order, body, name, kind != "no_bids")
    entry |= {"status": status, "order": answer["id"] if status == 201 else entry["order"]}
    if kind == "drop_after":
        await cut(request)
    if kind == "hang_after":
        return await never(request)
    return JSONResponse(answer, status)


async def control(request: Request) -> Response:
    """POST /_sim/{faults|calm|providers|settings|kill|reset}; GET reset too. ``calm`` ends all faults."""
    what, query = request.path_params["what"], request.query_params
    body = await request.json() if await request.body() else {}
    match what:
        case "faults":
            market.faults.arm(body["step"], body)
        case "calm":
            market.faults = Faults()
        case "providers":
            market.providers = body
        case "settings":
            market.ready_delay = float(body["ready_delay"])
        case "kill":
            dying = [one for one in market.live.get(query["name"], {}).values() if one.state == "leased"]
            for order in dying:
                order.state = "lost"
            return JSONResponse({"killed": [order.id for order in dying]})
        case "reset":
            market.__init__()  # type: ignore[misc]
        case _:
            return JSONResponse({"error": "no such control"}, 404)
    return JSONResponse({})


async def shown(request: Request) -> Response:
    """GET /_sim/{log|starts|peaks|running|orders}; ``peaks`` is the most leases that a name had at one time."""
    views: dict[str, Callable[[], Any]] = {
        "log": lambda: market.log,
        "starts": lambda: market.starts,
        "peaks": lambda: market.peaks,
        "running": lambda: {name: market.running(name) for name in market.live},
        "orders": lambda: [asdict(order) for order in market.orders.values()],
    }
    what = request.path_params["what"]
    if what == "reset":
        return await control(request)
    return JSONResponse(views[what]()) if what in views else JSONResponse({"error": "no such view"}, 404)


STEPS = [
    ("create", "POST", "/orders"),
    ("find", "GET", "/orders"),
    ("offers", "GET", "/orders/{id}/bids"),
    ("lease", "POST", "/orders/{id}/lease"),
    ("observe", "GET", "/orders/{id}"),
    ("close", "DELETE", "/orders/{id}"),
]
app = Starlette(
    routes=[
        *(Route(path, partial(api, step), methods=[method]) for step, method, path in STEPS),
        Route("/_sim/{what}", control, methods=["POST"]),
        Route("/_sim/{what}", shown),
    ]
)


class MarketSimulator(SimulatorProcess):
    """The running market: ``MarketDriver(simulator.url)`` speaks to it."""

    module = "tests.simulators.market"


if __name__ == "__main__":
    serve(app)
