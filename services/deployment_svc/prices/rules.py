"""How prices follow each other: pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from clawplane.deployment.v1 import price_pb2
from services.deployment_svc.prices.models import Price
from services.deployment_svc.prices.price_file import Entry
from services.kit import ids
from services.kit.proto import assign

Key = tuple[str, str, int]
"""(provider, model, above_tokens_in): of these one price is in force at a time."""
AMOUNTS = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "markup")


def key_of(row: Price) -> Key:
    """What a price is one after another for."""
    return row.provider, row.model, row.above_tokens_in


def row_of(price: price_pb2.Price, currency: str, at: datetime) -> Price:
    """The row of a new price; ``at``: from when it counts if it does not say so."""
    row = Price(id=ids.new("prc"), currency=currency, above_tokens_in=0, effective_to=None)
    assign(row, price)
    row.effective_from = row.effective_from or at
    row.tokens_in, row.tokens_out = Decimal(price.tokens_in), Decimal(price.tokens_out)
    row.tokens_cached = Decimal(price.tokens_cached or price.tokens_in)
    row.tokens_reasoning = Decimal(price.tokens_reasoning or price.tokens_out)
    row.markup = Decimal(price.markup or 0)
    return row


def begins_with(row: Price, line: Iterable[Price]) -> Price | None:
    """Of the prices of the same key, the one that begins at the same time."""
    return next((one for one in line if one.effective_from == row.effective_from), None)


def in_force(line: Iterable[Price], at: datetime) -> Price | None:
    """Of the prices of one key, the one that counts at a time."""
    return next((one for one in line if one.effective_from <= at and (one.effective_to is None or at < one.effective_to)), None)


def next_after(line: Iterable[Price], at: datetime) -> Price | None:
    """Of the prices of one key, the first that begins later."""
    return min((one for one in line if one.effective_from > at), key=lambda one: one.effective_from, default=None)


def place(row: Price, line: Iterable[Price]) -> tuple[Price | None, Price | None]:
    """Puts a new price among those of the same key, of which none begins at its time: the one that counts then ends there, and it ends
    itself where a later one begins. Returns the one that was given an end, and a new one that goes on with it where the new price ends
    before it would have: a time without a price would give the usage in it away."""
    line = list(line)
    before, after = in_force(line, row.effective_from), next_after(line, row.effective_from)
    if after is not None and (row.effective_to is None or row.effective_to > after.effective_from):
        row.effective_to = after.effective_from
    if before is None:
        return None, None
    until, before.effective_to = before.effective_to, row.effective_from
    if row.effective_to is None or (until is not None and until <= row.effective_to):
        return before, None
    same = {name: getattr(before, name) for name in ("provider", "model", "above_tokens_in", "currency", *AMOUNTS)}
    return before, Price(id=ids.new("prc"), effective_from=row.effective_to, effective_to=until, **same)


@dataclass
class Plan:
    """What a file makes of a price book."""

    new: list[Price] = field(default_factory=list)
    unchanged: int = 0


def plan(entries: Sequence[Entry], known: Iterable[Price], currency: str, at: datetime) -> Plan:
    """Puts the prices of a file among those that are known; PriceFileError when they contradict these or each other.

    An entry without a beginning is what counts from ``at`` on, unless the same counts then already."""
    made = Plan()
    lines: dict[Key, list[Price]] = {}
    for row in known:
        lines.setdefault(key_of(row), []).append(row)
    places: dict[tuple[Key, datetime], Entry] = {}
    given: list[tuple[Entry, Price]] = []
    for entry in entries:
        row = row_of(entry.price, currency, at)
        if row.currency != currency:
            raise entry.wrong(f"currency: must be that of the ledger, {currency}")
        if row.effective_to is not None and row.effective_to <= row.effective_from:
            raise entry.wrong("effective_to: must be after effective_from")
        twin = places.setdefault((key_of(row), row.effective_from), entry)
        if twin is not entry:
            raise entry.wrong(f"effective_from: {twin.place} is for the same models, of the same above_tokens_in and effective_from")
        given.append((entry, row))
    # By their time, so that each of a file finds those before it.
    for entry, row in sorted(given, key=lambda pair: pair[1].effective_from):
        line = lines.setdefault(key_of(row), [])
        if (same := _known(entry, row, line)) is not None:
            _check_end(entry, same, line)
            made.unchanged += 1
            continue
        _, resumed = place(row, line)
        new = [row, resumed] if resumed is not None else [row]
        line += new
        made.new += new
    return made


def _known(entry: Entry, row: Price, line: Sequence[Price]) -> Price | None:
    """The price of the book that an entry says again; PriceFileError when it says another amount."""
    dated = entry.price.HasField("effective_from")
    same = begins_with(row, line) if dated else in_force(line, row.effective_from)
    if same is None:
        return None
    differs = [name for name in AMOUNTS if getattr(same, name) != getattr(row, name)]
    if not differs:
        return same
    if begins_with(row, line) is None:
        return None
    raise entry.wrong(
        f"{differs[0]}: the book has {getattr(same, differs[0]):f} from {row.effective_from.isoformat()} on ({same.id}), and prices "
        "are never changed: give it a later effective_from"
    )


def _check_end(entry: Entry, same: Price, line: Sequence[Price]) -> None:
    """What an entry says of the end of a price that is known must be so already; where another takes over, that is the end."""
    if not entry.price.HasField("effective_to"):
        return
    end = row_of(entry.price, same.currency, same.effective_from).effective_to
    after = next_after(line, same.effective_from)
    if after is not None and end is not None and end > after.effective_from:
        end = after.effective_from
    if end != same.effective_to:
        raise entry.wrong(f"effective_to: {same.id} of the book ends otherwise; EndPrice gives it an end")
