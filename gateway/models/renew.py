"""Keeps calls open while they are under way, many of them by one message, and cuts off what cannot be kept open before it expires."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2, model_call_service_pb2_grpc

log = structlog.get_logger()
_MARGIN_S = 20.0
"""A call ends so long before it would be settled by estimate."""
_TRY_S, _LEAST_S = 5.0, 0.1
_MOST = 1000
"""So many calls are renewed by one message."""
_EARLY = 0.1
"""What would be due within this share of a lifetime is renewed along with what is due."""


class Kept:
    """A call that is kept open; times are the loop's."""

    def __init__(self, call: model_call_pb2.ModelCall, at: float) -> None:
        self.id = call.id
        self._lifetime_s = max(1.0, (call.expires_at.ToNanoseconds() - call.created_at.ToNanoseconds()) / 1e9)
        left_s = max(1.0, call.expires_at.ToNanoseconds() / 1e9 - time.time())
        self._margin_s = min(_MARGIN_S, left_s / 2, self._lifetime_s / 2)
        self.expires_at = at + left_s
        """When it is settled by estimate, if nobody renews it."""
        self.renew_at = at + left_s / 3
        self.is_open = True
        self.cut: asyncio.Timeout | None = None

    def renewed(self, asked_at: float) -> None:
        """It was renewed by a message that was sent then."""
        self.expires_at = max(self.expires_at, asked_at + self._lifetime_s)
        self.renew_at = asked_at + self._lifetime_s / 3
        self._cut_at(self.ends_at)

    def not_renewed(self, at: float) -> None:
        """Nobody knows whether it was: soon again, ever sooner the less time is left."""
        self.renew_at = at + max(_LEAST_S, (self.ends_at - at) / 3)

    def lost(self, at: float) -> None:
        """It is settled already: what is used from now on is nobody's."""
        self._cut_at(at)

    @property
    def ends_at(self) -> float:
        """When it is cut off unless it is renewed before."""
        return self.expires_at - self._margin_s

    def is_due(self, at: float) -> bool:
        """Whether it may be renewed along with others now."""
        return self.renew_at <= at + self._lifetime_s * _EARLY

    def _cut_at(self, when: float) -> None:
        if self.is_open and self.cut is not None and not self.cut.expired():
            self.cut.reschedule(when)


class Renewer:
    """Renews calls with the gateway's own credential."""

    def __init__(self, channel: grpc.aio.Channel, service_metadata: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._stub = model_call_service_pb2_grpc.ModelCallServiceStub(channel)
        self._metadata = service_metadata
        self._open: set[Kept] = set()
        self._task: asyncio.Task[Any] | None = None
        self._sooner = asyncio.Event()
        self._next = 0.0

    @asynccontextmanager
    async def keep(self, call: model_call_pb2.ModelCall) -> AsyncIterator[Kept]:
        """Keeps a call open while the block runs, or until it is ``done``; TimeoutError when that cannot be done any longer."""
        kept = Kept(call, asyncio.get_running_loop().time())
        self._open.add(kept)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="renew")
        elif kept.renew_at < self._next:
            self._sooner.set()
        try:
            async with asyncio.timeout_at(kept.ends_at) as kept.cut:
                yield kept
        finally:
            self.done(kept)

    def done(self, kept: Kept) -> None:
        """It is kept open no more, and not cut off for that either."""
        kept.is_open = False
        self._open.discard(kept)

    async def close(self) -> None:
        """Renews nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._open:
            self._next = min(kept.renew_at for kept in self._open)
            self._sooner.clear()
            try:
                await asyncio.wait_for(self._sooner.wait(), max(0, self._next - loop.time()))
            except TimeoutError:
                due = [kept for kept in self._open if kept.is_due(loop.time())]
                await asyncio.gather(*(self._renew(due[start : start + _MOST]) for start in range(0, len(due), _MOST)))

    async def _renew(self, due: Sequence[Kept]) -> None:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        timeout_s = min(_TRY_S, max(_LEAST_S, (min(kept.ends_at for kept in due) - asked_at) / 2))
        request = model_call_service_pb2.BatchRenewModelCallsRequest(ids=[kept.id for kept in due])
        try:
            answer = await self._stub.BatchRenewModelCalls(request, metadata=tuple(self._metadata()), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            log.warning("model_calls.not_renewed", calls=len(due), code=error.code().name)
            for kept in due:
                kept.not_renewed(loop.time())
            return
        for kept, renewed in zip(due, answer.renewed, strict=True):
            if renewed:
                kept.renewed(asked_at)
            else:
                self._open.discard(kept)
                kept.lost(loop.time())
