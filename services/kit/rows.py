"""Reading of all tenants without a session, which would cost more than the query: rows by key, and whether there is anything to do."""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Select, any_, bindparam
from sqlalchemy.orm import InstrumentedAttribute

from services.kit.coalesce import Fetch
from services.kit.db import Database


def among(db: Database, key: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """Whether a column is one of the parameter ``keys``. However many they are, PostgreSQL is asked with the same statement."""
    return key.in_(bindparam("keys", expanding=True)) if db.is_sqlite else key == any_(bindparam("keys", type_=ARRAY(key.type)))


def by_key(db: Database, statement: Select[Any], key: InstrumentedAttribute[str]) -> Fetch[Any]:
    """What a Loader reads with: the rows of a statement over columns by one of them. Core rows, read only: the ORM would cost more than
    the query."""
    statement = statement.where(among(db, key))
    names = [str(column.key) for column in statement.selected_columns]
    # Rows of SQLAlchemy look names up at each access, and have no class that tells them.
    kind: Any = namedtuple("Row", names)  # type: ignore[misc]
    at = names.index(key.key)

    async def fetch(keys: list[str]) -> Mapping[str, Any]:
        async with db.reading.connect() as connection:
            rows = (await connection.execute(statement, {"keys": keys})).all()
        return {row[at]: kind._make(row) for row in rows}

    return fetch


async def look(db: Database, statement: Select[Any]) -> Any:
    """One value, for loops that look again and again whether there is anything to do."""
    async with db.reading.connect() as connection:
        return await connection.scalar(statement)
