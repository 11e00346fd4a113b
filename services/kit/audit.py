"""The audit log: who did what, in the transaction that did it. Sealed afterwards (audit_sealer.py), shown by audit_events.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from sqlalchemy import JSON, BigInteger, Index, LargeBinary, String, insert, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from clawplane.audit.v1.audit_event_pb2 import AuditOutcome
from services.kit import ids
from services.kit.audit_chain import Chain, stored
from services.kit.auth import Caller
from services.kit.columns import Identifier, ProtoEnum, Tenant, Timestamps, UtcDateTime, now
from services.kit.proto import any_field

OUTCOME = ProtoEnum(AuditOutcome)
REDACTED = "[redacted]"
_UNTOLD = frozenset({"etag", "created_at", "updated_at"})
"""Fields that change with every change."""
_LONGEST = 500
_MOST_ID, _MOST_IP = 100, 45


class AuditRow(Tenant):
    """Mixin of each service's ``audit_events``. Table key (org_id, id, created_at): partitioned by month on PostgreSQL."""

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    id: Mapped[str] = mapped_column(Identifier("aud"), primary_key=True, default=lambda: ids.new("aud"), sort_order=-19)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True, default=now, sort_order=-18)
    subject: Mapped[str] = mapped_column(String(100))
    """Who: "usr_...", "service:gateway", "operator"."""
    method: Mapped[str] = mapped_column(String(200))
    """What: the full name of the RPC."""
    resource_id: Mapped[str] = mapped_column(String(_MOST_ID), default="", index=True)
    project_id: Mapped[str | None] = mapped_column(Identifier("prj"))
    request_id: Mapped[str] = mapped_column(String(100), default="")
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    credential: Mapped[str] = mapped_column(String(16), server_default="")
    """Kind of the caller's credential."""
    credential_id: Mapped[str] = mapped_column(String(_MOST_ID), server_default="")
    ip: Mapped[str] = mapped_column(String(_MOST_IP), server_default="")
    outcome: Mapped[int] = mapped_column(OUTCOME, server_default="done")
    written: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    """Keyed hash of all of the above, made by the writer: what came into the table in another way has none."""
    seal_number: Mapped[int | None] = mapped_column(BigInteger)
    """Place among the organization's sealed rows, from 1; NULL until then."""
    seal: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    """Keyed hash of the seal before it and of every column."""

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"primary_key": [cls.id]}


def indexes() -> tuple[Index, ...]:
    """For ``__table_args__``: what waits for its seal, and ids alone, by which operators look across organizations."""
    unsealed = text("seal_number IS NULL")
    return (
        Index("ix_audit_events__unsealed", "org_id", "id", postgresql_where=unsealed, sqlite_where=unsealed),
        Index("ix_audit_events__id", "id"),
    )


class AuditHeadRow(Timestamps):
    """Mixin of each service's ``audit_heads``: where an organization's chain has come to. Touched by the sealer alone."""

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)
    """How many rows are sealed."""
    head: Mapped[bytes] = mapped_column(LargeBinary(32))
    """The seal of the last one."""
    sealed_at: Mapped[datetime] = mapped_column(UtcDateTime)
    mac: Mapped[bytes] = mapped_column(LargeBinary(32))
    """Keyed hash of all of the above."""


@dataclass(frozen=True)
class Note:
    """What a call says of what it did, beside who and how."""

    resource_id: str = ""
    org_id: str = ""
    before: Any = None
    after: Any = None
    project_id: str | None = None
    subject: str = ""


@dataclass
class Trail:
    """The notes of one call. Its own row is written once; ``elsewhere`` are rows of other organizations."""

    own: Note = Note()
    elsewhere: list[Note] = field(default_factory=list)
    is_written: bool = False


class Log:
    """Writes the rows of one service."""

    def __init__(self, model: Any, chain: Chain) -> None:
        self.model, self.chain = model, chain
        self._table = model.__table__

    async def write(self, session: AsyncSession, notes: list[Note], caller: Caller, **common: Any) -> None:
        """Adds a row for each note to the transaction. ``common``: method, request_id, ip, outcome."""
        await session.flush()
        # Past the ORM, whose sessions know the rows of their own organization alone.
        rows = [self._row(note, caller, common) for note in notes]
        await (await session.connection()).execute(insert(self._table), rows)

    def _row(self, note: Note, caller: Caller, common: Mapping[str, Any]) -> dict[str, Any]:
        row = {
            "org_id": note.org_id or caller.org_id or ids.NO_ORG, "id": ids.new("aud"), "created_at": now(),
            "subject": note.subject or caller.subject, "credential": caller.kind, "credential_id": caller.key_id,
            "resource_id": note.resource_id[:_MOST_ID], "project_id": note.project_id, "before": note.before or None,
            "after": note.after or None, **common,
        }  # fmt: skip
        return row | {"written": self.chain.written(stored(self._table, row))}


def diff(before: Message | None, after: Message | None) -> dict[str, Any]:
    """What changed between two states of a resource, as ``before`` and ``after`` of ``Call.audit``; None is no resource yet, or no more.

    Only the fields that differ. The value of a field marked ``debug_redact`` is never shown, nor one that is long.
    """
    was, became = (_fields(state, every=None not in (before, after)) for state in (before, after))
    result: dict[str, Any] = {"before": {}, "after": {}}
    for each in (after or before).DESCRIPTOR.fields:  # type: ignore[union-attr]
        if each.name in _UNTOLD or was.get(each.name) == became.get(each.name):
            continue
        if before is not None:
            result["before"][each.name] = _shown(each, was.get(each.name))
        if after is not None:
            result["after"][each.name] = _shown(each, became.get(each.name))
    return result


def _fields(message: Message | None, *, every: bool) -> dict[str, Any]:
    if message is None:
        return {}
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=every)


def _shown(each: Any, value: Any) -> Any:
    if value is None:
        return None
    if is_secret(each):
        return REDACTED
    size = len(orjson.dumps(value))
    return f"[{size} bytes]" if size > _LONGEST else value


def is_secret(each: FieldDescriptor) -> bool:
    """Whether a field is marked ``debug_redact``, or holds a message with such a field."""
    within = each.message_type
    return each.GetOptions().debug_redact or (within is not None and any_field(within, lambda inner: inner.GetOptions().debug_redact))
