"""One process: health, reflection, and an orderly end."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.kit.call import Call
from tests.harness import Stack
from tests.kit.echo import SERVICE, Answer, Echo, refused, running


async def listed(channel: grpc.aio.Channel, version: str) -> set[str]:
    """The services that reflection names, and it can describe each."""
    rpc: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString, reflection_pb2.ServerReflectionResponse.FromString,
    )  # fmt: skip

    async def ask(*requests: Any) -> list[Any]:
        async def given() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        return [answer async for answer in rpc(given())]

    (answer,) = await ask(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in answer.list_services_response.service}
    described = await ask(*(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names if "reflection.v1." not in name))
    assert all(one.WhichOneof("message_response") == "file_descriptor_response" for one in described)
    return names


@pytest.mark.any_engine
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_every_service(stack: Stack, version: str) -> None:
    names = await listed(stack.channel, version)
    assert {
        "clawplane.user.v1.UserService", "clawplane.user.v1.AccessService", "clawplane.user.v1.EntitlementService",
        "clawplane.deployment.v1.DeploymentService", "clawplane.deployment.v1.PaymentService", "clawplane.deployment.v1.BlacklistService",
        "clawplane.deployment.v1.UsageService", "clawplane.deployment.v1.SandboxService", "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
    } <= names  # fmt: skip


@pytest.mark.any_engine
async def test_health_is_told_of_all_and_each(echo: Echo) -> None:
    health = health_pb2_grpc.HealthStub(echo.channel)
    for name in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await refused(health.Check(health_pb2.HealthCheckRequest(service="nonsense")))).code() is grpc.StatusCode.NOT_FOUND


async def test_draining_finishes_calls_and_ends_streams(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url) as echo:
        begun = asyncio.Event()

        async def slow(request: Any, call: Call) -> Any:
            begun.set()
            await asyncio.sleep(0.5)
            async with call.transaction():
                return Answer(text="finished")

        async def watch(request: Any, call: Call) -> Any:
            yield Answer(text="one")
            await asyncio.sleep(60)

        echo.service.on |= {"Write": slow, "Watch": watch}
        streams = [echo.call("Watch") for _ in range(5)]
        assert [(await stream.read()).text for stream in streams] == ["one"] * 5
        health = health_pb2_grpc.HealthStub(echo.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = echo.call("Write")
        writing = asyncio.ensure_future(_answer(call))
        await begun.wait()
        started = time.monotonic()
        draining = asyncio.create_task(echo.server.drain())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for stream in streams:
            error = await refused(stream)
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "stopping" in (error.details() or "")
        assert (await writing).text == "finished"
        health.cancel()
        await draining
        assert time.monotonic() - started < 2
        assert not echo.kit.streams and echo.kit.in_flight == 0
        assert (await refused(echo.call("Read"))).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.any_engine
async def test_a_client_that_never_hangs_up_does_not_hold_the_end(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url) as echo:
        health = health_pb2_grpc.HealthStub(echo.channel).Watch(health_pb2.HealthCheckRequest())
        await health.read()
        reflection = reflection_pb2_grpc.ServerReflectionStub(echo.channel).ServerReflectionInfo()
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflection.read()
        started = time.monotonic()
        await echo.server.drain()
        assert time.monotonic() - started < 2


async def _answer(call: Any) -> Any:
    return await call
