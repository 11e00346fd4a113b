"""Streams of rows as files: CSV, or one JSON object a line."""

import asyncio
import csv
import io
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import grpc
import orjson
from google.protobuf import json_format, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.convert import is_map
from gateway.errors import from_rpc, invalid

KINDS = {"csv": "text/csv; charset=utf-8", "ndjson": "application/x-ndjson"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?\Z", re.ASCII)


class BrokenOff(Exception):
    """The rest of a file will not come. Raised after its beginning was sent, it closes the connection without the chunk that ends an
    answer, so that clients report an incomplete one: a part must not look like the whole."""


def rows_of(rpc: MethodDescriptor) -> FieldDescriptor | None:
    """The field of a stream's messages that holds the rows of an export; None for streams that are none."""
    rows = [field for field in rpc.output_type.fields if field.is_repeated and field.message_type is not None]
    return rows[0] if rpc.server_streaming and len(rows) == 1 and "position" in rpc.output_type.fields_by_name else None


def kind_of(query: bytes) -> tuple[bytes, str]:
    """(a query without the kind of file that it asks for; the kind, empty for none). ApiError for another kind."""
    parts = query.split(b"&")
    asked = [part.partition(b"=")[2].decode("latin-1") for part in parts if part.partition(b"=")[0] == b"format"]
    if len(asked) > 1:
        raise invalid([("format", "is given more than once")])
    if asked and asked[0] not in KINDS:
        raise invalid([("format", f"must be {' or '.join(KINDS)}; without it, events of a stream are sent")])
    return b"&".join(part for part in parts if part.partition(b"=")[0] != b"format"), asked[0] if asked else ""


async def answer(
    http: Request, call: Any, field: FieldDescriptor, kind: str, name: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The file, as it comes from the service and no faster than the reader takes it; ApiError when the RPC fails at once."""
    try:
        first = await call.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None
    filename = f"{name}-{datetime.now(UTC):%Y-%m-%d}.{kind}"
    sent = {"Cache-Control": "no-store", **(headers or {}), "Content-Disposition": f'attachment; filename="{filename}"'}
    if http.method == "HEAD":
        call.cancel()
        return Response(None, 200, sent, KINDS[kind])
    assert field.message_type is not None
    columns = list(field.message_type.fields)
    lines: Callable[[Any], bytes] = _ndjson if kind == "ndjson" else lambda rows: _csv(columns, rows)
    head = line([column.name for column in columns]).encode() if kind == "csv" else b""
    body = _body(call, first, head, lambda message: lines(getattr(message, field.name)), http.app.state.stopping)
    return StreamingResponse(body, 200, sent, KINDS[kind])


async def _body(call: Any, message: Any, head: bytes, lines: Callable[[Any], bytes], stopping: asyncio.Event) -> AsyncIterator[bytes]:
    ending = asyncio.ensure_future(stopping.wait())
    try:
        if head:
            yield head
        while message is not grpc.aio.EOF:
            # A full message takes 20 ms to convert, in which no other request would move.
            yield await asyncio.to_thread(lines, message)
            reading = asyncio.ensure_future(call.read())
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                raise BrokenOff("the gateway stops")
            message = reading.result()
    except grpc.aio.AioRpcError as error:
        raise BrokenOff(error.code().name) from None
    finally:
        ending.cancel()
        call.cancel()


def _ndjson(rows: Iterable[Message]) -> bytes:
    return b"".join(
        orjson.dumps(json_format.MessageToDict(row, always_print_fields_with_no_presence=True), option=orjson.OPT_APPEND_NEWLINE)
        for row in rows
    )


def _csv(columns: list[FieldDescriptor], rows: Iterable[Message]) -> bytes:
    return "".join(line([_cell(row, column) for column in columns]) for row in rows).encode()


def line(cells: Iterable[str]) -> str:
    """A line of CSV, as RFC 4180 says."""
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula; numbers stay numbers."""
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.match(text) else text


def _cell(row: Message, field: FieldDescriptor) -> str:
    value: Any = getattr(row, field.name)
    if isinstance(value, str):
        return guarded(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None and value else ""
    if isinstance(value, timestamp_pb2.Timestamp):
        return value.ToJsonString() if row.HasField(field.name) else ""
    if is_map(field):
        return orjson.dumps(dict(value), option=orjson.OPT_SORT_KEYS).decode() if value else ""
    return str(value)
