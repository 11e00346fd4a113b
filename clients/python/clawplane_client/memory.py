"""Events in memory: first in, first out, and never more than so many."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

from clawplane_client.errors import Closed


class Memory:
    """A bounded queue. An event that was taken out is held until it is forgotten: while on its way, it still needs its place."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._since = 0.0
        self._closed = False
        self.held = 0
        """Events that wait or are under way."""

    @property
    def waiting(self) -> int:
        """Events that wait."""
        return len(self._waiting)

    @property
    def waited_s(self) -> float:
        """How long the first of them has waited."""
        return time.monotonic() - self._since if self._waiting else 0

    def close(self) -> None:
        """Takes no more: from here on nobody can put anything behind the back of whoever empties it."""
        with self._lock:
            self._closed = True

    def put(self, event: bytes) -> int:
        """Adds one; how many wait now, or 0 when there is no room. Closed after ``close``."""
        with self._lock:
            if self._closed:
                raise Closed("the recorder is closed")
            if self.held >= self._most:
                return 0
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(event)
            self.held += 1
            return len(self._waiting)

    def take(self, most: int, most_bytes: int) -> list[bytes]:
        """The first of those that wait: at least one, if there is any."""
        with self._lock:
            first = first_part(self._waiting, most, most_bytes)
            for _ in first:
                self._waiting.popleft()
            self._since = time.monotonic()
            return first

    def put_back(self, events: Sequence[bytes]) -> None:
        """What was taken is first again, and has waited long enough."""
        with self._lock:
            self._waiting.extendleft(reversed(events))
            self._since = 0.0

    def forget(self, count: int) -> None:
        """So many of those that were taken are elsewhere now."""
        with self._lock:
            self.held -= count


def first_part(events: "Sequence[bytes] | deque[bytes]", most: int, most_bytes: int) -> list[bytes]:
    """The first events, at most so many and with at most so many bytes; at least one, if there is any."""
    part: list[bytes] = []
    size = 0
    for event in islice(events, most):
        size += len(event)
        if part and size > most_bytes:
            break
        part.append(event)
    return part


def parts(events: Sequence[bytes], most: int, most_bytes: int) -> list[list[bytes]]:
    """All of them, cut so."""
    cut = []
    at = 0
    while at < len(events):
        cut.append(first_part(events[at : at + most], most, most_bytes))
        at += len(cut[-1])
    return cut
