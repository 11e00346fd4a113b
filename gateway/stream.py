"""Streams of answers as server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import orjson
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import StreamingResponse

from gateway.errors import from_rpc, status_json

HEARTBEAT_S = 15.0
"""Proxies close what is silent for long."""
FIRST_S = 0.5
"""How long an error may take to come as an HTTP status; later ones come as an event."""
RETRY_MS = 1000


def resume(http: Request, message: Any) -> None:
    """Puts what a browser sends when it reconnects into the request, unless the query says where to resume."""
    last = http.headers.get("last-event-id", "")
    field = "after_position" if "after_position" in message.DESCRIPTOR.fields_by_name else "after_event_id"
    if last and not getattr(message, field):
        setattr(message, field, last)


async def answer(call: Any, stopping: asyncio.Event, to_json: Callable[[Message], bytes]) -> StreamingResponse:
    """The open stream; ApiError when the RPC fails at once. It ends when the client leaves, the RPC ends, or the gateway stops."""
    first = asyncio.ensure_future(call.read())
    await asyncio.wait({first}, timeout=FIRST_S)
    if first.done() and isinstance(error := first.exception(), grpc.aio.AioRpcError):
        raise from_rpc(error) from None
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(call, first, stopping, to_json), media_type="text/event-stream", headers=headers)


async def _events(
    call: Any, reading: "asyncio.Future[Any]", stopping: asyncio.Event, to_json: Callable[[Message], bytes]
) -> AsyncIterator[bytes]:
    ending = asyncio.ensure_future(stopping.wait())
    try:
        yield b"retry: %d\n\n" % RETRY_MS
        while True:
            await asyncio.wait({reading, ending}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return
            if not reading.done():
                yield b": still here\n\n"
                continue
            message = reading.result()
            if message is grpc.aio.EOF:
                return
            yield _event(b"", _place(message), to_json(message))
            reading = asyncio.ensure_future(call.read())
    except grpc.aio.AioRpcError as error:
        yield _event(b"error", "", orjson.dumps(status_json(from_rpc(error))))
    finally:
        ending.cancel()
        reading.cancel()
        call.cancel()


def _place(message: Any) -> str:
    """Where to resume after a message."""
    return str(message.position if "position" in message.DESCRIPTOR.fields_by_name else message.event.id)


def _event(kind: bytes, token: str, data: bytes) -> bytes:
    """One event; JSON holds no line breaks, and a token is one of ours."""
    head = (b"event: %s\n" % kind if kind else b"") + (b"id: %s\n" % token.encode() if token else b"")
    return head + b"data: " + data + b"\n\n"
