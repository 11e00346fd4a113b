"""AsyncUsageRecorder: for asyncio."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import grpc

from clawplane.deployment.v1 import usage_service_pb2_grpc
from clawplane_client.events import CallFields, UsageFields, make_event
from clawplane_client.outbox import Added, request_of
from clawplane_client.patience import failure_of
from clawplane_client.recorder import Recorder, of_anthropic, of_openai

log = logging.getLogger("clawplane_client")
_AFTER_DEFECT_S = 1.0
T = TypeVar("T")


class AsyncUsageRecorder(Recorder):
    """UsageRecorder for one event loop: nothing in it blocks the loop, disk work is done in a thread.

    Use it as ``async with``, or ``await close()``. What was recorded and not closed is flushed when the interpreter ends, without the loop.
    """

    def _begin(self, *, at_once: bool) -> None:
        self._wake, self._progress, self._steps = asyncio.Event(), asyncio.Event(), 0
        self._task: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> "AsyncUsageRecorder":
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def record(self, **fields: Unpack[UsageFields]) -> str:
        """As UsageRecorder.record. It waits only when there is no room in memory."""
        event_id, event = make_event(fields)
        deadline = time.monotonic() + self._full_timeout_s
        seen = self._steps
        while (added := self._outbox.add(event)) is Added.NO_ROOM:
            trouble = await self._aside(self._outbox.spill)
            self._wake.set()
            if trouble is not None and not await self._until(self._more_than(seen), deadline):
                raise trouble
            seen = self._steps
        if added is Added.LOOK_AGAIN:
            self._start()
            self._wake.set()
        return event_id

    async def record_openai(self, response: Any, *, provider: str = "openai", model: str = "", **fields: Unpack[CallFields]) -> str:
        """As UsageRecorder.record_openai."""
        return await self.record(**of_openai(response, provider, model, fields))

    async def record_anthropic(self, response: Any, *, provider: str = "anthropic", model: str = "", **fields: Unpack[CallFields]) -> str:
        """As UsageRecorder.record_anthropic."""
        return await self.record(**of_anthropic(response, provider, model, fields))

    async def flush(self, timeout_s: float = 10.0) -> bool:
        """As UsageRecorder.flush."""
        self._outbox.hurry()
        self._start()
        self._wake.set()
        return await self._until(lambda: self._outbox.idle, time.monotonic() + timeout_s)

    async def close(self, timeout_s: float | None = None) -> None:
        """As UsageRecorder.close."""
        self._outbox.close()
        if self._task is not None:
            self._wake.set()
            await self._until(lambda: self._outbox.at_rest, time.monotonic() + (self._close_timeout_s if timeout_s is None else timeout_s))
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._channel is not None:
            await self._channel.close()
        lost = await self._aside(self._undelivered)
        self._tell()
        if lost is not None:
            raise lost

    def _at_exit(self) -> None:
        # The loop is gone, and with it what it was doing: the outbox still has all of that.
        self._outbox.close()
        deadline = time.monotonic() + self._close_timeout_s
        with contextlib.closing(self._open(grpc)) as channel:
            while not self._outbox.at_rest and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, self._outbox.pause_s()))
                self._send(lambda: channel, lambda: False)
        lost = self._undelivered()
        self._tell()
        if lost is not None and self._on_error is not None:
            self._on_error(lost)

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work) if self._spools else work()

    async def _until(self, done: Callable[[], bool], deadline: float) -> bool:
        """Whether it came to be in time; looked at after each step of the task."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await _wait(self._progress, left)
        return True

    def _more_than(self, steps: int) -> Callable[[], bool]:
        return lambda: self._steps > steps

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="clawplane-usage")

    async def _run(self) -> None:
        while True:
            try:
                await _wait(self._wake, self._outbox.pause_s())
                self._wake.clear()
                await self._step()
                self._tell()
            except Exception as error:
                # Whatever it is, the events are still there. Its text may hold the token.
                log.error("the usage recorder failed: %s", type(error).__name__)
                await asyncio.sleep(_AFTER_DEFECT_S)
            self._steps += 1
            self._progress.set()
            self._progress = asyncio.Event()

    async def _step(self) -> None:
        batch = await self._aside(self._outbox.next)
        if batch is None:
            return
        self._channel = self._channel or self._open(grpc.aio)
        try:
            call: Any = usage_service_pb2_grpc.UsageServiceStub(self._channel).BatchRecordUsage
            answer = await call(request_of(batch), metadata=self._metadata(), timeout=self._call_timeout_s)
        except Exception as error:
            failure = failure_of(error)
            await self._aside(lambda: self._outbox.failed(failure))
        else:
            await self._aside(lambda: self._outbox.answered(answer))


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
