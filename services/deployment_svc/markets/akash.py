"""The ``akash`` driver: bots on Akash's network, by the Console API.

Creating is not idempotent there, so an order carries our name, and only what carries it is ever ours: a name that the Console does
not tell belongs to somebody else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import httpx
import structlog

from services.deployment_svc.markets.console import Console
from services.deployment_svc.markets.driver import Lease, Observation, Offer, Order, ProviderError, Secrets, Spec
from services.deployment_svc.markets.sdl import BotTemplate, document
from services.kit.coalesce import Loader

log = structlog.get_logger()
_PAGE = 200
_MICRO = Decimal(1_000_000)
_PROVIDERS_KEPT_S, _PROVIDERS_RETRY_S = 300.0, 30.0


@dataclass(frozen=True)
class _Facts:
    """What the Console tells of a provider."""

    uptime: Decimal | None = None
    audited: bool | None = None
    online: bool = True


class AkashDriver:
    """Implements Driver. ``model_url`` is what bots get as BASE_URL; ``block_s`` how long one of Akash's blocks takes."""

    name = "akash"

    def __init__(
        self, console: Console, template: BotTemplate, model_url: str, *, block_s: Decimal, deposit_usd: Decimal, health_path: str
    ) -> None:
        self.console, self.template, self.model_url = console, template, model_url
        self._blocks_an_hour, self._deposit_usd, self._health_path = Decimal(3600) / block_s, deposit_usd, health_path
        self._by_name = Loader(self._list)
        self._providers: dict[str, _Facts] = {}
        self._providers_until = 0.0
        # What a provider serves may have a certificate of its own making; the look is only whether something answers.
        self._http = httpx.AsyncClient(trust_env=False, timeout=10, verify=False, follow_redirects=False)  # noqa: S501

    async def create(self, spec: Spec, secrets: Secrets, start_id: str) -> Order:
        sdl = document(self.template, spec, secrets, self.model_url)
        data: dict[str, Any] = {"sdl": sdl, "name": spec.name}
        if self._deposit_usd:
            data["deposit"] = float(self._deposit_usd)
        hidden = (secrets.claw_key, secrets.channel_token, secrets.channel_api_key)
        made = await self.console.ask("create", "POST", "/v1/deployments", body={"data": data}, secrets=hidden)
        try:
            return Order(str(made["dseq"]), spec.name, str(made["manifest"]))
        except (KeyError, TypeError):
            raise _unexpected("create") from None

    async def find(self, name: str) -> list[str]:
        return await self._by_name(name) or []

    async def _list(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The live orders of each name: one walk through the account's deployments for all who ask at once."""
        found: dict[str, list[str]] = {name: [] for name in names}
        skip = 0
        while True:
            page = await self.console.ask("list", "GET", "/v1/deployments", query={"skip": skip, "limit": _PAGE})
            try:
                for item in page["deployments"]:
                    order, name = item["deployment"], item.get("name")
                    if name in found and order["state"] == "active":
                        found[name].append(str(order["id"]["dseq"]))
                if not page["pagination"]["hasMore"]:
                    return found
            except (KeyError, TypeError):
                raise _unexpected("list") from None
            skip += _PAGE

    async def offers(self, order: Order) -> list[Offer]:
        bids = await self.console.ask("bids", "GET", "/v1/bids", query={"dseq": order.id})
        facts = await self._provider_facts() if bids else {}
        offers: dict[str, Offer] = {}
        try:
            for item in bids:
                bid = item["bid"]
                if bid["state"] != "open" or bid["price"]["denom"] != self.template.price_denom:
                    continue
                provider, amount = str(bid["id"]["provider"]), Decimal(str(bid["price"]["amount"]))
                known = facts.get(provider, _Facts())
                offer = Offer(
                    provider, amount / _MICRO * self._blocks_an_hour, known.uptime, f"{bid['id']['gseq']}/{bid['id']['oseq']}",
                    known.audited, known.online,
                )  # fmt: skip
                # A provider that has made two offers is held to the cheaper one.
                if provider not in offers or offer.price < offers[provider].price:
                    offers[provider] = offer
        except (KeyError, TypeError, InvalidOperation):
            raise _unexpected("bids") from None
        return list(offers.values())

    async def _provider_facts(self) -> dict[str, _Facts]:
        """Uptime, audit and whether online, by address. A choice can be made without: then the last known ones are used."""
        if time.monotonic() < self._providers_until:
            return self._providers
        # Whoever comes while we ask goes on with what is known.
        self._providers_until = time.monotonic() + _PROVIDERS_RETRY_S
        try:
            found = await self.console.ask("providers", "GET", "/v1/providers")
            self._providers = {str(one["owner"]): _facts(one) for one in found}
            self._providers_until = time.monotonic() + _PROVIDERS_KEPT_S
        except (ProviderError, KeyError, TypeError) as error:
            log.warning("akash.providers_unknown", error=str(error))
        return self._providers

    async def lease(self, order: Order, offer: Offer) -> Lease:
        if not order.manifest:
            raise ProviderError("the order's manifest is lost", "order")
        try:
            gseq, oseq = (int(part) for part in offer.reference.split("/"))
        except ValueError:
            raise ProviderError("the offer's name is lost", "order") from None
        wanted = {"dseq": order.id, "gseq": gseq, "oseq": oseq, "provider": offer.provider}
        body = {"manifest": order.manifest, "leases": [wanted]}
        answer = await self.console.ask("lease", "POST", "/v1/leases", body=body, secrets=(order.manifest,))
        for lease in _leases(answer):
            if lease["state"] == "active" and lease["id"]["provider"] == offer.provider:
                return Lease(_lease_id(lease), offer.provider)
        raise ProviderError(f"{offer.provider} holds no lease after it was made", "order")

    async def observe(self, order_id: str) -> Observation:
        try:
            found = await self.console.ask("observe", "GET", f"/v1/deployments/{order_id}")
        except ProviderError as error:
            if error.blame == "order":
                return Observation("absent", reason="Akash knows the order no more", is_ours=True)
            raise
        try:
            return await self._judge(found)
        except (KeyError, TypeError, AttributeError):
            raise _unexpected("observe") from None

    async def _judge(self, found: Any) -> Observation:
        leases = _leases(found)
        live = next((lease for lease in leases if lease["state"] == "active"), None)
        if live is None:
            if not leases:
                return Observation("ordered" if found["deployment"]["state"] == "active" else "absent", is_ours=True)
            last = leases[-1]
            why = str(last.get("reason") or last["state"])
            # Only the provider's own end of a lease is the provider's fault.
            ours = found["deployment"]["state"] != "active" or "owner" in why or "insufficient" in why
            return Observation("lost", reason=f"its lease has ended: {why}", is_ours=ours)
        about: dict[str, Any] = {"lease_id": _lease_id(live), "provider": str(live["id"]["provider"])}
        services = (live.get("status") or {}).get("services") or {}
        for service in services.values():
            uris = service.get("uris") or []
            if uris and int(service.get("ready_replicas") or 0) >= 1:
                url = uris[0] if "://" in uris[0] else f"http://{uris[0]}"
                if await self._answers(url):
                    return Observation("ready", url=url, **about)
        return Observation("starting", **about)

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._http.get(url.rstrip("/") + self._health_path)).status_code < 500
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    async def close(self, order_id: str) -> None:
        try:
            await self.console.ask("close", "DELETE", f"/v1/deployments/{order_id}")
        except ProviderError as error:
            if error.blame != "order":
                raise

    async def shutdown(self) -> None:
        await self.console.close()
        await self._http.aclose()


def _facts(provider: dict[str, Any]) -> _Facts:
    uptime = provider.get("uptime7d")
    return _Facts(
        None if uptime is None else Decimal(str(uptime)),
        None if provider.get("isAudited") is None else bool(provider["isAudited"]),
        provider.get("isOnline") is not False,
    )


def _leases(found: Any) -> list[dict[str, Any]]:
    try:
        return list(found["leases"])
    except (KeyError, TypeError):
        raise _unexpected("leases") from None


def _lease_id(lease: dict[str, Any]) -> str:
    """owner/dseq/gseq/oseq/provider, as the network writes it."""
    return "/".join(str(lease["id"][part]) for part in ("owner", "dseq", "gseq", "oseq", "provider"))


def _unexpected(call: str) -> ProviderError:
    log.warning("akash.failed", call=call, error="unexpected answer")
    return ProviderError("Akash did not answer as expected")
