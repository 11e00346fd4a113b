"""What only PostgreSQL can do for model calls: many of them in few statements."""

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

Row = dict[str, Any]
_KINDS = {
    "org_id": "uuid", "id": "uuid", "user_id": "uuid", "api_key_id": "text", "deployment_id": "uuid", "provider": "text", "model": "text",
    "tokens_in_estimate": "bigint", "max_tokens": "bigint", "cost_estimate": "numeric", "currency": "text", "expires_at": "timestamptz",
    "created_at": "timestamptz", "updated_at": "timestamptz",
}  # fmt: skip
_PREFIXES = {"org_id": "org", "id": "call", "user_id": "usr", "deployment_id": "dep"}
_NAMES = ", ".join(_KINDS)
# In the order given; until the commit nobody else opens calls of these organizations.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('credit of ' || org, 0)) FROM unnest(CAST(:orgs AS text[])) AS org")
# One statement, one snapshot: a call that is settled meanwhile is either held or spent.
_MONEY = text("""
SELECT org,
    (SELECT coalesce(sum(cost), 0) FROM usage_rollups WHERE org_id = org::uuid AND day >= CAST(:first AS date)),
    (SELECT coalesce(sum(cost_estimate), 0) FROM model_calls WHERE org_id = org::uuid)
FROM unnest(CAST(:orgs AS text[])) AS org
""")
_OPEN = text(
    f"INSERT INTO model_calls ({_NAMES}) SELECT {', '.join(f'{name}::{kind}' for name, kind in _KINDS.items())} "  # noqa: S608
    f"FROM unnest({', '.join(f'CAST(:{name} AS text[])' for name in _KINDS)}) AS given({_NAMES})"
)
_TAKE = text(f"""
DELETE FROM model_calls WHERE id IN (
    SELECT id FROM model_calls WHERE id = ANY(CAST(CAST(:ids AS text[]) AS uuid[])) ORDER BY id FOR UPDATE
) RETURNING {_NAMES}
""")  # noqa: S608


async def money(session: AsyncSession, org_ids: Sequence[str], first: date) -> dict[str, tuple[Decimal, Decimal]]:
    """(spent since a day, held) of each organization, locked until the transaction ends."""
    orgs = [org_id[-32:] for org_id in org_ids]
    await session.execute(_LOCK, {"orgs": orgs})
    rows = await session.execute(_MONEY, {"orgs": orgs, "first": first})
    return {f"org_{row[0]}": (row[1], row[2]) for row in rows}


async def insert(session: AsyncSession, rows: Sequence[Row]) -> None:
    """Opens the calls."""

    def given(name: str, value: Any) -> str | None:
        if value is None:
            return None
        return value[-32:] if name in _PREFIXES else str(value)

    await session.execute(_OPEN, {name: [given(name, row[name]) for row in rows] for name in _KINDS})


async def take(session: AsyncSession, ids: Sequence[str]) -> list[Row]:
    """Removes the calls that are there, and returns them."""
    rows = await session.execute(_TAKE, {"ids": [one[-32:] for one in ids]})
    return [
        {
            name: f"{_PREFIXES[name]}_{value.hex}" if name in _PREFIXES and value is not None else value
            for name, value in zip(_KINDS, row, strict=True)
        }
        for row in rows
    ]
