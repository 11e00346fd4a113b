"""What can go wrong, and what is told about it. No text here ever holds the token."""

from collections.abc import Sequence
from dataclasses import dataclass

from clawplane.deployment.v1.usage_event_pb2 import UsageEvent


class UsageError(Exception):
    """Base of all errors of this package."""


class Closed(UsageError):
    """The recorder is closed; the event was not taken."""


class BufferFull(UsageError):
    """The buffer stayed full for ``full_timeout_s`` seconds and there is no spool; the event was not taken."""


class SpoolFull(UsageError):
    """The spool has reached ``spool_max_bytes``. Raised by ``record`` when the buffer is full too: the event was not taken."""


class SpoolFailed(UsageError):
    """The spool's disk refuses. Raised by ``record`` when the buffer is full too: the event was not taken."""


class SpoolDamaged(UsageError):
    """A file of the spool holds bytes that nobody wrote there. What is whole in it is sent; the file is kept beside as ``*.damaged``."""


class NoUsage(UsageError, ValueError):
    """A provider's answer carries no usage that can be read, so nothing was recorded."""


class SendRefused(UsageError):
    """The service refuses the call as it is (a credential that does not hold, a missing permission): the events are kept and tried again
    after ``refused_pause_s``. ``code`` is gRPC's name of it, or the name of the exception that came before any call."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}" if details else code)
        self.code, self.details = code, details


class NotDelivered(UsageError):
    """The recorder is closed, and its last events are neither with the service nor in a spool: here they are, with their ids."""

    def __init__(self, events: Sequence[UsageEvent]) -> None:
        super().__init__(f"{len(events)} usage events were not delivered")
        self.events = tuple(events)


@dataclass(frozen=True)
class Rejection:
    """An event that the service will not store, however often it is sent."""

    event: UsageEvent
    """As it was sent."""
    field: str
    """The field that is wrong; "" when it is none alone."""
    message: str
    """What is wrong with it."""
