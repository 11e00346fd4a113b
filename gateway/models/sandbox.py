"""A simulated model with the API of OpenAI's shape. Served only while the sandbox is enabled; no provider is asked."""

import time
import uuid
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from gateway.models.openai import OpenAiError, parse
from gateway.models.upstreams import SIMULATED_KEY

_CHARS_A_TOKEN = 4


def routes() -> list[BaseRoute]:
    """Where the simulated model answers."""
    return [Route("/sandbox/models/v1/chat/completions", complete, methods=["POST"])]


async def complete(http: Request) -> Response:
    """An answer that is always the same for the same words."""
    if http.headers.get("authorization") != f"Bearer {SIMULATED_KEY}":
        return OpenAiError(401, "the simulated model takes its own key only", code="invalid_api_key").response()
    try:
        wish = parse(await http.body())
    except OpenAiError as error:
        return error.response()
    asked = _text(wish.body["messages"][-1].get("content"))
    reply = answer(wish.model, asked)
    sent = sum(_tokens(_text(message.get("content"))) for message in wish.body["messages"])
    usage = {"prompt_tokens": sent, "completion_tokens": _tokens(reply), "total_tokens": sent + _tokens(reply)}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wish.model}
    if wish.stream:
        return StreamingResponse(_chunks(head, reply, usage), media_type="text/event-stream")
    choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
    whole = head | {"object": "chat.completion", "choices": [choice], "usage": usage}
    return Response(orjson.dumps(whole), media_type="application/json")


async def _chunks(head: dict[str, Any], reply: str, usage: dict[str, int]) -> Any:
    def event(choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> bytes:
        return b"data: " + orjson.dumps(head | {"object": "chat.completion.chunk", "choices": choices, "usage": used}) + b"\n\n"

    yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for word in reply.split(" "):
        yield event([{"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}])
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event([], usage)
    yield b"data: [DONE]\n\n"


def answer(model: str, message: str) -> str:
    """A pleasant answer."""
    words = message.split()
    topic = " ".join(words[:12]) + ("..." if len(words) > 12 else "")
    if message.rstrip().endswith("?"):
        return f'You asked "{topic}" - a good question. I am a simulated {model}, so take this as proof that I am awake.'
    return f'I read "{topic}" ({len(words)} words). I am a simulated {model}; ask me anything.'


def _text(content: Any) -> str:
    """The text of a message's content, which is text or a list of parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _tokens(text: str) -> int:
    """About one token for four characters, and at least one."""
    return max(1, len(text) // _CHARS_A_TOKEN)
