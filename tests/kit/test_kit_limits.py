"""How much one process and one subject may ask at a time."""

import asyncio
import time
from typing import Any

import grpc
from google.rpc import error_details_pb2
from prometheus_client import REGISTRY

from services.kit.call import Call
from tests.kit.echo import Answer, detail, refused, running

Code = grpc.StatusCode


async def test_more_calls_than_the_cap_are_refused_at_once(kit_url: str, tmp_path: Any) -> None:
    async with running(tmp_path, kit_url, max_concurrent_calls=3) as echo:
        go = asyncio.Event()

        async def waits(request: Any, call: Call) -> Any:
            await go.wait()
            return Answer()

        echo.service.on["Write"] = waits
        who = echo.person()
        calls = [asyncio.ensure_future(_answer(echo.call("Write", metadata=who))) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert REGISTRY.get_sample_value("clawplane_rpc_in_flight", {"service": "echo"}) == 3
        started = time.monotonic()
        error = await refused(echo.call("Read", metadata=who))
        assert error.code() is Code.UNAVAILABLE and time.monotonic() - started < 0.5
        assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        go.set()
        await asyncio.gather(*calls)
        assert (await echo.call("Read", "x", who)).text == "x"
        assert REGISTRY.get_sample_value("clawplane_rpc_in_flight", {"service": "echo"}) == 0


async def test_a_rate_is_kept_for_each_subject_but_not_for_the_platform(kit_url: str, tmp_path: Any) -> None:
    async with running(tmp_path, kit_url, rate_limit="3/minute") as echo:
        eager, other = echo.person(), echo.person()
        for _ in range(3):
            await echo.call("Read", metadata=eager)
        error = await refused(echo.call("Read", metadata=eager))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert 0 < detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() <= 60_000
        await echo.call("Read", metadata=other)
        for _ in range(5):
            await echo.call("Manage", metadata=echo.operator)


async def _answer(call: Any) -> Any:
    return await call
