"""The ring of key-encryption keys: what it is, and the file that processes follow and `clawplane keys` changes."""

import base64
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from services.kit.columns import now

NEXT, CURRENT, OLD = "next", "current", "old"
"""States of a key: known but used by nobody yet; what new secrets are wrapped with; kept for what is still wrapped with it."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,60}")


@dataclass(frozen=True)
class RingKey:
    """One AES-256 key. Versions grow by one with each key of a ring."""

    id: str
    version: int
    state: str
    made_at: str
    """RFC 3339; empty for keys of the environment."""
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Ring:
    """Keys in the order of their versions. ValueError when it is not one that can be used."""

    keys: tuple[RingKey, ...]
    minimum_version: int = 1
    """Secrets under keys below it are refused."""
    rotating: bool = False
    """Whether a rotation has begun and not come to its end."""

    def __post_init__(self) -> None:
        ids, versions = [key.id for key in self.keys], [key.version for key in self.keys]
        if len(set(ids)) != len(ids) or versions != sorted(set(versions)):
            raise ValueError("ids and versions of a key ring must differ, and versions must grow")
        for key in self.keys:
            if not _ID.fullmatch(key.id):
                raise ValueError(f"the key id {key.id!r} must be made of letters, digits, _ and -, at most 60: no dot, no colon")
            if len(key.key) != 32 or key.state not in (NEXT, CURRENT, OLD):
                raise ValueError(f"the key {key.id!r} of a ring must have 32 bytes and a known state")
        states = [key.state for key in self.keys]
        if states.count(CURRENT) != 1 or states.count(NEXT) > 1:
            raise ValueError("a key ring has exactly one current key, and at most one next key")
        if self.current.version < self.minimum_version:
            raise ValueError(f"the current key {self.current.id!r} is below the required version {self.minimum_version}")

    @classmethod
    def of(cls, keys: Mapping[str, bytes], current: str) -> "Ring":
        """A ring of the environment: id -> key, oldest first."""
        if current not in keys:
            raise ValueError(f"CLAWPLANE_ENCRYPTION_KEYS has no key with the id {current!r} of CLAWPLANE_ENCRYPTION_KEY_ID")
        numbered = enumerate(keys.items(), 1)
        return cls(tuple(RingKey(id_, number, CURRENT if id_ == current else OLD, "", key) for number, (id_, key) in numbered))

    @property
    def current(self) -> RingKey:
        """The key of new secrets."""
        return next(key for key in self.keys if key.state == CURRENT)

    @property
    def next(self) -> RingKey | None:
        """The key that a rotation has made and not switched to yet."""
        return next((key for key in self.keys if key.state == NEXT), None)

    @property
    def ids(self) -> list[str]:
        """The ids of all keys."""
        return [key.id for key in self.keys]

    def with_next(self) -> "Ring":
        """A rotation begins: with a new key, which nothing uses yet. A ring that has begun stays as it is."""
        if self.rotating:
            return self
        version = self.keys[-1].version + 1
        # The end makes it differ from a key that another copy of this ring was given at the same time.
        fresh = RingKey(f"k{version}-{secrets.token_hex(3)}", version, NEXT, now().isoformat(timespec="seconds"), os.urandom(32))
        return replace(self, keys=(*self.keys, fresh), rotating=True)

    def switched(self) -> "Ring":
        """The next key is the current one, and the current one is old."""
        if self.next is None:
            return self
        states = {CURRENT: OLD, NEXT: CURRENT}
        return replace(self, keys=tuple(replace(key, state=states.get(key.state, key.state)) for key in self.keys))

    def without_old(self) -> "Ring":
        """Only what is current, or will be."""
        return replace(self, keys=tuple(key for key in self.keys if key.state != OLD))


class RingFile:
    """A ring as JSON, readable by its owner. Written whole or not at all; who changes it takes turns."""

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """``private``: a file that others may read is refused."""
        self.path, self.private = path, private

    def stamp(self) -> tuple[int, int, int] | None:
        """Differs whenever the file was replaced; None when there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def load(self) -> Ring:
        """The ring; ValueError says what is wrong with the file, never a key."""
        try:
            if self.private and self.path.stat().st_mode & 0o027:
                raise ValueError(f"{self.path} holds keys and can be read or changed by others: chmod 600 {self.path}")
            return _parse(orjson.loads(self.path.read_bytes()))
        except OSError as error:
            raise ValueError(f"the key ring {self.path} cannot be read: {error.strerror}") from None
        except orjson.JSONDecodeError:
            raise ValueError(f"{self.path} is not a key ring: it is not JSON") from None
        except (KeyError, TypeError):
            raise ValueError(f"{self.path} is not a key ring: something is missing in it") from None
        except ValueError as error:
            raise ValueError(f"the key ring {self.path}: {error}" if str(self.path) not in str(error) else str(error)) from None

    def load_or_make(self, first: Callable[[], Ring]) -> Ring:
        """The ring; made of ``first`` when there is none. Of several processes that start at once, one makes it."""
        if self.stamp() is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if self.stamp() is None:
                    self._write(first())
        return self.load()

    def change(self, how: Callable[[Ring], Ring]) -> Ring:
        """Replaces the ring by what ``how`` makes of it, and returns that."""
        with self._lock():
            before = self.load()
            after = how(before)
            if after != before:
                self._write(after)
            return after

    @contextmanager
    def rotation(self) -> Iterator[None]:
        """Held by the one rotation that runs; ValueError when another one does."""
        with _locked(self.path.with_name(f"{self.path.name}.rotation"), wait=False):
            yield

    def _lock(self) -> Any:
        return _locked(self.path.with_name(f"{self.path.name}.lock"), wait=True)

    def _write(self, ring: Ring) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                self._keep_owner(file.fileno())
                file.write(_text(ring))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _keep_owner(self, descriptor: int) -> None:
        """Whoever rotates, the services must be able to read it as before."""
        with suppress(FileNotFoundError, PermissionError):
            before = os.stat(self.path)
            os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o640)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    # The lock ends with the process, however that ends; the empty file stays.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError("another rotation is running: let it end, or stop it") from None
    finally:
        os.close(descriptor)


def _parse(body: Any) -> Ring:
    keys = [
        RingKey(str(one["id"]), int(one["version"]), str(one["state"]), str(one["made_at"]), base64.b64decode(one["key"], validate=True))
        for one in body["keys"]
    ]
    return Ring(tuple(keys), int(body["minimum_version"]), bool(body["rotating"]))


def _text(ring: Ring) -> bytes:
    keys = [
        {"id": key.id, "version": key.version, "state": key.state, "made_at": key.made_at, "key": base64.b64encode(key.key).decode()}
        for key in ring.keys
    ]
    body = {"keys": keys, "minimum_version": ring.minimum_version, "rotating": ring.rotating}
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
