"""The demo's other world: bots on a simulated Akash that fails, paid at a simulated Polar. The simulators are in the source tree."""

import importlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2

if TYPE_CHECKING:
    from services.demo import Demo

_PACE = {"BID_WINDOW_S": "0.5", "BID_TIMEOUT_S": "20", "READY_TIMEOUT_S": "20", "WATCH_S": "1", "STEP_TIMEOUT_S": "3", "BACKOFF_S": "0.3"}
_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("create", {"kind": "lost"}, "an order's answer was lost"),
    ("bids", {"kind": "status", "status": 503}, "bids answered 503"),
    ("lease", {"kind": "status", "status": 429}, "a lease answered 429"),
    ("observe", {"kind": "html"}, "a look at a lease answered a page of HTML"),
    ("list", {"kind": "cut"}, "a list broke off"),
]


class Akash:
    """The simulators, and what a customer or an operator sees of them."""

    def __init__(self, akash: Any, polar: Any, names: Any) -> None:
        self.akash, self.polar, self._names = akash, polar, names

    def env(self) -> dict[str, str]:
        """The settings that put a stack on them."""
        ours = {
            "DRIVER": "akash", "AKASH_API_KEY": self._names["key"], "AKASH_API_BASE": self.akash.url,
            "AKASH_BOT": json.dumps({"image": "registry.example/bot:1.2.3"}), "PAYMENT_PROVIDER": "polar",
            "POLAR_ACCESS_TOKEN": self._names["token"], "POLAR_PRODUCT_ID": self._names["product"], "POLAR_API_BASE": self.polar.url,
            "POLAR_WEBHOOK_SECRETS": json.dumps([self._names["secret"]]), **_PACE,
        }  # fmt: skip
        return {f"CLAWPLANE_{name}": value for name, value in ours.items()}

    async def prepare(self, demo: "Demo") -> None:
        """Strangers on the account, bad providers, and faults for whoever comes first."""
        await self.polar.do("webhooks", url=f"{demo.where.http}/webhooks/polar")
        await self.akash.post("/_sim/settings", {"bots": True})
        await self.akash.post("/_sim/strangers", {"names": [None, "somebody-else"]})
        bad = {"akash1a": {"price": "1.1", "refuses": True}, "akash1b": {"price": "1.2", "takes_no_manifest": True}}
        good = {f"akash1{name}": {"price": f"{price}.5", "uptime": 0.99, "audited": True} for price, name in enumerate("cde", 2)}
        await self.akash.post("/_sim/providers", bad | good)
        for call, fault, _ in _FAULTS:
            await self.akash.post("/_sim/faults", {"call": call} | fault)

    async def pay(self, d: dict[str, Any]) -> str:
        """Pays at Polar: what to say of it."""
        said = await self.polar.do("succeed", id=d["paymentUrl"].rsplit("/", 1)[1])
        if set(said) != {200}:
            raise RuntimeError(f"the webhooks were answered with {said}")
        return "paid at the simulated Polar; its signed webhooks went through the gateway"

    async def report(self, demo: "Demo", live: deployment_pb2.Deployment) -> None:
        """What Akash did to the first bot, and what became of it."""
        met = {one["fault"] for one in await self.akash.get("/_sim/log")}
        for _, fault, words in _FAULTS:
            demo.check(fault["kind"] in met, f"fault: {words}")
        listed = deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=live.id, page_size=250)
        events = (await demo.deployments.ListDeploymentEvents(listed, metadata=demo.operator)).events
        for event in events:
            if event.kind in ("attempt.failed", "provider.chosen"):
                demo.say(f"event: {event.kind}: {event.message}")
        orders = [one for one in await self.akash.get("/_sim/orders") if one["name"] == f"clawplane-{live.id}"]
        active = [one for one in orders if one["state"] == "active"]
        demo.check(len(active) == 1, f"one lease runs; {len(orders) - 1} other orders of it were closed, none is left open")

    async def close(self, demo: "Demo") -> None:
        """After everything was closed."""
        left = [one for one in await self.akash.get("/_sim/orders") if one["state"] == "active"]
        strangers = {one["name"] for one in left}
        untouched = strangers == {None, "somebody-else"} and not any(one["touched"] for one in left)
        demo.check(untouched, "only strangers' orders are left, untouched")


@asynccontextmanager
async def simulators() -> AsyncIterator[Akash]:
    """Both, as processes; ImportError where the source tree is not."""
    akash, polar = importlib.import_module("tests.simulators.akash"), importlib.import_module("tests.simulators.polar")
    names = {"key": akash.KEY, "token": polar.TOKEN, "product": polar.PRODUCT, "secret": polar.SECRET}
    with akash.AkashSimulator() as market, polar.PolarSimulator() as shop:
        try:
            yield Akash(market, shop, names)
        finally:
            await market.post("/_sim/reset")
