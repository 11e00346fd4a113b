"""Rows to messages and back, by field name. The message is the allow-list: a column without a field never leaves."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

from google.api import field_behavior_pb2
from google.protobuf import struct_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from sqlalchemy import inspect

from services.kit.errors import InvalidArgument

M = TypeVar("M", bound=Message)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AS_THEY_ARE = frozenset((str, int, bool, bytes))
_NOT_WRITABLE = {field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER}


def to_proto(row: Any, kind: type[M]) -> M:
    """A message with every field that the row's class has under the same name; ``etag`` from the row's version."""
    names, keep_empty, read, has_etag = _shared(type(row), kind)  # type: ignore[arg-type]  # classes are hashable
    values: dict[str, Any] = {}
    for name, kept, value in zip(names, keep_empty, read(row)):  # noqa: B905 - of one length, and strict costs
        if value:
            if type(value) in _AS_THEY_ARE:
                values[name] = value
            elif isinstance(value, datetime):
                values[name] = _timestamp(value)
            else:
                values[name] = format(value.normalize(), "f") if isinstance(value, Decimal) else value
        elif value is None:
            continue
        elif isinstance(value, Decimal):
            values[name] = "0"  # An empty text would say that it is not known.
        elif kept:
            values[name] = value
    if has_etag and (version := getattr(row, "version", None)) is not None:
        values["etag"] = str(version)
    return kind(**values)


def columns_for(model: Any, kind: type[Message], *more: str) -> list[Any]:
    """The columns of a model that a message shows, its version, and ``more`` of them; no secret is even read."""
    wanted = {*kind.DESCRIPTOR.fields_by_name, "version", *more}
    return [column for column in inspect(model).columns if column.key in wanted]


@cache
def _shared(row: Any, kind: Any) -> tuple[tuple[str, ...], tuple[bool, ...], Callable[[Any], Sequence[Any]], bool]:
    """What a class of rows and a message have in common: the fields, whether an empty value says something, and how to read all at once.
    And whether the message has an etag."""
    shared = []
    for field in kind.DESCRIPTOR.fields:
        # An attribute may carry an underscore where its own name means something else on a model (metadata).
        attribute = next((name for name in (f"{field.name}_", field.name) if hasattr(row, name)), None)
        if attribute is not None:
            shared.append((field.name, field.has_presence and field.message_type is None, attribute))
    names, keep_empty, attributes = zip(*shared, strict=True)
    read = attrgetter(*attributes)
    return names, keep_empty, read if len(attributes) > 1 else lambda one: (read(one),), "etag" in kind.DESCRIPTOR.fields_by_name


def _timestamp(value: datetime) -> dict[str, int]:
    """The fields of a Timestamp: a message would be made only to be copied, a datetime taken apart by slower code."""
    since = value - _EPOCH
    return {"seconds": since.days * 86400 + since.seconds, "nanos": since.microseconds * 1000}


def assign(row: Any, message: Message, mask: FieldMask | None = None) -> list[str]:
    """Copies what a caller may write from a message to a row, and returns the names of the fields.

    Without a mask the row is new: every field that is set. With one: exactly its paths; when it is empty, every field that is set;
    "*", all of them. OUTPUT_ONLY and IDENTIFIER fields are ignored; InvalidArgument for an unknown path, or for another value of an
    IMMUTABLE field.
    """
    descriptor = message.DESCRIPTOR
    paths = [field.name for field in descriptor.fields if _is_set(message, field)]
    if mask is not None and list(mask.paths) == ["*"]:
        paths = [field.name for field in descriptor.fields if field_behavior_pb2.IMMUTABLE not in _behaviour(descriptor, field.name)]
    elif mask is not None and mask.paths:
        paths = list(mask.paths)
    written = []
    for path in paths:
        if path not in descriptor.fields_by_name:
            raise InvalidArgument("update_mask", f"{path} is no field of {descriptor.name}")
        behaviour = _behaviour(descriptor, path)
        if path == "etag" or _NOT_WRITABLE & behaviour:
            continue
        value = _python(message, descriptor.fields_by_name[path])
        attribute = f"{path}_" if hasattr(row, f"{path}_") else path
        if mask is not None and field_behavior_pb2.IMMUTABLE in behaviour:
            if value != getattr(row, attribute):
                raise InvalidArgument("update_mask", f"{path} cannot be changed")
            continue
        setattr(row, attribute, value)
        written.append(path)
    return written


@cache
def _behaviour(descriptor: Descriptor, name: str) -> frozenset[int]:
    options = descriptor.fields_by_name[name].GetOptions()
    return frozenset(options.Extensions[field_behavior_pb2.field_behavior])


def _is_set(message: Message, field: Any) -> bool:
    if field.has_presence:
        return message.HasField(field.name)
    return bool(getattr(message, field.name))


def _python(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if isinstance(value, timestamp_pb2.Timestamp):
        return to_datetime(value, field.name) if message.HasField(field.name) else None
    if isinstance(value, struct_pb2.Struct):
        return MessageToDict(value)
    if field.is_repeated:
        return dict(value) if field.message_type is not None and field.message_type.GetOptions().map_entry else list(value)
    return value


def to_datetime(value: timestamp_pb2.Timestamp, field: str) -> datetime:
    """A protobuf time as aware UTC; InvalidArgument, naming its field, for one that no calendar has."""
    try:
        return value.ToDatetime(tzinfo=UTC)
    except ValueError:
        raise InvalidArgument(field, "must lie within the years 1 to 9999") from None


def any_field(message: Descriptor, holds: Callable[[FieldDescriptor], bool], seen: set[str] | None = None) -> bool:
    """Whether something holds for a field of the message, or of the messages in it."""
    seen = set() if seen is None else seen
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    return any(holds(field) or (field.message_type is not None and any_field(field.message_type, holds, seen)) for field in message.fields)
