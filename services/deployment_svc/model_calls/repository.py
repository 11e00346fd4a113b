"""Opens and settles calls, many of them in one commit."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.model_call_service_pb2 import SettleModelCallRequest
from services.deployment_svc.model_calls.models import ModelCall
from services.deployment_svc.model_calls.rules import Credit, abandoned, event_of
from services.deployment_svc.usage import repository as usage
from services.deployment_svc.usage.models import UsageRollup
from services.deployment_svc.usage.prices import PriceBook
from services.deployment_svc.usage.rules import month_of
from services.kit.columns import now
from services.kit.db import alone
from services.kit.errors import Exhausted

Row = dict[str, Any]
Wish = tuple[Row, Decimal | None]
"""An open call's columns, and the month's credit of its organization; None: without limit."""


async def open_calls(session: AsyncSession, wishes: Sequence[Wish]) -> list[Exhausted | None]:
    """Opens those calls that the credit covers: for each, None or why not."""
    limited = sorted({row["org_id"] for row, granted in wishes if granted is not None})
    # In order, so that two batches cannot wait for each other in a circle. Until the commit nobody else opens calls of these.
    for org_id in limited:
        await alone(session, f"credit of {org_id}")
    # What is held first: a call that is settled in between is then counted twice, and never not at all.
    held = await _held(session, limited)
    spent = await _spent(session, limited, now())
    answers: list[Exhausted | None] = []
    opened: list[Row] = []
    for row, granted in wishes:
        org_id = row["org_id"]
        credit = Credit(granted, spent.get(org_id, Decimal(0)), held.get(org_id, Decimal(0)), row["currency"])
        refusal = credit.refusal(row["cost_estimate"])
        answers.append(refusal)
        if refusal is None:
            held[org_id] = credit.held + row["cost_estimate"]
            opened.append(row)
    if opened:
        await session.execute(insert(ModelCall), opened)
    return answers


async def _spent(session: AsyncSession, org_ids: Sequence[str], at: datetime) -> dict[str, Decimal]:
    if not org_ids:
        return {}
    rows = await session.execute(
        select(UsageRollup.org_id, func.sum(UsageRollup.cost))
        .where(UsageRollup.org_id.in_(org_ids), UsageRollup.day >= month_of(at))
        .group_by(UsageRollup.org_id)
    )
    return {row[0]: row[1] for row in rows}


async def _held(session: AsyncSession, org_ids: Sequence[str]) -> dict[str, Decimal]:
    if not org_ids:
        return {}
    rows = await session.execute(
        select(ModelCall.org_id, func.sum(ModelCall.cost_estimate)).where(ModelCall.org_id.in_(org_ids)).group_by(ModelCall.org_id)
    )
    return {row[0]: row[1] for row in rows}


async def settle(session: AsyncSession, used: Sequence[SettleModelCallRequest], prices: PriceBook) -> list[bool]:
    """Turns open calls into usage events: for each, whether this did it."""
    wanted = {request.id: request for request in used}
    columns = list(ModelCall.__mapper__.columns)
    # In order, so that two batches cannot wait for each other in a circle.
    locked = select(ModelCall.id).where(ModelCall.id.in_(sorted(wanted))).order_by(ModelCall.id).with_for_update()
    present = list(await session.scalars(locked))
    gone = await session.execute(delete(ModelCall).where(ModelCall.id.in_(present)).returning(*columns)) if present else ()
    calls = [dict(row._mapping) for row in gone]
    await _write(session, calls, wanted, prices)
    settled = {call["id"] for call in calls}
    answers = []
    for request in used:
        answers.append(request.id in settled)
        settled.discard(request.id)
    return answers


async def settle_abandoned(session: AsyncSession, prices: PriceBook, limit: int) -> int:
    """Settles by estimate what nobody has settled in time: how many calls."""
    late = select(ModelCall.id).where(ModelCall.expires_at < now()).order_by(ModelCall.id).limit(limit).with_for_update(skip_locked=True)
    present = list(await session.scalars(late))
    if not present:
        return 0
    gone = await session.execute(
        delete(ModelCall).where(ModelCall.id.in_(present)).returning(*ModelCall.__mapper__.columns)
    )
    calls = [dict(row._mapping) for row in gone]
    await _write(session, calls, {call["id"]: abandoned(call) for call in calls}, prices)
    return len(calls)


async def _write(
    session: AsyncSession, calls: Sequence[Row], used: Mapping[str, SettleModelCallRequest], prices: PriceBook
) -> None:
    if calls:
        at = now()
        await usage.store(session, [event_of(call, used[call["id"]], at, prices) for call in calls])
