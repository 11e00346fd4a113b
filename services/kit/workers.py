"""Several processes on one port: each binds it with SO_REUSEPORT, and this one starts, replaces and stops them.

Spawned as commands, never forked: gRPC does not survive a fork.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import structlog

log = structlog.get_logger()

_NUMBER, _COUNT, _READY = "CLAWPLANE_WORKER", "CLAWPLANE_WORKER_COUNT", "CLAWPLANE_WORKER_READY_FD"
_START_S = 60.0
_PAUSE_S, _MAX_PAUSE_S = 0.2, 10.0


def number() -> int | None:
    """Which worker this process is, from 0; None when it is alone."""
    text = os.environ.get(_NUMBER)
    return int(text) if text else None


def count() -> int:
    """How many workers there are of this process's kind; 1 when it is alone."""
    return int(os.environ.get(_COUNT, "1"))


class Lifeline:
    """A worker's tie to its supervisor, held from before it starts to serve: nobody would stop it when the supervisor is gone."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """``stop`` ends a worker that serves; one that does not yet has nothing to bring to an end, and goes at once."""
        self._stop, self._serves = stop, False
        if number() is not None:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._at_end)

    def ready(self) -> None:
        """Tells the supervisor that this worker serves."""
        self._serves = True
        if number() is None:
            return
        descriptor = int(os.environ[_READY])
        # A supervisor that is gone hears nothing; the end of our input says the rest.
        with suppress(BrokenPipeError):
            os.write(descriptor, b"1")
        os.close(descriptor)

    def _at_end(self) -> None:
        if not self._serves:
            os._exit(1)
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._stop()


class Supervisor:
    """Keeps ``count`` copies of a command running. SIGTERM stops them, SIGHUP replaces them one after the other."""

    def __init__(self, command: list[str], count: int) -> None:
        self.command, self.count = command, count
        self._workers: list[asyncio.subprocess.Process | None] = [None] * count
        self._stopping = asyncio.Event()
        self._turn = asyncio.Lock()

    async def run(self) -> int:
        """Until stopped; the exit status. The first worker must come up, or nothing does."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stopping.set)
        tasks: set[asyncio.Task[None]] = set()

        def replace() -> None:
            task = asyncio.create_task(self._replace_all())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGHUP, replace)
        first = await self._start(0)
        if first is None:
            return 1
        self._workers[0] = first
        await asyncio.gather(*(self._keep(index) for index in range(self.count)))
        return 0

    async def _start(self, index: int) -> asyncio.subprocess.Process | None:
        """A worker that serves; None when it did not come up."""
        reader, writer = os.pipe()
        env = os.environ | {_NUMBER: str(index), _COUNT: str(self.count), _READY: str(writer)}
        worker = await asyncio.create_subprocess_exec(
            *self.command, env=env, pass_fds=[writer], stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        os.close(writer)
        try:
            told = await asyncio.wait_for(asyncio.to_thread(os.read, reader, 1), _START_S)
        except TimeoutError:
            worker.kill()
            told = b""
        finally:
            with suppress(OSError):
                os.close(reader)
        if told:
            log.info("worker.started", worker=index, pid=worker.pid)
            return worker
        log.error("worker.not_started", worker=index, status=await worker.wait())
        return None

    async def _keep(self, index: int) -> None:
        """Starts a worker again whenever it ends by itself."""
        pause = _PAUSE_S
        while not self._stopping.is_set():
            worker = self._workers[index]
            if worker is None:
                async with self._turn:
                    worker = self._workers[index] = await self._start(index)
            if worker is None:
                await self._sleep(pause)
                pause = min(_MAX_PAUSE_S, pause * 2)
                continue
            pause = _PAUSE_S
            ended, stopping = asyncio.create_task(worker.wait()), asyncio.create_task(self._stopping.wait())
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if self._stopping.is_set():
                await self._stop(worker)
            elif self._workers[index] is worker:
                log.error("worker.ended", worker=index, status=worker.returncode)
                self._workers[index] = None

    async def _replace_all(self) -> None:
        """One after the other: the next one serves before the old one stops taking calls."""
        for index in range(self.count):
            async with self._turn:
                if self._stopping.is_set():
                    return
                old, fresh = self._workers[index], await self._start(index)
                if fresh is None:
                    log.error("worker.not_replaced", worker=index)
                    return
                self._workers[index] = fresh
                if old is not None:
                    await self._stop(old)

    async def _stop(self, worker: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            worker.terminate()
        await worker.wait()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
