"""A model's provider with an API of OpenAI's shape, as a server in its own process: counts what it said, and breaks as told.

What a call is to meet is in its own last message, as JSON: ``{"chunks": 50, "break_at": 7, "kind": "cut"}``. Kinds: cut (the connection
closes), hang, no_usage (a stream without its last chunk), html (200 and no JSON), status (an error of ``status``). ``sleep_s`` is the
pause between chunks.
"""

import asyncio
import json
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.simulators.market import NO_TLS, Json, SimulatorProcess, cut, never, serve

KEY = "sk-upstream-simulated"
CALLS: dict[str, Json] = {}
"""By the request's ``user``, or its number: what was said, and how it ended."""
_CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"word "},"finish_reason":null}],"usage":null}\n\n'
)


def usage_of(body: Json, chunks: int) -> Json:
    """What this provider says that a call has used."""
    sent = max(1, len(json.dumps(body["messages"])) // 4)
    return {
        "prompt_tokens": sent, "completion_tokens": chunks, "total_tokens": sent + chunks,
        "prompt_tokens_details": {"cached_tokens": sent // 2}, "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


async def complete(scope: Scope, receive: Receive, send: Send) -> None:
    """``POST /v1/chat/completions``."""
    http = Request(scope, receive)
    if http.headers.get("authorization") != f"Bearer {KEY}":
        return await JSONResponse({"error": {"message": "the key sk-platform is wrong"}}, 401)(scope, receive, send)
    body = json.loads(await http.body())
    try:
        order = json.loads(body["messages"][-1]["content"])
    except (ValueError, TypeError):
        order = {}
    order = order if isinstance(order, dict) else {}
    chunks = min(order.get("chunks", 50), body.get("max_tokens", 1 << 30))
    kind, usage = order.get("kind", ""), usage_of(body, chunks)
    seen = CALLS[str(body.get("user") or len(CALLS))] = {"model": body["model"], "usage": usage, "ended": False, "asked": body}
    if kind == "status":
        error = {"error": {"message": order.get("message", "simulated"), "type": "x"}}
        return await JSONResponse(error, order["status"], {"Retry-After": "3"})(scope, receive, send)
    if kind == "html":
        return await Response("<html>busy</html>", 200, media_type="text/html")(scope, receive, send)
    if body.get("stream"):
        return await _stream(http, send, seen, order, chunks)
    await asyncio.sleep(order.get("sleep_s", 0) * chunks)
    if kind == "cut":
        return await cut(http)
    if kind == "hang":
        await never(http)
        return None
    seen["ended"] = True
    choice = {"index": 0, "message": {"role": "assistant", "content": "word " * chunks}, "finish_reason": "stop"}
    said: Json = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
    return await JSONResponse(said | ({} if kind == "no_usage" else {"usage": usage}))(scope, receive, send)


async def _stream(http: Request, send: Send, seen: Json, order: Json, chunks: int) -> None:
    async def write(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    kind, sleep_s = order.get("kind", ""), order.get("sleep_s", 0)
    for number in range(chunks):
        if kind in ("cut", "hang") and number == order.get("break_at", 0):
            await (cut(http) if kind == "cut" else never(http))
            return
        await write(_CHUNK)
        if sleep_s:
            await asyncio.sleep(sleep_s)
    if kind != "no_usage":
        last = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": seen["usage"]}
        await write(b"data: " + json.dumps(last).encode() + b"\n\n")
        seen["ended"] = True
    await write(b"data: [DONE]\n\n", more=False)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """No framework around it: as the bare floor of the bench it must cost little."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/v1/chat/completions":
        await complete(scope, receive, send)
    elif scope["path"] == "/_sim/calls":
        await JSONResponse(CALLS)(scope, receive, send)
    else:
        await JSONResponse({"error": {"message": "nothing is here"}}, 404)(scope, receive, send)


class UpstreamSimulator(SimulatorProcess):
    """The simulator as a process."""

    module = "tests.simulators.upstream"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    async def calls(self) -> dict[str, Any]:
        """What it was asked, by ``user``."""
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
            found: dict[str, Any] = (await client.get(f"{self.url}/_sim/calls")).json()
            return found


if __name__ == "__main__":
    serve(app)  # type: ignore[arg-type]
