"""What makes the audit log tamper-evident: keyed hashes over rows, chained for each organization. Pure functions over bytes.

Three hashes, each under a key of its own that is derived from CLAWPLANE_AUDIT_KEY for one service:
``written`` is made by whoever writes a row, over what the row says; ``seal`` is made later, over the seal before it and every column
of the row; ``mac`` is made over the head of an organization's chain.
"""

import hmac
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import JSON, Column, ColumnElement, Table, Text, cast, type_coerce
from sqlalchemy.types import NullType

from services.kit.columns import Identifier, ProtoEnum, now
from services.kit.ids import to_uuid
from services.kit.settings import KitSettings, decode_key

START = bytes(32)
"""Stands before the first seal of a chain."""
LATER = frozenset({"seal_number", "seal"})
"""Columns that the sealer writes."""
_MADE = frozenset({"mac", "created_at", "updated_at"})
"""Columns of a head that its hash leaves out."""


class Chain:
    """The three hashes of one service's log."""

    def __init__(self, key: bytes, service: str) -> None:
        self.service = service
        self._row, self._seal, self._head = (
            HKDF(SHA256(), 32, None, f"audit/{service}/{what}".encode()).derive(key) for what in ("row", "seal", "head")
        )

    @classmethod
    def of(cls, settings: KitSettings, service: str) -> "Chain":
        """With the settings' key; ValueError names the setting when it is none."""
        return cls(decode_key(settings.audit_key, "audit_key"), service)

    def written(self, row: Mapping[str, Any]) -> bytes:
        """The hash of what a row says, without ``written`` itself and what is added later."""
        return _hash(self._row, _encode({name: row[name] for name in row if name not in LATER and name != "written"}))

    def seal(self, previous: bytes, number: int, row: Mapping[str, Any]) -> bytes:
        """The seal of a row in its place."""
        return _hash(self._seal, previous + _encode({name: row[name] for name in row if name not in LATER} | {"seal_number": number}))

    def head(self, row: Mapping[str, Any]) -> bytes:
        """The hash of an organization's head."""
        return _hash(self._head, _encode({name: row[name] for name in row if name not in _MADE}))


def same(one: Any, other: Any) -> bool:
    """Whether two hashes are equal; False for whatever is none."""
    return isinstance(one, bytes) and isinstance(other, bytes) and hmac.compare_digest(one, other)


def raw(column: Any) -> ColumnElement[Any]:
    """A column as the driver gives it: whatever stands in the table is read, also what no type of ours would take."""
    # The driver of PostgreSQL would read JSON, and its exact text is what was hashed.
    read = cast(column, Text) if isinstance(column.type, JSON) else type_coerce(column, NullType())
    return read.label(column.key)


def stored(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's values as ``raw`` would read them back, by column."""
    return {name: _stored(table.c[name], value) for name, value in values.items()}


def bare_id(value: Any) -> str:
    """The 32 digits of an identifier, as a driver gives it."""
    return value.hex if isinstance(value, uuid.UUID) else str(value)


def age_s(value: Any) -> float:
    """How long ago a time was, as a driver gives it; endless for what is no time."""
    try:
        at = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return float("inf")
    return (now() - (at if at.tzinfo else at.replace(tzinfo=UTC))).total_seconds()


def _stored(column: Column[Any], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column.type, Identifier):
        return to_uuid(value, column.type.prefix)
    if isinstance(column.type, ProtoEnum):
        return column.type.words[value]
    return orjson.dumps(value).decode() if isinstance(column.type, JSON) else value


def _hash(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _encode(values: Mapping[str, Any]) -> bytes:
    """Every column that is set, by name, each with its length before it. A column that is added later changes no hash."""
    parts = []
    for name in sorted(values):
        if values[name] is not None:
            text = _bytes(values[name])
            parts += [len(name).to_bytes(4, "big"), name.encode(), len(text).to_bytes(8, "big"), text]
    return b"".join(parts)


def _bytes(value: Any) -> bytes:
    """A value as both engines give it."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, uuid.UUID):
        return value.hex.encode()
    if isinstance(value, datetime):
        # What SQLite keeps.
        value = (value.astimezone(UTC) if value.tzinfo else value).strftime("%Y-%m-%d %H:%M:%S.%f")
    return str(value).encode("utf-8", "surrogatepass")
