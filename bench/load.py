"""The load generator, a process of its own: reads one order a line (JSON), answers with one line of figures.

Messages travel as bytes, so that it costs as little as a Python client can; each answer's status is checked, over gRPC and HTTP.
"""

import asyncio
import base64
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop

from services.kit import ids

_CHANNELS = 4
_MOST_TOLD = 3000
_MARK = b"@" * 35
"""Stands in a message for what must be new in each call; 35 characters, or 36 for a whole UUID."""
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]

Send = Callable[[int], Awaitable[None]]
"""Makes one call as one of the callers."""


@dataclass
class Order:
    """What to send, and for how long."""

    target: str
    method: str
    """Full method name, or the path of a GET when ``http`` is set."""
    bodies: list[str]
    """Base64; taken in turn."""
    tokens: list[str]
    """Bearer tokens; the n-th belongs to the n-th body and path."""
    paths: list[str] = field(default_factory=list)
    http: bool = False
    stream: bool = False
    """POST the bodies, and read answers that come in pieces to their end."""
    callers: int = 32
    first: int = 0
    """Where in the bodies and tokens to begin."""
    apart: bool = False
    """Each caller takes other bodies, so that as many as there are calls are sent."""
    seconds: float = 2.0


def fresh(body: bytes) -> bytes:
    """The message with its mark replaced by what no other call has."""
    at = body.find(_MARK)
    if at < 0:
        return body
    length = 36 if body[at : at + 36] == b"@" * 36 else 35
    return body[:at] + str(ids.uuid7()).encode()[:length] + body[at + length :]


async def run(order: Order) -> dict[str, Any]:
    """Sends until the time is over: how many calls, how long they took together, and of some their latencies, in seconds."""
    firsts: list[float] = []
    make = _http if order.http else _grpc
    senders, close = await (_streams(order, firsts) if order.stream else make(order))
    await asyncio.gather(*(send(order.first + index) for index, send in enumerate(senders)))
    firsts.clear()
    latencies: list[float] = []
    started = time.perf_counter()
    deadline = started + order.seconds

    async def caller(index: int, send: Send) -> None:
        for number in itertools.count(order.first + index, order.callers if order.apart else 1):
            begun = time.perf_counter()
            if begun >= deadline:
                return
            await send(number)
            latencies.append(time.perf_counter() - begun)

    await asyncio.gather(*(caller(index, send) for index, send in enumerate(senders)))
    elapsed = time.perf_counter() - started
    await close()
    counts = {"calls": len(latencies), "warmed": len(senders), "elapsed_s": elapsed}
    return counts | {"latencies_s": _some(latencies), "firsts_s": _some(firsts)}


def _some(seconds: list[float]) -> list[float]:
    """As many as say enough, by chance, to the microsecond: a line of very many has come to the reader cut."""
    return [round(one, 6) for one in (seconds if len(seconds) <= _MOST_TOLD else random.sample(seconds, _MOST_TOLD))]


async def _grpc(order: Order) -> tuple[list[Send], Callable[[], Awaitable[None]]]:
    channels = [grpc.aio.insecure_channel(order.target, options=_OPTIONS) for _ in range(_CHANNELS)]
    bodies = [base64.b64decode(body) for body in order.bodies]
    metadata = [(("authorization", f"Bearer {token}"),) for token in order.tokens]

    def sender(rpc: Any) -> Send:
        async def send(number: int) -> None:
            # Raises for every status but OK.
            await rpc(fresh(bodies[number % len(bodies)]), metadata=metadata[number % len(metadata)], timeout=30)

        return send

    async def close() -> None:
        for channel in channels:
            await channel.close()

    return [sender(channels[index % _CHANNELS].unary_unary(order.method)) for index in range(order.callers)], close


async def _http(order: Order) -> tuple[list[Send], Callable[[], Awaitable[None]]]:
    host, port = order.target.split(":")
    requests = [
        f"GET {path} HTTP/1.1\r\nhost: {order.target}\r\nauthorization: Bearer {token}\r\n\r\n".encode()
        for path, token in zip(order.paths, order.tokens, strict=True)
    ]
    writers: list[asyncio.StreamWriter] = []

    async def sender() -> Send:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)

        async def send(number: int) -> None:
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            status, _, rest = head.lower().partition(b"\r\n")
            if b" 200 " not in status:
                raise RuntimeError(f"the gateway answered {status.decode()}")
            await reader.readexactly(int(rest.partition(b"content-length:")[2].split(b"\r\n")[0]))

        return send

    async def close() -> None:
        for writer in writers:
            writer.close()

    return [await sender() for _ in range(order.callers)], close


async def _streams(order: Order, firsts: list[float]) -> tuple[list[Send], Callable[[], Awaitable[None]]]:
    """As ``_http``, with POST; the time to each first piece goes into ``firsts``."""
    host, port = order.target.split(":")
    body = base64.b64decode(order.bodies[0])
    head = f"POST {order.paths[0]} HTTP/1.1\r\nhost: {order.target}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    requests = [f"{head}authorization: Bearer {token}\r\n\r\n".encode() + body for token in order.tokens]
    writers: list[asyncio.StreamWriter] = []

    async def sender() -> Send:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)

        async def send(number: int) -> None:
            begun = time.perf_counter()
            writer.write(requests[number % len(requests)])
            answer = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise RuntimeError(f"the answer was {answer.decode()}")
            await reader.readuntil(b"data: ")
            firsts.append(time.perf_counter() - begun)
            said = await reader.readuntil(b"\r\n0\r\n\r\n")
            if b"[DONE]" not in said or b"error" in said:
                raise RuntimeError(f"the stream broke: {said[-300:]!r}")

        return send

    async def close() -> None:
        for writer in writers:
            writer.close()

    return [await sender() for _ in range(order.callers)], close


def main() -> None:
    """Serves orders until standard input ends."""
    while line := sys.stdin.readline():
        print(json.dumps(uvloop.run(run(Order(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
