"""Rows of the ledger as the texts that PostgreSQL is given: a column is one text, whatever the number of rows, and cast by the server.

An empty text stands for none where a column may have none. A column of which all rows say the same travels once: the server reads each text
of an array apart, and many columns of a batch are like that."""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy import inspect

from services.deployment_svc.usage.models import USAGE_STATUS, USAGE_TYPE, UsageEvent
from services.deployment_svc.usage.rows import Row

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KNOWN: dict[Any, str] = {}


def _uuid(identifier: str | None) -> str:
    return identifier[-32:] if identifier is not None else ""


def _plain(value: Any) -> str:
    return str(value) if value is not None else ""


def _few(value: Any) -> str:
    """Of a column that says the same again and again."""
    known = _KNOWN.get(value)
    if known is None:
        if len(_KNOWN) > 1000:
            _KNOWN.clear()
        known = _KNOWN[value] = str(value)
    return known


def _micros(when: datetime) -> str:
    """Microseconds since 1970: written and read faster than a time of day."""
    since = when - _EPOCH
    return str((since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds)


def _same(value: str | None) -> str:
    return value or ""


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode() if value else "{}"


WORDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "org_id": ("uuid", _uuid), "id": ("text", _same), "month": ("date", _few), "occurred_at": ("micros", _micros),
    "user_id": ("uuid", _uuid), "api_key_id": ("text", _same), "deployment_id": ("uuid", _uuid), "agent_id": ("uuid", _uuid),
    "thread_id": ("uuid", _uuid), "project_id": ("uuid", _uuid), "provider": ("text", _same), "model": ("text", _same),
    "type": ("text", USAGE_TYPE.words.__getitem__), "tokens_in": ("bigint", str), "tokens_out": ("bigint", str),
    "tokens_cached": ("bigint", str), "tokens_reasoning": ("bigint", str), "tokens_total": ("bigint", str),
    "cost": ("numeric", _plain), "stated_cost": ("numeric", _plain), "price_id": ("uuid", _uuid), "currency": ("text", _same),
    "latency_ms": ("bigint", str), "status": ("text", USAGE_STATUS.words.__getitem__), "operation_id": ("text", _same),
    "attempt": ("integer", str), "estimated": ("boolean", str), "adjusts": ("text", _same), "reason": ("text", _same),
    "metadata": ("json", _json), "created_at": ("timestamptz", _few),
}  # fmt: skip
"""Column -> its type in the database, and how a value of a row is written as text. In the order of a row."""
assert [name.rstrip("_") for name in Row._fields] == list(WORDS)



def array(values: Iterable[str]) -> str:
    """Texts as the database writes an array of them. The driver, given a list, would ask each item what it is."""
    items = list(values)
    joined = '","'.join(items)
    if "\\" in joined or joined.count('"') != 2 * (len(items) - 1):
        joined = '","'.join(item.replace("\\", "\\\\").replace('"', '\\"') for item in items)
    return f'{{"{joined}"}}' if items else "{}"


NAMES = ", ".join(WORDS)
"""The columns of an event, in the order of a row."""
_NULLABLE = {column.name for column in inspect(UsageEvent).columns if column.nullable}
_FROM_MICROS = "TIMESTAMPTZ 'epoch' + {}::bigint * INTERVAL '1 microsecond'"


_MANY, _MOST_KINDS = 100, 12
"""Columns are looked at from so many rows on, and so many kinds of statements are made at most: each has to be planned."""
_kinds: set[frozenset[str]] = {frozenset()}


def encode(rows: Sequence[Row]) -> tuple[frozenset[str], list[str]]:
    """(columns that say the same in all rows, the text of each column)."""
    columns = list(zip(*rows, strict=True))
    same: frozenset[str] = frozenset()
    if len(rows) >= _MANY:
        same = frozenset(name for name, column in zip(WORDS, columns, strict=True) if name != "id" and column.count(column[0]) == len(rows))
        if same not in _kinds and len(_kinds) >= _MOST_KINDS:
            same = max((kind for kind in _kinds if kind <= same), key=len)
        _kinds.add(same)
    return same, [
        write(column[0]) if name in same else array(map(write, column))
        for (name, (_, write)), column in zip(WORDS.items(), columns, strict=True)
    ]


@lru_cache(maxsize=_MOST_KINDS)
def select(same: frozenset[str], first: int) -> str:
    """The SELECT of all columns from the texts of ``encode``, given as parameters from number ``first`` on."""
    casts, once, given, names = [], [], [], []
    for number, (name, (kind, _)) in enumerate(WORDS.items(), first):
        if name in same:
            once.append(_cast(f"${number}::text", name, kind))
            casts.append(name)
        else:
            casts.append(_cast(name, name, kind))
            given.append(f"${number}::text::text[]")
            names.append(name)
    # OFFSET keeps it apart: without it, what is the same would be cast for each row.
    alike = f"(SELECT {', '.join(once)} OFFSET 0) AS alike, " if once else ""
    return f"SELECT {', '.join(casts)} FROM {alike}unnest({', '.join(given)}) AS given({', '.join(names)})"  # noqa: S608 - our own names


def _cast(given: str, name: str, kind: str) -> str:
    given = f"nullif({given}, '')" if name in _NULLABLE else given
    return f"{_FROM_MICROS.format(given) if kind == 'micros' else f'({given})::{kind}'} AS {name}"
