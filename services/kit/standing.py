"""Answers that stand: who sends the very same request again gets the same answer, for as long as the handler's word for it holds."""

from abc import ABC, abstractmethod
from hashlib import sha256

_MOST = 200_000


class Word(ABC):
    """A handler's word for one answer, a new one for each. Small, since among very many what costs is memory that no cache holds."""

    __slots__ = ("answer",)
    answer: bytes

    @abstractmethod
    def holds(self) -> bool:
        """Whether the answer may be given now. Asked each time that it is to be given, so it also does what an answer owes beside that."""


class Standing:
    """The answers of one RPC that stand, by a hash of the request's bytes: some hold secrets, which must not lie about in memory."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Word] = {}

    def again(self, raw: bytes) -> bytes | None:
        """The answer to a request that was answered before; None when it must be handled."""
        if not self._kept:
            return None
        name = sha256(raw).digest()
        word = self._kept.get(name)
        if word is None:
            return None
        if word.holds():
            return word.answer
        del self._kept[name]
        return None

    def keep(self, raw: bytes, answer: bytes, word: Word) -> None:
        """Remembers an answer, for as long as the word for it holds. Where there are too many, all go: each is soon there again."""
        if len(self._kept) >= _MOST:
            self._kept.clear()
        word.answer = answer
        self._kept[sha256(raw).digest()] = word
