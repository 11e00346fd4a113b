"""``/openapi.json``, and ``/docs``: the same document as a page that needs no script and nothing from elsewhere."""

from pathlib import Path
from typing import Any

import jinja2
import orjson
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.openapi.document import document
from gateway.openapi.schemas import Schema

_HERE = Path(__file__).parent.parent
_CACHE = {"Cache-Control": "public, max-age=300"}
_HEADERS = _CACHE | {"Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; frame-ancestors 'none'"}
_SIZES = {
    "minimum": "at least {}", "maximum": "at most {}", "exclusiveMinimum": "more than {}", "exclusiveMaximum": "less than {}",
    "minLength": "{} characters or more", "maxLength": "{} characters or fewer", "minItems": "{} items or more",
    "maxItems": "{} items or fewer", "minProperties": "{} pairs or more", "maxProperties": "{} pairs or fewer",
}  # fmt: skip


def routes() -> list[BaseRoute]:
    """Both addresses."""
    return [Route("/openapi.json", _document), Route("/docs", _page)]


async def _document(_: Request) -> Response:
    return Response(orjson.dumps(document()), media_type="application/json", headers=_CACHE)


async def _page(_: Request) -> Response:
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["code"] = code
    found = document()
    operations: dict[str, list[dict[str, Any]]] = {}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            operations.setdefault(operation["tags"][0], []).append({"method": method.upper(), "path": path, **shown(operation)})
    schemas = {name: schema | {"rows": rows(schema)} for name, schema in found["components"]["schemas"].items()}
    html = pages.get_template("docs.html").render(document=found, operations=operations, schemas=schemas)
    return Response(html, media_type="text/html", headers=_HEADERS)


def code(text: str) -> Markup:
    """Text with what stands between backquotes as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts))


def shown(operation: dict[str, Any]) -> dict[str, Any]:
    """An operation as the page shows it."""
    parameters = [
        {"name": one["name"], "where": one["in"], "required": one.get("required", False), "text": one.get("description", "")}
        | {"type": kind(one["schema"]), "limits": limits(one["schema"])}
        for one in operation["parameters"]
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    content = next(iter(operation["responses"]["200"]["content"].values()))
    return {
        "id": operation["operationId"], "summary": operation["summary"],
        "text": [part for part in operation["description"].removeprefix(operation["summary"]).lstrip(". \n").split("\n\n") if part],
        "parameters": parameters, "body": rows(body) if body and "$ref" not in body else [],
        "body_ref": kind(body) if body and "$ref" in body else None,
        "answer": kind(content.get("x-event", content["schema"])), "streams": "x-event" in content,
    }  # fmt: skip


def rows(schema: Schema) -> list[dict[str, Any]]:
    """The properties of an object, one row each."""
    return [
        {
            "name": name, "type": kind(one), "limits": limits(one), "required": name in schema.get("required", ()),
            "read_only": one.get("readOnly", False), "text": one.get("description", ""),
        }
        for name, one in schema.get("properties", {}).items()
    ]  # fmt: skip


def kind(schema: Schema) -> dict[str, str]:
    """A type as a word, and the schema that it leads to, if any."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return {"word": name, "ref": name}
    if schema.get("type") == "array":
        of = kind(schema.get("items", {}))
        return {"word": f"list of {of['word']}", "ref": of["ref"]}
    if isinstance(schema.get("additionalProperties"), dict):
        of = kind(schema["additionalProperties"])
        return {"word": f"map to {of['word']}", "ref": of["ref"]}
    plain = schema.get("type", "any")
    word = plain if isinstance(plain, str) else " or ".join(plain)
    return {"word": f"{word} ({schema['format']})" if "format" in schema else word, "ref": ""}


def limits(schema: Schema) -> list[str]:
    """The limits of a value in words."""
    said = [text.format(schema[name]) for name, text in _SIZES.items() if name in schema]
    if "pattern" in schema:
        said.append(f"matches `{schema['pattern']}`")
    if "enum" in schema:
        said.append("one of " + ", ".join(f"`{word}`" for word in schema["enum"]))
    for one in schema.get("anyOf", ()):
        said += ["empty"] if one.get("const") == "" else [f"or {text}" for text in limits(one)] or [f"or {one.get('format', '')}"]
    return said
