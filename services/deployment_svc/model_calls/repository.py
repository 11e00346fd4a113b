"""Opens and settles calls, many of them in one commit."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.model_call_service_pb2 import ModelCallUsage
from services.deployment_svc.model_calls import postgres
from services.deployment_svc.model_calls.models import ModelCall
from services.deployment_svc.model_calls.rules import Credit, abandoned, event_of
from services.deployment_svc.usage import repository as usage
from services.deployment_svc.usage.models import UsageRollup
from services.deployment_svc.usage.prices import PriceBook
from services.deployment_svc.usage.rules import month_of
from services.kit.columns import now
from services.kit.db import is_postgres
from services.kit.errors import Exhausted

Row = dict[str, Any]
Wish = tuple[Row, Decimal | None]
"""An open call's columns, and the month's credit of its organization; None: without limit."""


async def open_calls(session: AsyncSession, wishes: Sequence[Wish]) -> list[Exhausted | None]:
    """Opens those calls that the credit covers: for each, None or why not."""
    limited = sorted({row["org_id"] for row, granted in wishes if granted is not None})
    money = await _money(session, limited) if limited else {}
    answers: list[Exhausted | None] = []
    opened: list[Row] = []
    for row, granted in wishes:
        spent, held = money.get(row["org_id"], (Decimal(0), Decimal(0)))
        refusal = Credit(granted, spent, held, row["currency"]).refusal(row["cost_estimate"])
        answers.append(refusal)
        if refusal is None:
            money[row["org_id"]] = (spent, held + row["cost_estimate"])
            opened.append(row)
    if opened:
        await (postgres.insert(session, opened) if is_postgres(session) else session.execute(insert(ModelCall), opened))
    return answers


async def _money(session: AsyncSession, org_ids: Sequence[str]) -> dict[str, tuple[Decimal, Decimal]]:
    """(spent this month, held) of each organization. Until the transaction ends, nobody else opens calls of these."""
    first = month_of(now())
    if is_postgres(session):
        return await postgres.money(session, org_ids, first)
    costs = (
        select(UsageRollup.org_id, func.sum(UsageRollup.cost))
        .where(UsageRollup.org_id.in_(org_ids), UsageRollup.day >= first)
        .group_by(UsageRollup.org_id)
    )
    estimates = (
        select(ModelCall.org_id, func.sum(ModelCall.cost_estimate)).where(ModelCall.org_id.in_(org_ids)).group_by(ModelCall.org_id)
    )
    spent: dict[str, Decimal] = {row[0]: row[1] for row in await session.execute(costs)}
    held: dict[str, Decimal] = {row[0]: row[1] for row in await session.execute(estimates)}
    return {org_id: (spent.get(org_id, Decimal(0)), held.get(org_id, Decimal(0))) for org_id in org_ids}


async def settle(session: AsyncSession, used: Sequence[ModelCallUsage], prices: PriceBook) -> list[bool]:
    """Turns open calls into usage events: for each, whether this did it."""
    wanted = {request.id: request for request in used}
    calls = await _take(session, sorted(wanted))
    await _write(session, calls, wanted, prices)
    settled = {call["id"] for call in calls}
    answers = []
    for request in used:
        answers.append(request.id in settled)
        settled.discard(request.id)
    return answers


async def _take(session: AsyncSession, ids: Sequence[str]) -> list[Row]:
    """Removes the calls that are there, and returns them: whoever gets a call writes its event."""
    if is_postgres(session):
        return await postgres.take(session, ids)
    gone = await session.execute(delete(ModelCall).where(ModelCall.id.in_(ids)).returning(*ModelCall.__mapper__.columns))
    return [dict(row._mapping) for row in gone]


async def settle_abandoned(session: AsyncSession, prices: PriceBook, limit: int) -> int:
    """Settles by estimate what nobody has settled in time: how many calls."""
    late = select(ModelCall.id).where(ModelCall.expires_at < now()).order_by(ModelCall.id).limit(limit).with_for_update(skip_locked=True)
    present = list(await session.scalars(late))
    if not present:
        return 0
    calls = await _take(session, present)
    await _write(session, calls, {call["id"]: abandoned(call) for call in calls}, prices)
    return len(calls)


async def _write(
    session: AsyncSession, calls: Sequence[Row], used: Mapping[str, ModelCallUsage], prices: PriceBook
) -> None:
    if calls:
        at = now()
        await usage.store(session, [event_of(call, used[call["id"]], at, prices) for call in calls])
