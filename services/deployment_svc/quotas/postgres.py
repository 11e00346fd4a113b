"""What only PostgreSQL can do for limits: how any number of callers stand, in one statement and so in one snapshot."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.deployment_svc.quotas.rules import TOKENS, Key, Limit, Standing, Standings, Who

_HELD = "org_id, user_id, api_key_id, deployment_id, tokens_in + tokens_out AS tokens, cost_held AS cost, created_at, hour, day, month"
_SUMS = ", ".join(
    f"sum({name}) FILTER (WHERE created_at >= {period}) AS {name}_{period}"
    for period in ("hour", "day", "month")
    for name in ("tokens", "cost")
)
_OF_PERIOD = "CASE period WHEN 'hour' THEN {0}_hour WHEN 'day' THEN {0}_day ELSE {0}_month END"


def _subject(column: str, prefix: str) -> str:
    return f"'{prefix}_' || replace({column}::text, '-', '')"


# What is settled meanwhile is either held or used, never both and never neither. A call holds in the periods in which it was begun, since
# its usage will count in these; one that settles itself holds until it is settled. The time is the database's own, as it is for everybody.
# Organizations are told by their place, and money as text: that costs the client the least.
_STANDINGS = f"""
WITH clock AS MATERIALIZED (
    SELECT at, date_trunc('hour', at, 'UTC') AS hour, date_trunc('day', at, 'UTC') AS day, date_trunc('month', at, 'UTC') AS month
    FROM (SELECT clock_timestamp() AS at) AS now
), orgs AS MATERIALIZED (
    SELECT org::uuid AS org_id, place::int FROM unnest($1::text[]) WITH ORDINALITY AS given(org, place)
), limited AS MATERIALIZED (
    SELECT * FROM quotas JOIN orgs USING (org_id)
), asked AS MATERIALIZED (
    SELECT org_id, 'organization' AS scope, '' AS subject FROM orgs
    UNION ALL
    SELECT org::uuid, scope, subject FROM unnest($2::text[], $3::text[], $4::text[]) AS given(org, scope, subject)
    WHERE (org::uuid, scope) IN (SELECT org_id, scope FROM limited)
), counted AS MATERIALIZED (
    SELECT org_id, scope, subject, period, starts_at
    FROM asked CROSS JOIN clock CROSS JOIN LATERAL (VALUES ('hour', hour), ('day', day), ('month', month)) AS each(period, starts_at)
    WHERE (scope = 'organization' AND period <> 'day') OR (org_id, scope, period) IN (SELECT org_id, scope, period FROM limited)
), holds AS MATERIALIZED (
    SELECT {_HELD} FROM usage_reservations CROSS JOIN clock
    WHERE org_id = ANY($1::text[]::uuid[]) AND NOT settled AND expires_at > at
    UNION ALL
    SELECT {_HELD} FROM usage_reservations CROSS JOIN clock
    WHERE org_id = ANY($1::text[]::uuid[]) AND NOT settled AND settles_itself AND expires_at <= at
), held AS MATERIALIZED (
    SELECT org_id, 'organization' AS scope, '' AS subject, {_SUMS} FROM holds GROUP BY org_id
    UNION ALL
    SELECT org_id, CASE GROUPING(user_id, api_key_id, deployment_id) WHEN 3 THEN 'user' WHEN 5 THEN 'api_key' ELSE 'deployment' END,
        CASE GROUPING(user_id, api_key_id, deployment_id) WHEN 3 THEN {_subject("user_id", "usr")} WHEN 5 THEN api_key_id
            ELSE {_subject("deployment_id", "dep")} END, {_SUMS}
    FROM holds WHERE org_id IN (SELECT org_id FROM limited WHERE scope <> 'organization')
    GROUP BY GROUPING SETS ((org_id, user_id), (org_id, api_key_id), (org_id, deployment_id))
)
SELECT place, scope, subject, period, c.tokens, c.cost::text, ({_OF_PERIOD.format("tokens")})::bigint, ({_OF_PERIOD.format("cost")})::text,
    NULL::text AS unit, NULL::uuid AS id, NULL::boolean AS soft, NULL::boolean AS suspends, NULL::timestamptz AS at
FROM counted JOIN orgs USING (org_id)
LEFT JOIN usage_counters AS c USING (org_id, scope, subject, period, starts_at)
LEFT JOIN held USING (org_id, scope, subject)
WHERE c.tokens IS NOT NULL OR held.scope IS NOT NULL
UNION ALL
SELECT place, scope, subject, period, amount_tokens, amount_cost::text, NULL, NULL, unit, id, soft, suspends, NULL FROM limited
UNION ALL
SELECT 0, '', '', '', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, at FROM clock
"""  # noqa: S608 - only our own names are put in
_ALIVE = select(1)


async def standings(connection: AsyncConnection, whos: Sequence[Who]) -> Standings:
    """How the organizations and callers stand, and the quotas of the organizations."""
    org_ids = list({who.org_id for who in whos})
    asked = {(who.org_id[-32:], scope, subject) for who in whos for scope, subject in who.subjects()}
    columns = [list(column) for column in zip(*asked, strict=True)] if asked else [[], [], []]
    quotas: dict[str, list[Limit]] = {}
    standing: dict[Key, Standing] = {}
    at: Any = None
    rows = await _fetch(connection, [org_id[-32:] for org_id in org_ids], *columns)
    for place, scope, subject, period, tokens, cost, tokens_held, cost_held, unit, quota, soft, suspends, when in rows:
        org_id = org_ids[place - 1]
        if when is not None:
            at = when
        elif unit is None:
            standing[org_id, scope, subject, period] = Standing(tokens or 0, Decimal(cost or 0), tokens_held or 0, Decimal(cost_held or 0))
        else:
            amount = tokens if unit == TOKENS else Decimal(cost)
            quotas.setdefault(org_id, []).append(Limit(scope, subject, period, unit, amount, soft, suspends, f"quo_{quota.hex}"))
    for limits in quotas.values():
        limits.sort(key=lambda limit: limit.subject)
    return Standings(at, quotas, standing)


async def _fetch(connection: AsyncConnection, *given: Any) -> Any:
    # Beside SQLAlchemy, which would spend several times as long on it.
    raw: Any = (await connection.get_raw_connection()).driver_connection
    try:
        return await raw.fetch(_STANDINGS, *given)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        # A connection that is gone is seen by SQLAlchemy here, which forgets it and says so in its own words.
        await connection.execute(_ALIVE)
        raise DBAPIError("SELECT usage_counters", None, error) from error
