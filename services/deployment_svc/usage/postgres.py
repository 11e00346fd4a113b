"""What only PostgreSQL can do for the ledger: any number of events with their roll-ups and counters in one statement.

It writes the events in the order of their keys, only then the roll-ups in the order of theirs, and then the counters (which ask for the
roll-ups, since the database runs parts that nobody asks for from the last to the first), so two of them cannot wait for each other in a
circle, nor one for whoever prices anew.

Nearly all events are new. To ask for each whether it is (ON CONFLICT) costs the database a third of all its work on a batch, so a
transaction of its own is tried without; when one of its events is known, or twice among them, it begins again and asks.
"""

import time
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import bindparam, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.prices.repository import RULES
from services.deployment_svc.usage import texts
from services.deployment_svc.usage.models import KINDS, LATENCIES, LATENCY_MS, SUMS
from services.deployment_svc.usage.rows import Row, key_of
from services.deployment_svc.usage.rules import ALWAYS, COUNTED_BY
from services.kit.columns import Identifier
from services.kit.db import Database, together_sql

Keys = set[tuple[str, str, date]]
_ASKING_S = 5.0
_asks_until = 0.0
"""Until when this process asks at once: events that were sent again come in numbers, and a try that fails leaves dead rows behind."""
_PREFIXES = {"user_id": "usr", "deployment_id": "dep", "agent_id": "agnt", "project_id": "prj"}


def _text(column: str) -> str:
    """A column as roll-ups and counters know it: identifiers with their prefix, empty when there is none."""
    if column in _PREFIXES:
        return f"coalesce('{_PREFIXES[column]}_' || replace({column}::text, '-', ''), '')"
    return f"coalesce({column}, '')" if column else "''"


def _dim(number: int) -> str:
    cases = " ".join(f"WHEN '{kind}' THEN {_text(columns[number])}" for kind, columns in KINDS.items())
    return f"CASE kind {cases} END AS dim_{number + 1}"


_IN_BUCKET = f"width_bucket(latency_ms, ARRAY[{', '.join(map(str, LATENCY_MS))}]::bigint[])"
_OWN = "adjusts = ''"
_ADDED = ", ".join(f"{name} = r.{name} + excluded.{name}" for name in SUMS)
_KEY = "org_id, kind, starts_at, dim_1, dim_2, dim_3, currency"
_COUNTER_KEY = "org_id, scope, subject, period, starts_at"
_BUCKET = f"CASE WHEN latency_ms > 0 AND {_OWN} THEN {_IN_BUCKET} END AS bucket"

_GROUPED = "org_id, starts_at, currency, user_id, api_key_id, deployment_id, agent_id, project_id, provider, model, type, bucket"
_TOKENS = "tokens_in, tokens_out, tokens_cached, tokens_reasoning, tokens_total"
_COUNTED = (
    "org_id, id, month, user_id, api_key_id, deployment_id, agent_id, project_id, provider, model, type, status, adjusts, currency, cost, "
    f"{_TOKENS}, date_bin('15 minutes', occurred_at, TIMESTAMPTZ '2000-01-01 00:00:00+00') AS starts_at, {_BUCKET}"
)
_COUNTS = {
    "events": f"count(*) FILTER (WHERE {_OWN})", "errors": f"count(*) FILTER (WHERE {_OWN} AND status = 'error')",
    "unpriced_events": f"count(*) FILTER (WHERE {_OWN} AND cost IS NULL)", "cost": "sum(cost)",
}  # fmt: skip
_SUMMED = {"cost": "coalesce(sum(cost), 0)"} | {
    name: f"coalesce(sum(events) FILTER (WHERE bucket = {number}), 0)" for number, name in enumerate(LATENCIES)
}
# In two steps: three kinds with a column for each bucket cost every event what they need to cost only those that differ.
_SUMS = f"""alike AS (
    SELECT {_GROUPED}, {", ".join(f"{_COUNTS.get(name, f'sum({name})')} AS {name}" for name in SUMS if name not in LATENCIES)}
    FROM stored GROUP BY {_GROUPED}
), sums AS (
    SELECT org_id, kind, starts_at, {_dim(0)}, {_dim(1)}, {_dim(2)}, currency,
        {", ".join(f"{_SUMMED.get(name, f'sum({name})')} AS {name}" for name in SUMS)}
    FROM alike CROSS JOIN (VALUES {", ".join(f"('{kind}')" for kind in KINDS)}) AS kinds(kind) GROUP BY {_KEY}
)"""  # noqa: S608
_COUNTED_BY = f"CASE scope {' '.join(f'WHEN {scope!r} THEN {kind!r}' for scope, (kind, _) in COUNTED_BY.items())} END"
_PLACES = {scope: "''" if place is None else f"dim_{place + 1}" for scope, (_, place) in COUNTED_BY.items()}
_SUBJECT = f"CASE scope {' '.join(f'WHEN {scope!r} THEN {place}' for scope, place in _PLACES.items())} END"



@lru_cache(maxsize=32)
def _statement(same: frozenset[str], *, asks: bool) -> str:
    """Parameters: currency, version of the book, how many rows, and the columns. ``asks``: whether events that are known are left out;
    otherwise they are an error."""
    return f"""
WITH book AS (
    SELECT coalesce((SELECT version FROM price_book_versions WHERE currency = $1), 0) = $2 AS fresh
), stored AS (
    INSERT INTO usage_events ({texts.NAMES})
    SELECT * FROM ({texts.select(same, 4)}) AS given WHERE (SELECT fresh FROM book)
    {"ON CONFLICT DO NOTHING" if asks else ""}
    RETURNING {_COUNTED}
), {_SUMS}, rolled AS (
    INSERT INTO usage_rollups AS r ({_KEY}, {", ".join(SUMS)}, created_at, updated_at)
    SELECT {_KEY}, {", ".join(SUMS)}, now(), now() FROM sums ORDER BY {_KEY}
    ON CONFLICT ({_KEY}) DO UPDATE SET {_ADDED}, updated_at = excluded.updated_at
    RETURNING 1
), wanted AS (
    SELECT org_id, scope, period FROM (SELECT DISTINCT org_id FROM stored) AS orgs
    CROSS JOIN (VALUES {", ".join(f"('{scope}', '{period}')" for scope, period in ALWAYS)}) AS always(scope, period)
    UNION SELECT org_id, scope, period FROM quotas WHERE org_id IN (SELECT org_id FROM stored)
), counts AS (
    SELECT s.org_id, scope, {_SUBJECT} AS subject, period, date_trunc(period, s.starts_at, 'UTC') AS starts_at,
        sum(tokens_total) AS tokens, sum(cost) AS cost
    FROM sums AS s JOIN wanted AS w ON w.org_id = s.org_id AND s.kind = {_COUNTED_BY} GROUP BY 1, 2, 3, 4, 5
), counted AS (
    INSERT INTO usage_counters AS c ({_COUNTER_KEY}, tokens, cost, created_at, updated_at)
    SELECT {_COUNTER_KEY}, tokens, cost, now(), now() FROM counts CROSS JOIN (SELECT count(*) FROM rolled) AS before
    WHERE scope = 'organization' OR subject <> '' ORDER BY {_COUNTER_KEY}
    ON CONFLICT ({_COUNTER_KEY}) DO UPDATE SET tokens = c.tokens + excluded.tokens, cost = c.cost + excluded.cost,
        updated_at = excluded.updated_at
)
SELECT (SELECT fresh FROM book),
    CASE WHEN (SELECT count(*) FROM stored) < $3 THEN ARRAY(SELECT ROW(org_id, id, month) FROM stored) END
"""  # noqa: S608 - only our own names are put in


_FIRST = f"SELECT {together_sql(RULES)}"


async def commit(db: Database, rows: Sequence[Row], book: PriceBook) -> tuple[bool, Keys]:
    """As ``store``, in a transaction of its own: beside SQLAlchemy, whose session costs more than a few events."""

    async def once() -> tuple[bool, Keys]:
        global _asks_until
        async with db.raw(_FIRST) as connection:
            if time.monotonic() >= _asks_until:
                try:
                    return await _write(connection, rows, book, asks=False)
                except asyncpg.UniqueViolationError:
                    _asks_until = time.monotonic() + _ASKING_S
                    await connection.execute(f"ROLLBACK; BEGIN; {_FIRST}")
            return await _write(connection, rows, book, asks=True)

    return await db.again(once)


async def store(session: AsyncSession, rows: Sequence[Row], book: PriceBook) -> tuple[bool, Keys]:
    """As ``repository.store``: (whether the book still counts, the keys of what was new). Another statement of the session has begun its
    transaction."""
    raw = await (await session.connection()).get_raw_connection()
    try:
        return await _write(raw.driver_connection, rows, book, asks=True)
    except asyncpg.PostgresError as error:
        # What SQLAlchemy would have made of it, so that a unit of work that clashed is repeated.
        raise DBAPIError("INSERT INTO usage_events", None, error) from error


async def _write(connection: Any, rows: Sequence[Row], book: PriceBook, *, asks: bool) -> tuple[bool, Keys]:
    # Sorted here: for the database, a sort of such wide rows is dear. A SELECT from arrays gives them in their order.
    same, given = texts.encode(sorted(rows, key=key_of))
    fresh, new = await connection.fetchrow(_statement(same, asks=asks), book.currency, book.version, len(rows), *given)
    if new is None:
        return fresh, set(map(key_of, rows))
    return fresh, {(f"org_{org_id.hex}", event_id, month) for org_id, event_id, month in new}


_RECOUNT = text(
    f"WITH stored AS (SELECT {_COUNTED} FROM usage_events WHERE org_id = :org AND month = :month), {_SUMS} SELECT * FROM sums"  # noqa: S608
).bindparams(bindparam("org", type_=Identifier("org")))


_ONE_MOMENT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


async def recount(session: AsyncSession, org_id: str, month: date) -> list[dict[str, Any]]:
    """The roll-up rows that the events of an organization's month make."""
    rows = await session.execute(_RECOUNT, {"org": org_id, "month": month})
    return [dict(row._mapping) | {"org_id": org_id} for row in rows]


async def as_of_one_moment(session: AsyncSession) -> None:
    """Lets all statements of a transaction see the same moment, while others write; must be its first."""
    await session.execute(_ONE_MOMENT)
