"""Akash's Console API as a server in its own process: orders, bids, leases, providers of every kind, and every documented failure.

Creating is not idempotent, the list omits the leases' status, a manifest comes from create alone. What a lease starts is, when ``bots``
is on, the local driver's bot as a real process with the environment of the SDL; otherwise a page of this server.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.deployment_svc.markets import bot
from tests.simulators.market import NO_TLS, Faults, Json, SimulatorProcess, cut, never, serve

KEY = "ac.sk.test." + "0" * 64
OWNER = "akash1owner"
_numbers = itertools.count(int(time.time() * 1000))


@dataclass
class Placed:
    """A deployment as the chain and the Console keep it."""

    dseq: str
    name: str | None
    sdl: Json
    manifest: str
    state: str = "active"
    lease: Json | None = None
    leased_at: float = 0
    touched: bool = False
    """Whether anybody but its owner has done something to it."""
    process: "subprocess.Popen[bytes] | None" = None
    url: str = ""

    @property
    def denom(self) -> str:
        placement = next(iter(self.sdl["profiles"]["placement"].values()))
        return str(placement["pricing"]["bot"]["denom"])

    @property
    def env(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.sdl["services"]["bot"]["env"])


@dataclass
class World:
    """Everything that this Akash knows."""

    placed: dict[str, Placed] = field(default_factory=dict)
    providers: dict[str, Json] = field(default_factory=lambda: {f"akash1p{n}": {"price": f"{n}.5"} for n in range(1, 6)})
    faults: Faults = field(default_factory=Faults)
    log: list[Json] = field(default_factory=list)
    leases: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    bots: bool = False
    null_names: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="akash-simulator-")))

    def running(self, name: str | None) -> int:
        return sum(one.name == name and one.lease is not None and one.lease["state"] == "active" for one in self.placed.values())

    def close(self, one: Placed, reason: str = "lease_closed_owner") -> None:
        one.state = "closed"
        self.end_lease(one, reason)

    def end_lease(self, one: Placed, reason: str) -> None:
        if one.lease is not None and one.lease["state"] == "active":
            one.lease |= {"state": "closed", "reason": reason, "closed_on": "1"}
        if one.process is not None:
            one.process.kill()
            one.process.wait()
            one.process = None

    def start(self, one: Placed) -> None:
        """Runs the bot with what the SDL says."""
        env = one.env
        home = self.folder / one.dseq
        home.mkdir()
        given = {
            "start_id": one.dseq, "deployment_id": env["CLAWPLANE_DEPLOYMENT_ID"], "model": env["MODEL_ID"], "channel": env["CLAWPLANE_CHANNEL"],
            "base_url": env["BASE_URL"], "api_key": env["API_KEY"], "channel_token": "", "channel_api_key": "",
        }  # fmt: skip
        one.process = subprocess.Popen([sys.executable, "-I", bot.__file__, str(home)], stdin=subprocess.PIPE)
        assert one.process.stdin is not None
        one.process.stdin.write(json.dumps(given).encode() + b"\n")
        one.process.stdin.close()

    def url_of(self, one: Placed, base: str) -> str:
        if not self.bots:
            return f"{base.removeprefix('http://')}bots/{one.dseq}"
        with suppress(FileNotFoundError, ValueError):
            return f"127.0.0.1:{json.loads((self.folder / one.dseq / 'bot.json').read_text())['port']}"
        return ""


world = World()


def wrong(status: int, message: str, code: str = "", **headers: str) -> Response:
    """An error as the Console writes it."""
    body = {"error": "Error", "message": message, "code": code, "type": "error"} | ({"errorCode": code} if code else {})
    return JSONResponse(body, status, headers)


def chain(one: Placed, base: str, *, with_status: bool) -> Json:
    """A deployment as reads show it."""
    leases = []
    if one.lease is not None:
        shown = {name: value for name, value in one.lease.items() if name != "provider"}
        if with_status:
            shown["status"] = _status(one, base) if one.lease["state"] == "active" else None
        leases.append(shown)
    return {
        "deployment": {"id": {"owner": OWNER, "dseq": one.dseq}, "state": one.state, "hash": "x", "created_at": "1"},
        "leases": leases, "name": None if world.null_names else one.name,
        "escrow_account": {"state": {"state": "open" if one.state == "active" else "closed", "funds": [{"denom": "uusdc", "amount": "5000000.0"}]}},
    }  # fmt: skip


def _status(one: Placed, base: str) -> Json:
    provider = world.providers.get(one.lease["provider"], {}) if one.lease else {}
    ready = not provider.get("never_ready") and time.time() - one.leased_at >= float(provider.get("ready_s", 0))
    url = world.url_of(one, base)
    service = {"name": "bot", "uris": [url] if url else [], "ready_replicas": int(ready), "replicas": 1, "total": 1, "available": int(ready)}
    return {"services": {"bot": service}, "forwarded_ports": {}, "ips": {}}


def create(body: Json) -> Response:
    """A new deployment under a new dseq, always."""
    data = body["data"]
    try:
        sdl = yaml.safe_load(data["sdl"])
        placement = next(iter(sdl["profiles"]["placement"]))
        assert sdl["version"] == "2.0" and sdl["deployment"]["bot"][placement]["count"] == 1
    except (yaml.YAMLError, KeyError, TypeError, AssertionError):
        # As some do, it quotes what it was sent.
        return wrong(400, f"Invalid SDL: {data.get('sdl', '')}", "validation_error")
    dseq = str(next(_numbers))
    one = world.placed[dseq] = Placed(dseq, data.get("name"), sdl, json.dumps([{"name": placement, "services": sdl["services"], "n": dseq}]))
    return JSONResponse({"data": {"dseq": dseq, "manifest": one.manifest, "signTx": {"code": 0, "transactionHash": "x", "rawLog": ""}}}, 201)


def bids(dseq: str) -> Response:
    """Everybody's bids; one more in another currency."""
    one = world.placed.get(dseq)
    if one is None:
        return wrong(404, "Deployment not found")
    found = []
    for address, provider in world.providers.items():
        if not provider.get("offers", True):
            continue
        state = "open" if one.lease is None and one.state == "active" else "closed"
        for number, denom in enumerate((one.denom, "uakt")):
            bid = {
                "id": {"owner": OWNER, "dseq": dseq, "gseq": 1, "oseq": 1, "provider": address, "bseq": number},
                "state": provider.get("bid_state", state), "created_at": "1",
                "price": {"denom": denom, "amount": str(provider.get("price", "1.0")) if number == 0 else "0.000000000000000001"},
            }  # fmt: skip
            found.append({"bid": bid, "escrow_account": {}})
    return JSONResponse({"data": found})


def lease(body: Json, base: str) -> Response:
    """Takes a bid and sends the manifest; again it changes nothing."""
    wanted = body["leases"][0]
    one = world.placed.get(wanted["dseq"])
    if one is None or one.state != "active":
        return wrong(404, "Deployment not found")
    provider = world.providers.get(wanted["provider"])
    if body["manifest"] != one.manifest:
        return wrong(400, "Invalid manifest", "validation_error")
    if one.lease is None:
        if provider is None or provider.get("refuses"):
            return wrong(409, "The bid is not open", "bid_closed")
        one.lease = {
            "id": {"owner": OWNER, "dseq": one.dseq, "gseq": 1, "oseq": 1, "provider": wanted["provider"], "bseq": 0}, "state": "active",
            "price": {"denom": one.denom, "amount": "1"}, "created_at": "1", "closed_on": "0", "provider": wanted["provider"],
        }  # fmt: skip
        one.leased_at = time.time()
        world.leases[str(one.name)] += 1
        world.peaks[str(one.name)] = max(world.peaks[str(one.name)], world.running(one.name))
        if provider.get("takes_no_manifest"):
            return wrong(503, f"The lease exists, but provider {wanted['provider']} did not receive its manifest", "manifest_not_delivered")
        if world.bots and not provider.get("never_ready"):
            world.start(one)
    return JSONResponse({"data": chain(one, base, with_status=False)})


def providers() -> Response:
    """The list, which has no wrapper."""
    return JSONResponse(
        [
            {"owner": address, "uptime7d": one.get("uptime"), "isAudited": one.get("audited"), "isOnline": one.get("online", True)}
            for address, one in world.providers.items()
        ]
    )


def listing(request: Request) -> Response:
    """A page of the account's deployments."""
    skip, limit = int(request.query_params.get("skip", 0)), int(request.query_params.get("limit", 1000))
    every = list(world.placed.values())
    page = [chain(one, str(request.base_url), with_status=False) for one in every[skip : skip + limit]]
    pagination = {"total": len(every), "skip": skip, "limit": limit, "hasMore": skip + limit < len(every)}
    return JSONResponse({"data": {"deployments": page, "pagination": pagination}})


def perform(call: str, request: Request, body: Json) -> Response:
    """Does what was asked."""
    one = world.placed.get(request.path_params.get("dseq", ""))
    for placed in world.placed.values():
        provider = world.providers.get(placed.lease["provider"], {}) if placed.lease else {}
        if provider.get("dies_s") and placed.lease and time.time() - placed.leased_at > float(provider["dies_s"]):
            world.end_lease(placed, "lease_closed_provider")
    match call:
        case "create":
            return create(body)
        case "list":
            return listing(request)
        case "bids":
            return bids(request.query_params["dseq"])
        case "lease":
            return lease(body, str(request.base_url))
        case "providers":
            return providers()
    if one is None:
        return wrong(404, "Deployment not found")
    if call == "close":
        one.touched = one.touched or not str(one.name).startswith("clawplane-dep_")
        world.close(one)
        return JSONResponse({"data": {"success": True}})
    return JSONResponse({"data": chain(one, str(request.base_url), with_status=True)})


async def api(call: str, request: Request) -> Response:
    """Every call: checks the key, logs it, breaks where a fault is armed."""
    body = await request.json() if request.method == "POST" else {}
    dseq = request.path_params.get("dseq") or request.query_params.get("dseq") or next((one["dseq"] for one in body.get("leases", [])), "")
    name = body.get("data", {}).get("name") or (world.placed[dseq].name if dseq in world.placed else "") or ""
    if request.headers.get("x-api-key") != KEY or "authorization" in request.headers:
        return wrong(401, "Unauthorized", "unauthorized")
    fault = world.faults.take(call, name)
    kind = fault.get("kind", "")
    entry = {"at": time.time(), "call": call, "name": name, "dseq": dseq, "fault": kind, "status": 0, "provider": ""}
    if call == "lease":
        entry["provider"] = body["leases"][0]["provider"]
    world.log.append(entry)
    if kind == "hang":
        return await never(request)
    if kind == "cut":
        await cut(request)
        return Response()
    if kind == "html":
        return Response("<!doctype html><title>502 Bad gateway</title>", 502, media_type="text/html")
    if kind == "html_200":
        return Response("<!doctype html><title>Console</title>", 200, media_type="text/html")
    if kind == "status":
        headers = {"Retry-After": "1"} if fault["status"] == 429 else {}
        return wrong(fault["status"], fault.get("message", "simulated"), fault.get("code", ""), **headers)
    answer = JSONResponse({"data": []}) if kind == "no_bids" else perform(call, request, body)
    entry["status"] = answer.status_code
    if kind == "lost":
        await cut(request)
    if kind == "lost_slowly":
        return await never(request)
    return answer


async def bot_page(request: Request) -> Response:
    """What a bot answers when it is a page of this server."""
    one = world.placed.get(request.path_params["dseq"])
    alive = one is not None and one.lease is not None and one.lease["state"] == "active"
    return Response("a bot" if alive else "gone", 200 if alive else 502)


async def control(request: Request) -> Response:
    """POST /_sim/{faults|calm|providers|settings|kill|strangers|reset}."""
    what, query = request.path_params["what"], request.query_params
    body: Any = await request.json() if await request.body() else {}
    match what:
        case "faults":
            world.faults.arm(body["call"], body)
        case "calm":
            world.faults = Faults()
        case "providers":
            world.providers = body
        case "settings":
            world.bots, world.null_names = body.get("bots", world.bots), body.get("null_names", world.null_names)
        case "kill":
            for one in world.placed.values():
                if one.name == query["name"]:
                    world.end_lease(one, query.get("reason", "lease_closed_provider"))
        case "strangers":
            sdl = {"services": {}, "profiles": {"placement": {"x": {"pricing": {"bot": {"denom": "uakt"}}}}}}
            for name in body["names"]:
                dseq = str(next(_numbers))
                world.placed[dseq] = Placed(dseq, name, sdl, "theirs", touched=False)
        case "reset":
            for one in world.placed.values():
                world.close(one)
            world.__init__()  # type: ignore[misc]
    return JSONResponse({})


async def shown(request: Request) -> Response:
    """GET /_sim/{log|orders|peaks|leases}."""
    match request.path_params["what"]:
        case "log":
            return JSONResponse(world.log)
        case "peaks":
            return JSONResponse(world.peaks)
        case "leases":
            return JSONResponse(world.leases)
    return JSONResponse(
        [
            {"dseq": one.dseq, "name": one.name, "state": one.state, "touched": one.touched, "sdl": one.sdl, "lease": one.lease}
            for one in world.placed.values()
        ]
    )


CALLS = [
    ("create", "POST", "/v1/deployments"),
    ("list", "GET", "/v1/deployments"),
    ("bids", "GET", "/v1/bids"),
    ("lease", "POST", "/v1/leases"),
    ("providers", "GET", "/v1/providers"),
    ("observe", "GET", "/v1/deployments/{dseq}"),
    ("close", "DELETE", "/v1/deployments/{dseq}"),
]
app = Starlette(
    routes=[
        *(Route(path, partial(api, call), methods=[method]) for call, method, path in CALLS),
        Route("/bots/{dseq}", bot_page),
        Route("/bots/{dseq}/", bot_page),
        Route("/_sim/{what}", control, methods=["POST"]),
        Route("/_sim/{what}", shown),
    ]
)


class AkashSimulator(SimulatorProcess):
    """The running simulator."""

    module = "tests.simulators.akash"

    def stop(self) -> None:
        # Its bots are processes of their own.
        with suppress(httpx.HTTPError):
            httpx.post(f"{self.url}/_sim/reset", trust_env=False, verify=NO_TLS, timeout=10)
        super().stop()

    def settings(self) -> Json:
        """What puts a deployment service on it."""
        return {
            "driver": "akash", "akash_api_key": KEY, "akash_api_base": self.url,
            "akash_bot": {"image": "registry.example/bot:1.2.3"}, "bid_window_s": 0.2,
        }  # fmt: skip


if __name__ == "__main__":
    serve(app)
