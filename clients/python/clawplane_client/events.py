"""From the arguments of ``record`` to an event with an id and a time that never change again."""

import os
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Required, TypedDict

from clawplane.deployment.v1.usage_event_pb2 import UsageEvent, UsageStatus, UsageType
from clawplane_client.frames import MAX_EVENT_BYTES


class CallFields(TypedDict, total=False):
    """What may be said of any use of a model."""

    type: str | int
    """What the model was used for: "chat" (as when left out), "completion", "embedding", "image", "audio", "tool", or a UsageType."""
    status: str | int
    """How it ended: "ok" (as when left out), "error", "canceled", or a UsageStatus. Tokens of a call that failed count all the same."""
    latency_ms: int
    """How long the call took, in milliseconds."""
    operation_id: str
    """Groups the attempts of one retried call; at most 100 characters."""
    attempt: int
    """Which attempt of the operation; 0 means the first."""
    deployment_id: str
    """The deployment; a bot's own key says it already."""
    agent_id: str
    """The agent, if any."""
    thread_id: str
    """The thread, if any."""
    project_id: str
    """The project, if any."""
    metadata: Mapping[str, str]
    """Up to 20 short texts of your own; no secrets: they are stored, and spooled, as they are."""
    stated_cost: str
    """What you say that it cost, as an exact decimal; needs a permission of its own."""
    occurred_at: datetime
    """When the model was used, with a time zone; now when left out."""
    event_id: str
    """An id of your own, at most 100 visible ASCII characters, when one use may be recorded twice (after a crash of your program, say).
    Its month is part of what makes an event the same one: give ``occurred_at`` too, and the same each time. Made when left out."""


class UsageFields(CallFields, total=False):
    """What ``record`` takes: ``provider`` and ``model``, and whatever else is known."""

    provider: Required[str]
    """Who served the model: "openai", "anthropic", ..."""
    model: Required[str]
    """The model."""
    tokens_in: int
    """Tokens read, ``tokens_cached`` among them."""
    tokens_out: int
    """Tokens written, ``tokens_reasoning`` among them."""
    tokens_cached: int
    """Tokens read from the provider's cache."""
    tokens_reasoning: int
    """Tokens spent on reasoning."""


_NAMES = frozenset(UsageFields.__annotations__)
_OWN = ("type", "status", "occurred_at", "event_id")
_VERSION = 7


def make_event(fields: Mapping[str, Any]) -> tuple[str, bytes]:
    """(id, serialized UsageEvent).

    TypeError for an argument that there is none of, or one that is missing; ValueError for one that no event can hold: a time without a
    zone, a type unknown, a text with U+0000, an event above 64 KiB. What else may be wrong, the service finds.
    """
    if unknown := fields.keys() - _NAMES:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}")
    for name in ("provider", "model"):
        if not fields.get(name):
            raise TypeError(f"the argument {name} is needed")
    event = UsageEvent(**{name: value for name, value in fields.items() if name not in _OWN})
    event.type = _number(UsageType, "USAGE_TYPE_", "type", fields.get("type", 0))
    event.status = _number(UsageStatus, "USAGE_STATUS_", "status", fields.get("status", 0))
    _identify(event, fields.get("event_id", ""), fields.get("occurred_at"))
    if any("\0" in text for text in _texts(event)):
        raise ValueError("no text of an event may hold the character U+0000")
    data = event.SerializeToString()
    if len(data) > MAX_EVENT_BYTES:
        raise ValueError(f"an event has at most {MAX_EVENT_BYTES} bytes, this one {len(data)}")
    return event.id, data


def uuid7(at_ns: int) -> str:
    """A UUID of version 7 that carries a time, in nanoseconds since 1970."""
    # 12 bits below the millisecond hold 1/4096 ms, so that ids made one after the other mostly sort so.
    millis, fraction = divmod(at_ns * 4096 // 1_000_000, 4096)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    return str(uuid.UUID(int=(millis << 80) | (_VERSION << 76) | (fraction << 64) | (0b10 << 62) | random))


def _identify(event: UsageEvent, event_id: str, occurred_at: datetime | None) -> None:
    if occurred_at is not None and occurred_at.tzinfo is None:
        raise ValueError("occurred_at needs a time zone")
    if occurred_at is not None:
        event.occurred_at.FromDatetime(occurred_at)
    elif (inside := _time_in(event_id)) is not None:
        event.occurred_at.FromMilliseconds(inside)
    else:
        event.occurred_at.FromMicroseconds(time.time_ns() // 1000)
    # The id carries the time of the event, not of the call: the service takes no event whose two times lie in different months.
    event.id = event_id or uuid7(event.occurred_at.ToNanoseconds())


def _time_in(event_id: str) -> int | None:
    try:
        value = uuid.UUID(event_id)
    except ValueError:
        return None
    return value.int >> 80 if value.version == _VERSION else None


def _number(kind: Any, prefix: str, name: str, value: str | int) -> Any:
    try:
        return kind.Value(f"{prefix}{value.upper()}") if isinstance(value, str) else int(value)
    except ValueError:
        known = ", ".join(word.removeprefix(prefix).lower() for word in kind.keys()[1:])
        raise ValueError(f"{name} must be one of {known}") from None


def _texts(event: UsageEvent) -> list[str]:
    texts = [value for _, value in event.ListFields() if isinstance(value, str)]
    return [*texts, *event.metadata.keys(), *event.metadata.values()]
