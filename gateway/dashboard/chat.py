"""A chat with one's own bot, to try it. Nothing of it is stored: the page carries what was said."""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from starlette.responses import Response

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from gateway import outgoing
from gateway.dashboard import deployments
from gateway.dashboard.visit import Visit
from gateway.errors import invalid

_TIMEOUT_S = 60
_MOST_BYTES = 64 * 1024
_MOST_CHARS = 4000
_TURNS = 40


class _Outside(AbstractResolver):
    """Resolves names, but to no address of this network: where a bot answers is its provider's word."""

    def __init__(self) -> None:
        self._all = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._all.resolve(host, port, family)
        kept = [one for one in found if ipaddress.ip_address(one["host"]).is_global]
        if not kept:
            raise OSError(f"{host} is no address of the internet")
        return kept

    async def close(self) -> None:
        await self._all.close()


class Chat:
    """Relays messages to bots. ``allow_local``: bots of the local driver answer on this machine."""

    def __init__(self, *, allow_local: bool) -> None:
        self._allow_local = allow_local
        self._session: aiohttp.ClientSession | None = None

    async def say(self, visit: Visit) -> Response:
        """Sends what was typed, and shows the page with the answer."""
        said, told = (visit.repeated.get(name, [])[-_TURNS:] for name in ("said", "told"))
        turns = [(who, text[:_MOST_CHARS]) for who, text in zip(told, said, strict=False) if who in ("you", "bot")]
        message = visit.form.get("message", "")
        if not message or len(message) > _MOST_CHARS:
            visit.blame(invalid([("message", f"needs 1 to {_MOST_CHARS} characters")]))
            return await deployments.show(visit, 400, turns)
        wanted = deployment_service_pb2.GetDeploymentRequest(id=visit.http.path_params["id"])
        d = await visit.call(visit.services.deployments.GetDeployment, wanted)
        if d.state != deployment_pb2.STATE_ACTIVE or not d.provider_url:
            visit.problem = "The bot does not run now."
            return await deployments.show(visit, 409, turns)
        turns.append(("you", message))
        reply, problem = await self._ask(d.provider_url, message)
        if problem:
            visit.problems["message"] = problem
            return await deployments.show(visit, 502, turns)
        return await deployments.show(visit, 200, [*turns, ("bot", reply[:_MOST_CHARS])])

    async def _ask(self, url: str, message: str) -> tuple[str, str]:
        """(reply, problem), of which one is empty."""
        try:
            if not self._allow_local and _is_inside(url):
                return "", "The bot's address is not one of the internet."
            async with self._http().post(f"{url.rstrip('/')}/chat", json={"message": message}, allow_redirects=False) as answer:
                raw = await outgoing.read(answer, _MOST_BYTES)
            body = orjson.loads(raw)
            if answer.status == 200 and isinstance(body.get("reply"), str):
                return body["reply"], ""
            words = body.get("error", {}).get("message", "")
            return "", f"The bot could not answer: {str(words)[:300]}" if words else "The bot takes no chat at its address."
        except (aiohttp.ClientError, TimeoutError, OSError):
            return "", "The bot did not answer. It may be starting again; try once more."
        except (ValueError, AttributeError):
            return "", "The bot takes no chat at its address."

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:  # It wants to be made where a loop runs.
            resolver: Any = None if self._allow_local else _Outside()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
            )  # fmt: skip
        return self._session

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


def _is_inside(url: str) -> bool:
    """Whether a URL names an address of this network by its number, which no resolver sees."""
    try:
        return not ipaddress.ip_address(urlsplit(url).hostname or "").is_global
    except ValueError:
        return False
