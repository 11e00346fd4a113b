"""Grants and settles reservations, many of them in one commit.

What is granted is right at that moment: everything that could make less room (another grant, a renewal, a settlement in time of what would
have expired) waits for the lock of the organization, and the time is told by the database after it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.prices.repository import RULES, version_of
from services.deployment_svc.quotas import repository as quotas
from services.deployment_svc.quotas.rules import holding, refusal
from services.deployment_svc.usage import repository as usage
from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage_reservations import postgres
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.deployment_svc.usage_reservations.rules import Settled, Used, Wish, abandoned, event_of, most_cost, row_of, settled
from services.kit.columns import now
from services.kit.db import is_postgres, together
from services.kit.errors import Error, InvalidArgument, InvalidState, NotFound

Row = dict[str, Any]
WHAT = "usage reservation"


async def grant(session: AsyncSession, wishes: Sequence[Wish], book: PriceBook) -> list[Row | Error]:
    """Holds what the limits cover, in the order given: for each wish the reservation, or why not. StaleBook when the prices have changed:
    what is held must cover the event, which is priced at the time of the grant."""
    if is_postgres(session):
        await postgres.lock(session, sorted({wish.who.org_id for wish in wishes}), alone=True)
    if await version_of(session, book.currency) != book.version:
        raise usage.StaleBook
    found = await quotas.standings(session, [wish.who for wish in wishes])
    answers: list[Row | Error] = []
    for wish in wishes:
        who, tokens = wish.who, wish.tokens_in + wish.tokens_out
        try:
            cost = most_cost(book, wish.provider, wish.model, wish.tokens_in, wish.tokens_out, found.at)
            if cost is None and wish.settles_itself:
                raise InvalidArgument("model", "has no price yet, so it cannot be called", ErrorReason.ERROR_REASON_NO_PRICE)
        except InvalidArgument as error:
            answers.append(error)
            continue
        limits = holding(wish.paid_for, found.quotas.get(who.org_id, ()), who)
        refused = refusal(limits, found, who, tokens, cost, book.currency)
        if refused is None:
            found.hold(who, tokens, cost or Decimal(0))
        answers.append(refused or row_of(wish, cost, book.currency, found.at))
    granted = [row for row in answers if not isinstance(row, Error)]
    if granted:
        await insert_all(session, granted)
    return answers


async def insert_all(session: AsyncSession, rows: Sequence[Row]) -> None:
    """Stores reservations."""
    await (postgres.insert(session, rows) if is_postgres(session) else session.execute(insert(UsageReservation), list(rows)))


async def settle(session: AsyncSession, used: Sequence[Used], book: PriceBook) -> list[Settled | Error]:
    """Turns reservations into usage events, each once: what became of each; NotFound, or InvalidState for another's to settle.

    What was used beyond what was held, or too late, is written down in full, and its reservation stays to be seen."""
    if len({(one.id, one.org_id, one.deployment_id) for one in used}) > len({one.id for one in used}):
        # Whoever names another's id must neither get nor cost him his answer.
        return [answer for one in used for answer in await settle(session, [one], book)]
    # Before any row of ours, as whoever writes usage does.
    await together(session, RULES)
    orgs = sorted({one.org_id for one in used if one.org_id})
    if orgs and is_postgres(session):
        await postgres.lock(session, orgs, alone=False)
    first: dict[str, Used] = {}
    for one in used:
        first.setdefault(one.id, one)
    rows, at = await take(session, [(one.id, one.org_id, one.deployment_id) for one in first.values()])
    known = await write(session, rows, first, at or now(), book)
    missing = [one for one in used if one.id not in known and one.org_id]
    before = await _settled_before(session, missing) if missing else {}
    answers: list[Settled | Error] = []
    for one in used:
        if one.id in known:
            done = known[one.id]
            # The same one twice in one commit: the first has settled it.
            answers.append(done if first[one.id] is one else Settled(done.event, True, done.tokens_overrun, done.cost_overrun, done.late))
        else:
            answers.append(before.get(one.id) or NotFound(WHAT))
    return answers


async def take(session: AsyncSession, wanted: Sequence[tuple[str, str, str]]) -> tuple[list[Row], datetime | None]:
    """Removes those reservations that still hold or may be settled late, as (id, organization, deployment; empty for any), and the time:
    whoever gets one writes its event. Without an organization, only those that settle themselves; with one, only the others."""
    if is_postgres(session):
        return await postgres.take(session, wanted)
    r, whose = UsageReservation, {call_id: (org_id, deployment_id) for call_id, org_id, deployment_id in wanted}
    found = await session.execute(select(*r.__mapper__.columns).where(r.id.in_(whose), r.settled.is_(False)))
    rows = [dict(row._mapping) for row in found if _is_wanted(row, *whose[row.id])]
    gone = delete(r).where(r.id.in_([row["id"] for row in rows]))
    await session.execute(gone.execution_options(synchronize_session=False))
    return rows, now()


def _is_wanted(row: Any, org_id: str, deployment_id: str) -> bool:
    return row.settles_itself == (not org_id) and org_id in ("", row.org_id) and deployment_id in ("", row.deployment_id)


async def write(
    session: AsyncSession, rows: Sequence[Row], used: Mapping[str, Used], at: datetime, book: PriceBook
) -> dict[str, Settled]:
    """Stores the events of reservations that were taken, and keeps those that are to be seen; by id."""
    if not rows:
        return {}
    events = [event_of(row, used[row["id"]], at, book) for row in rows]
    done = {row["id"]: settled(row, event, at) for row, event in zip(rows, events, strict=True)}
    await usage.store(session, events, book)
    over = [row for row in rows if (one := done[row["id"]]).tokens_overrun or one.cost_overrun or one.late]
    if over:
        await insert_all(session, [row | _seen(done[row["id"]], at) for row in over])
    return done


def _seen(done: Settled, at: datetime) -> Row:
    over = {"tokens_overrun": done.tokens_overrun, "cost_overrun": done.cost_overrun}
    return {"settled": True, "settled_late": done.late, "updated_at": at, **over}


async def _settled_before(session: AsyncSession, used: Sequence[Used]) -> dict[str, Settled | Error]:
    """What is known of what was not there to be settled."""
    found: dict[str, Settled | Error] = {}
    for one in used:
        row = await session.scalar(select(UsageReservation).where(UsageReservation.id == one.id, UsageReservation.org_id == one.org_id))
        if row is not None and _is_of(row, one) and not row.settled:
            found[one.id] = of_the_endpoint()
        event = await session.scalar(select(UsageEvent).where(UsageEvent.id == one.id, UsageEvent.org_id == one.org_id))
        if event is not None and _is_of(event, one):
            over = (row.tokens_overrun, row.cost_overrun, row.settled_late) if row is not None else (0, Decimal(0), False)
            found[one.id] = Settled(event, True, *over)
    return found


def _is_of(row: UsageReservation | UsageEvent, one: Used) -> bool:
    return not one.deployment_id or row.deployment_id == one.deployment_id


def of_the_endpoint() -> InvalidState:
    """Whoever calls models by the endpoint does not say himself what he has used."""
    return InvalidState("this is a call of the model endpoint, which alone renews and settles it", state="held")


async def settle_abandoned(session: AsyncSession, book: PriceBook, limit: int) -> list[Row]:
    """Settles by estimate what would settle itself and nobody has settled in time: the reservations."""
    await together(session, RULES)
    r = UsageReservation
    late = select(r.id).where(r.settles_itself.is_(True), r.settled.is_(False), r.expires_at < now()).order_by(r.expires_at).limit(limit)
    present = list(await session.scalars(late.with_for_update(skip_locked=True)))
    if not present:
        return []
    rows, at = await take(session, [(call_id, "", "") for call_id in present])
    await write(session, rows, {row["id"]: abandoned(row) for row in rows}, at or now(), book)
    return rows


async def renew_calls(session: AsyncSession, ids: Sequence[str], lifetime_s: float) -> set[str]:
    """Keeps calls open that would settle themselves: those that are still open. They hold until they are settled, whatever the time."""
    if is_postgres(session):
        return await postgres.renew(session, ids, lifetime_s)
    r = UsageReservation
    longer = update(r).where(r.id.in_(ids), r.settles_itself.is_(True), r.settled.is_(False)).values(
        expires_at=now() + timedelta(seconds=lifetime_s)
    )  # fmt: skip
    return set(await session.scalars(longer.returning(r.id).execution_options(synchronize_session=False)))


async def own(session: AsyncSession, org_id: str, reservation_id: str, deployment_id: str) -> tuple[UsageReservation | None, datetime]:
    """A reservation of the organization (of one bot, if that is not empty), locked, and the time. Nothing is granted meanwhile that what
    is done with it could take the room of."""
    if is_postgres(session):
        await postgres.lock(session, [org_id], alone=False)
    row = await session.get(UsageReservation, reservation_id, with_for_update=True)
    at = await postgres.clock(session) if is_postgres(session) else now()
    if row is None or row.org_id != org_id or (deployment_id and row.deployment_id != deployment_id):
        return None, at
    return row, at


async def forget_released(session: AsyncSession, before: datetime) -> None:
    """Deletes what was released and has expired before a time: nobody releases it again."""
    gone = delete(UsageReservation).where(UsageReservation.released.is_(True), UsageReservation.expires_at < before)
    await session.execute(gone.execution_options(synchronize_session=False))
