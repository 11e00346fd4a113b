"""Calls of the model endpoint are kept open while they are under way, and cut off before they would expire when that cannot be done."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2_grpc
from clawplane.deployment.v1 import model_call_service_pb2 as rpc
from gateway.models.renew import Renewer

OPTIONS = [("grpc.enable_http_proxy", 0)]


class Service(model_call_service_pb2_grpc.ModelCallServiceServicer):
    """Renews what it is asked to, unless it is told otherwise."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.metadata: list[dict[str, Any]] = []
        self.settled: set[str] = set()
        self.is_away = False

    async def BatchRenewModelCalls(self, request: rpc.BatchRenewModelCallsRequest, context: Any) -> rpc.BatchRenewModelCallsResponse:
        self.asked.append(list(request.ids))
        self.metadata.append(dict(context.invocation_metadata()))
        if self.is_away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return rpc.BatchRenewModelCallsResponse(renewed=[one not in self.settled for one in request.ids])


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    """One that runs."""
    made = Service()
    server = grpc.aio.server(options=OPTIONS)
    model_call_service_pb2_grpc.add_ModelCallServiceServicer_to_server(made, server)
    made.port = server.add_insecure_port("127.0.0.1:0")  # type: ignore[attr-defined]
    await server.start()
    yield made
    await server.stop(0)


@asynccontextmanager
async def renewer(service: Service) -> AsyncIterator[Renewer]:
    """One that asks it."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=OPTIONS) as channel:  # type: ignore[attr-defined]
        made = Renewer(channel, lambda: (("authorization", "Bearer ours"),))
        yield made
        await made.close()


def call(number: int = 0, lifetime_s: float = 1.2) -> model_call_pb2.ModelCall:
    """One that was opened now."""
    at = time.time()
    made = model_call_pb2.ModelCall(id=f"call_{number:032x}")
    made.created_at.FromNanoseconds(int(at * 1e9))
    made.expires_at.FromNanoseconds(int((at + lifetime_s) * 1e9))
    return made


async def lasts(renewer: Renewer, one: model_call_pb2.ModelCall, wanted_s: float) -> float:
    """How long a call that takes so long is let run."""
    began = time.monotonic()
    try:
        async with renewer.keep(one):
            await asyncio.sleep(wanted_s)
    except TimeoutError:
        pass
    return time.monotonic() - began


async def test_a_long_call_is_kept_open(service: Service) -> None:
    async with renewer(service) as ours:
        assert await lasts(ours, call(), 3.5) >= 3.5
    # Each third of its time; by the gateway's own credential.
    assert 6 <= len(service.asked) <= 11 and service.metadata[0]["authorization"] == "Bearer ours"


async def test_a_short_call_costs_nothing(service: Service) -> None:
    async with renewer(service) as ours:
        await asyncio.gather(*(lasts(ours, call(number), 0.2) for number in range(50)))
        await asyncio.sleep(0.5)
    assert not service.asked


async def test_many_calls_are_renewed_by_one_message(service: Service) -> None:
    async with renewer(service) as ours:

        async def one(number: int) -> float:
            # They begin within a tenth of their time.
            await asyncio.sleep(number % 50 * 0.001)
            return await lasts(ours, call(number), 1.6)

        assert min(await asyncio.gather(*(one(number) for number in range(1200)))) >= 1.6
    assert len(service.asked) <= 12 and max(map(len, service.asked)) == 1000
    assert {each for asked in service.asked for each in asked} == {call(number).id for number in range(1200)}


async def test_what_cannot_be_renewed_is_cut_before_it_expires(service: Service) -> None:
    service.is_away = True
    async with renewer(service) as ours:
        # The margin of so short a call is half of it.
        assert 0.5 <= await lasts(ours, call(), 5) < 1.1
        assert len(service.asked) >= 1
        # Away for a while only: tried again until it is there.
        running = asyncio.create_task(lasts(ours, call(1, 6), 4.5))
        await asyncio.sleep(2.3)
        service.is_away = False
        assert await running >= 4.5


async def test_what_is_settled_elsewhere_is_cut_at_once(service: Service) -> None:
    service.settled.add(call(1).id)
    async with renewer(service) as ours:
        kept, cut = await asyncio.gather(lasts(ours, call(0, 3), 2), lasts(ours, call(1, 3), 2))
    assert kept >= 2 and 0.9 <= cut < 1.4


async def test_what_is_done_is_neither_renewed_nor_cut(service: Service) -> None:
    """A caller who reads the end slowly gets it, though the call is settled by then."""
    service.settled.add(call().id)
    async with renewer(service) as ours:
        async with ours.keep(call(0, 3)) as kept:
            ours.done(kept)
            await asyncio.sleep(1.3)
            cpu = time.process_time()
            # Nothing spins meanwhile.
            async with ours.keep(call(1, 60)):
                await asyncio.sleep(0.1)
            assert time.process_time() - cpu < 0.09
    assert not service.asked


async def test_a_shorter_call_is_renewed_in_its_time(service: Service) -> None:
    async with renewer(service) as ours:
        long, short = await asyncio.gather(lasts(ours, call(0, 60), 2.5), lasts(ours, call(1, 1.2), 2.5))
    assert min(long, short) >= 2.5 and all(asked == [call(1).id] for asked in service.asked)


@pytest.mark.parametrize("skew_s", [-0.5, 0.5])
async def test_a_clock_that_is_wrong(service: Service, skew_s: float) -> None:
    """The service's clock is half a second off: the call runs all the same."""
    one = call()
    for when in (one.created_at, one.expires_at):
        when.FromNanoseconds(when.ToNanoseconds() + int(skew_s * 1e9))
    async with renewer(service) as ours:
        assert await lasts(ours, one, 2.5) >= 2.5
