"""Which text of a request cannot be taken: one that is not UTF-8, or that PostgreSQL cannot store."""

from collections.abc import Iterator

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

_MAX_DEPTH = 100
_VARINT, _EIGHT_BYTES, _WITH_LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def field_with_nul(message: Message) -> str:
    """Path of the first text that holds U+0000, or "". Messages whose rules their own handler checks, each by itself, are left to it."""
    for descriptor, value in message.ListFields():
        if descriptor.GetOptions().Extensions[validate_pb2.field].repeated.items.ignore == validate_pb2.IGNORE_ALWAYS:
            continue
        items = value if descriptor.is_repeated else [value]
        if descriptor.is_repeated and descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            items = [*value.keys(), *value.values()]
        for item in items:
            if isinstance(item, str) and "\0" in item:
                return str(descriptor.name)
            inner = field_with_nul(item) if isinstance(item, Message) else ""
            if inner:
                return f"{descriptor.name}.{inner}"
    return ""


def field_not_utf8(raw: bytes, descriptor: Descriptor) -> str:
    """Path of the first text in a serialized message that is not UTF-8; "" when the bytes are no message at all.

    protobuf says only that it cannot parse, so what came is read once more, by hand.
    """
    try:
        return _not_utf8(raw, descriptor, 0)
    except (IndexError, ValueError):
        return ""


def _not_utf8(raw: bytes, descriptor: Descriptor, depth: int) -> str:
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    for number, value in _chunks(raw):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                value.decode()
            except UnicodeDecodeError:
                return str(field.name)
        elif field.message_type is not None:
            inner = _not_utf8(value, field.message_type, depth + 1)
            if inner:
                return f"{field.name}.{inner}"
    return ""


def _chunks(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, bytes) of what has a length; IndexError or ValueError where the bytes are no message."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(raw, at)
        elif kind == _WITH_LENGTH:
            size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError("cut off")
            yield tag >> 3, raw[at : at + size]
            at += size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError("groups are not supported")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
