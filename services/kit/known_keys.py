"""API keys as credentials, in any service: what is known of a key, and which keys were used."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from services.kit import keys
from services.kit.auth import Caller, KeyResolver
from services.kit.feed import Follower, Remembered

log = structlog.get_logger()
PEOPLE, BOTS = "cp", "claw"
"""Prefixes of the texts of people's keys and of bots'."""
ID_PREFIX = "key"
_MOST = 200_000
_FLUSHED = 1000
FLUSH_S = 3.0
"""How often uses are written down."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What was found out of a key, also of one that does not hold: it is remembered until a change concerns it."""

    caller: Caller
    holds: bool
    """Whether it holds but for its time."""
    ends_at: float
    """When it ends by itself, seconds since 1970; infinite when it does not."""
    answer: Any = None
    """What is told of it, made once."""
    permissions: frozenset[str] = frozenset()
    """Those that are told of it, where it is told: the caller's but for what every key may."""


def parse(text: str) -> keys.Key | None:
    """The parts of a key of people or bots, or None when its form or checksum is wrong, so that garbage costs no query."""
    prefix = text.partition("_")[0]
    return keys.parse(text, prefix, ID_PREFIX) if prefix in (PEOPLE, BOTS) else None


def remembered_keys(
    follower: Follower, find: Callable[[str], Awaitable[KnownKey | None]], concerns: Callable[[Any], list[str]]
) -> "Remembered[KnownKey | None]":
    """Keys by their text. What no key is, is not remembered: whoever sends garbage drives nothing out."""

    def tags(known: KnownKey | None) -> list[str]:
        return [known.caller.key_id, known.caller.user_id, known.caller.org_id] if known is not None else []

    return Remembered(follower, find, concerns, tags, hidden=True, most=_MOST)


class Uses:
    """Collects which keys were used, and writes them down now and then, never within a call."""

    def __init__(self, write: Callable[[list[str]], Awaitable[None]]) -> None:
        self._write = write
        self._used: set[str] = set()

    def note(self, key_id: str) -> None:
        """A key was used now."""
        self._used.add(key_id)

    async def flush(self) -> bool:
        """Writes down what was used since the last time; a tick of a loop, and the last thing at the stop. True when there is more."""
        # In order, for processes that write the same rows; not all that wait, of which there may be very many.
        batch = sorted(islice(self._used, _FLUSHED))
        if batch:
            self._used.difference_update(batch)
            try:
                await self._write(batch)
            except Exception:
                self._used.update(batch)
                raise
        return bool(self._used) and len(batch) == _FLUSHED

    async def flush_all(self) -> None:
        """The same until nothing is left, for the stop of a process, which nothing may hold up."""
        try:
            while await self.flush():
                pass
        except Exception as error:
            log.warning("keys.uses_lost", keys=len(self._used), error=type(error).__name__)


def resolver(known: "Remembered[KnownKey | None]", uses: Uses) -> KeyResolver:
    """Key text -> the key as a caller, as long as it holds."""

    async def resolve(text: str) -> Caller | None:
        found = known.peek(text) or await known(text)
        if found is None or not found.holds or found.ends_at <= time.time():
            return None
        uses.note(found.caller.key_id)
        return found.caller

    return resolve
