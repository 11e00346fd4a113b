"""One gRPC process: services, health, reflection, loops, and an orderly end."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from services.kit.call import Kit
from services.kit.loops import Loop
from services.kit.rpc import Registrar
from services.kit.table import Table

log = structlog.get_logger()

_IDLE_MS = 15 * 60 * 1000
_OPTIONS = [("grpc.so_reuseport", 1), ("grpc.keepalive_permit_without_calls", 1)]
_OPTIONS_OF = {
    "grpcio": [("grpc.max_connection_idle_ms", _IDLE_MS), ("grpc.http2.min_ping_interval_without_data_ms", 10_000)],
    # It cannot close idle connections, but it finds out which of them are dead; and it takes pings at any pace.
    "native": [("grpc.keepalive_time_ms", _IDLE_MS)],
}

_QUIET_S = 0.2
_MOST_THREADS = 10_000
_NEW_OBJECTS = 100_000
"""After so many the collector looks for cycles, which then takes some 80 ms. A batch makes tens of thousands, none of them in a cycle: with
Python's own 700, looking took about a tenth of a batch's time."""

Register = Callable[[Any, Any], None]


@dataclass
class App:
    """The table of contents of a service: what it serves, what runs beside, what to close at the end."""

    kit: Kit
    services: Sequence[tuple[Register, Any]]
    """(add_XServicer_to_server, servicer)."""
    loops: Sequence[Loop] = ()
    starters: Sequence[Callable[[], Awaitable[None]]] = ()
    """Called once the database answers, before the port opens."""
    closers: Sequence[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Called last, in order."""


def _make(transport: str, max_message_bytes: int, tls: bool) -> grpc.aio.Server:
    """The server of a transport; ValueError when it cannot be had."""
    limits = [(f"grpc.max_{way}_message_length", max_message_bytes) for way in ("receive", "send")]
    options = [*_OPTIONS, *_OPTIONS_OF[transport], *limits]
    if transport == "grpcio":
        return grpc.aio.server(options=options)
    if tls:
        raise ValueError("CLAWPLANE_TRANSPORT=native has no TLS: put a proxy that ends TLS before it, or use grpcio")
    try:
        import pygrpc_native.aio
    except ImportError:
        raise ValueError("CLAWPLANE_TRANSPORT=native needs the package pygrpc-native: pip install 'clawplane[native]'") from None
    # One thread for HTTP/2 keeps up with the one that runs Python; with a second, a small read takes a tenth more CPU.
    return pygrpc_native.aio.Server(options=options, io_threads=1)


class Server:
    """Serves one or more apps at one address. ``port`` 0 picks a free one; TLS with a key and certificate file."""

    def __init__(self, apps: Sequence[App], host: str, port: int, tls: tuple[Path, Path] | None = None) -> None:
        self.apps = apps
        transport = apps[0].kit.settings.transport
        self._native = transport == "native"
        self.server = _make(transport, max(app.kit.settings.max_message_bytes for app in apps), bool(tls))
        self.health = health.aio.HealthServicer()
        self.table = Table()
        names = [health.SERVICE_NAME, reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection"]
        for app in apps:
            registrar = Registrar(self.table, app.kit)
            for add, servicer in app.services:
                add(servicer, registrar)
            names += registrar.services
        self.names = names
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.table)  # type: ignore[arg-type]
        self._add_reflection()
        self.table.serve(self.server, registered=self._native)
        address = f"{host}:{port}"
        if tls:
            key, certificate = (path.read_bytes() for path in tls)
            self.port = self.server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
        else:
            self.port = self.server.add_insecure_port(address)

    def _add_reflection(self) -> None:
        servicer = reflection.aio.ReflectionServicer(self.names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, self.table)  # type: ignore[no-untyped-call]
        # grpcio-reflection knows v1alpha only; v1 has the same messages under another name.
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        self.table.add_registered_method_handlers("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler})

    async def start(self) -> None:
        """Databases first, then the port, then the loops, then SERVING."""
        for app in self.apps:
            await app.kit.db.connect()
            for start in app.starters:
                await start()
        if self._native:
            # It gives a thread of the loop's pool to each watcher that is behind with reading, and needs one more to stop. In a pool as
            # small as usual, a few who never read would hold up all others, and the stop.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MOST_THREADS, "clawplane-behind"))
        await self.server.start()
        # What was loaded so far stays for good: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_NEW_OBJECTS)
        for app in self.apps:
            for loop in app.loops:
                loop.start()
        for name in ["", *self.names]:
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("server.started", port=self.port, services=[n for n in self.names if n.startswith("clawplane")])

    async def drain(self) -> None:
        """No new calls; calls in flight finish, streams end with UNAVAILABLE, loops finish their step, pools close."""
        await self.health.enter_graceful_shutdown()
        await self._take_in()
        for app in self.apps:
            app.kit.draining, app.kit.turns_away = True, self._native
            for stream in list(app.kit.streams):
                stream.cancel()
        grace = max(app.kit.settings.drain_timeout_s for app in self.apps)
        # grpcio sends callers elsewhere from now on. Native would close as soon as the last handler has returned, with its answer still
        # on the way: there the wrapper turns new calls away until all is quiet.
        stops = [] if self._native else [self.server.stop(grace)]
        await asyncio.gather(*stops, self._end(grace), *(loop.stop() for app in self.apps for loop in app.loops))
        for app in self.apps:
            for close in app.closers:
                await close()
            await app.kit.limiter.close()
            await app.kit.db.close()
        log.info("server.stopped")

    async def _take_in(self) -> None:
        """Lets calls that have arrived reach their handlers: gRPC answers CANCELLED for those that have not when it stops."""
        deadline, seen = time.monotonic() + _QUIET_S, -1
        while time.monotonic() < deadline and seen != (seen := sum(app.kit.taken_in for app in self.apps)):
            await asyncio.sleep(0.03)

    async def _end(self, grace_s: float) -> None:
        """Ends what is left once nobody waits for an answer of ours: a health watch would hold the port for the whole grace."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._quiet(), grace_s)
        await self.server.stop(_QUIET_S)

    async def _quiet(self) -> None:
        """Until no call has been in flight for a moment."""
        quiet_since = time.monotonic()
        # Calls that gRPC has taken in but not handed over yet are seen by nobody: so one quiet moment is not enough.
        while time.monotonic() - quiet_since < _QUIET_S:
            if any(app.kit.in_flight or app.kit.streams for app in self.apps):
                quiet_since = time.monotonic()
            await asyncio.sleep(0.01)
