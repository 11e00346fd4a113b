"""A rate as text, as settings, methods and keys have it: "6000/minute"."""

import re
from functools import lru_cache
from typing import NamedTuple

_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_FORM = re.compile(rf"([1-9][0-9]{{0,17}})/({'|'.join(_PERIODS)})")
_REMEMBERED = 4096
PERIODS_S = tuple(_PERIODS.values())


class Rate(NamedTuple):
    """So many within so long."""

    most: int
    period_s: int


@lru_cache(_REMEMBERED)
def parse(text: str) -> Rate:
    """A rate; ValueError for any other form."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f'a rate is a number and a period, such as "6000/minute"; the periods are {", ".join(_PERIODS)}')
    return Rate(int(found[1]), _PERIODS[found[2]])


def checked(text: str) -> str:
    """The text itself, when it is a rate; ValueError else."""
    parse(text)
    return text


def times(text: str, factor: float) -> str:
    """A rate so many times as high, at least one."""
    period = text.partition("/")[2]
    return f"{max(1, int(parse(text).most * factor))}/{period}"
