"""Reads and writes of limits, and how they stand."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import case, delete, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import quota_pb2
from services.deployment_svc.prices.repository import RULES
from services.deployment_svc.quotas import postgres
from services.deployment_svc.quotas.models import PERIOD, SCOPE, UNIT, Quota
from services.deployment_svc.quotas.rules import ORGANIZATION, TOKENS, Limit, Standing, Standings, Who
from services.deployment_svc.usage.models import UsageCounter, UsageRollup
from services.deployment_svc.usage.rules import ALWAYS, COUNTED_BY, PERIODS, period_end, period_of
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.kit.columns import now
from services.kit.db import ALL, Database, alone, is_postgres


def limit_of(row: Any) -> Limit:
    """A quota as it is checked."""
    unit = UNIT.words[row.unit]
    amount = row.amount_tokens if unit == TOKENS else row.amount_cost
    return Limit(SCOPE.words[row.scope], row.subject, PERIOD.words[row.period], unit, amount, row.soft, row.suspends, row.id)


async def set_quota(session: AsyncSession, wish: quota_pb2.Quota, amount: int | Decimal) -> tuple[Quota, Quota | None]:
    """Stores a limit in the place of the one before: (the limit, a copy of that one). What it counts is right from the start."""
    # Until the end of the transaction nobody writes usage: what was written is in the roll-ups, what comes will be counted.
    await alone(session, RULES)
    same = (Quota.org_id == wish.org_id, Quota.scope == wish.scope, Quota.period == wish.period)
    beside = (await session.scalars(select(Quota).where(*same))).all()
    scope, period = SCOPE.words[wish.scope], PERIOD.words[wish.period]
    if not beside and (scope, period) not in ALWAYS:
        await _count(session, wish.org_id, scope, period)
    row = next((one for one in beside if (one.subject, one.unit) == (wish.subject, wish.unit)), None)
    before = _copy(row) if row is not None else None
    if row is None:
        row = Quota(org_id=wish.org_id, scope=wish.scope, subject=wish.subject, period=wish.period, unit=wish.unit)
        session.add(row)
    is_tokens = wish.unit == quota_pb2.QUOTA_UNIT_TOKENS
    row.amount_tokens, row.amount_cost = (int(amount), None) if is_tokens else (None, Decimal(amount))
    row.soft, row.suspends, row.updated_at = wish.soft, wish.suspends, now()
    await session.flush()
    return row, before


def _copy(row: Quota) -> Quota:
    return Quota(**{column.key: getattr(row, column.key) for column in Quota.__mapper__.column_attrs})


async def _count(session: AsyncSession, org_id: str, scope: str, period: str) -> None:
    """Counts anew what is in the roll-ups: of the period that runs, and of the next one, in which events may lie that are ahead of time."""
    kind, place = COUNTED_BY[scope]
    subject = (UsageRollup.dim_1, UsageRollup.dim_2, UsageRollup.dim_3)[place] if place is not None else None
    start = period_of(period, now())
    ends = period_end(period, start)
    gone = delete(UsageCounter).where(UsageCounter.org_id == org_id, UsageCounter.scope == scope, UsageCounter.period == period)
    await session.execute(gone.execution_options(synchronize_session=False))
    at = now()
    for since, until in ((start, ends), (ends, period_end(period, ends))):
        columns: list[Any] = [func.sum(UsageRollup.tokens_total), func.sum(UsageRollup.cost), *([subject] if subject is not None else [])]
        sums = select(*columns).where(
            UsageRollup.org_id == org_id, UsageRollup.kind == kind, UsageRollup.starts_at >= since, UsageRollup.starts_at < until
        )
        found = await session.execute(sums.group_by(subject) if subject is not None else sums.having(func.count() > 0))
        rows = [
            {
                "org_id": org_id, "scope": scope, "subject": whose[0] if whose else "", "period": period, "starts_at": since,
                "tokens": int(tokens), "cost": cost, "created_at": at, "updated_at": at,
            }
            for tokens, cost, *whose in found
        ]  # fmt: skip
        rows = [row for row in rows if scope == ORGANIZATION or row["subject"]]
        if rows:
            await session.execute(insert(UsageCounter), rows)


async def standings(session: AsyncSession, whos: Sequence[Who]) -> Standings:
    """How some callers and their organizations stand at one moment, and the quotas of these organizations."""
    if is_postgres(session):
        return await postgres.standings(await session.connection(), whos)
    org_ids, at = {who.org_id for who in whos}, now()
    found = Standings(at, await _quotas(session, org_ids))
    subjects = {subject for who in whos for _, subject in who.subjects()} | {""}
    await _add_used(session, found, UsageCounter.org_id.in_(org_ids), UsageCounter.subject.in_(subjects))
    for who, period, tokens, cost in await _holds(session, org_ids, at):
        for scope, subject in ((ORGANIZATION, ""), *who.subjects()):
            key = (who.org_id, scope, subject, period)
            known = found.standing.get(key, Standing())
            found.standing[key] = known._replace(tokens_held=known.tokens_held + tokens, cost_held=known.cost_held + cost)
    return found


async def look(db: Database, whos: Sequence[Who]) -> Standings:
    """As ``standings``, for who only wants to know."""
    if db.is_sqlite:
        async with db.read(ALL) as session:
            return await standings(session, whos)
    # One statement, which needs nothing of a session.
    async with db.reading.connect() as connection:
        return await postgres.standings(connection, whos)


async def _add_used(session: AsyncSession, found: Standings, *which: Any) -> None:
    """What the counters say of the present hour, day and month."""
    c = UsageCounter
    current = or_(*((c.period == period) & (c.starts_at == period_of(period, found.at)) for period in PERIODS))
    # There may be very many: columns, since objects would cost several times as much.
    columns = (c.org_id, c.scope, c.subject, c.period, c.tokens, c.cost)
    for org_id, scope, subject, period, tokens, cost in await session.execute(select(*columns).where(current, *which)):
        found.standing[org_id, scope, subject, period] = Standing(tokens, cost)


async def _quotas(session: AsyncSession, org_ids: Iterable[str]) -> dict[str, list[Limit]]:
    """By organization, those for each one before those of a subject's own."""
    found: dict[str, list[Limit]] = {}
    for row in await session.scalars(select(Quota).where(Quota.org_id.in_(org_ids)).order_by(Quota.subject)):
        found.setdefault(row.org_id, []).append(limit_of(row))
    return found


async def _holds(session: AsyncSession, org_ids: Iterable[str], at: datetime) -> list[tuple[Who, str, int, Decimal]]:
    """(who, period, tokens, money) of what is held by calls that were begun in the present hour, day and month."""
    r = UsageReservation
    tokens, whose = r.tokens_in + r.tokens_out, (r.org_id, r.user_id, r.api_key_id, r.deployment_id)
    sums: list[Any] = []
    for period in PERIODS:
        is_in = r.created_at >= period_of(period, at)
        sums += [func.sum(case((is_in, tokens), else_=0)), func.sum(case((is_in, r.cost_held), else_=None))]
    holds = (r.org_id.in_(org_ids), r.settled.is_(False), r.settles_itself.is_(True) | (r.expires_at > at))
    found = []
    for row in await session.execute(select(*whose, *sums).where(*holds).group_by(*whose)):
        who = Who(*(value or "" for value in row[:4]))
        found += [(who, period, int(row[4 + 2 * n]), row[5 + 2 * n] or Decimal(0)) for n, period in enumerate(PERIODS)]
    return found


async def counters(session: AsyncSession, org_ids: Iterable[str], at: datetime) -> Standings:
    """What was used in the present hour, day and month, of all subjects of some organizations, and their quotas."""
    found = Standings(at, await _quotas(session, org_ids))
    await _add_used(session, found, UsageCounter.org_id.in_(org_ids))
    return found


async def users_of(session: AsyncSession, at: datetime) -> set[str]:
    """The organizations that have used something this month."""
    month = select(UsageCounter.org_id).where(UsageCounter.period == "month", UsageCounter.starts_at == period_of("month", at))
    return set(await session.scalars(month.distinct()))
