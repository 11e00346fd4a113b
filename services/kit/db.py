"""The database of a service: one engine and pool, explicit short transactions, the tenant filter."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import asyncpg  # type: ignore[import-untyped]
import orjson
import structlog
from sqlalchemy import event, func, select, text
from sqlalchemy import exc as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.util.concurrency import greenlet_spawn

from services.kit import telemetry
from services.kit.columns import Tenant
from services.kit.errors import is_retryable
from services.kit.settings import KitSettings

log = structlog.get_logger()
T = TypeVar("T")

ALL = "*"
"""The tenant of loops, services and operators: no filter. It has to be said; a session without a tenant cannot read."""


class ScopedSession(Session):
    """A session whose statements on Tenant tables see one organization."""


@event.listens_for(ScopedSession, "do_orm_execute")
def _only_own_rows(state: ORMExecuteState) -> None:
    if state.session.info["readonly"] and not state.is_select:
        raise RuntimeError("a session for reading writes")
    if state.is_column_load or state.is_relationship_load:
        return
    tenant = state.session.info["tenant"]
    if tenant != ALL:
        criteria = with_loader_criteria(Tenant, lambda cls: cls.org_id == tenant, include_aliases=True)
        state.statement = state.statement.options(criteria)


@event.listens_for(ScopedSession, "before_flush")
def _stamp_tenant(session: Session, *_: object) -> None:
    if session.info["readonly"] and (session.new or session.dirty or session.deleted):
        # On PostgreSQL each statement of such a session would commit by itself.
        raise RuntimeError("a session for reading writes")
    tenant = session.info["tenant"]
    for row in (*session.new, *session.dirty):
        if isinstance(row, Tenant) and tenant != ALL:
            if row.org_id is None:
                row.org_id = tenant
            elif row.org_id != tenant:
                raise RuntimeError(f"{type(row).__name__} of another organization in a session of {tenant}")


class Database:
    """Opens sessions. ``url`` is a SQLAlchemy URL: sqlite+aiosqlite:///file or postgresql+asyncpg://..."""

    def __init__(self, url: str, settings: KitSettings, name: str) -> None:
        self.url = make_url(_async_url(url))
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.settings = settings
        self.name = name
        self.engine = self._engine()
        if self.is_sqlite:
            self.writing, self.reading = self.engine, self.engine.execution_options(readonly=True)
        else:
            # One pool: AUTOCOMMIT saves a one-statement read its BEGIN and COMMIT.
            self.writing, self.reading = self.engine.execution_options(isolation_level="READ COMMITTED"), self.engine
        # SQLite has one writer; queueing here is fair and cheap, where its own busy handler sleeps and guesses.
        self._one_writer = asyncio.Lock()
        telemetry.watch_pool(name, self.engine)

    def _engine(self) -> AsyncEngine:
        s = self.settings
        json: dict[str, Any] = {"json_serializer": lambda value: orjson.dumps(value).decode(), "json_deserializer": orjson.loads}
        if self.is_sqlite:
            engine = create_async_engine(
                self.url, pool_size=s.pool_size, max_overflow=s.max_overflow, pool_timeout=s.pool_timeout_s,
                connect_args={"timeout": s.lock_timeout_s}, hide_parameters=True, **json,
            )  # fmt: skip
            event.listen(engine.sync_engine, "connect", _sqlite_connect)
            event.listen(engine.sync_engine, "begin", _sqlite_begin)
        else:
            limits = {
                "statement_timeout": f"{int(s.statement_timeout_s * 1000)}",
                "idle_in_transaction_session_timeout": f"{int(s.statement_timeout_s * 1000)}",
                "lock_timeout": f"{int(s.lock_timeout_s * 1000)}",
                "application_name": f"clawplane-{self.name}",
            }
            engine = create_async_engine(
                self.url, isolation_level="AUTOCOMMIT", pool_size=s.pool_size, max_overflow=s.max_overflow,
                pool_timeout=s.pool_timeout_s, connect_args={"server_settings": limits}, hide_parameters=True, **json,
            )  # fmt: skip
        event.listen(engine.sync_engine, "before_cursor_execute", _start_timer)
        event.listen(engine.sync_engine, "after_cursor_execute", self._report_slow)
        return engine

    async def connect(self) -> None:
        """Proves that the database answers; tries ``connect_tries`` times with a growing pause."""
        for attempt in range(1, self.settings.connect_tries + 1):
            try:
                async with self.engine.connect() as connection:
                    await connection.exec_driver_sql("SELECT 1")
                return
            except (sa.DBAPIError, OSError) as error:
                if attempt == self.settings.connect_tries:
                    raise
                log.warning("database.connect_failed", database=self.name, attempt=attempt, error=type(error).__name__)
                await asyncio.sleep(0.2 * 2**attempt)

    async def close(self) -> None:
        """Closes the pool."""
        await self.engine.dispose()

    @asynccontextmanager
    async def transaction(self, tenant: str) -> AsyncIterator[AsyncSession]:
        """A unit of work that commits at the end of the block, or leaves nothing. Never make a remote call inside."""
        async with AsyncExitStack() as stack:
            if self.is_sqlite:
                with telemetry.waiting_for_pool(self.name):
                    await stack.enter_async_context(self._one_writer)
            session = await stack.enter_async_context(self._session(self.writing, tenant))
            await self._begin(session)
            yield session
            await session.commit()

    @asynccontextmanager
    async def read(self, tenant: str) -> AsyncIterator[AsyncSession]:
        """A session for reading; on PostgreSQL each statement stands alone."""
        async with self._session(self.reading, tenant, readonly=True) as session:
            await self._begin(session)
            yield session

    async def run(self, work: Callable[[AsyncSession], Awaitable[T]], tenant: str, tries: int = 5) -> T:
        """Runs a unit of work, again when the database says that two of them clashed. ``work`` may run several times."""

        async def once() -> T:
            async with self.transaction(tenant) as session:
                return await work(session)

        return await self.again(once, tries)

    async def again(self, work: Callable[[], Awaitable[T]], tries: int = 5) -> T:
        """The result of a whole unit of work, which is made again when the database says that it clashed with another."""
        for attempt in range(1, tries + 1):
            try:
                return await work()
            except sa.DBAPIError as error:
                if attempt == tries or not is_retryable(error):
                    raise
                telemetry.DB_RETRIES.labels(self.name).inc()
                await asyncio.sleep(random.uniform(0.005, 0.02) * 2**attempt)
        raise AssertionError

    @asynccontextmanager
    async def raw(self, first: str) -> AsyncIterator[Any]:
        """A transaction on a connection of PostgreSQL's driver itself (asyncpg), for bulk: begun together with a first statement, in one
        round trip, committed at the end of the block. Its errors are those of the driver, as SQLAlchemy would wrap them."""
        with telemetry.waiting_for_pool(self.name):
            pooled = await self.engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            await connection.execute(f"BEGIN; {first}")
            yield connection
            await connection.execute("COMMIT")
        except BaseException as error:
            # Cancelled or broken in the middle of whatever: nobody knows what it would still say.
            pooled.invalidate()
            if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | OSError):
                raise sa.DBAPIError("bulk", None, error) from error
            raise
        finally:
            await greenlet_spawn(pooled.close)

    def _session(self, engine: AsyncEngine, tenant: str, *, readonly: bool = False) -> AsyncSession:
        if not tenant:
            raise RuntimeError("a session without a tenant")
        info = {"tenant": tenant, "readonly": readonly}
        return AsyncSession(engine, sync_session_class=ScopedSession, expire_on_commit=False, autobegin=True, info=info)

    async def _begin(self, session: AsyncSession) -> None:
        """Takes the connection now, so that waiting for one is seen, and BEGIN IMMEDIATE is the first thing that can fail."""
        with telemetry.waiting_for_pool(self.name):
            for attempt in range(3):
                try:
                    await session.connection()
                    return
                except sa.OperationalError as error:
                    if attempt == 2 or not is_retryable(error):
                        raise
                    await session.rollback()

    def _report_slow(self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        elapsed_ms = (time.perf_counter() - context._clawplane_started) * 1000
        if elapsed_ms >= self.settings.slow_statement_ms:
            log.warning("database.slow_statement", database=self.name, statement=statement_name(statement), ms=round(elapsed_ms))


async def alone(session: AsyncSession, what: str) -> None:
    """Lets one transaction at a time past this point, for each ``what``, until it ends. On SQLite every writer is alone anyway."""
    await session.run_sync(alone_sync, what)


def alone_sync(session: Session, what: str) -> None:
    """As ``alone``, for listeners of the ORM."""
    if is_postgres(session):
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))


async def together(session: AsyncSession, what: str) -> None:
    """Past this point with any number of others who are ``together``, and with nobody who is ``alone``, for the same ``what``."""
    if is_postgres(session):
        await session.execute(select(func.pg_advisory_xact_lock_shared(func.hashtextextended(what, 0))))


def together_sql(what: str) -> str:
    """The lock of ``together`` as an expression, for statements of PostgreSQL that are written out. ``what`` is one of our own names."""
    return f"pg_advisory_xact_lock_shared(hashtextextended('{what}', 0))"


async def alone_now(session: AsyncSession, what: str) -> bool:
    """As ``alone``, without waiting: False when another process is past this point."""
    if not is_postgres(session):
        return True
    return bool(await session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(what, 0)))))


def statement_name(statement: str) -> str:
    """A statement's verb and table, which is what may be logged: "SELECT deployments"."""
    found = re.search(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+(?:ONLY\s+)?\"?(\w+)", statement, re.IGNORECASE)
    verb = statement.split(None, 1)[0].upper() if statement.strip() else "?"
    return f"{verb} {found.group(1)}" if found else verb


def is_postgres(session: AsyncSession | Session) -> bool:
    """Whether a session talks to PostgreSQL; SQLite otherwise."""
    return session.get_bind().dialect.name == "postgresql"


def insert_for(session: AsyncSession) -> Callable[..., Any]:
    """The engine's own INSERT, which knows ON CONFLICT; both engines take the same calls."""
    return postgresql.insert if is_postgres(session) else sqlite.insert


_FREE_CONNECTIONS = """
    SELECT sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END)
    FROM pg_settings WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""


async def check_connections(url: str, settings: KitSettings, workers: int) -> None:
    """ValueError when that many processes could ask the server for more connections than it gives."""
    db = Database(url, settings, "check")
    if db.is_sqlite:
        return
    try:
        await db.connect()
        async with db.writing.connect() as connection:
            free = await connection.scalar(text(_FREE_CONNECTIONS))
    finally:
        await db.close()
    wanted = workers * (settings.pool_size + settings.max_overflow)
    if wanted > free:
        raise ValueError(
            f"{workers} workers may open {wanted} connections, the server gives {free}: "
            "lower CLAWPLANE_POOL_SIZE or CLAWPLANE_MAX_OVERFLOW, or raise the server's max_connections"
        )


def _async_url(url: str) -> str:
    return re.sub(r"^(postgres|postgresql)://", "postgresql+asyncpg://", re.sub(r"^sqlite://", "sqlite+aiosqlite://", url))


def _start_timer(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
    context._clawplane_started = time.perf_counter()


def _sqlite_connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_begin(connection: Any) -> None:
    readonly = connection.get_execution_options().get("readonly", False)
    connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")
