"""JSON values and texts into protobuf fields, strictly, with the path of each field that does not fit."""

import base64
import binascii
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import duration_pb2, field_mask_pb2, json_format, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from gateway.errors import Violation
from gateway.strictjson import printable

F = FieldDescriptor
_INT_RANGE = {
    **dict.fromkeys((F.TYPE_INT32, F.TYPE_SINT32, F.TYPE_SFIXED32), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((F.TYPE_UINT32, F.TYPE_FIXED32), (0, 2**32 - 1)),
    **dict.fromkeys((F.TYPE_INT64, F.TYPE_SINT64, F.TYPE_SFIXED64), (-(2**63), 2**63 - 1)),
    **dict.fromkeys((F.TYPE_UINT64, F.TYPE_FIXED64), (0, 2**64 - 1)),
}
_INT_TEXT = re.compile(r"-?[0-9]{1,20}\Z", re.ASCII)
_FLOAT_TEXT = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?\Z", re.ASCII)
_MASK_TEXT = re.compile(r"[A-Za-z0-9_.]*\Z", re.ASCII)
_MAX_FLOAT32 = 3.4028234663852886e38
_WELL_KNOWN = {
    "google.protobuf.Timestamp": 'must be an RFC 3339 time such as "2026-01-31T12:00:00Z"',
    "google.protobuf.Duration": 'must be a number of seconds such as "1.5s"',
    "google.protobuf.FieldMask": 'must be names with commas between, such as "name,settings"',
    "google.protobuf.Struct": "must be an object",
    "google.protobuf.ListValue": "must be a list",
    "google.protobuf.Value": "is no JSON value",
    "google.protobuf.Any": 'must be an object with a known "@type"',
}
_WRAPPERS = {
    f"google.protobuf.{name}Value" for name in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
}


class Mismatch(ValueError):
    """A value that does not fit; the text says what would."""


@functools.cache
def fields_of(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """The fields of a message by both names, lowerCamelCase and snake_case."""
    return {name: field for field in descriptor.fields for name in (field.name, field.json_name)}


def is_plain_message(field: FieldDescriptor) -> bool:
    """Whether a field is one message with fields of ours, so that paths lead into it."""
    kind = field.message_type
    return kind is not None and not field.is_repeated and kind.full_name not in _WELL_KNOWN and kind.full_name not in _WRAPPERS


def type_of(field: FieldDescriptor) -> Descriptor:
    """The message type of a field that has one."""
    assert field.message_type is not None
    return field.message_type


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def join(path: str, name: str) -> str:
    """The path of a field below `path`, which is empty at the top."""
    return f"{path}.{name}" if path else name


def set_fields(message: Message, data: Any, path: str, out: list[Violation]) -> None:
    """Fills a message from a JSON object; what does not fit is added to `out` by its path in snake_case."""
    if not isinstance(data, dict):
        out.append((path or "body", "must be an object"))
        return
    fields = fields_of(message.DESCRIPTOR)
    seen: set[str] = set()
    oneofs: dict[str, str] = {}
    for key, value in data.items():
        field = fields.get(key)
        if field is None:
            out.append((join(path, printable(key)), "is not a field that is known here"))
            continue
        place = join(path, field.name)
        if field.name in seen:
            out.append((place, "is given under both of its names"))
            continue
        seen.add(field.name)
        if value is None and (field.message_type is None or field.message_type.full_name != "google.protobuf.Value"):
            continue
        if field.containing_oneof is not None:
            other = oneofs.setdefault(field.containing_oneof.name, field.name)
            if other != field.name:
                out.append((place, f"excludes {other}: only one of the two can be given"))
                continue
        set_field(message, field, value, place, out)


def set_field(message: Message, field: FieldDescriptor, value: Any, path: str, out: list[Violation]) -> None:
    """Sets one field from a JSON value."""
    if is_map(field):
        _set_map(message, field, value, path, out)
    elif field.is_repeated:
        _set_repeated(message, field, value, path, out)
    elif field.message_type is not None:
        child = getattr(message, field.name)
        child.SetInParent()
        _set_message(child, value, path, out)
    else:
        _guard(path, out, lambda: setattr(message, field.name, from_json(field, value)))


def _set_message(child: Message, value: Any, path: str, out: list[Violation]) -> None:
    name = child.DESCRIPTOR.full_name
    if name in _WRAPPERS:
        set_field(child, fields_of(child.DESCRIPTOR)["value"], value, path, out)
    elif name in _WELL_KNOWN:
        _guard(path, out, lambda: set_well_known(child, value))
    else:
        set_fields(child, value, path, out)


def _set_repeated(message: Message, field: FieldDescriptor, value: Any, path: str, out: list[Violation]) -> None:
    if not isinstance(value, list):
        out.append((path, "must be a list"))
        return
    items = getattr(message, field.name)
    for index, item in enumerate(value):
        place = f"{path}[{index}]"
        if item is None:
            out.append((place, "must not be null"))
        elif field.message_type is not None:
            _set_message(items.add(), item, place, out)
        else:
            _guard(place, out, functools.partial(lambda item: items.append(from_json(field, item)), item))


def _set_map(message: Message, field: FieldDescriptor, value: Any, path: str, out: list[Violation]) -> None:
    if not isinstance(value, dict):
        out.append((path, "must be an object"))
        return
    target = getattr(message, field.name)
    key_field, value_field = (fields_of(type_of(field))[name] for name in ("key", "value"))
    for text, item in value.items():
        place = f'{path}["{printable(text)}"]'
        try:
            key = from_text(key_field, text)
            if value_field.message_type is None:
                target[key] = from_json(value_field, item)
            else:
                _set_message(target[key], item, place, out)
        except Mismatch as error:
            out.append((place, str(error)))


def _guard(path: str, out: list[Violation], assign: Callable[[], None]) -> None:
    try:
        assign()
    except Mismatch as error:
        out.append((path, str(error)))


def set_well_known(message: Message, value: Any) -> None:
    """Fills a Timestamp, Duration, FieldMask, Struct, ... from its JSON form; raises Mismatch."""
    hint = _WELL_KNOWN[message.DESCRIPTOR.full_name]
    try:
        if isinstance(message, timestamp_pb2.Timestamp | duration_pb2.Duration):
            message.FromJsonString(value)
        elif isinstance(message, field_mask_pb2.FieldMask):
            message.paths.extend(_mask_paths(value))
        else:
            json_format.ParseDict(value, message)
    except (json_format.ParseError, ValueError, TypeError, AttributeError, OverflowError):
        raise Mismatch(hint) from None


def _mask_paths(value: Any) -> Iterator[str]:
    for path in str.split(value, ",") if value else ():
        if not path or not _MASK_TEXT.match(path):
            raise ValueError(path)
        yield re.sub(r"([A-Z])", lambda found: "_" + found[1].lower(), path)


def from_json(field: FieldDescriptor, value: Any) -> Any:
    """A JSON value as the Python value of a scalar or enum field; raises Mismatch."""
    kind = field.type
    if kind == F.TYPE_STRING:
        if not isinstance(value, str):
            raise Mismatch("must be a text")
        return value
    if kind == F.TYPE_BOOL:
        if not isinstance(value, bool):
            raise Mismatch("must be true or false")
        return value
    if isinstance(value, str):
        return from_text(field, value)
    if kind == F.TYPE_BYTES:
        raise Mismatch("must be a text in base64")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mismatch("must be the name of a value" if kind == F.TYPE_ENUM else "must be a number")
    if kind in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return _float(kind, value)
    if isinstance(value, float):
        if not value.is_integer():
            raise Mismatch("must be a whole number")
        value = int(value)
    return _ranged(F.TYPE_INT32 if kind == F.TYPE_ENUM else kind, value)


def from_text(field: FieldDescriptor, text: str) -> Any:
    """A text from a path, a query or a JSON string as the Python value of a scalar or enum field; raises Mismatch."""
    kind = field.type
    if kind == F.TYPE_STRING:
        return text
    if kind == F.TYPE_BOOL:
        if text not in ("true", "false"):
            raise Mismatch('must be "true" or "false"')
        return text == "true"
    if kind == F.TYPE_BYTES:
        try:
            return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise Mismatch("must be base64") from None
    if kind in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        if not _FLOAT_TEXT.match(text):
            raise Mismatch("must be a number")
        return _float(kind, float(text))
    enum = field.enum_type
    if enum is not None and (known := enum.values_by_name.get(text)) is not None:
        return known.number
    if not _INT_TEXT.match(text):
        names = ", ".join(value.name for value in enum.values if value.number) if enum is not None else ""
        raise Mismatch(f"must be one of {names}" if names else "must be a whole number")
    return _ranged(F.TYPE_INT32 if kind == F.TYPE_ENUM else kind, int(text))


def _ranged(kind: int, value: int) -> int:
    low, high = _INT_RANGE[kind]
    if not low <= value <= high:
        raise Mismatch(f"must be from {low} to {high}")
    return value


def _float(kind: int, value: float) -> float:
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or (kind == F.TYPE_FLOAT and abs(result) > _MAX_FLOAT32):
        raise Mismatch("is out of range")
    return result
