"""Rows of the ledger that tests put there themselves: of any time, by any caller."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_event_pb2 as pb
from services.deployment_svc.prices.repository import load
from services.deployment_svc.usage import repository
from services.deployment_svc.usage.rows import Row, month_of
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from tests.harness import Stack

THEN = datetime(now().year + 3, 3, 15, tzinfo=UTC)
"""In the midst of the weeks in which clocks are put forward, far from what other tests store, and long before it is forgotten."""
MODELS = (("anthropic", "claude-opus-4.5"), ("anthropic", "claude-sonnet-4.5"), ("openai", "gpt-3.2"), ("nobody", "unknown"))


@asynccontextmanager
async def ledger(stack: Stack, settings: KitSettings | None = None) -> AsyncIterator[Database]:
    """The deployment service's database."""
    url = stack.urls.get("deployment_svc") or f"sqlite+aiosqlite:///{stack.data_dir / 'deployment_svc.db'}"
    db = Database(url, settings or KitSettings(), "test")
    try:
        yield db
    finally:
        await db.close()


def row(org_id: str, when: datetime, **more: Any) -> Row:
    """An event of a time."""
    given: dict[str, Any] = {
        "org_id": org_id, "id": f"row-{ids.uuid7().hex}", "month": month_of(when), "occurred_at": when, "user_id": None, "api_key_id": None,
        "deployment_id": None, "agent_id": None, "thread_id": None, "project_id": None, "provider": "anthropic", "model": "claude-opus-4.5",
        "type": pb.USAGE_TYPE_CHAT, "tokens_in": 1000, "tokens_out": 100, "tokens_cached": 0, "tokens_reasoning": 0, "cost": Decimal("0.0075"),
        "stated_cost": None, "price_id": None, "currency": "usd", "latency_ms": 0, "status": pb.USAGE_STATUS_OK, "operation_id": "", "attempt": 0,
        "estimated": False, "adjusts": "", "reason": "", "metadata_": {}, "created_at": now(),
    }  # fmt: skip
    given |= more
    given.setdefault("tokens_total", given["tokens_in"] + given["tokens_out"])
    return Row(**given)


async def store(stack: Stack, rows: Sequence[Row]) -> None:
    """Stores events with their sums, as the ledger does, at the cost that they say."""
    async with ledger(stack) as db:
        async with db.read(ALL) as session:
            book = await load(session, "usd")
        for start in range(0, len(rows), 500):
            await db.run(lambda session, start=start: repository.store(session, rows[start : start + 500], book), ALL)  # type: ignore[misc]


def at_random(org_id: str, dice: random.Random, count: int, days: int = 45) -> list[Row]:
    """Events of all kinds, within so many days of THEN either way; every tenth is a correction."""
    people, bots, agents = ([ids.new(prefix) for _ in range(3)] for prefix in ("usr", "dep", "agnt"))
    keys, projects = [ids.new("key") for _ in range(3)], [ids.new("prj") for _ in range(2)]
    rows = []
    for _ in range(count):
        provider, model = dice.choice(MODELS)
        correction = dice.random() < 0.1
        sign = -1 if correction else 1
        rows.append(
            row(
                org_id, THEN + timedelta(seconds=dice.uniform(-86400 * days, 86400 * days)), provider=provider, model=model,
                user_id=dice.choice([None, *people]), api_key_id=dice.choice([None, *keys]), deployment_id=dice.choice([None, *bots]),
                agent_id=dice.choice([None, *agents]), project_id=dice.choice([None, *projects]),
                type=dice.choice([pb.USAGE_TYPE_CHAT, pb.USAGE_TYPE_EMBEDDING, pb.USAGE_TYPE_TOOL]),
                status=dice.choice([pb.USAGE_STATUS_OK, pb.USAGE_STATUS_OK, pb.USAGE_STATUS_ERROR, pb.USAGE_STATUS_CANCELED]),
                tokens_in=sign * dice.randint(0, 9000), tokens_out=sign * dice.randint(0, 900), tokens_cached=sign * dice.randint(0, 90),
                cost=dice.choice([None, sign * Decimal(dice.randint(0, 10**12)).scaleb(-12)]),
                latency_ms=dice.choice([0, dice.randint(1, 9), 10, int(10 ** dice.uniform(1, 6))]),
                adjusts="another" if correction else "", reason="counted twice" if correction else "",
            )
        )  # fmt: skip
    return rows
