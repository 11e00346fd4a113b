"""What only PostgreSQL can do for reservations: many of them in few statements, in the order of locks."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices.repository import RULES
from services.kit.db import together_sql

Row = dict[str, Any]
_KINDS = {
    "org_id": "uuid", "id": "uuid", "user_id": "uuid", "api_key_id": "text", "deployment_id": "uuid", "provider": "text", "model": "text",
    "tokens_in": "bigint", "tokens_out": "bigint", "cost_held": "numeric", "currency": "text", "settles_itself": "boolean",
    "settled": "boolean", "released": "boolean", "settled_late": "boolean", "tokens_overrun": "bigint", "cost_overrun": "numeric",
    "expires_at": "timestamptz", "created_at": "timestamptz", "updated_at": "timestamptz",
}  # fmt: skip
_PREFIXES = {"org_id": "org", "id": "call", "user_id": "usr", "deployment_id": "dep"}
_NAMES = ", ".join(_KINDS)
# In the order given, until the commit.
_ALONE, _TOGETHER = (
    text(f"SELECT {locks}(hashtextextended('credit of ' || org, 0)) FROM unnest(CAST(:orgs AS text[])) AS org")  # noqa: S608
    for locks in (f"{together_sql(RULES)}, pg_advisory_xact_lock", "pg_advisory_xact_lock_shared")
)
_INSERT = text(
    f"INSERT INTO usage_reservations ({_NAMES}) SELECT {', '.join(f'{name}::{kind}' for name, kind in _KINDS.items())} "  # noqa: S608
    f"FROM unnest({', '.join(f'CAST(:{name} AS text[])' for name in _KINDS)}) AS given({_NAMES})"
)
_TAKE = text(f"""
DELETE FROM usage_reservations WHERE id IN (
    SELECT r.id FROM usage_reservations AS r
    JOIN unnest(CAST(:ids AS text[]), CAST(:orgs AS text[]), CAST(:deployments AS text[])) AS given(id, org, deployment)
        ON r.id = given.id::uuid AND r.settles_itself = (given.org = '')
        AND (given.org = '' OR r.org_id = CAST(nullif(given.org, '') AS uuid))
        AND (given.deployment = '' OR r.deployment_id = CAST(nullif(given.deployment, '') AS uuid))
    WHERE NOT r.settled ORDER BY r.id FOR UPDATE OF r
) RETURNING {_NAMES}, clock_timestamp()
""")  # noqa: S608
_RENEW = text("""
UPDATE usage_reservations SET expires_at = clock_timestamp() + make_interval(secs => :seconds), updated_at = now() WHERE id IN (
    SELECT id FROM usage_reservations WHERE id = ANY(CAST(CAST(:ids AS text[]) AS uuid[])) AND settles_itself AND NOT settled
    ORDER BY id FOR UPDATE
) RETURNING id
""")
_CLOCK = text("SELECT clock_timestamp()")


def _hex(identifier: str) -> str:
    return identifier[-32:]


async def lock(session: AsyncSession, org_ids: Sequence[str], *, alone: bool) -> None:
    """Until the transaction ends, nobody else is granted anything in these organizations; if not ``alone``, others may lock them so too.
    ``alone`` also keeps the rules of the ledger as they are."""
    await session.execute(_ALONE if alone else _TOGETHER, {"orgs": list(map(_hex, org_ids))})


async def clock(session: AsyncSession) -> datetime:
    """The time, as every process is told it."""
    at: datetime = (await session.execute(_CLOCK)).scalar_one()
    return at


async def insert(session: AsyncSession, rows: Sequence[Row]) -> None:
    """Stores reservations."""

    def given(name: str, value: Any) -> str | None:
        if value is None:
            return None
        return _hex(value) if name in _PREFIXES else str(value)

    await session.execute(_INSERT, {name: [given(name, row[name]) for row in rows] for name in _KINDS})


async def take(session: AsyncSession, wanted: Sequence[tuple[str, str, str]]) -> tuple[list[Row], datetime | None]:
    """As ``repository.take``."""
    ids, orgs, deployments = (list(map(_hex, column)) for column in zip(*wanted, strict=True))
    found = (await session.execute(_TAKE, {"ids": ids, "orgs": orgs, "deployments": deployments})).all()
    rows = [
        {
            name: f"{_PREFIXES[name]}_{value.hex}" if name in _PREFIXES and value is not None else value
            for name, value in zip(_KINDS, row[:-1], strict=True)
        }
        for row in found
    ]
    return rows, max((row[-1] for row in found), default=None)


async def renew(session: AsyncSession, ids: Sequence[str], seconds: float) -> set[str]:
    """As ``repository.renew``."""
    found = await session.execute(_RENEW, {"ids": list(map(_hex, ids)), "seconds": seconds})
    return {f"call_{row[0].hex}" for row in found}
