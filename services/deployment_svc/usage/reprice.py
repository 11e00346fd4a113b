"""Other costs for stored events: these, their roll-ups and their counters are moved by the difference, in one transaction."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, column, inspect, select, update, values
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.usage.models import UsageCounter, UsageEvent, UsageRollup
from services.deployment_svc.usage.repository import asked_for
from services.deployment_svc.usage.rows import Row
from services.deployment_svc.usage.rules import counted, rolled_up
from services.kit.columns import now
from services.kit.db import is_postgres

Key = tuple[Any, ...]


async def write(session: AsyncSession, before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Takes events of one month from one cost and price to another; returns both for those that are still there.

    Nobody else may do so at the same time, nor change a quota, which says what counters there are."""
    there = await _locked(session, UsageEvent, [row.key for row in after], UsageEvent.month == after[0].month)
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if new.key in there]
    if not pairs:
        return [], []
    olds, news = [old for old, _ in pairs], [new for _, new in pairs]
    changes: dict[Key, dict[str, Any]] = {row.key: {"cost": row.cost, "price_id": row.price_id} for row in news}
    await _update(session, UsageEvent, changes, adds=False)
    wanted = await asked_for(session, {row.org_id for row in news})
    # What is there is moved, and nothing made: an organization's sums may be gone together with its events.
    await _move(session, UsageRollup, [*rolled_up(olds, -1), *rolled_up(news)], ("unpriced_events", "cost"))
    await _move(session, UsageCounter, [*counted(olds, wanted, -1), *counted(news, wanted)], ("cost",))
    return olds, news


async def _move(session: AsyncSession, model: Any, rows: Iterable[dict[str, Any]], sums: Sequence[str]) -> None:
    names = [each.key for each in inspect(model).primary_key]
    moved: dict[Key, dict[str, Any]] = {}
    for row in rows:
        total = moved.setdefault(tuple(row[name] for name in names), {name: 0 if name != "cost" else Decimal(0) for name in sums})
        for name in sums:
            total[name] += row[name]
    moved = {key: total for key, total in moved.items() if any(total.values())}
    if moved:
        await _locked(session, model, moved)
        await _update(session, model, moved, adds=True)


async def _locked(session: AsyncSession, model: Any, keys: Iterable[Key], *criteria: ColumnElement[bool]) -> set[Key]:
    """Those of the rows that are there, kept from everybody else until the transaction ends.

    They are taken in the order of their keys as the database has it, in which whoever stores events takes them as well: texts have
    another order there than here."""
    if not is_postgres(session):
        return set(keys)
    columns = inspect(model).primary_key
    given = values(*(column(each.key, each.type) for each in columns), name="given").data(list(keys))
    same = and_(*(each == given.c[each.key] for each in columns))
    found = select(*columns).join(given, same).where(*criteria).order_by(*columns)
    return {tuple(row) for row in await session.execute(found.with_for_update(of=columns[0].table))}


async def _update(session: AsyncSession, model: Any, changes: dict[Key, dict[str, Any]], *, adds: bool) -> None:
    columns = inspect(model).primary_key
    names = [f"key_{each.key}" for each in columns]
    new: dict[str, Any] = {}
    for name in next(iter(changes.values())):
        given = bindparam(f"new_{name}", type_=getattr(model, name).type)
        new[name] = getattr(model, name) + given if adds else given
    if adds:
        new["updated_at"] = now()
    statement = update(model).where(*(each == bindparam(f"key_{each.key}", type_=each.type) for each in columns)).values(new)
    rows = [
        dict(zip(names, key, strict=True)) | {f"new_{name}": value for name, value in change.items()}
        for key, change in changes.items()
    ]
    # Past the ORM, which takes many rows by their key alone, and no sums.
    await (await session.connection()).execute(statement, rows)
