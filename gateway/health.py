"""What a supervisor asks: alive, ready, numbers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import orjson
from grpc_health.v1 import health_pb2
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

CHECK_TIMEOUT_S = 1.0
Ready = Callable[[], Awaitable[bool]]


async def healthz(_: Request) -> Response:
    """200 while the process runs."""
    return Response(b'{"status":"ok"}', media_type="application/json")


async def metrics(_: Request) -> Response:
    """Prometheus text."""
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


class Readiness:
    """``GET /readyz``: 200 when all parts serve, otherwise 503; names each part and how it is."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], ready: Ready | None) -> None:
        self._channels = dict(channels)
        self._ready = ready

    async def readyz(self, _: Request) -> Response:
        """The answer, made from calls that take a second at most."""
        names = list(self._channels)
        states = await asyncio.gather(*(check(self._channels[name]) for name in names))
        parts = dict(zip(names, states, strict=True))
        if self._ready is not None:
            parts["gateway"] = "serving" if await self._ready() else "not serving"
        good = all(state == "serving" for state in parts.values())
        body = orjson.dumps({"status": "ready" if good else "not ready", "parts": parts})
        return Response(body, 200 if good else 503, media_type="application/json")


def _checker(channel: grpc.aio.Channel) -> Any:
    # By hand, since the types of the stub know none of its methods.
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


async def check(channel: grpc.aio.Channel) -> str:
    """ "serving", "not serving" or "unreachable"."""
    try:
        reply = await _checker(channel)(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return "unreachable"
    return "serving" if reply.status == health_pb2.HealthCheckResponse.SERVING else "not serving"
