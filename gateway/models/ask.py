"""Asks the providers of models."""

import asyncio

import aiohttp
import orjson
import structlog

from gateway import outgoing
from gateway.models import openai
from gateway.models.openai import OpenAiError, Wish
from gateway.models.upstreams import Upstream

log = structlog.get_logger()
_END_S = 1.0
_MOST_WORDS = 64 * 1024


class Unanswered(Exception):
    """The provider gave no answer that counts; ``error`` is what the caller gets. Nothing was generated, as far as anybody can know."""

    def __init__(self, error: OpenAiError) -> None:
        super().__init__(str(error))
        self.error = error


class Asker:
    """The connections to the providers. aiohttp reads what has arrived at once; httpx would hand over each small chunk by itself."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:  # It wants to be made where a loop runs.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
            jar = aiohttp.DummyCookieJar()
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, cookie_jar=jar, trust_env=False)
        return self._session

    async def ask(self, upstream: Upstream, wish: Wish, max_tokens: int) -> aiohttp.ClientResponse:
        """The provider's answer, its body still to be read; Unanswered when it is none."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {upstream.api_key.get_secret_value()}"}
        content = openai.outgoing(wish, upstream.name_of(wish.model), max_tokens, upstream.limit_name)
        url = f"{upstream.base_url}/chat/completions"
        try:
            answer = await self._http().post(url, data=content, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise Unanswered(_unavailable("the model's provider cannot be reached")) from None
        if answer.status == 200:
            return answer
        try:
            raw = await outgoing.read(answer, _MOST_WORDS)
        except aiohttp.ClientError:
            raw = b""
        finally:
            answer.close()
        log.warning("model.refused", provider=upstream.provider, model=wish.model, status=answer.status)
        raise Unanswered(_upstream_error(answer, raw))

    @staticmethod
    async def finish(answer: aiohttp.ClientResponse) -> None:
        """Gives the connection back, if the provider ends its answer soon; closes it otherwise."""
        try:
            async with asyncio.timeout(_END_S):
                while not answer.content.at_eof():
                    await answer.content.readany()
        except (aiohttp.ClientError, TimeoutError):
            pass
        # Back to the pool when all was read.
        answer.release()

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


def _unavailable(text: str) -> OpenAiError:
    return OpenAiError(503, f"{text}; try again", "server_error", "upstream_unavailable", headers={"Retry-After": "1"})


def _upstream_error(answer: aiohttp.ClientResponse, raw: bytes) -> OpenAiError:
    """What a provider's refusal becomes: its words where they are about the request, ours where they are about our account there."""
    status = answer.status
    if status in (400, 404, 413, 422):
        try:
            words = str(orjson.loads(raw)["error"]["message"])[:1000]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            words = "the model's provider refuses the request"
        return OpenAiError(400, words, code="upstream_refused")
    if status == 429:
        pause = answer.headers.get("retry-after", "")
        headers = {"Retry-After": pause if pause.isdigit() else "2"}
        return OpenAiError(429, "the model's provider is asked too often; try again", "rate_limit_error", "upstream_busy", headers=headers)
    if status in (401, 402, 403):
        words = "the model's provider refuses the platform's key; an operator has to mend it"
        return OpenAiError(502, words, "server_error", "upstream_key")
    return _unavailable("the model's provider is not available")
