"""Three million events pass, and the memory of the service stays as it is."""

import asyncio
import secrets
import statistics
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil
import pytest

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane.deployment.v1 import usage_service_pb2_grpc
from tests.harness import Metadata
from tests.metering_proof import MODELS, KillableDatabases
from tests.processes import OPTIONS, Processes

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

class Made:
    """Services on a PostgreSQL of their own."""

    def __init__(self, folder: Path) -> None:
        self.databases = KillableDatabases(folder)
        self.processes = Processes(self.databases, folder, CLAWPLANE_RATE_LIMIT="10000000/minute", CLAWPLANE_LOG_LEVEL="error")
        self.url = self.processes.env["CLAWPLANE_DEPLOYMENT_DATABASE_URL"]

    def close(self) -> None:
        """Ends them."""
        for process in self.processes.running:
            process.kill()
        self.databases.close()


async def test_memory_stays_while_three_million_events_pass(tmp_path: Path) -> None:
    made = Made(tmp_path)
    batch, callers, total = 5000, 3, 3_000_000
    try:
        await made.processes.ready()
        people = [await made.processes.person() for _ in range(callers)]
        process, seen, sent = psutil.Process(made.processes.running[1].pid), [], 0
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{made.processes.ports[1]}", options=OPTIONS)
        stub = usage_service_pb2_grpc.UsageServiceStub(channel)

        async def caller(who: Metadata) -> None:
            nonlocal sent
            while sent < total:
                sent += batch
                # An id costs as little as it can: this side shares the machine.
                head = f"{secrets.token_hex(8)}-"
                at = datetime.now(UTC)
                events = [
                    pb.UsageEvent(id=f"{head}{n}", occurred_at=at, provider=MODELS[n % 4][0], model=MODELS[n % 4][1], tokens_in=n, latency_ms=n)
                    for n in range(batch)
                ]
                request = rpc.BatchRecordUsageRequest(events=events)
                answer = await stub.BatchRecordUsage(request, metadata=who, timeout=120)  # type: ignore[misc]
                assert answer.accepted == batch
                seen.append(process.memory_info().rss)

        await asyncio.gather(*(caller(who) for who in people))
        await channel.close()
        early, late = statistics.median(seen[40:80]), statistics.median(seen[-40:])
        print(f"\n{len(seen) * batch:,} events: {early / 2**20:.0f} MiB after the first of them, {late / 2**20:.0f} MiB at the end, {late / early:.2f} times")
        assert late / early <= 1.2
    finally:
        made.close()
