"""Real concurrency: one wish is one row and one page; a tier's limit holds; two processes agree."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from tests.conftest import Databases
from tests.harness import Person, Stack
from tests.processes import Client, Processes

CALLS = 50


async def test_fifty_identical_orders_are_one_row_and_one_page(stack: Stack, person: Person) -> None:
    made = await asyncio.gather(*(stack.order(person) for _ in range(CALLS)))
    assert len({(d.id, d.payment_url, d.stripe_session_id) for d in made}) == 1
    listed = await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    assert [d.id for d in listed.deployments] == [made[0].id]


async def test_fifty_different_orders_leave_what_the_tier_allows(stack: Stack, person: Person) -> None:
    results = await asyncio.gather(
        *(stack.order(person, f"1234567{n:02d}:" + "D" * 35) for n in range(CALLS)), return_exceptions=True
    )
    made = [result for result in results if isinstance(result, deployment_pb2.Deployment)]
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert (len(made), len(refused)) == (3, CALLS - 3)
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    listed = await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    assert {d.id for d in listed.deployments} == {d.id for d in made}


async def test_gets_that_share_a_query_share_no_answer(stack: Stack, person: Person) -> None:
    stranger = await stack.person()
    d = await stack.order(person)
    get, request = stack.deployments.GetDeployment, deployment_service_pb2.GetDeploymentRequest(id=d.id)
    calls = [get(request, metadata=(person, stranger)[number % 2].metadata) for number in range(CALLS)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {result.id if isinstance(result, deployment_pb2.Deployment) else "?" for result in results[::2]} == {d.id}
    assert {result.code() if isinstance(result, grpc.aio.AioRpcError) else "?" for result in results[1::2]} == {grpc.StatusCode.NOT_FOUND}


@pytest_asyncio.fixture
async def processes(databases: Databases, tmp_path: Path) -> AsyncIterator[Processes]:
    """Two deployment services, which migrate the same database at the same moment."""
    started = Processes(databases, tmp_path, deployments=2)
    try:
        await started.ready()
        yield started
    finally:
        started.stop()


async def test_two_processes_agree_on_one_row_and_one_page(processes: Processes) -> None:
    person = await processes.person()
    async with Client(processes, 1) as first, Client(processes, 2) as second:
        made = await asyncio.gather(*((first, second)[n % 2].order(person) for n in range(CALLS)))
        assert len({(d.id, d.payment_url) for d in made}) == 1
        answer = await first.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person)
        assert [d.id for d in answer.deployments] == [made[0].id]
