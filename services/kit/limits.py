"""How often one subject may call, counted in fixed windows by this process."""

import re
import time

_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE = re.compile(rf"([1-9][0-9]{{0,11}})/({'|'.join(_PERIODS)})")


class RateLimit:
    """A rate as text: "6000/minute". ValueError for any other form."""

    def __init__(self, rate: str) -> None:
        found = _RATE.fullmatch(rate)
        if found is None:
            raise ValueError(f'a rate is a number and a period, such as "6000/minute"; the periods are {", ".join(_PERIODS)}')
        self._most, self._period_s = int(found[1]), _PERIODS[found[2]]
        self._window, self._counts = 0, dict[str, int]()

    def hit(self, subject: str) -> float:
        """Counts a call: 0 when it is within the rate, else the seconds until the next window."""
        now = time.time()
        window = int(now / self._period_s)
        if window != self._window:
            self._window, self._counts = window, {}
        count = self._counts.get(subject, 0)
        if count >= self._most:
            return (window + 1) * self._period_s - now
        self._counts[subject] = count + 1
        return 0.0
