"""Following the user service's changes, and what may be remembered while the feed is heard."""

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import structlog

from services.kit.auth import Access, AccessResolver, Session, SessionResolver

log = structlog.get_logger()
V = TypeVar("V")

_SILENCE_S = 1.0
"""A feed not heard of for so long may have been cut off: nothing remembered counts until it is heard again."""
SEEN_S = 60.0
"""How long a session may be remembered: the user service learns from being asked that it is in use."""
_PAUSE_S = 0.2
_LONG_S = 60.0
_CACHE_SIZE = 10_000


class Follower:
    """Follows the feed from now on, in one task. ``watch(after_seq)`` opens the stream; listeners hear each change."""

    def __init__(self, watch: Callable[[int], AsyncIterable[Any]]) -> None:
        self._watch = watch
        self._listeners: list[Callable[[Any], None]] = []
        self._resets: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._heard = 0.0

    def listen(self, on_change: Callable[[Any], None], on_reset: Callable[[], None]) -> None:
        """``on_change`` for each change; ``on_reset`` when changes may have been missed and everything must be read anew."""
        self._listeners.append(on_change)
        self._resets.append(on_reset)

    @property
    def is_heard(self) -> bool:
        """Whether the feed was heard within the last second."""
        return time.monotonic() - self._heard < _SILENCE_S

    async def start(self) -> None:
        """Starts following."""
        self._task = asyncio.create_task(self._run(), name="feed")

    async def stop(self) -> None:
        """Stops following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        seq = -1
        while True:
            opened = time.monotonic()
            try:
                async for message in self._watch(seq):
                    if seq < 0:
                        self._reset()
                    seq = message.seq
                    if message.HasField("change"):
                        for listener in self._listeners:
                            listener(message.change)
                    self._heard = time.monotonic()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                    seq = -1
                # A long stream ends when its credential does, or the other side restarts: nothing to look at.
                say = log.info if time.monotonic() - opened > _LONG_S else log.warning
                say("feed.interrupted", code=error.code().name)
            except Exception as error:
                log.error("feed.failed", exc_info=error)
                seq = -1
            await asyncio.sleep(_PAUSE_S)

    def _reset(self) -> None:
        for reset in self._resets:
            reset()


class Kept(Generic[V]):
    """An answer that is remembered, and until when (``time.monotonic()``)."""

    __slots__ = ("until", "value")

    def __init__(self, value: V, until: float) -> None:
        self.value, self.until = value, until

    def drop(self) -> None:
        """It holds no more, and nothing is held by whoever still has it at hand."""
        self.value, self.until = None, 0.0  # type: ignore[assignment]  # whoever asks whether it holds does so first


class Remembered(Generic[V]):
    """Answers of a look-up, kept until a change concerns them, and only while the feed is heard."""

    def __init__(
        self, follower: Follower, fetch: Callable[..., Awaitable[V]], concerns: Callable[[Any], list[str]],
        tags: Callable[[V], Sequence[str]] = lambda value: (), *, hidden: bool = False, most: int = _CACHE_SIZE,
        max_age_s: float = math.inf,
    ) -> None:  # fmt: skip
        """``concerns(change)`` gives the tags of answers to drop; an answer's tags are its arguments and what ``tags(answer)`` adds.
        That there is no answer (None) is not remembered. ``hidden``: the one argument is a secret, of which only a hash is kept, and
        which is no tag. ``most`` answers are kept, each for at most ``max_age_s``; then the oldest go."""
        self._follower, self._fetch, self._tags, self._hidden = follower, fetch, tags, hidden
        self._most, self._max_age_s = most, max_age_s
        # A plain dict seeks its first entry among all that were removed before it.
        self._known: OrderedDict[Any, Kept[V]] = OrderedDict()
        self._tagged: dict[str, set[Any]] = {}
        self._generation = 0
        follower.listen(lambda change: self._drop(concerns(change)), self._clear)

    def peek(self, *key: str) -> V | None:
        """What is remembered for these arguments; None when nothing is, or may not be used now."""
        kept = self.kept(*key)
        return kept.value if kept is not None else None

    def kept(self, *key: str) -> Kept[V] | None:
        """The same, for whoever asks again later whether it still ``holds``."""
        kept = self._known.get(self._name(key)) if self._follower.is_heard else None
        return kept if kept is not None and kept.until > time.monotonic() else None

    def holds(self, kept: Kept[V]) -> bool:
        """Whether something that was remembered still is, and may be used now."""
        return kept.until > time.monotonic() and self._follower.is_heard

    async def __call__(self, *key: str) -> V:
        """The answer for these arguments."""
        if not self._follower.is_heard:
            return await self._fetch(*key)
        name = self._name(key)
        kept = self._known.get(name)
        if kept is not None and kept.until > time.monotonic():
            return kept.value
        generation = self._generation
        value = await self._fetch(*key)
        # What was read while a change came in may be the state before it.
        if value is not None and generation == self._generation and self._follower.is_heard:
            if len(self._known) >= self._most:
                self._forget(next(iter(self._known)))
            self._forget(name)
            self._known[name] = Kept(value, time.monotonic() + self._max_age_s)
            for tag in self._tags_of(name, value):
                self._tagged.setdefault(tag, set()).add(name)
        return value

    def _name(self, key: tuple[str, ...]) -> Any:
        return hashlib.sha256(key[0].encode()).digest() if self._hidden else key

    def _tags_of(self, name: Any, value: V) -> set[str]:
        return {*(() if self._hidden else name), *self._tags(value)}

    def _drop(self, tags: list[str]) -> None:
        self._generation += 1
        for tag in tags:
            for name in tuple(self._tagged.get(tag, ())):
                self._forget(name)

    def _forget(self, name: Any) -> None:
        kept = self._known.pop(name, None)
        if kept is None:
            return
        tags = self._tags_of(name, kept.value)
        kept.drop()
        for tag in tags:
            left = self._tagged[tag]
            left.discard(name)
            if not left:
                del self._tagged[tag]

    def _clear(self) -> None:
        self._generation += 1
        for kept in self._known.values():
            kept.drop()
        self._known.clear()
        self._tagged.clear()


def remembered_access(follower: Follower, resolve: AccessResolver) -> AccessResolver:
    """A resolver that asks the other one only for what it does not know."""
    return Remembered(follower, resolve, _whose_access, _about)


def remembered_sessions(follower: Follower, resolve: SessionResolver) -> SessionResolver:
    """The same for sessions; what their user may do is asked apart. Asked again each minute: that says that a session is in use."""

    def tags(session: Session | None) -> list[str]:
        return [session.id] if session is not None else []

    return Remembered(follower, resolve, lambda change: [change.subject], tags, hidden=True, max_age_s=SEEN_S)


def _whose_access(change: Any) -> list[str]:
    # More than a change may concern: what is dropped in vain is only read again.
    return [change.subject, change.org_id]


def _about(access: Access | None) -> list[str]:
    # Also where it was asked for in other words: the id at Clerk, or no organization.
    return [access.user_id, access.org_id] if access is not None else []
