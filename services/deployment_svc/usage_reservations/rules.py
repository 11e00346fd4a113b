"""What a call may use at most, and what a reservation becomes in the ledger: pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_event_pb2 as pb
from services.deployment_svc.prices.book import MOST_COST, Line, PriceBook
from services.deployment_svc.quotas.rules import Limit, Who
from services.deployment_svc.usage.rows import Row as Event
from services.deployment_svc.usage.rows import make, read
from services.kit.errors import InvalidArgument

Row = Mapping[str, Any]
"""A reservation's columns."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to hold."""

    id: str
    who: Who
    provider: str
    model: str
    tokens_in: int
    tokens_out: int
    lifetime: timedelta
    settles_itself: bool
    paid_for: tuple[Limit, ...]
    """The limits of what the organization has paid for."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a call has used."""

    id: str
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    tokens_reasoning: int = 0
    status: "pb.UsageStatus.ValueType" = pb.USAGE_STATUS_OK
    latency_ms: int = 0
    estimated: bool = False
    org_id: str = ""
    """Whose it must be; empty: the platform itself says so, of a call that would settle itself."""
    deployment_id: str = ""
    """Of which bot it must be; empty: of anybody in the organization."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a reservation."""

    event: Any
    """The row of its usage event."""
    duplicate: bool
    tokens_overrun: int
    cost_overrun: Decimal
    late: bool


def most_cost(book: PriceBook, provider: str, model: str, tokens_in: int, tokens_out: int, at: datetime) -> Decimal | None:
    """What a call costs at most that uses at most so many tokens, whatever of them is cached or reasoning; None without a price."""
    if book.find(provider, model, tokens_in, at) is None:
        return None
    # Fewer tokens may fall under a price for shorter contexts, which need not be the lower one.
    tops = [tokens_in, *(above for above in _steps(book) if above < tokens_in)]
    costs = [_most(line, top, tokens_out) for top in tops if (line := book.find(provider, model, top, at)) is not None]
    cost = max(costs)
    if cost > MOST_COST:
        raise InvalidArgument("tokens_in", f"together with tokens_out may cost more than {MOST_COST}; no single call does")
    return cost


_remembered: tuple[tuple[Line, ...], tuple[int, ...]] = ((), ())


def _steps(book: PriceBook) -> tuple[int, ...]:
    """Where prices change with the tokens that are sent; of the book at hand, remembered."""
    global _remembered
    if _remembered[0] is not book.lines:
        _remembered = (book.lines, tuple({line.above_tokens_in for line in book.lines if line.above_tokens_in}))
    return _remembered[1]


def _most(line: Line, tokens_in: int, tokens_out: int) -> Decimal:
    cached = tokens_in if line.tokens_cached > line.tokens_in else 0
    reasoning = tokens_out if line.tokens_reasoning > line.tokens_out else 0
    return line.cost(tokens_in, tokens_out, cached, reasoning)


def row_of(wish: Wish, cost: Decimal | None, currency: str, at: datetime) -> dict[str, Any]:
    """A reservation that is granted now; ``cost`` is what it costs at most."""
    who = wish.who
    return {
        "id": wish.id, "org_id": who.org_id, "user_id": who.user_id or None, "api_key_id": who.api_key_id or None,
        "deployment_id": who.deployment_id or None, "provider": wish.provider, "model": wish.model, "tokens_in": wish.tokens_in,
        "tokens_out": wish.tokens_out, "cost_held": cost or Decimal(0), "currency": currency,
        "settles_itself": wish.settles_itself, "settled": False, "released": False, "settled_late": False, "tokens_overrun": 0,
        "cost_overrun": Decimal(0), "expires_at": at + wish.lifetime, "created_at": at, "updated_at": at,
    }  # fmt: skip


def abandoned(row: Row) -> Used:
    """What is written for a call that nobody has settled. What it has really used nobody knows, so it is what was held for it."""
    return Used(row["id"], row["tokens_in"], row["tokens_out"], estimated=True, status=pb.USAGE_STATUS_ERROR)


def event_of(row: Row, used: Used, at: datetime, book: PriceBook) -> Event:
    """The usage event of a reservation. It happened when that was made, so its periods do not depend on who settles it when."""
    event = pb.UsageEvent(
        id=row["id"], provider=row["provider"], model=row["model"], type=pb.USAGE_TYPE_CHAT, tokens_in=used.tokens_in,
        tokens_out=used.tokens_out, tokens_cached=used.tokens_cached, tokens_reasoning=used.tokens_reasoning, latency_ms=used.latency_ms,
        status=used.status,
    )  # fmt: skip
    who = (row["org_id"], row["user_id"], row["api_key_id"], row["deployment_id"])
    return make(read(event), who, row["id"], row["created_at"], at, book, estimated=used.estimated)


def settled(row: Row, event: Event, at: datetime) -> Settled:
    """How what was used compares to what was held."""
    tokens = max(0, event.tokens_total - row["tokens_in"] - row["tokens_out"])
    cost = max(Decimal(0), (event.cost or Decimal(0)) - row["cost_held"])
    # A call that settles itself holds until it is settled, so it is never late.
    return Settled(event, False, tokens, cost, not row["settles_itself"] and row["expires_at"] <= at)
