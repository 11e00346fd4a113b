"""How often a subject may do something: counted by this process, or by all processes together in Redis (kit/shared_limits.py)."""

import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from services.kit import workers
from services.kit.rates import PERIODS_S, parse
from services.kit.settings import KitSettings

if TYPE_CHECKING:
    from services.kit.shared_limits import SharedCounts

_MOST_SUBJECTS = 200_000
_MOST_NETWORKS, _MOST_CREDENTIALS = 10_000, 100_000


class Limiter:
    """Counts in windows that slide: what the window before has seen counts by the part of it that is less than a period ago.

    A subject is any text that names what is counted, with what it is counted for before it where one caller has several counts:
    "usr_1", "key:key_1", "/a.B/C:usr_1".
    """

    def __init__(self, settings: KitSettings, service: str) -> None:
        self._share = workers.count()
        """How many processes share each rate."""
        self._windows = {period_s: _Windows(period_s) for period_s in PERIODS_S}
        self.shared = _shared(settings, service) if settings.redis_url.get_secret_value() else None
        """Where all processes count together; None when each counts for itself."""

    async def hit(self, subject: str, rate: str) -> float:
        """Counts one: 0 when it is within the rate, else the seconds until the next one may be. What is refused is not counted."""
        return self.hit_here(subject, rate) if self.shared is None else await self.shared.hit(subject, parse(rate))

    def hit_here(self, subject: str, rate: str) -> float:
        """The same without waiting, by this process alone: for where nothing is ``shared``."""
        most, period_s = parse(rate)
        return self._windows[period_s].hit(subject, most if self._share == 1 else max(1, most // self._share))

    async def close(self) -> None:
        """Lets go of Redis."""
        if self.shared is not None:
            await self.shared.close()


def _shared(settings: KitSettings, service: str) -> "SharedCounts":
    # The libraries take a fifth of a second to load, which whoever has no Redis need not pay.
    from services.kit.shared_limits import SharedCounts

    return SharedCounts(settings, service)


class _Windows:
    """The counts of one period in the window that runs and in the one before it."""

    def __init__(self, period_s: int) -> None:
        self._period_s = period_s
        self._number = 0
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def hit(self, subject: str, most: int) -> float:
        number, into_s = divmod(time.time(), self._period_s)
        if number != self._number or len(self._counts) > _MOST_SUBJECTS:
            # So many are a flood; to forget them lets some of it in, to keep them would cost all others the memory.
            self._before = self._counts if number == self._number + 1 else {}
            self._number, self._counts = int(number), {}
        count, before = self._counts.get(subject, 0), self._before.get(subject, 0)
        if count >= most:
            return self._period_s - into_s
        if before and count + before * (1 - into_s / self._period_s) >= most:
            return max(0.001, self._period_s * (1 - (most - count) / before) - into_s)
        self._counts[subject] = count + 1
        return 0.0


class Guesses:
    """Networks that sent too many credentials that do not hold, and the credentials that have held: who shares the network goes on.

    Known to this process only: a network that guesses is soon known to the others too.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()
        self._refused: dict[str, float] = {}

    def held(self, credential: Hashable) -> None:
        """A credential has held."""
        if len(self._held) >= _MOST_CREDENTIALS:
            self._held.clear()
        # No need for the text: who guesses cannot know the seed of these hashes.
        self._held.add(hash(credential))

    def refuse(self, network: str, wait_s: float) -> None:
        """No new credentials from there for so long."""
        if len(self._refused) >= _MOST_NETWORKS:
            self._refused.clear()
        self._refused[network] = time.monotonic() + wait_s

    def wait_s(self, credential: Hashable, network: Callable[[], str]) -> float:
        """Seconds until the credential may be tried; 0: now. The network is asked for only when any is refused."""
        if not self._refused or hash(credential) in self._held:
            return 0.0
        place = network()
        left = self._refused.get(place, 0.0) - time.monotonic()
        if left > 0:
            return left
        self._refused.pop(place, None)
        return 0.0
