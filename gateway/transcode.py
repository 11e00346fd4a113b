"""Routes made from the descriptors: HTTP and JSON outside, gRPC inside."""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import grpc
import orjson
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import exports, httprule, request, stream
from gateway.errors import from_rpc, invalid, method_not_allowed
from gateway.httprule import Binding

MAX_HEADER_CHARS = 4096
THREAD_BYTES = 64 * 1024
_PRINTABLE = re.compile(r"[\x20-\x7e]*\Z")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_FORWARDED = ("authorization", "clawplane-org")

Call = Callable[..., Any]


class Segment(Convertor[str]):
    """One segment of a path; the colon is left out, so that ``{id}`` does not swallow ``{id}:verb``."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("segment", Segment())


class Endpoint:
    """An ASGI application that serves the bindings of one path, by HTTP method."""

    def __init__(self, template: str, timeout_s: float) -> None:
        self.template = template
        self._timeout_s = timeout_s
        self._bindings: dict[str, tuple[Binding, Call, FieldDescriptor | None]] = {}
        """By HTTP method; with the field of the rows where there is something to export."""

    def add(self, binding: Binding, channel: grpc.aio.Channel) -> None:
        """Adds a binding; ValueError when its HTTP method is taken on this path."""
        if binding.http_method in self._bindings:
            raise ValueError(f"{binding.rpc.full_name}: {binding.http_method} {self.template} is taken")
        rpc = binding.rpc
        make: Any = channel.unary_stream if rpc.server_streaming else channel.unary_unary
        call = make(
            f"/{rpc.containing_service.full_name}/{rpc.name}",
            request_serializer=message_factory.GetMessageClass(rpc.input_type).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(rpc.output_type).FromString,
        )
        self._bindings[binding.http_method] = (binding, cast(Call, call), exports.rows_of(rpc))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)

    async def _answer(self, http: Request) -> Response:
        method = "GET" if http.method == "HEAD" else http.method
        if method not in self._bindings:
            raise method_not_allowed([*self._bindings, *(["HEAD"] if "GET" in self._bindings else [])])
        binding, call, rows = self._bindings[method]
        body = await http.body()
        if body:
            _check_content_type(http)
        query, file = http.scope["query_string"], ""
        if rows is not None:
            query, file = exports.kind_of(query)
        parts = request.Parts(_path_values(http, binding), query, body)
        if len(body) > THREAD_BYTES:
            # A full batch takes 130 ms to convert, in which no other request would move.
            message = await asyncio.to_thread(request.build, binding, parts)
        else:
            message = request.build(binding, parts)
        if rows is not None and file:
            name = self.template.rpartition("/")[2].partition(":")[0]
            return await exports.answer(http, call(message, metadata=forwarded_metadata(http)), rows, file, name)
        if binding.rpc.server_streaming:
            stream.resume(http, message)
            return await stream.answer(call(message, metadata=forwarded_metadata(http)), http.app.state.stopping, to_json)
        try:
            reply = await call(message, metadata=forwarded_metadata(http), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        return Response(to_json(reply), media_type="application/json")


def to_json(message: Message) -> bytes:
    """A message as JSON in lowerCamelCase; fields at their default are printed too, so that readers need no table of defaults."""
    return orjson.dumps(json_format.MessageToDict(message, always_print_fields_with_no_presence=True))


def forwarded_metadata(http: Request) -> list[tuple[str, str]]:
    """The metadata of a forwarded call: the caller's credential and organization, request id, trace; ApiError for bad headers."""
    metadata = [("x-request-id", http.scope["state"]["request_id"]), *http.app.state.forward(http)]
    for name in _FORWARDED:
        values = http.headers.getlist(name)
        if len(values) > 1:
            raise invalid([(name, "is given more than once")])
        if values:
            if len(values[0]) > MAX_HEADER_CHARS or not _PRINTABLE.match(values[0]):
                raise invalid([(name, f"must be at most {MAX_HEADER_CHARS} printable ASCII characters")])
            metadata.append((name, values[0]))
    if _TRACEPARENT.match(trace := http.headers.get("traceparent", "")):
        metadata.append(("traceparent", trace))
    return metadata


def _path_values(http: Request, binding: Binding) -> Mapping[str, str]:
    try:
        # The server has decoded the path with replacement characters; the raw one tells whether it was UTF-8.
        unquote_to_bytes(http.scope.get("raw_path") or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise invalid([("path", "is not UTF-8")]) from None
    return {name: http.path_params[f"p{index}"] for index, name in enumerate(binding.variables)}


def _check_content_type(http: Request) -> None:
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid([("content-type", "must be application/json")], 415)
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise invalid([("content-encoding", "must be identity")], 415)


def build_routes(services: Iterable[Any], channels: Mapping[str, grpc.aio.Channel], timeout_s: float) -> list[Route]:
    """A route for each path of the services; `channels` by proto package. ValueError for rules that cannot be served."""
    endpoints: dict[str, Endpoint] = {}
    for service in services:
        for binding in httprule.bindings(service):
            endpoint = endpoints.setdefault(binding.route(), Endpoint(binding.template, timeout_s))
            endpoint.add(binding, channels[service.file.package])
    # A literal wins over a variable in the same place.
    return [
        Route(path, endpoints[path], name=endpoints[path].template)
        for path in sorted(endpoints, key=lambda path: path.replace("{", "\x7f"))
    ]
