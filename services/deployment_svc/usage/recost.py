"""Pricing stored events anew: in the order of their keys, a window of them at a time, each in a unit of work of its own."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from sqlalchemy import Select, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.prices.book import MOST_COST, PriceBook
from services.deployment_svc.prices.repository import RULES, version_of
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import adjust, reprice
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage.repository import StaleBook
from services.deployment_svc.usage.rows import Row, month_of, price
from services.kit import ids
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import alone, together
from services.kit.errors import InvalidState
from services.kit.paging import Cursor
from services.kit.proto import to_datetime

_WINDOW = 500
_KEY = (UsageEvent.month, UsageEvent.org_id, UsageEvent.id)
_FROM_HERE = ids.lowest("org")


class Place(NamedTuple):
    """Where the walk stands: behind the event of this key, whether there is one or not."""

    month: date
    org_id: str
    id: str


@dataclass
class Found:
    """What became of some events."""

    at: Place
    ends: bool
    """Whether none of the month comes behind them."""
    seen: int = 0
    unpriced: int = 0
    before: list[Row] = field(default_factory=list)
    """Those whose cost or price changes, as they were."""
    after: list[Row] = field(default_factory=list)


async def recost(request: rpc.RecostUsageRequest, call: Call, ledger: Ledger) -> AsyncIterator[rpc.RecostUsageResponse]:
    """What changes, and with ``apply`` changes it."""
    cursor = Cursor(request, call.caller.tenant, _KEY, "after_position")
    first, last = _months(request, call)
    place = Place(*cursor.last(request.after_position)) if request.after_position else Place(first, _FROM_HERE, "")
    place = max(place, Place(first, _FROM_HERE, ""))
    asked = MessageToDict(request, preserving_proto_field_name=True)
    call.audit(request.org_id, org_id=request.org_id, after=asked)
    answer, was, becomes = rpc.RecostUsageResponse(), Decimal(0), Decimal(0)
    async for _ in call.ticks(0):
        found = await _step(request, call, ledger, place)
        was += _cost(found.before)
        becomes += _cost(found.after)
        answer.seen += found.seen
        answer.changed += len(found.after)
        answer.unpriced += found.unpriced
        answer.cost_before, answer.cost_after = f"{was.normalize():f}", f"{becomes.normalize():f}"
        answer.position = cursor.token(found.at)
        answer.done = found.ends and found.at.month >= last
        yield answer
        if answer.done:
            return
        place = Place(_next(found.at.month), _FROM_HERE, "") if found.ends else found.at


def _months(request: rpc.RecostUsageRequest, call: Call) -> tuple[date, date]:
    """The first and the last month in which there may be events. A query by month is one of a partition, in the order of its key."""
    settings = call.kit.settings
    assert isinstance(settings, DeploymentSettings)
    first = month_of(now() - timedelta(days=settings.usage_retention_days))
    last = month_of(now() + timedelta(seconds=settings.usage_ahead_s))
    if request.HasField("start"):
        first = max(first, month_of(to_datetime(request.start, "start")))
    if request.HasField("end"):
        last = min(last, month_of(to_datetime(request.end, "end")))
    return first, max(first, last)


def _next(month: date) -> date:
    return (month + timedelta(days=32)).replace(day=1)


def _cost(rows: Sequence[Row]) -> Decimal:
    return sum((row.cost or Decimal(0) for row in rows), Decimal(0))


async def _step(request: rpc.RecostUsageRequest, call: Call, ledger: Ledger, place: Place) -> Found:
    async def look(session: AsyncSession, book: PriceBook) -> Found:
        if request.apply:
            # One at a time: what an event costs now is not to be taken away twice.
            await alone(session, "recost")
            await together(session, RULES)
        if await version_of(session, book.currency) != book.version:
            raise StaleBook
        found = await _price(session, request, place, book)
        if request.apply and found.after:
            found.before, found.after = await reprice.write(session, found.before, found.after)
        return found

    async def read(work: Any) -> Found:
        async with call.read() as session:
            result: Found = await work(session)
            return result

    found: Found = await ledger.run(look, call.run if request.apply else read)
    if request.apply:
        ledger.touched.update(row.org_id for row in found.after)
    return found


async def _price(session: AsyncSession, request: rpc.RecostUsageRequest, place: Place, book: PriceBook) -> Found:
    """The next events of the month at the prices of now."""
    keys = select(UsageEvent.org_id, UsageEvent.id).where(*_behind(request, place)).order_by(UsageEvent.org_id, UsageEvent.id)
    window = (await session.execute(keys.limit(_WINDOW))).all()
    if not window:
        return Found(place, ends=True)
    # What is asked for may be far between: the window is one of all events, so that none takes long.
    last = Place(place.month, window[-1].org_id, window[-1].id)
    rows = [Row._make(row) for row in await session.execute(_asked(request, place, last, book))]
    found = Found(last, ends=len(window) < _WINDOW, seen=len(rows))
    priced = await _corrections(session, [row for row in rows if row.adjusts and not adjust.is_explicit(row)], book)
    for row in rows:
        if row.adjusts:
            cost, price_id = priced.get(row.id, (row.cost, row.price_id))
        else:
            cost, price_id = price(book, row)
            found.unpriced += cost is None
        if cost is not None and abs(cost) > MOST_COST:
            raise InvalidState(f"event {row.id} of {row.org_id} would cost more than {MOST_COST}: end the price {price_id} first")
        if (cost, price_id) != (row.cost, row.price_id):
            found.before.append(row)
            found.after.append(row._replace(cost=cost, price_id=price_id))
    return found


def _behind(request: rpc.RecostUsageRequest, place: Place) -> list[Any]:
    criteria = [UsageEvent.month == place.month, tuple_(UsageEvent.org_id, UsageEvent.id) > _key(place)]
    return [*criteria, UsageEvent.org_id == request.org_id] if request.org_id else criteria


def _key(place: Place) -> Any:
    return tuple_(literal(place.org_id, UsageEvent.org_id.type), literal(place.id, UsageEvent.id.type))


def _asked(request: rpc.RecostUsageRequest, place: Place, last: Place, book: PriceBook) -> Select[Any]:
    """The events of a window that are asked for."""
    criteria = [*_behind(request, place), tuple_(UsageEvent.org_id, UsageEvent.id) <= _key(last)]
    # What is in another currency, no price of this book says anything of.
    criteria.append(UsageEvent.currency == book.currency)
    if request.provider:
        criteria.append(UsageEvent.provider == request.provider)
    if request.model:
        criteria.append(UsageEvent.model == request.model)
    if request.HasField("start"):
        criteria.append(UsageEvent.occurred_at >= to_datetime(request.start, "start"))
    if request.HasField("end"):
        criteria.append(UsageEvent.occurred_at < to_datetime(request.end, "end"))
    if request.unpriced_only:
        criteria.append(UsageEvent.cost.is_(None))
    return select(*adjust.COLUMNS).where(*criteria)


async def _corrections(session: AsyncSession, rows: Sequence[Row], book: PriceBook) -> dict[str, tuple[Decimal | None, str | None]]:
    """What corrections cost whose cost was computed, by their id: what each changes of the event as those before it have left it."""
    priced: dict[str, tuple[Decimal | None, str | None]] = {}
    for first, *corrections in (await adjust.families(session, rows)).values() if rows else ():
        before = first
        # Without their event, which has been deleted meanwhile, they stay as they are.
        for one in corrections if not first.adjusts else ():
            after = adjust.corrected(before, [one])
            if not adjust.is_explicit(one):
                priced[one.id] = adjust.change(book, before, after)
            before = after
    return priced
