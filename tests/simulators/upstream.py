"""A model's provider with an API of OpenAI's shape, as a server in its own process: counts what it said, and breaks as told.

What a call is to meet is in its own last message, as JSON: ``{"chunks": 50, "break_at": 7, "kind": "cut"}``. Kinds: cut (the connection
closes), hang, no_usage (a stream without its last chunk), html (200 and no JSON), status (an error of ``status``). ``sleep_s`` is the
pause between chunks.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.simulators.market import NO_TLS, Json, SimulatorProcess, cut, never, serve

KEY = "sk-upstream-simulated"
CALLS: dict[str, Json] = {}
"""By the request's ``user``, or its number: what was said, and how it ended."""


def usage_of(body: Json, chunks: int) -> Json:
    """What this provider says that a call has used."""
    sent = max(1, len(json.dumps(body["messages"])) // 4)
    return {
        "prompt_tokens": sent, "completion_tokens": chunks, "total_tokens": sent + chunks,
        "prompt_tokens_details": {"cached_tokens": sent // 2}, "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


async def complete(http: Request) -> Response:
    """``POST /v1/chat/completions``."""
    if http.headers.get("authorization") != f"Bearer {KEY}":
        return JSONResponse({"error": {"message": "the key sk-platform is wrong"}}, 401)
    body = await http.json()
    try:
        order = json.loads(body["messages"][-1]["content"])
    except (ValueError, TypeError):
        order = {}
    order = order if isinstance(order, dict) else {}
    chunks = min(order.get("chunks", 50), body.get("max_tokens", 1 << 30))
    kind, usage = order.get("kind", ""), usage_of(body, chunks)
    seen = CALLS[str(body.get("user") or len(CALLS))] = {"model": body["model"], "usage": usage, "ended": False, "asked": body}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body["model"]}
    if kind == "status":
        error = {"error": {"message": order.get("message", "simulated"), "type": "x"}}
        return JSONResponse(error, order["status"], {"Retry-After": "3"})
    if kind == "html":
        return Response("<html>busy</html>", 200, media_type="text/html")
    if body.get("stream"):
        return StreamingResponse(_stream(http, seen, order, head, chunks), media_type="text/event-stream")
    await asyncio.sleep(order.get("sleep_s", 0) * chunks)
    if kind == "cut":
        await cut(http)
    if kind == "hang":
        return await never(http)
    seen["ended"] = True
    choice = {"index": 0, "message": {"role": "assistant", "content": "word " * chunks}, "finish_reason": "stop"}
    whole = head | {"object": "chat.completion", "choices": [choice]}
    return JSONResponse(whole | ({} if kind == "no_usage" else {"usage": usage}))


async def _stream(http: Request, seen: Json, order: Json, head: Json, chunks: int) -> AsyncIterator[bytes]:
    def event(choices: list[Json], usage: Json | None = None) -> bytes:
        return b"data: " + json.dumps(head | {"object": "chat.completion.chunk", "choices": choices, "usage": usage}).encode() + b"\n\n"

    kind = order.get("kind", "")
    for number in range(chunks):
        if number == order.get("break_at", 0) and kind == "cut":
            await cut(http)
        if number == order.get("break_at", 0) and kind == "hang":
            await never(http)
        yield event([{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
        # Each token leaves by itself, as it does where a model makes it; without the step all of them would be sent as one.
        await asyncio.sleep(order.get("sleep_s", 0))
    if kind != "no_usage":
        yield event([], seen["usage"])
        seen["ended"] = True
    yield b"data: [DONE]\n\n"


async def calls(http: Request) -> Response:
    """``GET /_sim/calls``."""
    return JSONResponse(CALLS)


app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/_sim/calls", calls)])


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
    serve(app)
