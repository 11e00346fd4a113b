"""Showing the audit log: by page, and as an export. The same for each service."""

from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import Select, select

from clawplane.audit.v1 import audit_event_pb2 as log
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import NotFound
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import list_page

_PAGE = 500


async def list_events(call: Call, request: log.ListAuditEventsRequest) -> log.ListAuditEventsResponse:
    """A page of the events that the caller may see, newest first."""
    model = call.kit.audit_model
    statement = _period(call, request)
    for column, value in ((model.subject, request.actor), (model.resource_id, request.resource_id)):
        if value:
            statement = statement.where(column == value)
    if request.method_prefix:
        statement = statement.where(model.method.startswith(request.method_prefix, autoescape=True))
    return await list_page(call, request, log.ListAuditEventsResponse, statement, model.id, to_message)


async def export_events(call: Call, request: log.ExportAuditEventsRequest) -> AsyncIterator[log.ExportAuditEventsResponse]:
    """All events of a period that were there when it began, oldest first; a page at a time, so that no transaction stays open."""
    model = call.kit.audit_model
    period = _period(call, request).where(model.created_at <= now()).order_by(model.id).limit(_PAGE)
    asked = {name: value.ToJsonString() for name in ("start", "end") if request.HasField(name) and (value := getattr(request, name))}
    call.audit(request.org_id, org_id=request.org_id, after=asked)
    last = request.after_event_id
    async for _ in call.ticks(0):
        async with call.read() as session:
            rows = (await session.scalars(period.where(model.id > last) if last else period)).all()
        for row in rows:
            yield log.ExportAuditEventsResponse(event=to_message(row))
        if len(rows) < _PAGE:
            return
        last = rows[-1].id


def to_message(row: Any) -> log.AuditEvent:
    """The event as it is shown."""
    message = to_proto(row, log.AuditEvent)
    message.actor = row.subject
    message.fields.extend(sorted({*(row.before or {}), *(row.after or {})}))
    return message


def _period(call: Call, request: Any) -> Select[Any]:
    if request.org_id and not call.sees(request.org_id):
        raise NotFound("organization")
    model = call.kit.audit_model
    statement = select(model)
    if request.org_id:
        statement = statement.where(model.org_id == request.org_id)
    if request.HasField("start"):
        statement = statement.where(model.created_at >= to_datetime(request.start, "start"))
    if request.HasField("end"):
        statement = statement.where(model.created_at < to_datetime(request.end, "end"))
    return statement
