"""What tests of the client stand on: both recorders behind one face, a door to a service that can be shut, a service that fails on purpose."""

import asyncio
import contextlib
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane.deployment.v1 import usage_service_pb2_grpc
from clawplane_client import AsyncUsageRecorder, Stats, UsageRecorder
from tests.harness import Person, Stack, free_port

QUICK: dict[str, Any] = {
    "flush_interval_s": 0.03, "backoff_s": 0.03, "backoff_max_s": 0.1, "refused_pause_s": 0.1,
    "channel_options": [("grpc.enable_http_proxy", 0)],
}  # fmt: skip
USE: dict[str, Any] = {"provider": "anthropic", "model": "claude-opus-4.5", "tokens_in": 1000, "tokens_out": 100}


class Either:
    """A recorder of either kind. The service runs in this loop, so the blocking one works in threads."""

    def __init__(self, kind: str, target: str, token: Any, **options: Any) -> None:
        given = QUICK | options
        self.recorder: Any = UsageRecorder(target, token, **given) if kind == "sync" else AsyncUsageRecorder(target, token, **given)
        self._sync = kind == "sync"

    async def _do(self, name: str, *args: Any, **fields: Any) -> Any:
        method = getattr(self.recorder, name)
        return await (asyncio.to_thread(method, *args, **fields) if self._sync else method(*args, **fields))

    async def record(self, **fields: Any) -> str:
        return str(await self._do("record", **(USE | fields)))

    async def flush(self, timeout_s: float = 10) -> bool:
        return bool(await self._do("flush", timeout_s))

    async def close(self, timeout_s: float | None = None) -> None:
        await self._do("close", timeout_s)

    @property
    def stats(self) -> Stats:
        return self.recorder.stats  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def recorder(kind: str, target: str, token: Any, **options: Any) -> AsyncIterator[Either]:
    """A recorder that is closed afterwards, whatever it still has."""
    made = Either(kind, target, token, **options)
    try:
        yield made
    finally:
        with contextlib.suppress(Exception):
            await made.close(0.2)


async def key_of(stack: Stack, person: Person) -> str:
    """An API key that may record usage and nothing else."""
    return str((await stack.key(person, "usage.record")).key)


async def listed(stack: Stack, person: Person) -> Counter[str]:
    """How often each event of a person's organization is in the ledger, by id."""
    found: Counter[str] = Counter()
    token = ""
    while True:
        page = await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=250, page_token=token), metadata=person.metadata)
        found.update(event.id for event in page.events)
        token = page.next_page_token
        if not token:
            return found


async def ledger(stack: Stack, person: Person) -> Counter[str]:
    """The same once nothing comes in any more: it agrees with the sums."""
    found = await listed(stack, person)
    sums = await stack.usage.SummarizeUsage(rpc.SummarizeUsageRequest(), metadata=person.metadata)
    assert sums.total.events == found.total()
    return found


class Door:
    """A TCP port before a service: shut, nobody answers there; while it loses answers, all that is sent arrives and nothing comes back."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self._host, _, port = target.rpartition(":")
        self._to, self._tls = int(port), tls
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        self.loses_answers = False
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Lets everybody in, on the same port as ever."""
        self.loses_answers = False
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)

    async def shut(self) -> None:
        """Lets nobody in, and throws out who is in."""
        if self._server is not None:
            self._server.close()
        self._server = None
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> "Door":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = self._server
        behind, to_behind = await asyncio.open_connection(self._host, self._to)
        if self._server is not server:
            # It was shut meanwhile.
            writer.transport.abort()
            to_behind.transport.abort()
            return
        self._open |= {writer, to_behind}
        there = asyncio.create_task(self._pump(reader, to_behind, answers=False))
        back = asyncio.create_task(self._pump(behind, writer, answers=True))
        await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, to_behind):
            end.transport.abort()
            self._open.discard(end)
        await asyncio.gather(there, back, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not (answers and self.loses_answers):
                    writer.write(data)
                    await writer.drain()


class Faulty(usage_service_pb2_grpc.UsageServiceServicer):
    """A usage service that fails as it is told, one call after the other, and then stores ids in memory."""

    def __init__(self) -> None:
        self.faults: deque[tuple[grpc.StatusCode, float]] = deque()
        """(code, seconds of RetryInfo) of the next calls."""
        self.calls: list[tuple[float, list[str]]] = []
        """(when, ids) of each call."""
        self.raw: dict[str, set[bytes]] = {}
        """Everything that was ever sent as an event, by id."""
        self.stored: set[str] = set()

    async def BatchRecordUsage(self, request: rpc.BatchRecordUsageRequest, context: Any) -> rpc.BatchRecordUsageResponse:
        self.calls.append((asyncio.get_running_loop().time(), [event.id for event in request.events]))
        for event in request.events:
            self.raw.setdefault(event.id, set()).add(event.SerializeToString(deterministic=True))
        if self.faults:
            code, retry_after_s = self.faults.popleft()
            await context.abort_with_status(_status(code, retry_after_s))
        new = {event.id for event in request.events} - self.stored
        self.stored |= new
        return rpc.BatchRecordUsageResponse(accepted=len(new), duplicates=len(request.events) - len(new))


def _status(code: grpc.StatusCode, retry_after_s: float) -> Any:
    status = status_pb2.Status(code=code.value[0], message="on purpose")
    if retry_after_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
        detail = any_pb2.Any()
        detail.Pack(retry)
        status.details.append(detail)
    return rpc_status.to_status(status)


@contextlib.asynccontextmanager
async def faulty(*, max_bytes: int = 4 * 1024 * 1024) -> AsyncIterator[tuple[Faulty, str]]:
    """Such a service, and its address."""
    server, servicer = grpc.aio.server(options=[("grpc.max_receive_message_length", max_bytes)]), Faulty()
    usage_service_pb2_grpc.add_UsageServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield servicer, target
    finally:
        await server.stop(0)


async def until(check: Callable[[], Any], timeout_s: float = 10) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)
