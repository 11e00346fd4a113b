"""How long a summary takes says how much time it is about, and not how many events there were in it."""

import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.usage.models import KINDS, LATENCIES, LATENCY_MS, SUMS
from services.kit import ids
from services.kit.settings import KitSettings
from tests.harness import Person, Stack
from tests.usage_rows import THEN, ledger

FEW, MANY = 100_000, 10_000_000
_MODELS = ("claude-opus-4.5", "claude-sonnet-4.5", "gpt-3.2", "gemini-3-flash", "minimax-m2.5")
_EVENTS = f"""
    INSERT INTO usage_events (org_id, id, month, occurred_at, provider, model, type, tokens_in, tokens_out, tokens_cached, tokens_reasoning,
        tokens_total, cost, currency, latency_ms, status, operation_id, attempt, estimated, adjusts, reason, metadata, created_at)
    SELECT CAST(:org AS uuid), 'event-' || n, date_trunc('month', at, 'UTC')::date, at, 'provider-' || n % 3,
        (ARRAY[{", ".join(f"'{model}'" for model in _MODELS)}])[1 + n % 5], 'chat', 1000, 100, 0, 0, 1100, 0.0075, 'usd', 1 + n % 9000,
        CASE WHEN n % 50 = 0 THEN 'error' ELSE 'ok' END, '', 0, false, '', '', '{{}}', now()
    FROM (SELECT n, CAST(:start AS timestamptz) + n * interval '30 days' / :count AS at FROM generate_series(1, :count) AS n) AS given
"""


def _rollups() -> str:
    """The sums of the model's kind, from the events; in the order of time, as they come."""
    edges = (0, *LATENCY_MS)
    said = {"events": "count(*)", "errors": "count(*) FILTER (WHERE status = 'error')", "unpriced_events": "0"}
    for number, name in enumerate(LATENCIES):
        below = f" AND latency_ms < {edges[number + 1]}" if number + 1 < len(edges) else ""
        said[name] = f"count(*) FILTER (WHERE latency_ms >= {edges[number]}{below})"
    sums = ", ".join(said.get(name, f"sum({name})") for name in SUMS)
    dims = ", ".join(KINDS["model"])
    return (
        f"INSERT INTO usage_rollups (org_id, kind, starts_at, dim_1, dim_2, dim_3, currency, {', '.join(SUMS)}, created_at, updated_at) "
        f"SELECT org_id, 'model', date_bin('15 minutes', occurred_at, TIMESTAMPTZ '2000-01-01 00:00:00+00'), {dims}, currency, {sums}, now(), now() "
        "FROM usage_events WHERE org_id = CAST(:org AS uuid) GROUP BY 1, 3, 4, 5, 6, 7 ORDER BY 3, 4, 5, 6"
    )


async def _fill(stack: Stack, person: Person, count: int) -> None:
    given: dict[str, Any] = {"org": ids.to_uuid(person.org_id, "org"), "start": THEN - timedelta(days=15), "count": count}
    async with ledger(stack, KitSettings(statement_timeout_s=3600)) as db:
        async with db.writing.begin() as connection:
            await connection.execute(sa.text(_EVENTS), given)
            await connection.execute(sa.text(_rollups()), {"org": given["org"]})
        async with db.reading.connect() as connection:
            for table in ("usage_events", "usage_rollups"):
                await connection.exec_driver_sql(f"VACUUM ANALYZE {table}")


async def _took_ms(stack: Stack, person: Person, count: int, groups: "Sequence[rpc.UsageGroup.ValueType]") -> float:
    span: dict[str, Any] = {"start": THEN - timedelta(days=15), "end": THEN + timedelta(days=14)}
    request = rpc.SummarizeUsageRequest(group_by=groups, **span)
    started = time.perf_counter()
    answer = await stack.usage.SummarizeUsage(request, metadata=person.metadata)
    took = (time.perf_counter() - started) * 1000
    assert abs(answer.total.events - count) < count / 100 and answer.total.latency_p50_ms
    return took


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_month_of_ten_million_events_takes_as_long_as_one_of_a_hundred_thousand(stack: Stack) -> None:
    few, many = await stack.person(), await stack.person()
    await _fill(stack, few, FEW)
    await _fill(stack, many, MANY)
    by_model = [rpc.USAGE_GROUP_PROVIDER, rpc.USAGE_GROUP_MODEL]
    for groups in (by_model, [rpc.USAGE_GROUP_DAY, *by_model]):
        took: dict[int, list[float]] = {FEW: [], MANY: []}
        for _ in range(30):
            took[FEW].append(await _took_ms(stack, few, FEW, groups))
            took[MANY].append(await _took_ms(stack, many, MANY, groups))
        of_few, of_many = statistics.median(took[FEW]), statistics.median(took[MANY])
        by = ", ".join(rpc.UsageGroup.Name(group).removeprefix("USAGE_GROUP_").lower() for group in groups)
        print(f"\na month by {by}: {of_few:.1f} ms of {FEW:,} events, {of_many:.1f} ms of {MANY:,}")
        assert of_many <= 1.5 * of_few
