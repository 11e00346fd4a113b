"""The price book as it is asked: which price counts for a call, and what the call costs. Exact, in whole units of 10^-12."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal

_PLACES = Decimal("0.000001")
_UNITS = 10**6
_UNIT = Decimal("1E-12")
MOST_COST = Decimal(1_000_000)
"""No single event costs more; what would is a mistake in its tokens, and SQLite's integers could not hold many such."""


@dataclass(frozen=True)
class Line:
    """One price. The four amounts are for a million tokens with the markup, in units of 10^-6: for one token, of 10^-12."""

    id: str
    provider: str
    model: str
    above_tokens_in: int
    effective_from: datetime
    effective_to: datetime | None
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    tokens_reasoning: int

    def cost(self, tokens_in: int, tokens_out: int, tokens_cached: int, tokens_reasoning: int) -> Decimal:
        """Of so many tokens; ``tokens_cached`` are among ``tokens_in``, ``tokens_reasoning`` among ``tokens_out``."""
        units = (tokens_in - tokens_cached) * self.tokens_in + tokens_cached * self.tokens_cached
        units += (tokens_out - tokens_reasoning) * self.tokens_out + tokens_reasoning * self.tokens_reasoning
        return units * _UNIT

    @property
    def closeness(self) -> tuple[bool, int, int, str]:
        """How closely the pattern names a model: a plain name before all, then by the characters that stand for themselves. Of two that are
        alike in this, the one with fewer "*", and then always the same one."""
        stars = self.model.count("*")
        return not stars, len(self.model) - stars, -stars, self.model


def charged(price: Decimal, markup: Decimal) -> int:
    """A price with the platform's markup, rounded half to even to six places, in units of 10^-6."""
    return int((price * (1 + markup)).quantize(_PLACES, ROUND_HALF_EVEN) * _UNITS)


def _fits(pattern: str, model: str) -> bool:
    # Only "*" means anything: brackets and question marks are no characters of a pattern.
    return bool(re.fullmatch(fnmatch.translate(pattern), model))


@dataclass(frozen=True)
class PriceBook:
    """All prices, as they were at one version of the table."""

    currency: str
    version: int = 0
    lines: tuple[Line, ...] = ()
    _known: dict[tuple[str, str], tuple[Line, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, currency: str, version: int, lines: Iterable[Line]) -> "PriceBook":
        """The closest pattern first, then the longest context, then the latest."""
        ordered = sorted(lines, key=lambda line: (line.closeness, line.above_tokens_in, line.effective_from), reverse=True)
        return cls(currency, version, tuple(ordered))

    def find(self, provider: str, model: str, tokens_in: int, when: datetime) -> Line | None:
        """The price of a call of that many tokens in at a time; None when there is none."""
        lines = self._known.get((provider, model))
        for line in lines if lines is not None else self._learn(provider, model):
            if (
                (tokens_in > line.above_tokens_in or not line.above_tokens_in)
                and line.effective_from <= when
                and (line.effective_to is None or when < line.effective_to)
            ):
                return line
        return None

    def _learn(self, provider: str, model: str) -> tuple[Line, ...]:
        known = tuple(line for line in self.lines if line.provider == provider and _fits(line.model, model))
        # Callers name models as they like: what is remembered of them is bounded.
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[(provider, model)] = known
        return known
