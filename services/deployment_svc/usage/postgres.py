"""What only PostgreSQL can do for the ledger: any number of events with their roll-ups in one statement.

The values travel as arrays of text and are cast by the server, which costs the client least. The statement writes the events in the order
of their keys, and only then the roll-ups in the order of theirs, so two of them cannot wait for each other in a circle.
"""

from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import orjson
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.usage.models import NO_DEPLOYMENT, USAGE_STATUS, USAGE_TYPE


def _uuid(identifier: str | None) -> str | None:
    return None if identifier is None else identifier[-32:]


def _plain(value: Any) -> str | None:
    return None if value is None else str(value)


_COLUMNS: dict[str, tuple[str, Callable[[Any], str | None]]] = {
    "org_id": ("uuid", _uuid), "id": ("text", _plain), "month": ("date", _plain), "occurred_at": ("timestamptz", _plain),
    "user_id": ("uuid", _uuid), "api_key_id": ("text", _plain), "deployment_id": ("uuid", _uuid), "agent_id": ("uuid", _uuid),
    "thread_id": ("uuid", _uuid), "project_id": ("uuid", _uuid), "provider": ("text", _plain), "model": ("text", _plain),
    "type": ("text", lambda number: USAGE_TYPE.words[number]), "tokens_in": ("bigint", _plain), "tokens_out": ("bigint", _plain),
    "tokens_cached": ("bigint", _plain), "tokens_reasoning": ("bigint", _plain), "tokens_total": ("bigint", _plain),
    "cost": ("numeric", _plain), "currency": ("text", _plain), "latency_ms": ("bigint", _plain),
    "status": ("text", lambda number: USAGE_STATUS.words[number]), "operation_id": ("text", _plain), "attempt": ("integer", _plain),
    "estimated": ("boolean", _plain), "metadata": ("json", lambda value: orjson.dumps(value).decode()),
    "created_at": ("timestamptz", _plain),
}  # fmt: skip
_ATTRIBUTES = {"metadata": "metadata_"}
_NAMES = ", ".join(_COLUMNS)
_GIVEN = ", ".join(f"CAST(:{name} AS text[])" for name in _COLUMNS)
_CAST = ", ".join(f"{name}::{kind} AS {name}" for name, (kind, _) in _COLUMNS.items())
_KEY = "org_id, day, provider, model, deployment_id, currency"
_SUMS = ("events", "tokens_in", "tokens_out", "tokens_total", "cost", "unpriced_events")
_ADDED = ", ".join(f"{name} = r.{name} + excluded.{name}" for name in _SUMS)
_STORE = text(f"""
WITH stored AS (
    INSERT INTO usage_events ({_NAMES})
    SELECT {_CAST} FROM unnest({_GIVEN}) AS given({_NAMES}) ORDER BY org_id::uuid, id, month::date
    ON CONFLICT DO NOTHING
    RETURNING org_id, id, month, occurred_at, provider, model, deployment_id, currency, tokens_in, tokens_out, tokens_total, cost
), sums AS (
    SELECT org_id, (occurred_at AT TIME ZONE 'UTC')::date AS day, provider, model,
        coalesce(deployment_id, '{NO_DEPLOYMENT[-32:]}'::uuid) AS deployment_id, currency,
        count(*) AS events, sum(tokens_in) AS tokens_in, sum(tokens_out) AS tokens_out, sum(tokens_total) AS tokens_total,
        coalesce(sum(cost), 0) AS cost, count(*) FILTER (WHERE cost IS NULL) AS unpriced_events
    FROM stored GROUP BY 1, 2, 3, 4, 5, 6
), rolled AS (
    INSERT INTO usage_rollups AS r ({_KEY}, {", ".join(_SUMS)}, created_at, updated_at)
    SELECT {_KEY}, {", ".join(_SUMS)}, now(), now() FROM sums ORDER BY {_KEY}
    ON CONFLICT ({_KEY}) DO UPDATE SET {_ADDED}, updated_at = excluded.updated_at
)
SELECT org_id, id, month FROM stored
""")  # noqa: S608 - only our own names are put in


async def store(session: AsyncSession, rows: Sequence[dict[str, Any]]) -> set[tuple[str, str, date]]:
    """As ``repository.store``."""
    given = {
        name: [convert(row[_ATTRIBUTES.get(name, name)]) for row in rows] for name, (_, convert) in _COLUMNS.items()
    }
    return {(f"org_{row[0].hex}", row[1], row[2]) for row in await session.execute(_STORE, given)}
