"""Listing and exporting events."""

from collections.abc import AsyncIterator, Iterable, Iterator

from sqlalchemy import Select, select

from clawplane.deployment.v1 import usage_event_pb2
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage.rows import month_of
from services.kit.call import Call
from services.kit.columns import now
from services.kit.paging import Cursor, page
from services.kit.proto import to_datetime, to_proto

_KEY = (UsageEvent.occurred_at, UsageEvent.id)
_EXACT = (
    "deployment_id", "model", "provider", "type", "status", "user_id", "api_key_id", "agent_id", "thread_id", "project_id", "operation_id",
)  # fmt: skip
_PAGE = 500
_PIECE_BYTES = 1_000_000
"""Clients take no messages of more than four megabytes, and an event with all its texts may have forty thousand."""


async def list_events(request: rpc.ListUsageRequest, call: Call) -> rpc.ListUsageResponse:
    """A page of the events that fit, latest first."""
    async with call.read() as session:
        rows, token = await page(session, _filtered(request, call), _KEY, request)
    fitting = next(_pieces(rows), [])
    if len(fitting) < len(rows):
        token = Cursor(request, call.org_id, _KEY, "page_token").token(fitting[-1])
    return rpc.ListUsageResponse(events=map(_message, fitting), next_page_token=token)


async def export(request: rpc.ExportUsageRequest, call: Call) -> AsyncIterator[rpc.ExportUsageResponse]:
    """All events that fit and were there when it began, oldest first; a page at a time, so that no transaction stays open."""
    cursor = Cursor(request, call.org_id, _KEY, "after_position", descending=False)
    there = _filtered(request, call).where(UsageEvent.created_at <= now()).limit(_PAGE)
    position = request.after_position
    async for _ in call.ticks(0):
        async with call.read() as session:
            rows = (await session.scalars(cursor.after(there, position))).all()
        for piece in _pieces(rows):
            position = cursor.token(piece[-1])
            yield rpc.ExportUsageResponse(events=map(_message, piece), position=position)
        if len(rows) < _PAGE:
            return


def _pieces(rows: Iterable[UsageEvent]) -> Iterator[list[UsageEvent]]:
    """The rows in parts that a message can take."""
    piece: list[UsageEvent] = []
    room = _PIECE_BYTES
    for row in rows:
        size = 500 + sum(4 * len(value) for value in row.metadata_.values())
        if piece and size > room:
            yield piece
            piece, room = [], _PIECE_BYTES
        piece.append(row)
        room -= size
    if piece:
        yield piece


def _filtered(request: rpc.ListUsageRequest | rpc.ExportUsageRequest, call: Call) -> Select[UsageEvent]:
    _ = call.org_id
    statement = select(UsageEvent)
    # The month is what the table is partitioned by: it spares a look at all others.
    if request.HasField("start"):
        start = to_datetime(request.start, "start")
        statement = statement.where(UsageEvent.occurred_at >= start, UsageEvent.month >= month_of(start))
    if request.HasField("end"):
        end = to_datetime(request.end, "end")
        statement = statement.where(UsageEvent.occurred_at < end, UsageEvent.month <= month_of(end))
    for name in _EXACT:
        if value := getattr(request, name):
            statement = statement.where(getattr(UsageEvent, name) == value)
    return statement


def _message(row: UsageEvent) -> usage_event_pb2.UsageEvent:
    return to_proto(row, usage_event_pb2.UsageEvent)
