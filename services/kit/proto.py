"""Rows to messages and back, by field name. The message is the allow-list: a column without a field never leaves."""

from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any, TypeVar

from google.api import field_behavior_pb2
from google.protobuf import struct_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.kit.errors import InvalidArgument

M = TypeVar("M", bound=Message)

_NOT_WRITABLE = {field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER}


def to_proto(row: Any, kind: type[M]) -> M:
    """A message with every field that the row has under the same name; ``etag`` from the row's version."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        # An attribute may carry an underscore where its own name means something else on a model (metadata).
        value = getattr(row, f"{field.name}_", None) if hasattr(row, f"{field.name}_") else getattr(row, field.name, None)
        if value is None:
            continue
        if isinstance(value, datetime):
            getattr(message, field.name).FromDatetime(value)
        elif isinstance(value, Decimal):
            setattr(message, field.name, format(value, "f"))
        elif isinstance(value, dict):
            getattr(message, field.name).update(value)
        elif isinstance(value, list | tuple):
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    version = getattr(row, "version", None)
    if version is not None and "etag" in kind.DESCRIPTOR.fields_by_name:
        message.etag = str(version)  # type: ignore[attr-defined]
    return message


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
        if mask is not None and field_behavior_pb2.IMMUTABLE in behaviour:
            if value != getattr(row, path):
                raise InvalidArgument("update_mask", f"{path} cannot be changed")
            continue
        setattr(row, path, value)
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
        return to_datetime(value) if message.HasField(field.name) else None
    if isinstance(value, struct_pb2.Struct):
        return MessageToDict(value)
    if field.is_repeated:
        return dict(value) if field.message_type is not None and field.message_type.GetOptions().map_entry else list(value)
    return value


def to_datetime(value: timestamp_pb2.Timestamp) -> datetime:
    """A protobuf time as aware UTC."""
    return value.ToDatetime(tzinfo=UTC)
