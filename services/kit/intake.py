"""From the bytes of a request to a message that may be handled: decoded, of text that can be stored, and within its field rules."""

from collections.abc import Callable
from typing import Any

import protovalidate
from google.protobuf.message import DecodeError, Message

from clawplane.options.v1 import options_pb2
from services.kit import errors, texts
from services.kit.call import Plan

_SMALL_BYTES, _LARGE_BYTES = 1024, 8 * 1024
_MOST, _MOST_OF_PLATFORM = 5_000, 200_000
"""So many requests of an RPC are remembered; of our own processes, which ask about everybody, many more."""


class Intake:
    """Takes the requests of one RPC. Reads ask the same again and again: what was found sound once is not checked against its rules again.

    No rule of a read asks for the time (a law in tests/test_contract.py), so sound bytes stay sound. Only Python's hash of them is kept:
    some hold secrets, and nobody outside this process can make two that have the same.
    """

    def __init__(self, plan: Plan, deserialize: Callable[[bytes], Message]) -> None:
        self._plan, self._deserialize = plan, deserialize
        self._sound: set[int] = set()
        self._most = _MOST_OF_PLATFORM if plan.audience == options_pb2.AUDIENCE_PLATFORM else _MOST

    def take(self, raw: bytes) -> Any:
        """The message; InvalidArgument or InvalidFields naming what is wrong."""
        try:
            request = self._deserialize(raw)
        except (DecodeError, UnicodeDecodeError):
            field = texts.field_not_utf8(raw, self._plan.request)
            raise errors.InvalidArgument(field, "is not valid UTF-8" if field else "the request is not valid protobuf") from None
        if hash(raw) in self._sound:
            return request
        # Few requests hold the byte at all, so few are searched for it.
        if b"\0" in raw and (field := texts.field_with_nul(request)):
            raise errors.InvalidArgument(field, "must not hold the character U+0000")
        # In a large request every item may be wrong: the first is told.
        if self._plan.has_rules and (found := protovalidate.collect_violations(request, fail_fast=len(raw) > _LARGE_BYTES)):
            raise errors.InvalidFields([violation(item) for item in found])
        if self._plan.is_read and self._plan.has_rules and len(raw) <= _SMALL_BYTES:
            if len(self._sound) >= self._most:
                self._sound.clear()
            self._sound.add(hash(raw))
        return request


def violation(found: Any) -> errors.Violation:
    """A broken rule as (field path, what is wrong)."""
    proto = found.proto
    path = "".join(
        f".{element.field_name}" + (f"[{element.subscript.value}]" if element.subscript is not None else "")
        for element in (proto.field.elements if proto.field is not None else ())
    ).lstrip(".")
    message = proto.message or proto.rule_id
    if not path and ": " in message:
        # Rules over a whole message name the field they are about in their text.
        path, _, message = message.partition(": ")
    return path, message
