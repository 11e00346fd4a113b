"""What a service keeps under keys, said in one place, so that a rotation finds all of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, inspect, literal, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.kit.db import ALL, Database
from services.kit.secrets import VERSION, SecretBox, SecretError

_BATCH = 100


@dataclass(frozen=True)
class Sealed:
    """A column of sealed texts, or nothing."""

    column: InstrumentedAttribute[Any]
    place: Callable[[Any], str]
    """Row -> what its secret is bound to."""

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.column)

    def under(self, key_id: str) -> ColumnElement[bool]:
        """Whether a row is under a key."""
        return self.column.startswith(f"{VERSION}.{key_id}.", autoescape=True)

    def due(self, key_id: str) -> ColumnElement[bool]:
        """Whether a row is under another key than this one."""
        return self.column.is_not(None) & ~self.under(key_id)

    def renew(self, box: SecretBox, row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the row holds, and what it is to hold."""
        was = getattr(row, self.column.key)
        return {self.column.key: was}, {self.column.key: box.rewrap(was, self.place(row))}


@dataclass(frozen=True)
class Blind:
    """A column of keyed hashes of what the row itself holds, and the column with the id of the hash's key."""

    column: InstrumentedAttribute[bytes]
    key_id: InstrumentedAttribute[str]
    compute: Callable[[SecretBox, Any], bytes]
    """The hash of a row under the current key."""

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.column)

    def under(self, key_id: str) -> ColumnElement[bool]:
        """Whether a row is under a key."""
        return self.key_id == key_id

    def due(self, key_id: str) -> ColumnElement[bool]:
        """Whether a row is under another key than this one."""
        return self.key_id != key_id

    def renew(self, box: SecretBox, row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the row holds, and what it is to hold."""
        was = {self.column.key: getattr(row, self.column.key), self.key_id.key: getattr(row, self.key_id.key)}
        return was, {self.column.key: self.compute(box, row), self.key_id.key: box.current}


@dataclass(frozen=True)
class Hashed:
    """A column of hashes under an HMAC key, of texts that only their owners know: made anew at the next use, by the feature itself."""

    column: InstrumentedAttribute[bytes]
    key_id: InstrumentedAttribute[str]

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.column)

    def under(self, key_id: str) -> ColumnElement[bool]:
        """Whether a row is under a key."""
        return self.key_id == key_id


Kept = Sealed | Blind


@dataclass(frozen=True)
class Store:
    """One service's database, and what is under keys in it."""

    db: Database
    holder: Any
    """The service's own KeyHolder, a subclass of KeyHolderRow."""
    canary: Any
    """The service's own SecretCanary."""
    kept: Sequence[Kept]
    hashed: Sequence[Hashed]

    async def count(self, one: Kept | Hashed, which: ColumnElement[bool]) -> int:
        """How many rows of a column there are of a kind."""
        async with self.db.read(ALL) as session:
            return await session.scalar(select(func.count()).select_from(one.column.class_).where(which)) or 0


async def renew(store: Store, one: Kept, box: SecretBox, advance: Callable[[int], None]) -> dict[str, str]:
    """Brings every row of a column under the box's current key, batch by batch. Rows that others have locked are left to the next pass.

    ``advance`` hears how many rows each batch has brought over. Returns what cannot be brought: the row's key -> why.
    """
    model = one.column.class_
    keys = list(inspect(model).primary_key)
    after: Any = None
    troubles: dict[str, str] = {}

    async def batch(session: AsyncSession) -> tuple[Any, int]:
        """The key of the last row that was looked at, None at the end; how many were brought over."""
        due = select(model).where(one.due(box.current), *_after(keys, after)).order_by(*keys).limit(_BATCH)
        rows = (await session.scalars(due.with_for_update(skip_locked=True))).all()
        changes = []
        for row in rows:
            try:
                was, fresh = one.renew(box, row)
            except SecretError as error:
                troubles["/".join(_text(part) for part in _key(keys, row))] = str(error)
                continue
            where = {f"key_{number}": part for number, part in enumerate(_key(keys, row))}
            both = {f"was_{name}": value for name, value in was.items()} | {f"new_{name}": value for name, value in fresh.items()}
            changes.append(where | both)
        if changes:
            connection = await session.connection()
            await connection.execute(_compare_and_set(model, keys, was), changes)
        return _key(keys, rows[-1]) if rows else None, len(changes)

    while True:
        after, done = await store.db.run(batch, ALL)
        advance(done)
        if after is None:
            return troubles


def _compare_and_set(model: Any, keys: list[Any], was: dict[str, Any]) -> Any:
    """Writes a row that still is as it was read. Its owner sees no change: neither its time nor its version moves."""
    columns = {name: getattr(model, name) for name in was}
    statement = update(model).where(*(key == bindparam(f"key_{number}", type_=key.type) for number, key in enumerate(keys)))
    statement = statement.where(*(column == bindparam(f"was_{name}", type_=column.type) for name, column in columns.items()))
    values: dict[Any, Any] = {column: bindparam(f"new_{name}", type_=column.type) for name, column in columns.items()}
    return statement.values(values | {model.updated_at: model.updated_at})


def _after(keys: list[Any], last: Any) -> list[ColumnElement[bool]]:
    if last is None:
        return []
    if len(keys) == 1:
        return [keys[0] > last[0]]
    return [tuple_(*keys) > tuple_(*(literal(part, key.type) for part, key in zip(last, keys, strict=True)))]


def _key(keys: list[Any], row: Any) -> list[Any]:
    return [getattr(row, key.key) for key in keys]


def _text(part: Any) -> str:
    return part.hex() if isinstance(part, bytes) else str(part)


def _name(column: InstrumentedAttribute[Any]) -> str:
    return f"{column.class_.__tablename__}.{column.key}"
