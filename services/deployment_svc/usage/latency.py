"""Percentiles from buckets of latency."""

import math
from collections.abc import Sequence

from services.deployment_svc.usage.models import LATENCY_MS

_EDGES = (1, *LATENCY_MS, 2 * LATENCY_MS[-1])
"""Bucket n goes from the n-th of these to below the next. The last one has no end; it is taken to double as the others do."""


def percentiles(buckets: Sequence[int], *hundredths: int) -> list[int]:
    """What so many of 100 events took at most, in milliseconds, for each of ``hundredths``, which ascend; 0 for no events. Right within its
    bucket, in which events are taken to lie evenly on the logarithmic scale."""
    total, below, number = sum(buckets), 0, 0
    if not total:
        return [0] * len(hundredths)
    found = []
    for share in hundredths:
        wanted = math.ceil(total * share / 100)
        while below + buckets[number] < wanted:
            below += buckets[number]
            number += 1
        low, high = _EDGES[number], _EDGES[number + 1]
        found.append(int(low * (high / low) ** ((wanted - below - 0.5) / buckets[number])))
    return found
