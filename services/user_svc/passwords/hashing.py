"""Argon2id beside the event loop: a few at a time, since each takes its memory and a moment of a core."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.kit.errors import InvalidArgument, Unavailable
from services.user_svc.passwords import rules
from services.user_svc.settings import UserSettings

_MOST_WAITING = 64
R = TypeVar("R")


class Hasher:
    """Hashes and verifies passwords. Its threads are its own: a queue of passwords holds nothing else up."""

    def __init__(self, settings: UserSettings) -> None:
        self._argon2 = PasswordHasher(settings.password_time_cost, settings.password_memory_kib, settings.password_lanes)
        self._pool = ThreadPoolExecutor(settings.password_workers, "clawplane-password")
        self._waiting = 0
        # What is verified where there is nothing to verify, so that it takes as long.
        self._nobodys = self._argon2.hash("nobody's password")

    async def check(self, field: str, password: str, *about: str) -> None:
        """InvalidArgument for a new password that is not good enough."""
        problem = await self._run(lambda: rules.problem(password, *about))
        if problem:
            raise InvalidArgument(field, problem)

    async def hash(self, password: str) -> str:
        """What is stored of a password: algorithm, parameters, salt and hash in one text."""
        return await self._run(lambda: self._argon2.hash(rules.normal(password)))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether a password is the stored one; takes as long where none is stored (None)."""

        def work() -> bool:
            try:
                return self._argon2.verify(stored or self._nobodys, rules.normal(password)) and stored is not None
            except (VerificationError, InvalidHashError):
                return False

        return await self._run(work)

    def is_old(self, stored: str) -> bool:
        """Whether a hash was made with other parameters than those of today."""
        return self._argon2.check_needs_rehash(stored)

    async def close(self) -> None:
        """Lets the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], R]) -> R:
        if self._waiting >= _MOST_WAITING:
            raise Unavailable("too many sign-ins at once; try again", 1, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1
