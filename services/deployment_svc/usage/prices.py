"""What model calls cost: exact decimals from a small price file."""

import fnmatch
import tomllib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

_BUNDLED = Path(__file__).with_name("prices.toml")
_MILLION = Decimal(1_000_000)


def _exact(text: "str | int | Decimal") -> Decimal:
    """A price; ArithmeticError when the ledger, which keeps twelve places, could not hold the cost of one token."""
    price = Decimal(text)
    if not 0 <= price < _MILLION or price != round(price, 6):
        raise ArithmeticError(f"{text} is no price from 0 to {_MILLION} with at most six decimal places")
    return price


@dataclass(frozen=True)
class Price:
    """Price for a million tokens of each kind."""

    provider: str
    model: str
    tokens_in: Decimal
    tokens_cached: Decimal
    tokens_out: Decimal


@dataclass(frozen=True)
class PriceBook:
    """All prices, in one currency."""

    currency: str
    prices: tuple[Price, ...]

    @classmethod
    def load(cls, path: str = "") -> "PriceBook":
        """From a TOML file; empty: the bundled one. ValueError names what is wrong."""
        raw = tomllib.loads(Path(path or _BUNDLED).read_text(), parse_float=Decimal)
        try:
            prices = tuple(
                Price(
                    row["provider"], row["model"], _exact(row["tokens_in"]), _exact(row.get("tokens_cached", row["tokens_in"])),
                    _exact(row["tokens_out"]),
                )
                for row in raw["prices"]
            )  # fmt: skip
            return cls(raw["currency"], prices)
        except (KeyError, TypeError, ArithmeticError) as error:
            raise ValueError(f"the price file {path or 'bundled with the service'} is not valid: {error!r}") from None

    def cost(self, provider: str, model: str, tokens_in: int, tokens_cached: int, tokens_out: int) -> Decimal | None:
        """Exact cost of a call, or None when no price is known. ``tokens_cached`` are among ``tokens_in``."""
        for price in self.prices:
            if price.provider == provider and fnmatch.fnmatchcase(model, price.model):
                fresh = max(0, tokens_in - tokens_cached)
                return (fresh * price.tokens_in + tokens_cached * price.tokens_cached + tokens_out * price.tokens_out) / _MILLION
        return None
