"""Akash's Console API over HTTP: one request at a time, with a limit on its time, and each failure put down to whom it belongs."""

import asyncio
import json
from collections.abc import Collection
from decimal import Decimal
from typing import Any

import httpx
import structlog

from services.deployment_svc.markets.driver import Blame, ProviderError

log = structlog.get_logger()
_AT_ONCE = 16
_MAX_PAUSE_S = 300.0
_LEASE = "lease"


class Console:
    """A client of the Console. Answers come without their ``data`` wrapper; fractions are exact decimals."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers={"x-api-key": api_key, "accept": "application/json"}, timeout=timeout_s, trust_env=False
        )
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def ask(
        self, call: str, method: str, path: str, *, body: Any = None, query: dict[str, Any] | None = None, secrets: Collection[str] = ()
    ) -> Any:
        """Makes the call; ProviderError when it fails. ``secrets`` are texts that must not reach the log with an error of the Console."""
        try:
            async with self._turn:
                answer = await self._http.request(method, path, json=body, params=query)
        except httpx.HTTPError as error:
            log.warning("akash.failed", call=call, error=type(error).__name__)
            raise ProviderError("Akash does not answer") from None
        try:
            found: Any = json.loads(answer.content, parse_float=Decimal)
        except ValueError:
            found = None
        if answer.is_success and isinstance(found, dict | list):
            # Of the lists, some come without the wrapper.
            return found["data"] if isinstance(found, dict) and "data" in found else found
        raise _refusal(call, answer, found, secrets)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()


def _refusal(call: str, answer: httpx.Response, found: Any, secrets: Collection[str]) -> ProviderError:
    """What a failed answer means. Its own words go to the log only, and without our secrets: the Console may quote what it was sent."""
    status = answer.status_code
    said = found if isinstance(found, dict) else {}
    code = str(said.get("errorCode") or said.get("code") or said.get("type") or "")[:60]
    words = str(said.get("message") or "")[:500]
    for secret in secrets:
        words = words.replace(secret, "[secret]") if secret else words
    log.warning("akash.failed", call=call, status=status, code=code, message=words)
    if answer.is_success or not said:
        return ProviderError(f"Akash did not answer as expected ({status})", "market", _pause(answer))
    if code == "manifest_not_delivered":
        return ProviderError("the provider did not take the bot's manifest", "provider")
    blame, text = _MEANINGS.get(status, ("market", f"Akash answers with {status}"))
    if status == 400 and "deposit" in words.lower():
        text = "Akash refuses the deposit"
    if status == 409 and call == _LEASE and "wallet" not in code:
        blame, text = "provider", "the provider's offer does not hold any more"
    return ProviderError(text, blame, _pause(answer))


_MEANINGS: dict[int, tuple[Blame, str]] = {
    400: ("request", "Akash refuses the order as malformed"),
    401: ("market", "Akash refuses the platform's key; an operator has to mend it"),
    402: ("market", "the platform's balance at Akash is too low; an operator has to top it up"),
    403: ("market", "Akash refuses the platform's key; an operator has to mend it"),
    404: ("order", "Akash knows the order no more"),
    409: ("market", "Akash is still getting the platform's wallet ready"),
    422: ("order", "Akash can make no lease of the order any more"),
    429: ("market", "Akash is asked too often"),
    503: ("market", "Akash is not available"),
}


def _pause(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return min(_MAX_PAUSE_S, float(text)) if text.isdigit() else 0.0
