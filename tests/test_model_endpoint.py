"""The model endpoint: whatever breaks, a call is one usage event; what the provider counted where that arrived, an estimate otherwise."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import (
    model_call_service_pb2,
    quota_pb2,
    quota_service_pb2,
    usage_event_pb2,
    usage_reservation_pb2,
    usage_reservation_service_pb2,
    usage_service_pb2,
)
from clawplane.user.v1 import user_service_pb2
from gateway.models.upstreams import Upstream
from services.user_svc.settings import TIERS, Tier
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.simulators.upstream import KEY, UpstreamSimulator

MODEL = "claude-opus-4.5"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def upstream() -> Any:
    with UpstreamSimulator() as started:
        yield started


@pytest_asyncio.fixture(scope="module")
async def models(databases: Databases, upstream: UpstreamSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose models are at the simulated provider; calls are given up soon."""
    served = Upstream(provider="anthropic", prefixes=["claude"], base_url=upstream.base_url, api_key=KEY, names={MODEL: "claude-real"})
    nobody = Upstream(provider="google", prefixes=["gemini"], base_url="http://127.0.0.1:9/v1", api_key=KEY)
    refusing = Upstream(provider="openai", prefixes=["gpt"], base_url=upstream.base_url, api_key="sk-platform-is-wrong")
    starter = Tier(price_minor=2900, monthly_tokens=0, monthly_credit_minor=1000, live_deployments=3)
    gateway = {"model_upstreams": [served, nobody, refusing], "model_upstream_timeout_s": 1.5}
    deployment = {"model_call_s": 6, "poll_s": 0.2}
    folder = tmp_path_factory.mktemp("models")
    async with running(folder, databases.make(), gateway=gateway, deployment=deployment, user={"tiers": TIERS | {"starter": starter}}) as made:
        yield made


@pytest_asyncio.fixture
async def caller(models: Stack) -> Person:
    return await models.person()


def ask(body: dict[str, Any] | None = None, /, stream: bool = False, **order: Any) -> dict[str, Any]:
    """A request whose last message tells the simulated provider what to do."""
    content = json.dumps(order) if order else "hello"
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 100, "stream": stream} | (body or {})


async def post(stack: Stack, who: Person, body: dict[str, Any]) -> httpx.Response:
    return await stack.http.post(PATH, json=body, headers=dict(who.metadata), timeout=20)


async def events(stack: Stack, who: Person, count: int = 1) -> list[usage_event_pb2.UsageEvent]:
    """The organization's usage events, once there are so many; it is an error when there are more a moment later."""

    async def found() -> Any:
        listed = await stack.usage.ListUsage(usage_service_pb2.ListUsageRequest(page_size=250), metadata=who.metadata)
        return list(listed.events) if len(listed.events) >= count else None

    result: list[usage_event_pb2.UsageEvent] = await eventually(found, 20)
    assert len(result) == count
    return result


async def test_an_answer_is_passed_on_and_counted(models: Stack, caller: Person) -> None:
    answer = await post(models, caller, ask(chunks=10))
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    said = answer.json()
    assert said["choices"][0]["message"]["content"] == "word " * 10
    (event,) = await events(models, caller)
    usage = said["usage"]
    assert (event.tokens_in, event.tokens_out, event.tokens_cached) == (usage["prompt_tokens"], 10, usage["prompt_tokens"] // 2)
    assert (event.provider, event.model, event.estimated, event.status) == ("anthropic", MODEL, False, usage_event_pb2.USAGE_STATUS_OK)
    assert event.id.startswith("call_") and event.user_id == caller.user.id
    fresh = event.tokens_in - event.tokens_cached
    assert Decimal(event.cost) == (Decimal(5) * fresh + Decimal("0.5") * event.tokens_cached + Decimal(25) * 10) / 1_000_000


@pytest.mark.parametrize("wants_usage", [False, True])
async def test_a_stream_is_passed_on_and_counted(models: Stack, caller: Person, wants_usage: bool) -> None:
    more = {"stream_options": {"include_usage": True}} if wants_usage else {}
    answer = await post(models, caller, ask(more, stream=True, chunks=7))
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"]) == "word " * 7
    assert [bool(chunk["choices"]) for chunk in chunks].count(False) == wants_usage
    (event,) = await events(models, caller)
    assert (event.tokens_out, event.estimated) == (7, False)


async def test_what_is_sent_upstream(models: Stack, caller: Person, upstream: UpstreamSimulator) -> None:
    body = ask({"user": caller.user.id, "temperature": 0.5, "tools": [{"type": "function"}], "n": 2}, stream=True, chunks=1)
    del body["max_tokens"]
    await post(models, caller, body)
    asked = (await upstream.calls())[caller.user.id]["asked"]
    assert asked["model"] == "claude-real" and asked["temperature"] == 0.5 and asked["tools"] == [{"type": "function"}]
    assert asked["stream_options"] == {"include_usage": True} and asked["max_tokens"] == 4096  # Two choices share what is held.


@pytest.mark.parametrize(
    ("order", "status", "estimate"),
    [
        ({"kind": "cut", "break_at": 5}, 200, 5),
        ({"kind": "hang", "break_at": 4}, 200, 4),
        ({"kind": "no_usage", "chunks": 6}, 200, 6),
        ({"kind": "html"}, 502, 0),
        ({"kind": "status", "status": 500}, 503, 0),
    ],
)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_stream_that_breaks_is_one_estimate(models: Stack, caller: Person, order: dict[str, Any], status: int, estimate: int) -> None:
    answer = await post(models, caller, ask(stream=True, **order))
    assert answer.status_code == status
    (event,) = await events(models, caller)
    assert event.estimated and event.tokens_out == estimate
    # An answer that came to its end is no failure, whether or not its provider counts.
    assert event.status == (usage_event_pb2.USAGE_STATUS_OK if order["kind"] == "no_usage" else usage_event_pb2.USAGE_STATUS_ERROR)
    if status == 200 and order["kind"] != "no_usage":
        assert json.loads(answer.text.split("\n\n")[-2][6:])["error"]["code"] == "upstream_broken"


@pytest.mark.parametrize("kind", ["cut", "hang", "html", "no_usage"])
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_whole_answer_that_breaks_is_one_estimate(models: Stack, caller: Person, kind: str) -> None:
    answer = await post(models, caller, ask(kind=kind))
    assert answer.status_code == (200 if kind == "no_usage" else 502)
    (event,) = await events(models, caller)
    assert event.estimated and (event.status == usage_event_pb2.USAGE_STATUS_OK) == (kind == "no_usage")


async def test_refusals_of_the_provider(models: Stack, caller: Person) -> None:
    meant = await post(models, caller, ask(kind="status", status=400, message="max_tokens is too large"))
    assert meant.status_code == 400 and meant.json()["error"]["message"] == "max_tokens is too large"
    busy = await post(models, caller, ask(kind="status", status=429))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    # The provider's words about our key are not for the caller.
    key = await post(models, caller, ask({"model": "gpt-3.2"}))
    assert key.status_code == 502 and "sk-platform" not in key.text
    away = await post(models, caller, ask({"model": "gemini-3-flash"}))
    assert away.status_code == 503
    for event in await events(models, caller, 4):
        assert event.estimated and event.tokens_total == 0 and not Decimal(event.cost)


async def test_bad_requests_name_the_parameter(models: Stack, caller: Person) -> None:
    for change, param in (
        ({"model": 7}, "model"), ({"model": "claude-unknown"}, "model"), ({"model": "llama"}, "model"), ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages"), ({"stream": "yes"}, "stream"), ({"max_tokens": 0}, "max_tokens"), ({"n": 99}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"), ({"max_tokens": 9000}, "max_tokens"), ({"stream_options": 1}, "stream_options"),
    ):  # fmt: skip
        answer = await post(models, caller, ask(change))
        assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, (change, answer.text)
    for raw in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        answer = await models.http.post(PATH, content=raw, headers=dict(caller.metadata))
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", raw[:10]
    nobody = await models.http.post(PATH, json=ask(), headers={"authorization": "Bearer claw_test_nonsense"})
    assert nobody.status_code == 401 and nobody.json()["error"]["code"] == "invalid_api_key"
    listed = await models.usage.ListUsage(usage_service_pb2.ListUsageRequest(), metadata=caller.metadata)
    assert not listed.events


async def test_the_catalog(models: Stack, caller: Person) -> None:
    found = (await models.http.get("/v1/models", headers=dict(caller.metadata))).json()
    # Nobody serves the fourth one here.
    assert [(one["id"], one["owned_by"]) for one in found["data"]] == [
        (MODEL, "anthropic"), ("gemini-3-flash", "google"), ("gpt-3.2", "openai")
    ]  # fmt: skip
    assert (await models.http.get("/v1/models")).status_code == 401


async def test_a_caller_who_leaves_is_counted_all_the_same(models: Stack, caller: Person, upstream: UpstreamSimulator) -> None:
    body = ask({"user": caller.user.id}, stream=True, chunks=30, sleep_s=0.03)
    async with models.http.stream("POST", PATH, json=body, headers=dict(caller.metadata)) as answer:
        async for _ in answer.aiter_raw():
            break
    (event,) = await events(models, caller)
    assert (event.tokens_out, event.estimated) == (30, False)
    assert (await upstream.calls())[caller.user.id]["ended"]


async def test_a_long_stream_is_neither_cut_nor_abandoned(models: Stack, caller: Person) -> None:
    """It takes longer than a call is held for without being renewed: what it holds and what it uses is counted throughout."""
    answer = asyncio.create_task(post(models, caller, ask({"max_tokens": 200}, stream=True, chunks=120, sleep_s=0.07)))
    for _ in range(8):
        await asyncio.sleep(1)
        if not answer.done():
            listed = await models.reservations.ListUsageReservations(
                usage_reservation_service_pb2.ListUsageReservationsRequest(), metadata=caller.metadata
            )
            assert [one.state for one in listed.reservations] == [usage_reservation_pb2.USAGE_RESERVATION_STATE_HELD]
    said = (await answer).text
    assert said.count("word ") == 120 and said.rstrip().endswith("[DONE]")
    (event,) = await events(models, caller)
    assert (event.tokens_out, event.estimated) == (120, False)


async def test_used_up_limits_are_told_in_seconds(models: Stack, caller: Person) -> None:
    """An hour's tokens: 429 and when it is worth trying again; what only calls under way keep out, soon."""
    limit = quota_pb2.Quota(
        org_id=caller.org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=quota_pb2.QUOTA_PERIOD_HOUR, unit=quota_pb2.QUOTA_UNIT_TOKENS,
        amount="500",
    )  # fmt: skip
    await models.quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=models.operator)
    under_way = asyncio.create_task(post(models, caller, ask({"max_tokens": 400}, stream=True, chunks=100, sleep_s=0.02)))
    await asyncio.sleep(0.7)
    busy = await post(models, caller, ask({"max_tokens": 400}))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "5")
    assert (await under_way).status_code == 200
    # 100 tokens were used of the 400 that were held, and so there is room again.
    assert (await post(models, caller, ask({"max_tokens": 250}, chunks=250))).status_code == 200
    full = await post(models, caller, ask({"max_tokens": 400}))
    left_s = 3600 - time.time() % 3600
    assert full.status_code == 429 and left_s - 10 < int(full.headers["retry-after"]) <= left_s + 10
    error = full.json()["error"]
    assert error["type"] == "rate_limit_error" and "limit of 500 tokens an hour" in error["message"]


async def test_credit_is_never_overrun(models: Stack, caller: Person) -> None:
    # $10: the answer of 8,000 tokens may cost 0.2; so 50 of them at most, however many are asked for at once.
    opened = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model=MODEL, tokens_in_estimate=0, max_tokens=8000)
    calls = await asyncio.gather(
        *(models.model_calls.OpenModelCall(opened, metadata=caller.metadata, timeout=30) for _ in range(80)), return_exceptions=True
    )
    refused = [call for call in calls if isinstance(call, grpc.aio.AioRpcError)]
    assert len(refused) == 30 and {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    answer = await post(models, caller, ask({"max_tokens": 8000}))
    assert answer.status_code == 402 and answer.json()["error"]["code"] == "insufficient_quota"
    assert "10 USD" in answer.json()["error"]["message"]
    # What is settled gives back what was held and not used; the rest is settled by estimate when its time is over.
    good = [call for call in calls if not isinstance(call, BaseException)]
    used = model_call_service_pb2.ModelCallUsage(id=good[0].id, tokens_out=10, status=usage_event_pb2.USAGE_STATUS_OK)
    settle = model_call_service_pb2.BatchSettleModelCallsRequest(usages=[used, used])
    twice = await asyncio.gather(*(models.model_calls.BatchSettleModelCalls(settle, metadata=models.operator) for _ in range(10)))
    assert [done for one in twice for done in one.settled].count(True) == 1
    assert (await post(models, caller, ask({"max_tokens": 4000}, chunks=1))).status_code == 200
    found = await events(models, caller, 51)
    assert sum(event.estimated for event in found) == 49
    assert {event.tokens_out for event in found if event.estimated} == {8000}


async def test_a_tier_without_a_limit(models: Stack, caller: Person) -> None:
    account = user_service_pb2.UpdateUserAccountRequest(id=caller.user.id, tier="business")
    await models.users.UpdateUserAccount(account, metadata=models.operator)

    async def allowed() -> bool:
        opened = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model=MODEL, tokens_in_estimate=1_990_000)
        try:
            await models.model_calls.OpenModelCall(opened, metadata=caller.metadata)
        except grpc.aio.AioRpcError:
            return False
        return True

    # $60 cover what $10 do not, as soon as the change of tier has travelled.
    await eventually(allowed, 5)


async def test_the_namespace_is_the_endpoints(models: Stack, caller: Person) -> None:
    event = usage_event_pb2.UsageEvent(id="call_" + "0" * 32, provider="anthropic", model=MODEL, tokens_in=1)
    event.occurred_at.GetCurrentTime()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await models.usage.RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=caller.metadata)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "call_" in (refused.value.details() or "")
    batch = await models.usage.BatchRecordUsage(usage_service_pb2.BatchRecordUsageRequest(events=[event]), metadata=caller.metadata)
    assert (batch.accepted, batch.rejected) == (0, 1)
    # Nobody but the platform settles.
    settle = model_call_service_pb2.BatchSettleModelCallsRequest(usages=[model_call_service_pb2.ModelCallUsage(id="call_" + "0" * 32)])
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await models.model_calls.BatchSettleModelCalls(settle, metadata=caller.metadata)
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_bot_chats_by_the_endpoint(models: Stack, caller: Person, upstream: UpstreamSimulator, tmp_path: Path) -> None:
    d = await models.live(caller)
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        said = (await http.post(f"{d.provider_url}/chat", json={"message": "hello"})).json()
    assert said["reply"] == "word " * 50
    (event,) = await events(models, caller)
    assert (event.deployment_id, event.tokens_out, event.api_key_id[:4]) == (d.id, 50, "key_")
