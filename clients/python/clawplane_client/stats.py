"""What a recorder has done, in numbers."""

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stats:
    """Since the recorder was made."""

    recorded: int = 0
    """Events taken from the program."""
    accepted: int = 0
    """Events that the service has stored, those of the spool among them."""
    duplicates: int = 0
    """Events that it had stored before: an answer was lost on the way."""
    rejected: int = 0
    """Events that it will not store."""
    spooled: int = 0
    """Events that went to the spool."""
    failures: int = 0
    """Calls that brought no answer."""
    buffered: int = 0
    """Events in memory now, those under way among them."""


class Counts:
    """Counts for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, **more: int) -> None:
        """Adds to the fields of Stats."""
        with self._lock:
            for name, count in more.items():
                self._counts[name] = self._counts.get(name, 0) + count

    def stats(self, buffered: int) -> Stats:
        """The numbers now."""
        with self._lock:
            return replace(Stats(**self._counts), buffered=buffered)
