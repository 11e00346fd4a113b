"""What an owner may wish of a deployment, what an operator may set, and what is found by what."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import deployment_pb2, payment_service_pb2, usage_service_pb2
from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from services.deployment_svc.settings import DeploymentSettings
from services.kit.db import ALL, Database
from tests.conftest import Databases
from tests.harness import TELEGRAM, Person, Stack, eventually, running
from tests.simulators.market import MarketSimulator

ACTIVE, DEPLOYING, CLOSED = deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_DEPLOYING, deployment_pb2.STATE_CLOSED
CANCELED, SUSPENDED, FAILED = deployment_pb2.STATE_CANCELED, deployment_pb2.STATE_SUSPENDED, deployment_pb2.STATE_FAILED
Code = grpc.StatusCode


async def code_of(call: Awaitable[Any]) -> tuple[Code, str]:
    """How a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


async def orders(market: MarketSimulator, d: deployment_pb2.Deployment) -> list[dict[str, Any]]:
    """The deployment's live orders."""
    return [o for o in await market.get("/_sim/orders") if o["name"] == f"clawplane-{d.id}" and o["state"] != "closed"]


async def again_active(stack: Stack, d: deployment_pb2.Deployment) -> deployment_pb2.Deployment:
    """The deployment once its latest wish runs."""

    async def check() -> Any:
        now = await stack.get(d.id)
        return now if now.state == ACTIVE and now.observed_generation == now.generation > d.generation else None

    found: deployment_pb2.Deployment = await eventually(check)
    return found


async def test_a_name_at_once_and_a_model_by_a_restart(stack: Stack, person: Person, market: MarketSimulator) -> None:
    d = await stack.live(person)
    wish = deployment_pb2.Deployment(id=d.id, display_name="Ann's bot", etag=d.etag, email="x@example.com")
    named = await stack.deployments.UpdateDeployment(rpc.UpdateDeploymentRequest(deployment=wish), metadata=person.metadata)
    assert (named.display_name, named.email, named.state, named.generation) == ("Ann's bot", d.email, ACTIVE, d.generation)
    stale = rpc.UpdateDeploymentRequest(deployment=wish, update_mask={"paths": ["display_name"]})
    assert (await code_of(stack.deployments.UpdateDeployment(stale, metadata=person.metadata)))[0] is Code.ABORTED
    other = next(model for model in DeploymentSettings(data_dir=stack.data_dir).models if model != d.model)
    change = rpc.UpdateDeploymentRequest(deployment={"id": d.id, "model": other}, update_mask={"paths": ["model"]})  # type: ignore[arg-type]
    await stack.deployments.UpdateDeployment(change, metadata=person.metadata)
    live = await again_active(stack, d)
    (order,) = await orders(market, d)
    assert (live.model, live.display_name, order["spec"]["model"]) == (other, "Ann's bot", other)
    for paths, field in ((["state"], None), (["nonsense"], "update_mask"), (["model"], "model")):
        request = rpc.UpdateDeploymentRequest(deployment={"id": d.id, "model": "gpt-0"}, update_mask={"paths": paths})  # type: ignore[arg-type]
        if field is None:
            assert (await stack.deployments.UpdateDeployment(request, metadata=person.metadata)).state == ACTIVE
        else:
            code, text = await code_of(stack.deployments.UpdateDeployment(request, metadata=person.metadata))
            assert code is Code.INVALID_ARGUMENT and field in text


async def test_a_rotated_key_ends_with_the_new_start(stack: Stack, person: Person, market: MarketSimulator) -> None:
    d = await stack.live(person)
    (before,) = await orders(market, d)
    await stack.deployments.RotateClawKey(rpc.RotateClawKeyRequest(id=d.id), metadata=person.metadata)
    await again_active(stack, d)
    (after,) = await orders(market, d)

    def record(key: str) -> Any:
        event = {"id": "x", "provider": "anthropic", "model": d.model, "type": 1, "tokens_in": 1}
        request = usage_service_pb2.RecordUsageRequest(event=event)  # type: ignore[arg-type]
        request.event.occurred_at.GetCurrentTime()
        return stack.usage.RecordUsage(request, metadata=(("authorization", f"Bearer {key}"),))

    assert before["secrets"]["claw_key"] != after["secrets"]["claw_key"]
    assert (await code_of(record(before["secrets"]["claw_key"])))[0] is Code.UNAUTHENTICATED
    assert (await record(after["secrets"]["claw_key"])).event.deployment_id == d.id
    pending = await stack.order(person, "555555555:" + "R" * 35)
    code, text = await code_of(stack.deployments.RotateClawKey(rpc.RotateClawKeyRequest(id=pending.id), metadata=person.metadata))
    assert code is Code.FAILED_PRECONDITION and "PENDING" in text


async def test_cancelling(stack: Stack, person: Person, market: MarketSimulator) -> None:
    pending = await stack.order(person)
    gone = await stack.deployments.CancelDeployment(rpc.CancelDeploymentRequest(id=pending.id), metadata=person.metadata)
    assert gone.state == CANCELED
    # In the middle of being brought up: undone, and the money is due back.
    d = await stack.order(person)
    assert d.id != pending.id
    name = f"clawplane-{d.id}"
    await market.post("/_sim/faults", {"step": "offers", "kind": "no_bids", "name": name, "times": 1000})
    await stack.sandbox_act(d, "pay")

    async def ordered() -> bool:
        return bool(await orders(market, d))

    await eventually(ordered)
    closing = await stack.deployments.CancelDeployment(rpc.CancelDeploymentRequest(id=d.id), metadata=person.metadata)
    assert closing.state == deployment_pb2.STATE_CLOSING
    await stack.until(d.id, CLOSED)
    assert not await orders(market, d)
    due = await stack.payments.ListPayments(
        payment_service_pb2.ListPaymentsRequest(refund_due=True, page_size=250), metadata=stack.operator
    )
    assert [p.attention for p in due.payments if p.deployment_id == d.id] == ["closed before the bot ever ran"]
    again = await stack.deployments.CancelDeployment(rpc.CancelDeploymentRequest(id=d.id), metadata=person.metadata)
    assert again.state == CLOSED
    live = await stack.live(person, "555555556:" + "R" * 35)
    code, text = await code_of(stack.deployments.CancelDeployment(rpc.CancelDeploymentRequest(id=live.id), metadata=person.metadata))
    assert code is Code.FAILED_PRECONDITION and "close it" in text


async def test_deleting_hides_what_has_ended(stack: Stack, person: Person) -> None:
    d = await stack.live(person)
    delete = rpc.DeleteDeploymentRequest(id=d.id)
    code, text = await code_of(stack.deployments.DeleteDeployment(delete, metadata=person.metadata))
    assert code is Code.FAILED_PRECONDITION and "close it first" in text
    await stack.deployments.CloseDeployment(rpc.CloseDeploymentRequest(id=d.id), metadata=person.metadata)
    await stack.until(d.id, CLOSED)
    assert (await stack.deployments.DeleteDeployment(delete, metadata=person.metadata)).HasField("deleted_at")
    for call in (
        stack.deployments.GetDeployment(rpc.GetDeploymentRequest(id=d.id), metadata=person.metadata),
        stack.deployments.ListDeploymentEvents(rpc.ListDeploymentEventsRequest(deployment_id=d.id), metadata=person.metadata),
        stack.deployments.CloseDeployment(rpc.CloseDeploymentRequest(id=d.id), metadata=person.metadata),
        stack.deployments.DeleteDeployment(delete, metadata=person.metadata),
    ):
        assert (await code_of(call))[0] is Code.NOT_FOUND
    listed = await stack.deployments.ListDeployments(rpc.ListDeploymentsRequest(), metadata=person.metadata)
    assert not listed.deployments
    assert (await stack.get(d.id)).HasField("deleted_at")
    expired = await stack.order(person)
    await stack.sandbox_act(expired, "expire")
    await stack.until(expired.id, deployment_pb2.STATE_EXPIRED)
    gone = await stack.deployments.DeleteDeployment(rpc.DeleteDeploymentRequest(id=expired.id), metadata=person.metadata)
    assert gone.state == CANCELED


async def test_operators_move_along_the_legal_ways_only(stack: Stack, person: Person, market: MarketSimulator) -> None:
    d = await stack.live(person)

    def move(to: int, who: Any = None) -> Any:
        request = rpc.UpdateDeploymentStatusRequest(id=d.id, state=to, message="by hand")  # type: ignore[arg-type]
        return stack.deployments.UpdateDeploymentStatus(request, metadata=who or stack.operator)

    assert (await code_of(move(SUSPENDED, person.metadata)))[0] is Code.PERMISSION_DENIED
    assert (await code_of(move(deployment_pb2.STATE_PENDING)))[0] is Code.FAILED_PRECONDITION
    assert (await code_of(move(CLOSED)))[0] is Code.INVALID_ARGUMENT
    assert (await move(SUSPENDED)).state == SUSPENDED

    async def stopped() -> bool:
        return not await orders(market, d)

    await eventually(stopped)
    assert (await stack.get(d.id)).error_message == "by hand"
    assert (await code_of(move(ACTIVE)))[0] is Code.INVALID_ARGUMENT
    await move(DEPLOYING)
    await again_active(stack, d)
    assert (await move(deployment_pb2.STATE_CLOSING)).state == deployment_pb2.STATE_CLOSING
    await stack.until(d.id, CLOSED)


async def test_found_by_what_belongs_to_it(stack: Stack, person: Person) -> None:
    d = await stack.live(person)
    for by in ("stripe_session_id", "stripe_payment_intent_id", "akash_lease_id"):
        request = rpc.LookupDeploymentRequest(**{by: getattr(d, by)})  # type: ignore[arg-type]
        assert (await stack.deployments.LookupDeployment(request, metadata=stack.operator)).id == d.id
        assert (await code_of(stack.deployments.LookupDeployment(request, metadata=person.metadata)))[0] is Code.PERMISSION_DENIED
        unknown = rpc.LookupDeploymentRequest(**{by: "nothing"})  # type: ignore[arg-type]
        assert (await code_of(stack.deployments.LookupDeployment(unknown, metadata=stack.operator)))[0] is Code.NOT_FOUND
    wish = rpc.FindPendingDuplicateRequest(model="claude-opus-4.5", channel=1, channel_token=TELEGRAM)  # type: ignore[arg-type]
    assert (await code_of(stack.deployments.FindPendingDuplicate(wish, metadata=person.metadata)))[0] is Code.NOT_FOUND
    pending = await stack.order(person)
    assert (await stack.deployments.FindPendingDuplicate(wish, metadata=person.metadata)).id == pending.id
    stranger = await stack.person()
    assert (await code_of(stack.deployments.FindPendingDuplicate(wish, metadata=stranger.metadata)))[0] is Code.NOT_FOUND


async def test_only_so_many_are_brought_up_at_once(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    options = {
        "driver": "tests.simulators.market:MarketDriver",
        "driver_options": {"url": market.url},
        "org_deploying": 2,
        "all_deploying": 3,
    }
    async with running(tmp_path, databases.make(), deployment=options) as stack:
        people = [await stack.person() for _ in range(2)]
        made = [await stack.order(person, f"77777777{n}:" + "Q" * 35) for person in people for n in range(3)]
        names = {f"clawplane-{d.id}" for d in made}
        most, most_of_one = 0, 0
        await market.post("/_sim/settings", {"ready_delay": 0.3})
        try:
            await asyncio.gather(*(stack.sandbox_act(d, "pay") for d in made))
            for _ in range(200):
                at_work = [o for o in await market.get("/_sim/orders") if o["name"] in names and o["state"] != "closed"]
                now = await asyncio.gather(*(stack.get(d.id) for d in made))
                coming = [d for d in now if d.state == DEPLOYING and d.akash_deployment_id]
                most = max(most, len(coming))
                most_of_one = max(most_of_one, *(sum(d.org_id == person.org_id for d in coming) for person in people))
                if all(d.state == ACTIVE for d in now):
                    break
                await asyncio.sleep(0.03)
        finally:
            await market.post("/_sim/settings", {"ready_delay": 0})
        assert len(at_work) == 6 and (most, most_of_one) == (3, 2)


async def test_what_nothing_moves_is_found(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    options = {
        "driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}, "reap_s": 0.2, "stuck_after_s": 1.5,
    }  # fmt: skip
    urls = databases.make()
    async with running(tmp_path, urls, deployment=options) as stack:
        person = await stack.person()
        d = await stack.order(person)
        await market.post("/_sim/faults", {"step": "create", "kind": "error", "name": f"clawplane-{d.id}", "times": 10_000})
        await stack.sandbox_act(d, "pay")
        failed = await stack.until(d.id, FAILED, timeout_s=20)
        assert failed.error_message.startswith("not brought up within")
        await market.post("/_sim/calm")
        await stack.deployments.RetryDeployment(rpc.RetryDeploymentRequest(id=d.id), metadata=person.metadata)
        await stack.until(d.id, ACTIVE)
        # A due time that was lost: nobody would look at it ever again.
        await _sql(urls, tmp_path, "UPDATE deployments SET due_at = NULL, state = 'closing' WHERE lease_until IS NULL")
        await stack.until(d.id, CLOSED)
        # A wish from long ago that never got its page.
        wish = await stack.order(person)
        await _sql(urls, tmp_path, "UPDATE deployments SET link_number = 0, created_at = '2026-01-01 00:00:00' WHERE state = 'pending'")
        await stack.until(wish.id, deployment_pb2.STATE_EXPIRED)


async def _sql(urls: dict[str, str], data_dir: Path, statement: str) -> None:
    """Changes rows behind the service's back, until it changed at least one."""
    db = Database(urls["deployment_svc"], DeploymentSettings(data_dir=data_dir), "behind")

    async def changed() -> bool:
        async with db.transaction(ALL) as session:
            return bool((await session.execute(sa.text(statement))).rowcount)

    try:
        await eventually(changed)
    finally:
        await db.close()
