"""Answers that stand: who sends the very same request again gets the same answer, for as long as the handler's word for it holds."""

from collections.abc import Callable
from hashlib import sha256

_MOST = 200_000


class Standing:
    """The answers of one RPC that stand, by a hash of the request's bytes: some hold secrets, which must not lie about in memory."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[bytes, Callable[[], bool]]] = {}

    def again(self, raw: bytes) -> bytes | None:
        """The answer to a request that was answered before; None when it must be handled. ``stands`` is called each time, and does what an
        answer owes beside being given."""
        if not self._kept:
            return None
        name = sha256(raw).digest()
        kept = self._kept.get(name)
        if kept is None:
            return None
        answer, stands = kept
        if stands():
            return answer
        del self._kept[name]
        return None

    def keep(self, raw: bytes, answer: bytes, stands: Callable[[], bool]) -> None:
        """Remembers an answer, for as long as ``stands()`` is true. Where there are too many, all go: each is soon there again."""
        if len(self._kept) >= _MOST:
            self._kept.clear()
        self._kept[sha256(raw).digest()] = (answer, stands)
