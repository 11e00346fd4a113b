"""Rotation of the key that wraps all secrets: a new key everywhere first, then in use, then under everything, then the old one goes.

Progress is in the ring file and in the rows themselves, so that a rotation which was killed goes on where it was.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import column, func, select, table, update

from services.kit import holders, vault
from services.kit.db import ALL
from services.kit.keyring import OLD, Ring, RingFile
from services.kit.sealed import Blind, Hashed, Store, renew
from services.kit.secrets import SecretBox

_POLL_S, _PAUSE_S = 0.2, 0.3
_PASSES = 100
_ACTIVITY = table("pg_stat_activity", column("application_name"), column("datname"), column("xact_start"), column("pid"))


class RotationError(Exception):
    """The rotation cannot go on; the text says why and what to do. What was done stays valid, and running it again goes on."""


@dataclass
class Progress:
    """What whoever watches a rotation hears."""

    say: Callable[[str], None]
    total: Callable[[int], None]
    """How many rows there are to bring over, in all."""
    advance: Callable[[int], None]


@dataclass
class Result:
    """What a rotation came to."""

    current: str
    old: list[str] = field(default_factory=list)
    """Keys that are on the ring and needed by nothing."""
    dropped: list[str] = field(default_factory=list)


class Rotation:
    """One run of `clawplane keys rotate` over the databases of all services."""

    def __init__(self, stores: Sequence[Store], box: SecretBox, file: RingFile | None, progress: Progress, wait_s: float = 30) -> None:
        """``file``: None when the ring is in the environment, where the operator adds keys and this brings the rows over.

        ``wait_s``: how long processes have to follow each step.
        """
        self.stores, self.box, self.file, self.progress, self.wait_s = stores, box, file, progress, wait_s

    async def run(self, *, drop_old: bool) -> Result:
        """The whole way. RotationError says who or what is in the way."""
        with self.file.rotation() if self.file else nullcontext():
            self.box.refresh()
            if self.file is None:
                await self._use_environment()
            elif not (drop_old and self._only_drop_is_left()):
                await self._switch(self.file)
            await self._until_all(lambda one: one.current == self.box.current, f"does not seal with the key {self.box.current!r} yet")
            await self._bring_over()
            others = [key.id for key in self.box.ring.keys if key.state == OLD]
            if drop_old:
                await self._forget(others)
            if self.file:
                self._change(lambda ring: replace(ring.without_old() if drop_old else ring, rotating=False))
            return Result(self.box.current, dropped=others) if drop_old else Result(self.box.current, others)

    async def _use_environment(self) -> None:
        if len(self.box.ring.keys) == 1 and not await self._due():
            raise RotationError(
                "the ring is in the environment and has one key, which everything is under. To rotate: add a key to "
                "CLAWPLANE_ENCRYPTION_KEYS and restart all; set CLAWPLANE_ENCRYPTION_KEY_ID to it and restart all; run this again. "
                "Or set CLAWPLANE_KEY_RING to a file that all processes see, and this does all of it"
            )
        await self._use(self.box.current)

    def _only_drop_is_left(self) -> bool:
        """An earlier rotation has ended, and its old key is still there: no third one is made to drop it."""
        ring = self.box.ring
        return not ring.rotating and any(key.state == OLD for key in ring.keys)

    async def _switch(self, file: RingFile) -> None:
        """A new key: on the ring, held by all, known to the databases, in use. After a kill, it finds its own key."""
        self._change(Ring.with_next)
        fresh = self.box.ring.next
        if fresh is None:
            return
        self.progress.say(f"the new key is {fresh.id}")
        await self._use(fresh.id)
        self._change(Ring.switched)

    async def _use(self, key_id: str) -> None:
        """Makes a key one that may be used: every process holds it."""
        await self._until_all(lambda one: key_id in one.key_ids, f"has not reported the key {key_id!r}, which nothing uses yet")
        for store in self.stores:
            await self._put_into_use(store, key_id)

    async def _put_into_use(self, store: Store, key_id: str) -> None:
        """From here on, a process without the key cannot start; and in the same moment, none is there."""

        async def work(session: Any) -> None:
            await holders.turn(session)
            lacking = [one for one in await holders.live(session, store.holder) if key_id not in one.key_ids]
            if lacking:
                raise RotationError(f"{holders.named(lacking)} started with another ring in this moment: run this again")
            await vault.plant(session, self.box, store.canary, key_id)

        await store.db.run(work, ALL)

    async def _until_all(self, follows: Callable[[Any], bool], what: str) -> None:
        """Waits until something holds for each live process of each service."""

        async def waiting() -> str:
            late = []
            for store in self.stores:
                async with store.db.read(ALL) as session:
                    late += [one for one in await holders.live(session, store.holder) if not follows(one)]
            return holders.named(late)

        hint = "give it this ring file" if self.file else "restart it with this CLAWPLANE_ENCRYPTION_KEYS and CLAWPLANE_ENCRYPTION_KEY_ID"
        await self._until(waiting, lambda late: f"{late} {what}: {hint}, or stop it, and run this again")

    async def _until(self, waiting: Callable[[], Awaitable[str]], words: Callable[[str], str]) -> None:
        deadline = time.monotonic() + self.wait_s
        while late := await waiting():
            if time.monotonic() > deadline:
                raise RotationError(words(late))
            await asyncio.sleep(_POLL_S)

    async def _bring_over(self) -> None:
        """Every row under the current key, over and over until none is left."""
        for store in self.stores:
            await self._settle(store)
        self.progress.total(await self._due())
        troubles: dict[str, str] = {}
        for _ in range(_PASSES):
            troubles = {}
            for store in self.stores:
                for one in store.kept:
                    found = await renew(store, one, self.box, self.progress.advance)
                    troubles |= {f"{one.name} of {row}": why for row, why in found.items()}
            # What others had locked, or wrote in the moment of the switch.
            if await self._due() <= len(troubles):
                break
            await asyncio.sleep(_PAUSE_S)
        if troubles:
            first = "; ".join(f"{where}: {why}" for where, why in list(troubles.items())[:5])
            raise RotationError(f"{len(troubles)} rows cannot be opened and stay as they are, with the old keys on the ring: {first}")
        if left := await self._due():
            raise RotationError(f"{left} rows are locked by others all the time: run this again")

    async def _due(self) -> int:
        """How many rows are under another key than the current one."""
        return sum([await store.count(one, one.due(self.box.current)) for store in self.stores for one in store.kept])

    async def _settle(self, store: Store) -> None:
        """Until the transactions that may have sealed before the switch have ended; their rows come over with the others."""
        if store.db.is_sqlite:
            # One writer at a time: whoever gets a turn has waited for all before.
            async with store.db.transaction(ALL):
                return
        async with store.db.read(ALL) as session:
            since = await holders.clock(session)

        async def waiting() -> str:
            async with store.db.read(ALL) as session:
                return " ".join(str(pid) for pid in await session.scalars(_older(store, since)))

        await self._until(waiting, lambda pids: f"transactions from before the switch are open (server processes {pids}): run this again")

    def _change(self, how: Callable[[Ring], Ring]) -> None:
        assert self.file is not None
        self.file.change(how)
        self.box.refresh()

    async def _forget(self, old: list[str]) -> None:
        """From here on, no process needs keys that nothing is under, and none may seal with them."""
        for store in self.stores:
            await self._retire(store, old + [vault.HMAC + key_id for key_id in await self._hmac_keys_unused(store)])

    async def require(self, version: int) -> None:
        """From now on, secrets under keys below a version are refused, and processes that would seal with one."""
        if self.file is None:
            raise RotationError("the ring is in the environment: a key that is taken out of CLAWPLANE_ENCRYPTION_KEYS is refused anyway")
        with self.file.rotation():
            self.box.refresh()
            ring = self.box.ring
            if version > ring.current.version:
                raise RotationError(f"the current key {ring.current.id!r} has version {ring.current.version}: rotate first")
            below = [key.id for key in ring.keys if key.version < version]
            for store in self.stores:
                for one in store.kept:
                    if count := sum([await store.count(one, one.under(key_id)) for key_id in below]):
                        raise RotationError(f"{count} rows of {one.name} are below version {version}: run `clawplane keys rotate` first")
            await self._until_all(lambda one: one.current == self.box.current, f"does not seal with the key {self.box.current!r} yet")
            for store in self.stores:
                await self._retire(store, below)
            self._change(lambda ring: replace(ring, minimum_version=max(version, ring.minimum_version)))

    async def _retire(self, store: Store, key_ids: list[str]) -> None:
        async with store.db.transaction(ALL) as session:
            await holders.turn(session)
            await session.execute(update(store.canary).where(store.canary.key_id.in_(key_ids)).values(retired=True))

    async def _hmac_keys_unused(self, store: Store) -> list[str]:
        """Earlier HMAC keys that no hash of this service is under."""
        unused = []
        async with store.db.read(ALL) as session:
            names = (await session.scalars(select(store.canary.key_id).where(store.canary.key_id.startswith(vault.HMAC)))).all()
        for key_id in (name.removeprefix(vault.HMAC) for name in names):
            columns: list[Hashed | Blind] = [*store.hashed, *(one for one in store.kept if isinstance(one, Blind))]
            if key_id != self.box.hmac_key_id and not any([await store.count(one, one.under(key_id)) for one in columns]):
                unused.append(key_id)
        return unused


def _older(store: Store, since: datetime) -> Any:
    a = _ACTIVITY.c
    ours = (a.application_name == f"clawplane-{store.db.name}", a.datname == func.current_database(), a.pid != func.pg_backend_pid())
    return select(a.pid).where(*ours, a.xact_start < since)
