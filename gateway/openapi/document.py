"""The OpenAPI 3.1 document of the gateway, from the same descriptors as its routes."""

import functools
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor

from clawplane.options.v1 import options_pb2
from gateway import exports
from gateway.convert import is_map, is_plain_message, type_of
from gateway.httprule import Binding, bindings, find, services
from gateway.openapi.comments import comments
from gateway.openapi.schemas import Schema, Schemas, is_required, short

_INTRO = """\
Everything here is a gRPC method under another name: the same fields, limits and errors. Send a credential as
`authorization: Bearer ...`. Errors are `google.rpc.Status` as JSON; their `reason` never changes its meaning."""
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "status", "message", "details"],
            "properties": {
                "code": {"type": "integer", "description": "The HTTP status."},
                "status": {"type": "string", "description": "The gRPC status code, for instance `NOT_FOUND`."},
                "message": {"type": "string", "description": "For people."},
                "details": {
                    "type": "array",
                    "items": {"type": "object", "additionalProperties": True},
                    "description": "ErrorInfo with the stable `reason`; BadRequest names each field; RetryInfo says when to try again.",
                },
            },
        }
    },
}
_AUDIENCES = {
    options_pb2.AUDIENCE_PUBLIC: "Needs no credential.",
    options_pb2.AUDIENCE_PLATFORM: "For services and operators",
    options_pb2.AUDIENCE_ORGANIZATION: "For people, in their organization",
}
_ORG: Schema = {
    "name": "clawplane-org", "in": "header", "schema": {"type": "string", "pattern": "^org_[0-9a-f]{32}$"},
    "description": "The organization to act in; the personal one when left out.",
}  # fmt: skip
_FORMAT: Schema = {
    "name": "format", "in": "query", "schema": {"type": "string", "enum": list(exports.KINDS)},
    "description": "Sends a file: CSV with a line of names, or a JSON object a line; left out, a stream of events.",
}  # fmt: skip


@functools.cache
def document() -> dict[str, Any]:
    """The whole document."""
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = {}
    tags = []
    for service in services():
        found = list(bindings(service))
        if found:
            tags.append({"name": short(service.full_name), "description": comments().get(service.full_name, "")})
        for binding in found:
            paths.setdefault(_path(binding), {})[binding.http_method.lower()] = _operation(binding, service, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Clawplane", "version": importlib.metadata.version("clawplane"), "description": " ".join(_INTRO.split())},
        "security": [{"bearer": []}],
        "tags": tags,
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": {"description": "What went wrong.", "content": _json({"$ref": "#/components/schemas/Error"})}},
            "schemas": {"Error": _ERROR} | dict(sorted(schemas.found.items())),
        },
    }


def _path(binding: Binding) -> str:
    path = binding.template
    for variable in binding.variables:
        path = path.replace(f"{{{variable}}}", f"{{{_name(variable)}}}").replace(f"{{{variable}=*}}", f"{{{_name(variable)}}}")
    return path


def _name(variable: str) -> str:
    return variable.replace(".", "_")


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(binding: Binding, service: ServiceDescriptor, schemas: Schemas) -> dict[str, Any]:
    rpc = binding.rpc
    rule = rpc.GetOptions().Extensions[options_pb2.rule]
    text = comments().get(rpc.full_name, "")
    public = rule.audience == options_pb2.AUDIENCE_PUBLIC
    who = _AUDIENCES[rule.audience] + ("" if public else f", with the permission `{rule.permission}`.")
    operation: dict[str, Any] = {
        "operationId": f"{short(service.full_name)}.{rpc.name}",
        "tags": [short(service.full_name)],
        "summary": text.partition(". ")[0].rstrip("."),
        "description": f"{text}\n\n{who} gRPC: `{rpc.full_name}`.",
        "parameters": [_path_parameter(binding, name, schemas) for name in binding.variables],
    }
    if rule.audience == options_pb2.AUDIENCE_ORGANIZATION:
        operation["parameters"].append(_ORG)
    if public:
        operation["security"] = []
    body = _body(binding, schemas)
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    if binding.body != "*":
        taken = frozenset((*binding.variables, binding.body))
        operation["parameters"] += list(_query(rpc.input_type.fields, "", taken, schemas))
    answer = schemas.ref(rpc.output_type)
    if rpc.server_streaming:
        content: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}, "x-event": answer}}
        operation["parameters"].append(
            {"name": "last-event-id", "in": "header", "schema": {"type": "string"}, "description": "Where to resume; browsers send it."}
        )
        if exports.rows_of(rpc) is not None:
            operation["parameters"].append(_FORMAT)
            content |= {kind.partition(";")[0]: {"schema": {"type": "string"}} for kind in exports.KINDS.values()}
    else:
        content = _json(answer)
    operation["responses"] = {"200": {"description": "Done.", "content": content}, "default": {"$ref": "#/components/responses/Error"}}
    return operation


def _path_parameter(binding: Binding, variable: str, schemas: Schemas) -> dict[str, Any]:
    field = find(binding.rpc, variable)
    assert field is not None
    schema = schemas.field(field)
    schema.pop("readOnly", None)
    # A segment of a path is never empty and holds no slash or colon, which would be another path.
    schema.setdefault("pattern", "^[^/:]+$")
    return {"name": _name(variable), "in": "path", "required": True, "description": schema.pop("description", ""), "schema": schema}


def _body(binding: Binding, schemas: Schemas) -> Schema | None:
    if binding.body == "*":
        return schemas.object(binding.rpc.input_type, frozenset(binding.variables))
    if binding.body:
        return schemas.ref(type_of(binding.rpc.input_type.fields_by_name[binding.body]))
    return None


def _query(fields: Iterable[FieldDescriptor], prefix: str, taken: frozenset[str], schemas: Schemas) -> Iterable[dict[str, Any]]:
    for field in fields:
        if f"{prefix}{field.name}" in taken or is_map(field):
            continue
        if is_plain_message(field):
            yield from _query(type_of(field).fields, f"{prefix}{field.name}.", taken, schemas)
            continue
        schema = schemas.field(field)
        parameter = {"name": f"{prefix}{field.json_name}", "in": "query", "description": schema.pop("description", ""), "schema": schema}
        if is_required(field):
            parameter["required"] = True
        yield parameter
