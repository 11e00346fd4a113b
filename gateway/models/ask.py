"""Asks the providers of models."""

import httpx
import orjson
import structlog

from gateway.models import openai
from gateway.models.openai import OpenAiError, Wish
from gateway.models.upstreams import Upstream

log = structlog.get_logger()


class Unanswered(Exception):
    """The provider gave no answer that counts; ``error`` is what the caller gets. Nothing was generated, as far as anybody can know."""

    def __init__(self, error: OpenAiError) -> None:
        super().__init__(str(error))
        self.error = error


class Asker:
    """The connections to the providers."""

    def __init__(self, timeout_s: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=10), limits=limits, trust_env=False, follow_redirects=False
        )

    async def ask(self, upstream: Upstream, wish: Wish, max_tokens: int) -> httpx.Response:
        """The provider's answer, its body still to be read; Unanswered when it is none."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {upstream.api_key.get_secret_value()}"}
        content = openai.outgoing(wish, upstream.name_of(wish.model), max_tokens)
        request = self._http.build_request("POST", f"{upstream.base_url}/chat/completions", content=content, headers=headers)
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.ConnectError:
            raise Unanswered(_unavailable("the model's provider cannot be reached")) from None
        if answer.status_code == 200:
            return answer
        try:
            raw = await answer.aread()
        except httpx.HTTPError:
            raw = b""
        finally:
            await answer.aclose()
        log.warning("model.refused", provider=upstream.provider, model=wish.model, status=answer.status_code)
        raise Unanswered(_upstream_error(answer, raw))

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()


def _unavailable(text: str) -> OpenAiError:
    return OpenAiError(503, f"{text}; try again", "server_error", "upstream_unavailable", headers={"Retry-After": "1"})


def _upstream_error(answer: httpx.Response, raw: bytes) -> OpenAiError:
    """What a provider's refusal becomes: its words where they are about the request, ours where they are about our account there."""
    status = answer.status_code
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
