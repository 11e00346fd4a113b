"""Events on disk while the service is away: append-only files of framed events in a folder that programs on one machine may share.

Whoever writes a file holds its lock until he is done with it or dead; whoever drains takes the folder's lock, then that of each file. A
file goes away only under its lock and only after the service has answered for all that is in it. Locks are the system's (flock): they end
with their process, however that ends.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clawplane_client import errors
from clawplane_client.events import uuid7
from clawplane_client.frames import frame, scan

log = logging.getLogger("clawplane_client")
SEGMENT_BYTES = 1024 * 1024
"""A file that has grown so long is closed, and the next begun."""
_SUFFIX, _DAMAGED, _LOCK = ".usage", ".damaged", "drain.lock"


@dataclass
class Leftover:
    """A file of the spool that is being drained, and locked meanwhile."""

    path: Path
    lock: int
    """Open file that holds the lock."""
    events: list[bytes]
    damaged: bool


class Spool:
    """One folder. Not safe for several threads at once: the outbox sees to that."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes
        self.busy = False
        """Whether another process was draining when ``oldest`` was asked last."""
        self.tell: Callable[[errors.UsageError], None] = lambda _: None
        """Told of what goes wrong with single files and holds up nothing else."""
        self._drain_lock: int | None = None
        self._segment: int | None = None
        self._segment_bytes = 0
        self._finished: set[str] = set()
        self._told: set[str] = set()
        try:
            import fcntl  # noqa: F401
        except ImportError:
            raise errors.SpoolFailed("a spool needs a system with flock") from None
        with _as_failed("cannot make the folder of the spool"):
            self._make_folder()

    def append(self, events: Sequence[bytes]) -> None:
        """Puts events safely on the disk, all or none. SpoolFull when there is no room, SpoolFailed when the disk refuses."""
        data = frame(events)
        with _as_failed("cannot write to the spool"):
            if self._segment is not None and not os.fstat(self._segment).st_nlink:
                # Somebody has cleared the folder: what is written on would be nowhere.
                self.seal()
            self._make_folder()
            if self.size_bytes() + len(data) > self._max_bytes:
                raise errors.SpoolFull(f"the spool {self.folder} has reached {self._max_bytes} bytes")
            if self._segment is not None and self._segment_bytes + len(data) > SEGMENT_BYTES:
                self.seal()
            segment = self._begin() if self._segment is None else self._segment
            try:
                _write(segment, data)
                os.fsync(segment)
                if not self._segment_bytes:
                    _sync_folder(self.folder)
            except OSError:
                # What is half written would go out all the same, and its room be missed.
                with contextlib.suppress(OSError):
                    os.ftruncate(segment, self._segment_bytes)
                self.seal()
                raise
            self._segment_bytes += len(data)

    def seal(self) -> None:
        """Closes the file that is being written, so that anybody may drain it."""
        if self._segment is not None:
            os.close(self._segment)
        self._segment, self._segment_bytes = None, 0

    def size_bytes(self) -> int:
        """What lies in the folder and is not delivered, of all programs."""
        total = 0
        for name in self._names():
            with contextlib.suppress(FileNotFoundError):
                total += (self.folder / name).stat().st_size
        return total

    def oldest(self) -> Leftover | None:
        """The oldest file that nobody is writing, locked. None: there is none, or another process drains (``busy``)."""
        self.seal()
        self.busy = False
        with _as_failed("cannot read the spool"):
            if self._drain_lock is None:
                self._drain_lock = self._lock(self.folder / _LOCK, os.O_RDWR | os.O_CREAT)
                self.busy = self._drain_lock is None
            if self._drain_lock is not None:
                for name in self._names():
                    if leftover := self._take(self.folder / name):
                        return leftover
        self.release()
        return None

    def done(self, leftover: Leftover) -> None:
        """Forgets a file: the service has answered for all that is in it."""
        try:
            if leftover.damaged:
                leftover.path.rename(leftover.path.with_suffix(_DAMAGED))
            else:
                leftover.path.unlink()
        except OSError as error:
            # Or it would be sent again and again.
            self._finished.add(leftover.path.name)
            self._trouble(leftover.path, errors.SpoolFailed(f"cannot remove {leftover.path}: {error.strerror}"))
        os.close(leftover.lock)

    def release(self, leftover: Leftover | None = None) -> None:
        """Lets others drain; a file that was under way stays as it is."""
        if leftover is not None:
            os.close(leftover.lock)
        if self._drain_lock is not None:
            os.close(self._drain_lock)
        self._drain_lock = None

    def abandon(self, leftover: Leftover | None) -> None:
        """In a child process: the locks stay with the parent, who has the same files open."""
        self.seal()
        self.release(leftover)

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            # What is in events is nobody else's business.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(self.folder.parent)

    def _names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if name.endswith(_SUFFIX) and name not in self._finished)

    def _begin(self) -> int:
        while True:
            path = self.folder / f"{uuid7(time.time_ns())}{_SUFFIX}"
            segment = self._lock(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, wait=True)
            # Between making and locking it, somebody may have drained it.
            if segment is not None:
                self._segment, self._segment_bytes = segment, 0
                return segment

    def _take(self, path: Path) -> Leftover | None:
        try:
            if (lock := self._lock(path, os.O_RDWR)) is None:
                return None
            data = _read(lock)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._trouble(path, errors.SpoolFailed(f"cannot read {path}: {error.strerror}"))
            return None
        found = scan(data)
        if found.torn:
            log.warning("the end of %s was never wholly written, and is left out", path)
        if found.damaged:
            self._trouble(path, errors.SpoolDamaged(f"{path} is damaged; {len(found.events)} events in it are whole"))
        leftover = Leftover(path, lock, found.events, found.damaged)
        if found.events:
            return leftover
        self.done(leftover)
        return None

    def _lock(self, path: Path, flags: int, *, wait: bool = False) -> int | None:
        """The file, open and locked; None when another has the lock, or has removed the file meanwhile."""
        import fcntl

        opened = os.open(path, flags | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(opened), os.stat(path)):
                return opened
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)
        return None

    def _trouble(self, path: Path, error: errors.UsageError) -> None:
        if path.name not in self._told:
            self._told.add(path.name)
            self.tell(error)


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _read(file: int) -> bytes:
    parts = []
    while part := os.read(file, SEGMENT_BYTES):
        parts.append(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _as_failed(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.SpoolFailed(f"{what}: {error.strerror}") from error
