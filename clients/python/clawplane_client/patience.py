"""What a failed call means, and how long to wait before the next."""

import enum
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_MOST_ASKED_S = 300.0
_MOST_DETAILS = 300


class Kind(enum.Enum):
    """What to do about a failure."""

    AWAY = "away"
    """Send the same again, later."""
    REFUSED = "refused"
    """Nothing is wrong with the events: keep them until somebody has put right what is."""
    BAD = "bad"
    """The service does not take this batch as a whole: find out which event it is."""


_KINDS = {
    grpc.StatusCode.INVALID_ARGUMENT: Kind.BAD,
    grpc.StatusCode.UNAUTHENTICATED: Kind.REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: Kind.REFUSED,
    grpc.StatusCode.NOT_FOUND: Kind.REFUSED,
    grpc.StatusCode.ALREADY_EXISTS: Kind.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: Kind.REFUSED,
    grpc.StatusCode.OUT_OF_RANGE: Kind.REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: Kind.REFUSED,
}
"""All others (UNAVAILABLE, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED, and what a connection or a defect makes of a call): AWAY."""


@dataclass(frozen=True)
class Failure:
    """A call that brought no answer."""

    kind: Kind
    code: str
    """gRPC's name of it, or that of the exception that came before any call."""
    details: str = ""
    retry_after_s: float = 0
    """How long the service asks to be left alone."""


def failure_of(error: BaseException) -> Failure:
    """What a call's exception means."""
    code = error.code() if isinstance(error, grpc.RpcError) and hasattr(error, "code") else None
    if not isinstance(code, grpc.StatusCode):
        # Its text may hold what was to be sent, and with it the token.
        return Failure(Kind.REFUSED, type(error).__name__)
    call: Any = error
    details = str(call.details() or "")[:_MOST_DETAILS]
    kind = _KINDS.get(code, Kind.AWAY)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        # Not too many calls but too long a message: as it is, it will never be taken.
        kind = Kind.BAD
    return Failure(kind, code.name, details, _retry_after_s(call.trailing_metadata() or ()))


def _retry_after_s(metadata: Iterable[tuple[str, str | bytes]]) -> float:
    retry = error_details_pb2.RetryInfo()
    for key, value in metadata:
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
                    asked: float = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
                    return min(_MOST_ASKED_S, max(0.0, asked))
        except DecodeError:
            continue
    return 0


class Patience:
    """When the next call may be made: ever later after failures, and never at the same moment as all others."""

    def __init__(self, backoff_s: float, backoff_max_s: float, refused_pause_s: float) -> None:
        self._first_s, self._max_s, self._refused_s = backoff_s, backoff_max_s, refused_pause_s
        self._failures = 0
        self._not_before = self._asked_until = 0.0

    @property
    def wait_s(self) -> float:
        """How long to wait still."""
        return max(0.0, self._not_before - time.monotonic())

    @property
    def away(self) -> bool:
        """Whether the last call failed."""
        return self._failures > 0

    def failed(self, failure: Failure) -> None:
        """Another call failed."""
        now = time.monotonic()
        pause = self._refused_s if failure.kind is Kind.REFUSED else min(self._max_s, self._first_s * 2 ** min(self._failures, 30))
        self._failures += 1
        self._asked_until = now + failure.retry_after_s
        # What the service asks for is the least; those that it asks the same must not all come back at once either.
        self._not_before = max(now + pause * random.uniform(0.5, 1), now + failure.retry_after_s * random.uniform(1, 1.2))

    def succeeded(self) -> bool:
        """A call was answered; whether one before it was not."""
        was_away, self._failures, self._not_before = self.away, 0, 0.0
        return was_away

    def hurry(self) -> None:
        """The next call may be made now, or when the service itself has allowed it."""
        self._not_before = min(self._not_before, self._asked_until)
