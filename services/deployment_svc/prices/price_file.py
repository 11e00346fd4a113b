"""Price books as YAML: read strictly, since what is misread here is charged."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import protovalidate
import yaml

from clawplane.deployment.v1 import price_pb2
from services.deployment_svc.prices.models import Price
from services.kit.intake import violation

MOST = 5000
"""Prices of one file: all are taken in by one transaction, and no usage is written meanwhile."""
_AMOUNTS = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning")
_TEXTS, _TIMES = ("provider", "model", "currency"), ("effective_from", "effective_to")
_TIER = ("above_tokens_in", *_AMOUNTS, "markup")
_ENTRY = (*_TEXTS, *_TIMES, *_TIER, "tiers")
_HEAD = """\
# Prices for a million tokens, as exact decimals. `clawplane prices import` takes this file.
"""


class PriceFileError(ValueError):
    """The file cannot be taken; the text says which entry and which field."""


@dataclass(frozen=True)
class Entry:
    """One price of a file, within its rules."""

    place: str
    """As "entry 3, tier 1"."""
    price: price_pb2.Price

    def wrong(self, problem: str) -> PriceFileError:
        """That something is wrong with it."""
        return PriceFileError(f"{self.place}: {problem}")


class _Loader(yaml.SafeLoader):
    """Without aliases, of which a few lines can make millions of entries, and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not taken", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read(text: str) -> list[Entry]:
    """The prices of a file. Tiers are given as entries of their own, or within the entry whose models they are for."""
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 - a loader that is safer than the safe one
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise PriceFileError(f"{where}{problem or 'is not valid YAML'}") from None
    except (ValueError, OverflowError, RecursionError):
        # A date that no calendar has, or brackets without end.
        raise PriceFileError("is not valid YAML") from None
    if not isinstance(raw, dict) or set(raw) != {"prices"} or not isinstance(raw["prices"], list | None):
        raise PriceFileError('must have the one key "prices", with a list')
    entries: list[Entry] = []
    for number, one in enumerate(raw["prices"] or [], 1):
        entries += _entries(f"entry {number}", one)
        if len(entries) > MOST:
            raise PriceFileError(f"has more than {MOST} prices: split it")
    return entries


def _entries(place: str, raw: Any) -> Iterator[Entry]:
    """An entry, and one for each of its tiers, which has all that it does not say itself from there, but for the prices."""
    _check_keys(place, raw, _ENTRY)
    yield _entry(place, raw)
    tiers = raw.get("tiers")
    if not isinstance(tiers, list | None):
        raise PriceFileError(f"{place}: tiers: must be a list")
    common = {name: value for name, value in raw.items() if name in (*_TEXTS, *_TIMES, "markup")}
    for number, tier in enumerate(tiers or [], 1):
        inner = f"{place}, tier {number}"
        _check_keys(inner, tier, _TIER)
        if not tier.get("above_tokens_in"):
            raise PriceFileError(f"{inner}: above_tokens_in: is needed, and above 0")
        yield _entry(inner, common | tier)


def _check_keys(place: str, raw: Any, known: tuple[str, ...]) -> None:
    if not isinstance(raw, dict):
        raise PriceFileError(f"{place}: must be a mapping of fields")
    for name in raw:
        if name not in known:
            raise PriceFileError(f"{place}: {name}: is no field here; there are {', '.join(known)}")


def _entry(place: str, raw: dict[str, Any]) -> Entry:
    price = price_pb2.Price()
    for name, value in raw.items():
        if value is None or name == "tiers":
            continue
        try:
            if name in _TIMES:
                getattr(price, name).FromDatetime(_time(value))
            else:
                setattr(price, name, _whole(value) if name == "above_tokens_in" else _text(value, is_amount=name not in _TEXTS))
        except (ValueError, OverflowError) as error:
            raise PriceFileError(f"{place}: {name}: {error}") from None
    for broken in protovalidate.collect_violations(price):
        field, problem = violation(broken)
        raise PriceFileError(f"{place}: {field}: {problem}")
    return Entry(place, price)


def _text(value: Any, *, is_amount: bool) -> str:
    if isinstance(value, str):
        return value
    if is_amount and isinstance(value, float):
        raise ValueError("is not exact without quotes: YAML reads it as a float")
    # A whole number is exact as it is.
    if is_amount and type(value) is int:
        return str(value)
    raise ValueError("must be a text: put it in quotes")


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    if abs(value) >= 2**63:
        raise ValueError("is too great")
    return value


def _time(value: Any) -> datetime:
    """Without a zone it is UTC, as YAML has it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError('must be a time like "2026-01-31T00:00:00Z"') from None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError('must be a time like "2026-01-31T00:00:00Z"')
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def write(prices: Iterable[Price]) -> str:
    """The file that ``read`` makes the same prices of."""
    ordered = sorted(prices, key=lambda row: (row.provider, row.model, row.above_tokens_in, row.effective_from))
    return _HEAD + yaml.safe_dump({"prices": [_shown(row) for row in ordered]}, sort_keys=False, width=1000)


def _shown(row: Price) -> dict[str, Any]:
    shown: dict[str, Any] = {"provider": row.provider, "model": row.model}
    if row.above_tokens_in:
        shown["above_tokens_in"] = row.above_tokens_in
    for name in _TIMES:
        if (when := getattr(row, name)) is not None:
            shown[name] = when.isoformat().replace("+00:00", "Z")
    shown["currency"] = row.currency
    for name in (*_AMOUNTS, "markup"):
        amount: Decimal = getattr(row, name)
        if name != "markup" or amount:
            shown[name] = format(amount.normalize(), "f")
    return shown
