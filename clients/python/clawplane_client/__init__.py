"""Reports what models cost to Clawplane: each use once, whatever breaks on the way."""

from clawplane_client.aio import AsyncUsageRecorder
from clawplane_client.errors import (
    BufferFull,
    Closed,
    NotDelivered,
    NoUsage,
    Rejection,
    SendRefused,
    SpoolDamaged,
    SpoolFailed,
    SpoolFull,
    UsageError,
)
from clawplane_client.events import CallFields, UsageFields
from clawplane_client.shapes import Usage, usage_from_anthropic, usage_from_openai
from clawplane_client.stats import Stats
from clawplane_client.sync import UsageRecorder

__all__ = [
    "AsyncUsageRecorder",
    "BufferFull",
    "CallFields",
    "Closed",
    "NoUsage",
    "NotDelivered",
    "Rejection",
    "SendRefused",
    "SpoolDamaged",
    "SpoolFailed",
    "SpoolFull",
    "Stats",
    "Usage",
    "UsageError",
    "UsageFields",
    "UsageRecorder",
    "usage_from_anthropic",
    "usage_from_openai",
]
