"""Counts that all processes share, in Redis. While it does not answer at once everybody is let in: a limit must not stop the service."""

import asyncio
import hashlib
import time

import limits
import structlog
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.kit import telemetry
from services.kit.rates import Rate
from services.kit.settings import KitSettings

log = structlog.get_logger()

_ITEMS = {
    1: limits.RateLimitItemPerSecond,
    60: limits.RateLimitItemPerMinute,
    3600: limits.RateLimitItemPerHour,
    86400: limits.RateLimitItemPerDay,
}
_CONNECTIONS = 32
_PAUSE_S = 1.0
"""After a failure Redis is left alone for so long: else each call would wait for it in vain."""
_SAY_EVERY_S = 60.0


class SharedCounts:
    """The sliding windows of the library ``limits``, one round trip a count. Keys carry the service's name and a hash of the subject."""

    def __init__(self, settings: KitSettings, service: str) -> None:
        self._service, self._timeout_s = service, settings.redis_timeout_s
        self._hash_key = settings.hmac_key.get_secret_value().encode()[:64]
        url = settings.redis_url.get_secret_value()
        if not url.startswith(("redis://", "rediss://")):
            raise ValueError("CLAWPLANE_REDIS_URL must begin with redis:// or rediss://")
        # The usual pool raises when all its connections are taken. Nothing is tried twice: a late count is of no use.
        self._pool = BlockingConnectionPool.from_url(
            url, max_connections=_CONNECTIONS, timeout=self._timeout_s, socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s, retry=Retry(NoBackoff(), 0), health_check_interval=0,
        )  # fmt: skip
        storage = RedisStorage(f"async+{url}", implementation="redispy", key_prefix="clawplane", connection_pool=self._pool)  # type: ignore[arg-type]
        self._windows = SlidingWindowCounterRateLimiter(storage)
        self._rest_until = 0.0
        self._say_at = 0.0

    async def hit(self, subject: str, rate: Rate) -> float:
        """Counts one: 0 when it is within the rate or Redis does not answer, else the seconds until the next one may be."""
        if time.monotonic() < self._rest_until:
            return self._let_in()
        item = _ITEMS[rate.period_s](rate.most, namespace=self._service)
        key = hashlib.blake2b(subject.encode(), key=self._hash_key, digest_size=16).hexdigest()
        try:
            async with asyncio.timeout(self._timeout_s):
                if await self._windows.hit(item, key):
                    return 0.0
                stats = await self._windows.get_window_stats(item, key)
        except (RedisError, OSError, TimeoutError) as error:
            self._rest_until = time.monotonic() + _PAUSE_S
            self._say(error)
            return self._let_in()
        return max(0.001, stats.reset_time - time.time())

    def _let_in(self) -> float:
        telemetry.UNCOUNTED.labels(self._service).inc()
        return 0.0

    def _say(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + _SAY_EVERY_S
            log.warning("limits.uncounted", service=self._service, error=type(error).__name__)

    async def close(self) -> None:
        """Closes the connections."""
        await self._pool.disconnect()
