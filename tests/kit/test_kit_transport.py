"""Both transports: which one is made, what each refuses, and what must be the same on both."""

import asyncio
import contextvars
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services import embedded
from services.kit.call import Call
from services.kit.server import App, Server
from services.kit.table import Table, metadata_of
from tests.harness import TRANSPORT, Stack
from tests.kit.echo import SERVICE, Answer, Echo, refused, running

Code = grpc.StatusCode
pytestmark = pytest.mark.any_engine
PACKAGES = {"grpcio": "grpc", "native": "pygrpc_native"}
both = pytest.mark.parametrize("transport", PACKAGES)


def package(server: Server | None) -> str:
    """The package that a server comes from."""
    assert server is not None
    return type(server.server).__module__.partition(".")[0]


async def test_the_tests_run_on_the_transport_that_was_asked_for(echo: Echo, stack: Stack) -> None:
    assert package(echo.server) == package(stack.stack.grpc) == PACKAGES[TRANSPORT]


@both
async def test_the_setting_chooses(kit_url: str, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, kit_url, transport=transport) as echo:
        assert package(echo.server) == PACKAGES[transport]
        assert (await echo.call("Read", "hello")).text == "hello"


async def test_native_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, f"sqlite+aiosqlite:///{tmp_path / 'native.db'}", transport="native") as native:
        app = App(native.kit, [])
        with pytest.raises(ValueError, match="no TLS"):
            Server([app], "127.0.0.1", 0, (tmp_path / "key", tmp_path / "certificate"))
        monkeypatch.setitem(sys.modules, "pygrpc_native", None)
        with pytest.raises(ValueError, match="needs the package pygrpc-native"):
            Server([app], "127.0.0.1", 0)


@both
async def test_port_0_is_a_free_one_and_a_taken_one_is_told(kit_url: str, tmp_path: Path, transport: str) -> None:
    import socket

    async with running(tmp_path, kit_url, transport=transport) as echo:
        assert Server([App(echo.kit, [])], "127.0.0.1", 0).port > 0
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(embedded.StartError, match="is something else running there"):
                await embedded.Stack().start_grpc([App(echo.kit, [])], "127.0.0.1", taken.getsockname()[1])


@both
async def test_messages_have_a_limit_in_both_directions(kit_url: str, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, kit_url, transport=transport, max_message_bytes=2000) as echo:

        async def long(request: Any, call: Call) -> Any:
            return Answer(text="x" * 2000)

        echo.service.on["Read"] = long
        for call in (echo.raw("Open", b"\n" * 2001), echo.raw("Open", b"\n" * 100_000_000), echo.call("Read")):
            error = await refused(call)
            assert error.code() is Code.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or "")
        assert echo.kit.in_flight == 0
        assert (await refused(echo.raw("Open", b"\n" * 2000))).code() is Code.INVALID_ARGUMENT


@both
async def test_watchers_that_read_nothing_hold_up_neither_others_nor_the_end(kit_url: str, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, kit_url, transport=transport) as echo:

        async def watch(request: Any, call: Call) -> Any:
            while True:
                yield Answer(text=request.text or "x" * 100_000)
                await asyncio.sleep(0.001)

        echo.service.on["Watch"] = watch
        silent = [echo.call("Watch") for _ in range(40)]
        for stream in silent:
            await stream.read()
        await asyncio.sleep(0.5)
        assert (await echo.call("Read", "hello")).text == "hello"
        other = echo.call("Watch", "news")
        assert [(await asyncio.wait_for(other.read(), 2)).text for _ in range(20)] == ["news"] * 20
        started = time.monotonic()
        await echo.server.drain()
        assert time.monotonic() - started < 2
        assert not echo.kit.streams


@both
async def test_a_stop_waits_until_answers_have_left(kit_url: str, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, kit_url, transport=transport) as echo:
        begun = asyncio.Barrier(9)

        async def long(request: Any, call: Call) -> Any:
            await begun.wait()
            await asyncio.sleep(0.2)
            return Answer(text="x" * 4_000_000)

        async def length(call: Any) -> int:
            return len((await call).text)

        echo.service.on["Read"] = long
        lengths = [asyncio.create_task(length(echo.call("Read"))) for _ in range(8)]
        await begun.wait()
        started = time.monotonic()
        await echo.server.drain()
        assert await asyncio.gather(*lengths) == [4_000_000] * 8
        assert time.monotonic() - started < 2


async def test_native_turns_calls_away_while_others_finish(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, transport="native") as echo:
        begun = asyncio.Event()

        async def slow(request: Any, call: Call) -> Any:
            begun.set()
            await asyncio.sleep(1)
            return Answer(text="finished")

        async def text(call: Any) -> str:
            return str((await call).text)

        echo.service.on["Write"] = slow
        writing = asyncio.create_task(text(echo.call("Write")))
        await begun.wait()
        draining = asyncio.create_task(echo.server.drain())
        await asyncio.sleep(0.3)
        for call in (echo.call("Read"), echo.call("Watch")):
            error = await refused(call)
            assert error.code() is Code.UNAVAILABLE and "stopping" in (error.details() or "")
        assert await writing == "finished"
        await draining


async def test_grpcio_has_no_method_registered_and_finds_them_all(kit_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each registered one would make every call of the process dearer; native finds only those."""
    registered: list[str] = []
    monkeypatch.setattr("grpc.aio._server.Server.add_registered_method_handlers", lambda _, service, handlers: registered.append(service))
    async with running(tmp_path, kit_url, transport="grpcio") as echo:
        assert not registered
        assert (await echo.call("Read", "x")).text == "x"
        health = health_pb2_grpc.HealthStub(echo.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status == health_pb2.HealthCheckResponse.SERVING
        for path in (f"/{SERVICE}/Missing", "/missing.Service/Read"):
            assert (await refused(echo.channel.unary_unary(path)(b"", timeout=5))).code() is Code.UNIMPLEMENTED


def test_what_was_handed_over_with_a_call_is_nobody_elses() -> None:
    """A handler may start what handles other calls: it must not give them the credential of its own."""

    def call() -> None:
        details: Any = SimpleNamespace(method="/a.B/C", invocation_metadata=(("authorization", "mine"),))
        Table().service(details)
        assert metadata_of(SimpleNamespace(invocation_metadata=lambda: pytest.fail("made anew"))) == {"authorization": "mine"}
        others = SimpleNamespace(invocation_metadata=lambda: (("authorization", "another's"),))
        for context in (contextvars.copy_context(), contextvars.Context()):
            assert context.run(metadata_of, others) == {"authorization": "another's"}

    contextvars.Context().run(call)
