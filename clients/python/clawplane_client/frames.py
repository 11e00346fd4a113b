"""How events lie in a file of the spool: one after the other, each behind a mark, its length and a checksum. Pure; knows no disk."""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from clawplane.deployment.v1.usage_event_pb2 import UsageEvent

MAX_EVENT_BYTES = 64 * 1024
"""More than any event that the service takes."""
_MARK = b"\xff\x00\xc1\x01"
"""Stands nowhere inside an event: no text in UTF-8 has the byte FF, and no varint ends in FF 00. So what follows damage is found again."""
_HEAD = struct.Struct("<4sII")


@dataclass(frozen=True)
class Scan:
    """What was found in a file."""

    events: list[bytes]
    """Serialized UsageEvents, in the order in which they were written."""
    torn: bool
    """Whether the file ends within an event: whoever wrote it died."""
    damaged: bool
    """Whether it holds anything else that is no event."""


def frame(events: Iterable[bytes]) -> bytes:
    """The bytes to write for serialized events."""
    return b"".join(_HEAD.pack(_MARK, len(event), _checksum(event)) + event for event in events)


def scan(data: bytes) -> Scan:
    """The events in the bytes of a file, whatever these are. An event of which a bit has changed is left out."""
    found: list[bytes] = []
    at, torn, damaged = 0, False, False
    while at < len(data):
        event = _event_at(data, at)
        if event is not None:
            found.append(event)
            at += _HEAD.size + len(event)
            continue
        following = data.find(_MARK, at + 1)
        if following < 0 and _reaches_the_end(data, at):
            torn = True
        else:
            damaged = True
        at = following if following >= 0 else len(data)
    return Scan(found, torn, damaged)


def _checksum(event: bytes) -> int:
    # Of the length too: else a run of zeroes would be a row of empty events.
    return zlib.crc32(event, zlib.crc32(len(event).to_bytes(4, "little")))


def _event_at(data: bytes, at: int) -> bytes | None:
    if len(data) - at < _HEAD.size:
        return None
    mark, length, checksum = _HEAD.unpack_from(data, at)
    if mark != _MARK or not 0 < length <= MAX_EVENT_BYTES:
        return None
    event = data[at + _HEAD.size : at + _HEAD.size + length]
    if len(event) != length or _checksum(event) != checksum:
        return None
    try:
        UsageEvent.FromString(event)
    except DecodeError:
        return None
    return event


def _reaches_the_end(data: bytes, at: int) -> bool:
    """Whether an event begins here and the file ends before it does."""
    head = data[at : at + _HEAD.size]
    if not head.startswith(_MARK[: len(head)]):
        return False
    return len(head) < _HEAD.size or at + _HEAD.size + int(_HEAD.unpack(head)[1]) > len(data)
