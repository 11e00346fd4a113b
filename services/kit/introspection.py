"""What every server says of itself: health and reflection."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_V1 = "grpc.reflection.v1.ServerReflection"
SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME, _V1)


class Streams:
    """The open streams of health and reflection: they last as long as their clients like, or until a stop ends them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False

    @asynccontextmanager
    async def one(self, context: Any) -> AsyncIterator[None]:
        """Around one stream."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
            return
        except asyncio.CancelledError:
            if not self._ended:
                raise
            task.uncancel()
        finally:
            self._tasks.discard(task)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def end(self) -> None:
        """Ends them all."""
        self._ended = True
        for task in list(self._tasks):
            task.cancel()


class Health(health.aio.HealthServicer):
    """Says whether a service serves."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """As gRPC's own, until a stop."""
        async with self._streams.one(context):
            await super().Watch(request, context)


class Reflection(reflection.aio.ReflectionServicer):
    """Says what is served, to clients without stubs."""

    def __init__(self, names: Sequence[str], streams: Streams) -> None:
        super().__init__(names)
        self._streams = streams

    # gRPC's type stubs take the generator for a coroutine.
    async def ServerReflectionInfo(self, requests: Any, context: Any) -> Any:
        """As gRPC's own, until a stop."""
        base: Any = super()
        async with self._streams.one(context):
            async for answer in base.ServerReflectionInfo(requests, context):
                yield answer


def add_to_server(server: grpc.aio.Server, health_: Health, reflection_: Reflection) -> None:
    """Registers both."""
    health_pb2_grpc.add_HealthServicer_to_server(health_, server)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection_, server)  # type: ignore[no-untyped-call]
    # grpcio-reflection knows v1alpha only; v1 has the same messages under another name.
    handler = grpc.stream_stream_rpc_method_handler(
        reflection_.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": handler}),))
