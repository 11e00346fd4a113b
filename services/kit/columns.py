"""Column types and mixins that hold on both engines."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Dialect, Numeric, String, Uuid
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.types import TypeDecorator

from services.kit import ids

NAMING = {
    "ix": "ix_%(table_name)s__%(column_0_N_name)s",
    "uq": "uq_%(table_name)s__%(column_0_N_name)s",
    "ck": "ck_%(table_name)s__%(constraint_name)s",
    "fk": "fk_%(table_name)s__%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Constraint names; the double underscore lets errors.py find the column."""


def now() -> datetime:
    """The current time, UTC."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """timestamptz on PostgreSQL, naive UTC on SQLite; always aware UTC in Python."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Identifier(TypeDecorator[str]):
    """A prefixed identifier in Python, a plain UUID in the database."""

    impl = Uuid(as_uuid=True)
    cache_ok = True

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def process_bind_param(self, value: str | None, dialect: Dialect) -> uuid.UUID | None:
        return None if value is None else _uuid_class(dialect.driver)(ids.digits(value, self.prefix))

    def process_result_value(self, value: uuid.UUID | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{self.prefix}_{value.hex}"


@cache
def _uuid_class(driver: str) -> Callable[[str], uuid.UUID]:
    """The driver's own, which is made and sent in half the time: there is one in nearly every statement."""
    if driver != "asyncpg":
        return uuid.UUID
    from asyncpg.pgproto.pgproto import UUID  # type: ignore[import-untyped]

    return UUID  # type: ignore[no-any-return]


class ExactDecimal(TypeDecorator[Decimal]):
    """numeric(30, 12) on PostgreSQL; on SQLite, which knows floats only, an integer of 1e-12 units, so that SUM stays exact."""

    impl = Numeric(30, 12)
    cache_ok = True
    scale = Decimal(10) ** 12

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else Numeric(30, 12))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return int((value * self.scale).to_integral_exact())

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        if value is None:
            return None
        return (Decimal(value) / self.scale if dialect.name == "sqlite" else Decimal(value)).normalize()


class ProtoEnum(TypeDecorator[int]):
    """A protobuf enum: its number in Python, its short lower-case name in the database ("pending")."""

    impl = String(32)
    cache_ok = False

    def __init__(self, enum: Any) -> None:
        """``enum``: a generated enum, for instance ``State``."""
        super().__init__()
        names = {value.name: value.number for value in enum.DESCRIPTOR.values}
        zero = next(name for name, number in names.items() if number == 0)
        prefix = zero.removesuffix("UNSPECIFIED")
        self.numbers = {name.removeprefix(prefix).lower(): number for name, number in names.items()}
        self.words = {number: word for word, number in self.numbers.items()}

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        return None if value is None else self.words[value]

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:
        return None if value is None else self.numbers[value]

    def check(self, column: str, *, unspecified: bool = False) -> CheckConstraint:
        """The table's own check of the words."""
        words = ", ".join(f"'{word}'" for word, number in self.numbers.items() if number or unspecified)
        return CheckConstraint(f"{column} IN ({words})", name=column)


ProtoEnum.cache_ok = True


def identifier(prefix: str) -> Mapped[str]:
    """The primary key column of a table whose rows have identifiers."""
    return mapped_column(Identifier(prefix), primary_key=True, default=lambda: ids.new(prefix), sort_order=-19)


class Timestamps:
    """created_at and updated_at, which every mutable table has."""

    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, sort_order=90)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now, sort_order=91)


class Versioned(Timestamps):
    """Adds a version: a stale write through the ORM fails, and the etag of the message follows from it."""

    version: Mapped[int] = mapped_column(BigInteger, default=1, sort_order=92)

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"version_id_col": cls.version}


class Tenant:
    """Rows of an organization. Every ORM statement on them is filtered by the session's tenant (db.py)."""

    org_id: Mapped[str] = mapped_column(Identifier("org"), sort_order=-20)


class Leased:
    """Rows that a loop claims (loops.py): due at a time, leased by one worker at a time."""

    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, sort_order=80)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime, sort_order=81)
    lease_token: Mapped[str | None] = mapped_column(String(64), sort_order=82)
