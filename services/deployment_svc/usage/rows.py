"""From reported events to rows of the ledger: pure functions. Built for many at once: a row is a tuple, and nothing is parsed twice."""

import re
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from clawplane.deployment.v1 import usage_event_pb2 as pb
from services.deployment_svc.prices.book import MOST_COST, PriceBook
from services.kit.errors import InvalidArgument
from services.kit.ids import uuid7_time
from services.kit.proto import to_datetime

MODEL_CALL = "call_"
"""Ids of events that reservations become start so, and no others."""
_SAME_MOMENT = timedelta(hours=1)
"""An id made just before the end of a month, for a call just after it, is no contradiction: the id's time counts."""
_CHAT, _OK = pb.USAGE_TYPE_CHAT, pb.USAGE_STATUS_OK
_UUID_LENGTHS = (32, 36)
# As nearly all are written. The first digit is not the time's last possible one, which no datetime holds.
_SPELLED = re.compile("0[0-9a-f]{7}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")


key_of: Callable[[Any], tuple[str, str, date]] = itemgetter(0, 1, 2)
"""What makes a row this event: organization, id and month."""


class Row(NamedTuple):
    """An event as it is stored: the columns of ``usage_events`` in its order, values as the models take them."""

    org_id: str
    id: str
    month: date
    occurred_at: datetime
    user_id: str | None
    api_key_id: str | None
    deployment_id: str | None
    agent_id: str | None
    thread_id: str | None
    project_id: str | None
    provider: str
    model: str
    type: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    tokens_reasoning: int
    tokens_total: int
    cost: Decimal | None
    stated_cost: Decimal | None
    price_id: str | None
    currency: str
    latency_ms: int
    status: int
    operation_id: str
    attempt: int
    estimated: bool
    adjusts: str
    reason: str
    metadata_: dict[str, Any]
    created_at: datetime

    @property
    def key(self) -> tuple[str, str, date]:
        """What makes it this event."""
        return key_of(self)

    def priced(self, book: PriceBook) -> "Row":
        """The same at the prices of a book."""
        cost, price_id = price(book, self)
        return self._replace(cost=cost, price_id=price_id)


class Reporter(NamedTuple):
    """Who reports: what of an event never comes from the caller's words."""

    org_id: str
    user_id: str | None
    api_key_id: str | None
    deployment_id: str | None
    """A bot's own; it reports for no other."""
    own: frozenset[str] = frozenset()
    """Of the deployments that the events name, those of the organization."""
    may_state_cost: bool = False


class Window(NamedTuple):
    """When events may have happened that are reported at a time."""

    at: datetime
    late: timedelta
    ahead: timedelta
    first: datetime
    last: datetime

    @classmethod
    def around(cls, at: datetime, late: timedelta, ahead: timedelta) -> "Window":
        """Events may be as late as that, and as much ahead of time."""
        return cls(at, late, ahead, at - late, at + ahead)


SAID = (
    "id", "deployment_id", "stated_cost", "agent_id", "thread_id", "project_id", "provider", "model", "type", "tokens_in", "tokens_out",
    "tokens_cached", "tokens_reasoning", "latency_ms", "status", "operation_id", "attempt", "metadata",
)  # fmt: skip
"""What of an event is its reporter's to say, but for when it happened."""
read: Callable[[pb.UsageEvent], tuple[Any, ...]] = attrgetter(*SAID)
"""The values of SAID."""


def row_of(event: pb.UsageEvent, said: tuple[Any, ...], who: Reporter, window: Window, book: PriceBook) -> Row:
    """The row of an event that somebody reports; InvalidArgument naming the field otherwise. ``said``: what ``read`` says of it. Its field
    rules are checked before."""
    identity, when = occurred(event, window)
    _, named, stated, *_ = said
    if named and not who.deployment_id and named not in who.own:
        raise InvalidArgument("deployment_id", "is none of the organization's deployments")
    if stated and not who.may_state_cost:
        raise InvalidArgument("stated_cost", "needs the permission usage.state_cost; leave it out: the cost is computed here")
    return make(
        said, (who.org_id, who.user_id, who.api_key_id, who.deployment_id or named or None), identity, when, window.at, book,
        Decimal(stated) if stated else None,
    )  # fmt: skip


def make(
    said: tuple[Any, ...], who: tuple[str, str | None, str | None, str | None], identity: str, when: datetime, at: datetime,
    book: PriceBook, stated: Decimal | None = None, *, estimated: bool = False,
) -> Row:  # fmt: skip
    """The row of an event whose identity and time are settled. ``who``: organization, user, API key, deployment."""
    (
        _, _, _, agent_id, thread_id, project_id, provider, model, kind, tokens_in, tokens_out, cached, reasoning, latency_ms, status,
        operation_id, attempt, metadata,
    ) = said  # fmt: skip
    if cached > tokens_in:
        raise InvalidArgument("tokens_cached", "is more than tokens_in, of which it is a part")
    if reasoning > tokens_out:
        raise InvalidArgument("tokens_reasoning", "is more than tokens_out, of which it is a part")
    line = book.find(provider, model, tokens_in, when)
    cost = line.cost(tokens_in, tokens_out, cached, reasoning) if line is not None else None
    if cost is not None and cost > MOST_COST:
        raise InvalidArgument("tokens_in", f"together with tokens_out costs more than {MOST_COST}; no single call does")
    org_id, user_id, key_id, deployment_id = who
    # Not Row(...): with a parameter for each of so many columns, that call alone took a third of all that is done here.
    return Row._make((
        org_id, identity, _month(when.year, when.month), when, user_id, key_id, deployment_id, agent_id or None, thread_id or None,
        project_id or None, provider, model, kind or _CHAT, tokens_in, tokens_out, cached, reasoning, tokens_in + tokens_out,
        cost, stated, line.id if line is not None else None, book.currency, latency_ms, status or _OK, operation_id, attempt, estimated,
        "", "", dict(metadata) if metadata else {}, at,
    ))  # fmt: skip


def price(book: PriceBook, row: Any) -> tuple[Decimal | None, str | None]:
    """(cost, price id) of what is or will be a row of the ledger, by its tokens and time; (None, None) without a price."""
    line = book.find(row.provider, row.model, row.tokens_in, row.occurred_at)
    if line is None:
        return None, None
    return line.cost(row.tokens_in, row.tokens_out, row.tokens_cached, row.tokens_reasoning), line.id


def occurred(event: pb.UsageEvent, window: Window) -> tuple[str, datetime]:
    """(identity, when it happened) of an event of a caller's own making. Its month is part of its identity, so the time in a UUID of
    version 7 decides the month."""
    identity = event.id
    inside, spelled = _time_in_id(identity)
    if inside is None and identity.startswith(MODEL_CALL):
        raise InvalidArgument("id", f"must not start with {MODEL_CALL}: such events are written for reservations alone")
    given = to_datetime(event.occurred_at, "occurred_at") if event.HasField("occurred_at") else None
    if given is None and inside is None:
        raise InvalidArgument("occurred_at", "is needed, since the id is no UUID of version 7 and carries no time")
    if given is not None and inside is not None and (inside.month != given.month or inside.year != given.year):
        if abs(given - inside) <= _SAME_MOMENT:
            given = None
        elif "-" in identity:  # Without dashes it may be no UUID: one of 64 random texts looks like one of version 7.
            raise InvalidArgument("occurred_at", "lies in another month than the time in the id")
    when = given or inside
    assert when is not None
    if when < window.first:
        raise InvalidArgument("occurred_at", f"is more than {window.late.days} days ago")
    if when > window.last:
        raise InvalidArgument("occurred_at", f"is more than {int(window.ahead.total_seconds())} seconds ahead of time")
    return spelled, when


def spelling(event_id: str) -> str:
    """How the id of an event is stored: a UUID has several spellings."""
    return _time_in_id(event_id)[1]


def _time_in_id(text: str) -> tuple[datetime | None, str]:
    """The time in a UUID of version 7, and its one spelling, so that another spelling is no second event; (None, as it is) otherwise."""
    if _SPELLED.fullmatch(text):
        return datetime.fromtimestamp(int(text[:8] + text[9:13], 16) / 1000, UTC), text
    if len(text) not in _UUID_LENGTHS:
        return None, text
    try:
        found = uuid.UUID(text)
        inside = uuid7_time(found)
    except (ValueError, OverflowError):
        return None, text
    return (inside, str(found)) if inside is not None else (None, text)


def month_of(when: datetime) -> date:
    """The first day of the month, UTC."""
    return _month(when.year, when.month)


@lru_cache(maxsize=1000)
def _month(year: int, month: int) -> date:
    return date(year, month, 1)
