"""The client while the service is killed, again and again, under many senders."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane.deployment.v1 import usage_service_pb2_grpc
from tests.client_rig import recorder
from tests.conftest import Databases
from tests.processes import Client, Processes
from tests.test_client_programs import go_on

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
KILLS = 6


async def test_the_service_is_killed_while_everybody_sends(databases: Databases, tmp_path: Path) -> None:
    processes, made, done = Processes(databases, tmp_path), list[str](), asyncio.Event()
    try:
        await processes.ready()
        who = await processes.person()
        token, target = who[0][1].removeprefix("Bearer "), f"127.0.0.1:{processes.ports[1]}"
        async with recorder("sync", target, token, spool_dir=tmp_path / "spool") as one, recorder("aio", target, token) as two:
            going = asyncio.create_task(go_on(made, done, one, two))
            for _ in range(KILLS):
                await asyncio.sleep(random.uniform(0.2, 1))
                await processes.kill_and_restart(1)
            done.set()
            await going
            assert await one.flush(30) and await two.flush(30)
            assert one.stats.rejected == two.stats.rejected == 0
            print(f"\n{databases.engine}: {KILLS} kills, {len(made)} events; {one.stats}; {two.stats}")
        async with Client(processes) as client:
            stub = usage_service_pb2_grpc.UsageServiceStub(client.channel)
            found, token = Counter[str](), ""
            while not found or token:
                page = await stub.ListUsage(rpc.ListUsageRequest(page_size=250, page_token=token), metadata=who)
                found.update(event.id for event in page.events)
                token = page.next_page_token
            sums = await stub.SummarizeUsage(rpc.SummarizeUsageRequest(), metadata=who)
        assert found == Counter(made) and sums.total.events == len(made)
    finally:
        processes.stop()
