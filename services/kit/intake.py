"""From the bytes of a request to a message that may be handled: decoded, of text that can be stored, and within its field rules."""

from collections.abc import Callable
from typing import Any

import protovalidate
from google.protobuf.message import DecodeError, Message

from services.kit import errors, texts
from services.kit.call import Plan

_SMALL_BYTES, _LARGE_BYTES = 1024, 8 * 1024
_REMEMBERED_BYTES = 256 * 1024


class Intake:
    """Takes the requests of one RPC. Reads ask the same again and again: what was found sound once is not checked against its rules again.

    No rule of a read asks for the time (a law in tests/test_contract.py), so sound bytes stay sound.
    """

    def __init__(self, plan: Plan, deserialize: Callable[[bytes], Message]) -> None:
        self._plan, self._deserialize = plan, deserialize
        self._sound: set[bytes] = set()
        self._room = _REMEMBERED_BYTES

    def take(self, raw: bytes) -> Any:
        """The message; InvalidArgument or InvalidFields naming what is wrong."""
        try:
            request = self._deserialize(raw)
        except (DecodeError, UnicodeDecodeError):
            field = texts.field_not_utf8(raw, self._plan.request)
            raise errors.InvalidArgument(field, "is not valid UTF-8" if field else "the request is not valid protobuf") from None
        if raw in self._sound:
            return request
        # Few requests hold the byte at all, so few are searched for it.
        if b"\0" in raw and (field := texts.field_with_nul(request)):
            raise errors.InvalidArgument(field, "must not hold the character U+0000")
        # In a large request every item may be wrong: the first is told.
        if self._plan.has_rules and (found := protovalidate.collect_violations(request, fail_fast=len(raw) > _LARGE_BYTES)):
            raise errors.InvalidFields([violation(item) for item in found])
        if self._plan.is_read and self._plan.has_rules and len(raw) <= _SMALL_BYTES:
            self._remember(raw)
        return request

    def _remember(self, raw: bytes) -> None:
        self._room -= len(raw)
        if self._room < 0:
            self._sound.clear()
            self._room = _REMEMBERED_BYTES - len(raw)
        self._sound.add(raw)


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
