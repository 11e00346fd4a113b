"""An HTTP request into the protobuf request of a binding."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from gateway import strictjson
from gateway.convert import (
    Mismatch,
    fields_of,
    from_text,
    is_map,
    is_plain_message,
    join,
    set_field,
    set_fields,
    set_well_known,
    type_of,
)
from gateway.errors import Violation, invalid
from gateway.httprule import Binding

MAX_QUERY_FIELDS = 500


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a request brings: path values by field path, the raw query, the raw body."""

    path: Mapping[str, str]
    query: bytes
    body: bytes


def build(binding: Binding, parts: Parts) -> Message:
    """The request of the method; ApiError (400) that names every field that does not fit."""
    message = message_factory.GetMessageClass(binding.rpc.input_type)()
    out: list[Violation] = []
    data = _set_body(message, binding, parts.body, out)
    given = dict(_given(binding, data))
    for path, text in parts.path.items():
        _set_path(message, path, text, path in given, out)
    _set_query(message, binding, parts.query, out)
    if out:
        raise invalid(out)
    _derive_mask(message, binding, given)
    return message


def _set_body(message: Message, binding: Binding, raw: bytes, out: list[Violation]) -> Any:
    """Fills the message from the body; returns the JSON value, None when there is no body."""
    if not raw.strip():
        return None
    if not binding.body:
        out.append(("body", f"{binding.http_method} takes no body here"))
        return None
    data = strictjson.load(raw)
    if binding.body == "*":
        set_fields(message, data, "", out)
    elif data is None:
        out.append((binding.body, "must not be null"))
    else:
        set_field(message, fields_of(message.DESCRIPTOR)[binding.body], data, binding.body, out)
    return data


def _given(binding: Binding, data: Any) -> Iterator[tuple[str, None]]:
    """The paths of all fields that the body gives, as keys in their order."""
    if binding.body == "*":
        paths = body_paths(binding.rpc.input_type, data, "")
    elif binding.body and (field := binding.rpc.input_type.fields_by_name[binding.body]).message_type is not None:
        paths = body_paths(field.message_type, data, binding.body)
    else:
        paths = iter(())
    return ((path, None) for path in paths)


def body_paths(descriptor: Descriptor, data: Any, prefix: str) -> Iterator[str]:
    """Paths in snake_case of the leaves in a JSON object; lists, maps and well-known types are leaves."""
    if not isinstance(data, dict):
        return
    fields = fields_of(descriptor)
    for key, value in data.items():
        if (field := fields.get(key)) is None:
            continue
        place = join(prefix, field.name)
        if is_plain_message(field) and isinstance(value, dict) and value:
            yield from body_paths(type_of(field), value, place)
        else:
            yield place


def _set_path(message: Message, path: str, text: str, in_body: bool, out: list[Violation]) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = fields_of(message.DESCRIPTOR)[name]
    try:
        value = from_text(field, text)
    except Mismatch as error:
        out.append((path, str(error)))
        return
    if in_body and getattr(message, name) != value:
        out.append((path, "differs between the path and the body"))
        return
    setattr(message, name, value)


def _set_query(message: Message, binding: Binding, raw: bytes, out: list[Violation]) -> None:
    values: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(raw.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
    except UnicodeDecodeError:
        out.append(("query", "is not UTF-8"))
        return
    except ValueError:
        out.append(("query", f"has more than {MAX_QUERY_FIELDS} fields"))
        return
    for key, text in pairs:
        found = _resolve(binding.rpc.input_type, key)
        if found is None:
            out.append((strictjson.printable(key), "is not a parameter that is known here"))
            continue
        path, _ = found
        if binding.body == "*" or path.split(".")[0] == binding.body:
            out.append((path, "belongs in the body"))
        elif path in binding.variables:
            out.append((path, "is given by the path"))
        else:
            values.setdefault(path, []).append(text)
    for path, texts in values.items():
        _set_query_field(message, path, texts, out)


def _resolve(descriptor: Descriptor, key: str) -> tuple[str, FieldDescriptor] | None:
    """The path in snake_case and the field of a query parameter; None when there is no such field, or it has no text form."""
    path = ""
    names = key.split(".")
    for index, name in enumerate(names):
        field = fields_of(descriptor).get(name)
        if field is None or is_map(field):
            return None
        path = join(path, field.name)
        if index == len(names) - 1:
            return None if is_plain_message(field) else (path, field)
        if not is_plain_message(field):
            return None
        descriptor = type_of(field)
    return None


def _set_query_field(message: Message, path: str, texts: list[str], out: list[Violation]) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = fields_of(message.DESCRIPTOR)[name]
    if len(texts) > 1 and not field.is_repeated:
        out.append((path, "is given more than once"))
        return
    oneof = field.containing_oneof
    if oneof is not None and (other := message.WhichOneof(oneof.name)) is not None:
        out.append((path, f"excludes {other}: only one of the two can be given"))
        return
    for text in texts:
        try:
            _set_text(message, field, text)
        except Mismatch as error:
            out.append((path, str(error)))


def _set_text(message: Message, field: FieldDescriptor, text: str) -> None:
    target = getattr(message, field.name)
    kind = field.message_type
    if kind is None:
        value = from_text(field, text)
        if field.is_repeated:
            target.append(value)
        else:
            setattr(message, field.name, value)
        return
    child = target.add() if field.is_repeated else target
    if "value" in kind.fields_by_name and kind.full_name.endswith("Value"):
        child.value = from_text(fields_of(kind)["value"], text)
    elif kind.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.FieldMask"):
        set_well_known(child, text)
    else:
        raise Mismatch("cannot be given in the query")
    child.SetInParent()


def _derive_mask(message: Message, binding: Binding, given: Mapping[str, None]) -> None:
    """A PATCH without update_mask changes what its body gives."""
    mask = message.DESCRIPTOR.fields_by_name.get("update_mask")
    if binding.http_method != "PATCH" or mask is None or binding.body in ("", "*") or message.HasField("update_mask"):
        return
    prefix = binding.body + "."
    # An etag guards the change and a field of the path names what is changed; neither is a change.
    skip = {*binding.variables, prefix + "etag"}
    paths = [path.removeprefix(prefix) for path in given if path not in skip]
    message.update_mask.paths.extend(paths)  # type: ignore[attr-defined]
