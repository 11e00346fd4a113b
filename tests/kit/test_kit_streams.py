"""Streams through the wrapper: checked like calls, ended in order."""

import asyncio
from typing import Any

import grpc
import structlog

from services.kit.call import Call
from tests.kit.echo import Answer, Echo, fields_of, refused

Code = grpc.StatusCode


async def test_a_stream_is_checked_like_a_call_and_fails_like_one(echo: Echo) -> None:
    async def watch(request: Any, call: Call) -> Any:
        yield Answer(text="one")
        if request.text == "defect":
            raise KeyError("PLANTED")

    echo.service.on["Watch"] = watch
    assert [answer.text async for answer in echo.call("Watch")] == ["one"]
    assert (await refused(echo.call("Watch", metadata=()))).code() is Code.UNAUTHENTICATED
    assert fields_of(await refused(echo.call("Watch", "x" * 101))) == ["text"]
    with structlog.testing.capture_logs() as logs:
        error = await refused(echo.call("Watch", "defect"))
    assert error.code() is Code.INTERNAL and "PLANTED" not in str(error)
    assert "rpc.defect" in {line["event"] for line in logs}


async def test_a_departed_watcher_ends_the_stream(echo: Echo) -> None:
    ended = asyncio.Event()

    async def watch(request: Any, call: Call) -> Any:
        try:
            while True:
                yield Answer(text="tick")
                await asyncio.sleep(0.05)
        finally:
            ended.set()

    echo.service.on["Watch"] = watch
    stream = echo.call("Watch")
    assert (await stream.read()).text == "tick"
    stream.cancel()
    await asyncio.wait_for(ended.wait(), 2)
    assert not echo.kit.streams
