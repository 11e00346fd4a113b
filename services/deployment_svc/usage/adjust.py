"""Correcting an event by another one, which refers to it.

A correction without a cost of its own costs what it changes: the price of the event as it is then, less the price of the event as it was
before. So all of them together always come to the price of what remains, also where tokens lead to another length of context.
"""

from collections.abc import Iterable, Sequence
from decimal import Decimal

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import usage_event_pb2
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.prices.book import MOST_COST, PriceBook
from services.deployment_svc.usage import repository
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage.rows import Row, month_of, price, spelling
from services.kit import ids
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import alone
from services.kit.errors import Conflict, InvalidArgument, InvalidState, NotFound
from services.kit.proto import to_datetime, to_proto

COLUMNS = tuple(getattr(UsageEvent, name) for name in Row._fields)
KINDS = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning")
_PREFIX = "adj"


async def adjust(request: rpc.AdjustUsageRequest, call: Call, ledger: Ledger) -> usage_event_pb2.UsageEvent:
    """Appends the correction."""
    event_id = spelling(request.event_id)

    async def work(session: AsyncSession, book: PriceBook) -> usage_event_pb2.UsageEvent:
        # Of corrections of one event, each knows all before it.
        await alone(session, f"adjust {request.org_id} {event_id}")
        first = await _find(session, request, event_id)
        known = await _corrections(session, first)
        row = _correction(request, first, known, book)
        if not await repository.store(session, [row], book):
            raise Conflict("an event of the correction's id is there already; try again", retry_after_s=0.1)
        made = to_proto(row, usage_event_pb2.UsageEvent)
        call.audit(row.id, org_id=row.org_id, **diff(None, made))
        return made

    made: usage_event_pb2.UsageEvent = await ledger.run(work, call.run)
    ledger.touched.add(request.org_id)
    return made


async def _find(session: AsyncSession, request: rpc.AdjustUsageRequest, event_id: str) -> Row:
    """The event. Its month may be left out where only one event has the id."""
    statement = select(*COLUMNS).where(UsageEvent.org_id == request.org_id, UsageEvent.id == event_id)
    if request.HasField("occurred_at"):
        statement = statement.where(UsageEvent.month == month_of(to_datetime(request.occurred_at, "occurred_at")))
    found = [Row._make(row) for row in await session.execute(statement)]
    if not found:
        raise NotFound("event")
    if len(found) > 1:
        raise InvalidArgument("occurred_at", "is needed: there are events of this id in several months")
    (first,) = found
    if first.adjusts:
        raise InvalidArgument("event_id", f"is itself a correction: correct the event {first.adjusts}")
    return first


async def _corrections(session: AsyncSession, first: Row) -> list[Row]:
    return (await families(session, [first]))[first.key][1:]


async def families(session: AsyncSession, rows: Sequence[Row]) -> dict[repository.Key, list[Row]]:
    """Events, given themselves or by a correction, each with all of its corrections behind it in the order in which they were made."""
    firsts = {row.adjusts or row.id for row in rows}
    # They have the time of the event, which an index leads to.
    statement = select(*COLUMNS).where(
        UsageEvent.org_id.in_({row.org_id for row in rows}), UsageEvent.month.in_({row.month for row in rows}),
        UsageEvent.occurred_at.in_({row.occurred_at for row in rows}), or_(UsageEvent.id.in_(firsts), UsageEvent.adjusts.in_(firsts)),
    )  # fmt: skip
    found: dict[repository.Key, list[Row]] = {}
    for row in map(Row._make, await session.execute(statement)):
        found.setdefault((row.org_id, row.adjusts or row.id, row.month), []).append(row)
    return {key: sorted(family, key=lambda row: (row.adjusts != "", row.id)) for key, family in found.items()}


def _correction(request: rpc.AdjustUsageRequest, first: Row, known: Sequence[Row], book: PriceBook) -> Row:
    """The row to append; InvalidState when less than nothing would remain."""
    at = now()
    row = first._replace(
        # After all before it, whatever the clock says: their order decides what each costs.
        id=ids.new_after(_PREFIX, known[-1].id if known else ""), **{name: getattr(request, name) for name in KINDS},
        tokens_total=request.tokens_in + request.tokens_out, cost=None, stated_cost=None, price_id=None, latency_ms=0, adjusts=first.id,
        reason=request.reason, metadata_={}, created_at=at,
    )  # fmt: skip
    before = corrected(first, known)
    after = corrected(before, [row])
    _check_tokens(after)
    if request.cost:
        row = row._replace(cost=Decimal(request.cost))
    elif first.currency != book.currency:
        raise InvalidArgument("cost", f"is needed: the event is in {first.currency}, and the prices are in {book.currency}")
    else:
        cost, price_id = change(book, before, after)
        if cost is not None and abs(cost) > MOST_COST:
            raise InvalidArgument("tokens_in", f"together with tokens_out makes more than {MOST_COST}; no single call costs that")
        row = row._replace(cost=cost, price_id=price_id)
    # What was computed at prices that have changed since comes right by RecostUsage: what is given is held against what stands there.
    left = _cost((first, *known, row)) if request.cost else (price(book, after)[0] or 0) + _cost(filter(is_explicit, known))
    if row.cost is not None and row.cost < 0 and left < 0:
        raise _less_than_nothing("cost", f"of the event would be {left.normalize():f}")
    return row


def _cost(rows: Iterable[Row]) -> Decimal:
    return sum((row.cost or Decimal(0) for row in rows), Decimal(0))


def corrected(event: Row, corrections: Sequence[Row]) -> Row:
    """The event with the tokens that remain of it."""
    for one in corrections:
        event = event._replace(**{name: getattr(event, name) + getattr(one, name) for name in KINDS})
    return event


def change(book: PriceBook, before: Row, after: Row) -> tuple[Decimal | None, str | None]:
    """(what it costs that an event becomes another, the price that this follows from); (None, None) when there is no price."""
    (was, _), (becomes, price_id) = price(book, before), price(book, after)
    return (None, None) if was is None or becomes is None else (becomes - was, price_id)


def is_explicit(row: Row) -> bool:
    """Whether it is a correction whose cost was given, so that no price says anything of it."""
    return bool(row.adjusts) and row.cost is not None and row.price_id is None


def _check_tokens(after: Row) -> None:
    for name in KINDS:
        if getattr(after, name) < 0:
            raise _less_than_nothing(name, f"of the event would be {getattr(after, name)}")
    for name, whole in (("tokens_cached", "tokens_in"), ("tokens_reasoning", "tokens_out")):
        if getattr(after, name) > getattr(after, whole):
            raise _less_than_nothing(name, f"of the event would be {getattr(after, name)}, more than its {whole}, {getattr(after, whole)}")


def _less_than_nothing(field: str, problem: str) -> InvalidState:
    return InvalidState(f"{field} {problem}", violations=[(field, problem)], field=field)
