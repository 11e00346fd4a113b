"""Verifying the audit log of one service: every row, every seal, every head, in one snapshot, as a stream."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from sqlalchemy import Row, exists, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from services.kit.audit_chain import START, Chain, age_s, bare_id, raw, same
from services.kit.db import Database

WAIT_S = 60
"""A row that waits longer for its seal is a finding: nobody seals."""
_HEAD = "head_"
Logged = Mapping[str, Mapping[int, bytes]]
"""Organization (32 digits) -> count -> head, as a service's log has told."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as a service left it."""

    kind: str
    """edited, foreign, misplaced, removed, cut, head, log or unsealed."""
    org_id: str
    what: str
    row_id: str = ""
    """"aud_...", where a single row is meant."""

    def __str__(self) -> str:
        return f"{self.kind:<9} {self.row_id or self.org_id}: {self.what}" + (f" (organization {self.org_id})" if self.row_id else "")


@dataclass
class Summary:
    """What was looked at."""

    organizations: int = 0
    rows: int = 0
    unsealed: int = 0


@dataclass
class _Organization:
    """How far one organization's chain has been followed."""

    id: str
    head: Mapping[str, Any] | None
    number: int = 0
    """Of the last sealed row."""
    seal: Any = START
    """Of the last sealed row, as it stands there."""
    logged: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def org_id(self) -> str:
        return f"org_{self.id}"


def read_log(lines: Iterable[str], service: str) -> dict[str, dict[int, bytes]]:
    """The heads that a log tells of; whatever else it holds is passed over, also what stands before the JSON of a line."""
    found: dict[str, dict[int, bytes]] = {}
    for line in lines:
        if "audit.sealed" not in line or "{" not in line:
            continue
        try:
            told = orjson.loads(line[line.index("{") :])
            if told["event"] == "audit.sealed" and told["service"] == service:
                found.setdefault(told["org"].removeprefix("org_"), {})[int(told["count"])] = bytes.fromhex(told["head"])
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return found


class Verifier:
    """Looks at the log of one service. ``org_id`` narrows it to one organization."""

    def __init__(self, db: Database, rows: Any, heads: Any, chain: Chain, logged: Logged, org_id: str = "") -> None:
        """``rows``, ``heads``: the service's AuditEvent and AuditHead."""
        self._db, self._chain, self._org_id = db, chain, org_id
        self._rows, self._heads = rows.__table__, heads.__table__
        wanted = org_id.removeprefix("org_")
        self._logged = {org: told for org, told in logged.items() if not org_id or org == wanted}
        self.summary = Summary()

    async def count(self) -> int:
        """How many rows there are to look at."""
        async with self._db.reading.connect() as connection:
            return int(await connection.scalar(self._narrowed(select(func.count()).select_from(self._rows), self._rows)) or 0)

    async def problems(self) -> AsyncIterator[Problem]:
        """Everything that is wrong, as it is found."""
        seen: set[str] = set()
        async with self._db.writing.execution_options(readonly=True).connect() as connection:
            async with connection.begin():
                # Rows and heads must be of one moment: the sealer goes on meanwhile.
                if not self._db.is_sqlite:
                    await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
                org: _Organization | None = None
                async for row in await connection.stream(self._statement()):
                    if org is None or org.id != bare_id(row.org_id):
                        for problem in self._end(org):
                            yield problem
                        org = self._begin(row)
                        seen.add(org.id) if org.id in self._logged else None
                    self.summary.rows += 1
                    for problem in self._row(org, row):
                        yield problem
                for problem in self._end(org):
                    yield problem
                async for problem in self._without_rows(connection, seen):
                    yield problem

    def _narrowed(self, statement: Any, table: Any) -> Any:
        return statement.where(table.c.org_id == self._org_id) if self._org_id else statement

    def _statement(self) -> Any:
        """Every row with its organization's head, in the order of the chains; what has no seal comes last."""
        rows, heads = self._rows, self._heads
        of_head = [raw(column).label(f"{_HEAD}{column.key}") for column in heads.c]
        statement = select(*map(raw, rows.c), *of_head).join(heads, heads.c.org_id == rows.c.org_id, isouter=True)
        return self._narrowed(statement, rows).order_by(rows.c.org_id, rows.c.seal_number.asc().nulls_last(), rows.c.id)

    def _begin(self, row: Row[Any]) -> _Organization:
        self.summary.organizations += 1
        head = {column.key: row._mapping[f"{_HEAD}{column.key}"] for column in self._heads.c}
        org = bare_id(row.org_id)
        return _Organization(org, head if head["org_id"] is not None else None, logged=self._logged.get(org, {}))

    def _row(self, org: _Organization, row: Row[Any]) -> Iterator[Problem]:
        values = {column.key: row._mapping[column.key] for column in self._rows.c}
        row_id = f"aud_{bare_id(row.id)}"

        def found(kind: str, what: str) -> Problem:
            return Problem(kind, org.org_id, what, row_id)

        is_ours = same(self._chain.written(values), values["written"])
        number = values["seal_number"]
        if number is None:
            self.summary.unsealed += 1
            if not is_ours:
                yield found("foreign", "no service has written this row as it stands")
            elif age_s(values["created_at"]) > WAIT_S:
                yield found("unsealed", f"waits for its seal since {values['created_at']}: nobody seals, or its seal was taken away")
            return
        if not isinstance(number, int) or number <= org.number:
            yield found("misplaced", f"claims the number {number}, which is another row's")
            return
        is_next = number == org.number + 1
        if not is_next:
            yield Problem("removed", org.org_id, f"{_numbers(org.number + 1, number - 1)} missing before {row_id}, number {number}")
        fits = same(self._chain.seal(org.seal, number, values), values["seal"]) if is_next and isinstance(org.seal, bytes) else None
        if not is_ours and fits:
            yield found("foreign", "no service has written this row: it came into the table in another way, and was sealed")
        elif not is_ours:
            yield found("edited", "does not say what was written")
        elif fits is False:
            yield found("misplaced", f"was not sealed as number {number} after the row before it: moved, or the chain was computed anew")
        told = org.logged.get(number)
        if told is not None and not same(told, values["seal"]):
            yield found("log", f"number {number} had another seal when the log told of it: the chain was replaced")
        org.number, org.seal = number, values["seal"]

    def _end(self, org: _Organization | None) -> Iterator[Problem]:
        """What the head and the log say of a chain that was followed to its end."""
        if org is None:
            return

        def found(kind: str, what: str) -> Problem:
            return Problem(kind, org.org_id, what)

        if org.head is None:
            if org.number:
                yield found("head", f"{org.number} rows are sealed, and there is no head")
        elif not same(self._chain.head(org.head), org.head["mac"]):
            yield found("head", "the head is not as the sealer has written it")
        elif org.head["count"] > org.number:
            yield found("cut", f"{_numbers(org.number + 1, org.head['count'])} missing at the end")
        elif org.head["count"] < org.number:
            yield found("head", f"the head knows {org.head['count']} rows and the table {org.number}: the head is an old one")
        elif not same(org.head["head"], org.seal):
            yield found("head", "the last row's seal is not the one that the head knows")
        last = max(org.logged, default=0)
        if last > org.number:
            yield found("log", f"the log tells of {last} sealed rows, the table has {org.number}: it was set back to an earlier state")

    async def _without_rows(self, connection: AsyncConnection, seen: set[str]) -> AsyncIterator[Problem]:
        """Organizations of which nothing is left but the head, or what the log tells."""
        rows, heads = self._rows, self._heads
        alone = select(*map(raw, heads.c)).where(~exists().where(rows.c.org_id == heads.c.org_id))
        for row in (await connection.execute(self._narrowed(alone, heads))).all():
            self.summary.organizations += 1
            org = _Organization(bare_id(row.org_id), row._asdict(), logged=self._logged.get(bare_id(row.org_id), {}))
            seen.add(org.id)
            for problem in self._end(org):
                yield problem
        for org_id in sorted(self._logged.keys() - seen):
            self.summary.organizations += 1
            for problem in self._end(_Organization(org_id, None, logged=self._logged[org_id])):
                yield problem


def _numbers(first: int, last: int) -> str:
    return f"number {first} is" if first == last else f"numbers {first} to {last} are"
