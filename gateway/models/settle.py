"""Writes down what calls have used, many at once, however long the deployment service is away."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from clawplane.deployment.v1 import model_call_service_pb2, model_call_service_pb2_grpc
from clawplane.deployment.v1.model_call_service_pb2 import ModelCallUsage
from services.kit.coalesce import Coalescer

log = structlog.get_logger()
_TRY_S, _MAX_PAUSE_S = 5.0, 5.0


class Settler:
    """Settles calls with the gateway's own credential."""

    def __init__(self, channel: grpc.aio.Channel, service_metadata: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._stub = model_call_service_pb2_grpc.ModelCallServiceStub(channel)
        self._metadata = service_metadata
        # Not a Batcher: a service that is away is no reason to try the halves of a batch one by one.
        self._send: Coalescer[ModelCallUsage, bool] = Coalescer(self._settle)
        self._later: set[asyncio.Task[Any]] = set()

    async def settle(self, used: ModelCallUsage, until: float) -> None:
        """Settles a call. What does not succeed at once is tried in the background until ``until`` (time.monotonic); then the deployment
        service settles it by estimate."""
        # The caller may leave meanwhile: that must not undo it.
        if not await asyncio.shield(self._keep(self._try(used))):
            self._keep(self._retry(used, until))

    def _keep(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task

    async def _settle(self, used: list[ModelCallUsage]) -> list[bool]:
        request = model_call_service_pb2.BatchSettleModelCallsRequest(usages=used)
        return list((await self._stub.BatchSettleModelCalls(request, metadata=tuple(self._metadata()), timeout=_TRY_S)).settled)

    async def _try(self, used: ModelCallUsage) -> bool:
        """Whether nothing more is to be done."""
        try:
            await self._send(used)
        except grpc.aio.AioRpcError as error:
            log.warning("model_call.not_settled", call=used.id, code=error.code().name)
            return error.code() is grpc.StatusCode.INVALID_ARGUMENT
        return True

    async def _retry(self, used: ModelCallUsage, until: float) -> None:
        pause = 0.2
        while time.monotonic() < until:
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            if await self._try(used):
                return
            pause = min(_MAX_PAUSE_S, pause * 2)

    async def drain(self, timeout_s: float) -> None:
        """Waits for what is on its way."""
        if self._later:
            await asyncio.wait(self._later, timeout=timeout_s)
