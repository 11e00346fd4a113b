"""The audit log: who did what, what changed by it, and all of it as a file."""

import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import grpc
import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from starlette.responses import Response, StreamingResponse

from clawplane.audit.v1 import audit_event_pb2
from clawplane.user.v1 import member_service_pb2
from gateway import exports
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.visit import Visit
from gateway.errors import from_rpc, invalid

SIDES = {"account": "People and access", "deployments": "Deployments"}
COLUMNS = (
    "created_at", "actor", "credential", "credential_id", "method", "resource_id", "outcome", "before", "after", "ip", "request_id", "id",
    "seal_number",
)  # fmt: skip
"""Of the CSV."""
_PAGE_SIZE = 50
_EXPORT_S = 600


async def index(visit: Visit) -> Response:
    """The events of one service, latest first, with filters."""
    side = _side(visit)
    request = audit_event_pb2.ListAuditEventsRequest(
        page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", ""), actor=visit.query.get("actor", "")[:100],
        resource_id=visit.query.get("resource", "").strip()[:100], start=_day(visit, "from"), end=_day(visit, "to", 1),
    )  # fmt: skip
    stub = visit.services.user_audit if side == "account" else visit.services.deployment_audit
    found, people = await visit.calls(
        visit.call(stub.ListAuditEvents, request),
        visit.call(visit.services.members.ListMembers, member_service_pb2.ListMembersRequest(page_size=250)),
    )
    names = {member.user_id: member.full_name or member.email for member in people.members}
    return render(
        "audit.html", visit, page="audit", side=side, sides=SIDES, events=found.events, next_page=found.next_page_token, names=names,
        deed=deed, changes=changes, filtered=any(visit.query.get(name) for name in ("actor", "resource", "from", "to")),
    )  # fmt: skip


async def export(visit: Visit) -> Response:
    """All events of a period as a file, as they come from the service."""
    side, kind = _side(visit), "ndjson" if visit.query.get("format") == "ndjson" else "csv"
    request = audit_event_pb2.ExportAuditEventsRequest(start=_day(visit, "from"), end=_day(visit, "to", 1))
    stub = visit.services.user_audit if side == "account" else visit.services.deployment_audit
    call = stub.ExportAuditEvents(request, metadata=visit.metadata, timeout=_EXPORT_S)
    try:
        # Whoever may not is told so by a page, and not by a file that breaks off.
        first = await call.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None
    name = f"audit-{side}-{datetime.now(UTC):%Y-%m-%d}.{kind}"
    headers = {**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
    lines = _ndjson if kind == "ndjson" else _csv
    return StreamingResponse(lines(_events(call, first)), 200, headers, "application/x-ndjson" if kind == "ndjson" else "text/csv")


def _side(visit: Visit) -> str:
    return "deployments" if visit.query.get("of") == "deployments" else "account"


def _day(visit: Visit, name: str, days_later: int = 0) -> Timestamp | None:
    """The beginning of a day in UTC, or of the one after it."""
    text = visit.query.get(name, "")
    if not text:
        return None
    try:
        day = date.fromisoformat(text) + timedelta(days=days_later)
    except (ValueError, OverflowError):
        raise invalid([(name, "is no day; write it as 2027-03-31")]) from None
    stamp = Timestamp()
    stamp.FromDatetime(datetime(day.year, day.month, day.day, tzinfo=UTC))
    return stamp


async def _events(call: Any, first: Any) -> AsyncIterator[audit_event_pb2.AuditEvent]:
    """The stream, ended where its reader is gone. One that breaks off breaks the file off: a part must not look like the whole."""
    try:
        answer = first
        while answer is not grpc.aio.EOF:
            yield answer.event
            answer = await call.read()
    finally:
        call.cancel()


async def _ndjson(events: AsyncIterator[audit_event_pb2.AuditEvent]) -> AsyncIterator[bytes]:
    async for event in events:
        yield orjson.dumps(MessageToDict(event, preserving_proto_field_name=True)) + b"\n"


async def _csv(events: AsyncIterator[audit_event_pb2.AuditEvent]) -> AsyncIterator[str]:
    yield exports.line(COLUMNS)
    async for event in events:
        values: dict[str, Any] = MessageToDict(event, preserving_proto_field_name=True)
        cells = [values.get(name, "") for name in COLUMNS]
        yield exports.line(exports.guarded(cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)) for cell in cells)


def deed(method: str) -> str:
    """An RPC in words: "/clawplane.user.v1.UserService/UpdateUser" -> "Update user"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", method.rpartition("/")[2]).replace("O Auth", "OAuth")
    kept = [word if word.isupper() and len(word) > 1 else word.lower() for word in words.split()]
    text = " ".join(kept).replace("api key", "API key").replace("oauth", "OAuth")
    return text[:1].upper() + text[1:]


def changes(event: audit_event_pb2.AuditEvent) -> list[tuple[str, str, str]]:
    """(field, as it was, as it became), what is not known being empty."""
    before, after = MessageToDict(event.before), MessageToDict(event.after)
    return [(name, _said(before.get(name)), _said(after.get(name))) for name in event.fields or sorted({*before, *after})]


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else json.dumps(value, ensure_ascii=False)
