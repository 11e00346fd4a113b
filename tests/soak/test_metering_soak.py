"""A million events, ten kills."""

import time
from pathlib import Path

import pytest

from tests.metering_proof import prove


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_million_events_and_ten_kills(tmp_path: Path) -> None:
    started = time.monotonic()
    proof = await prove(tmp_path, events=1_000_000, kills=10, people=20)
    print(
        f"\n{proof.events:,} events in {proof.sent:,} reports, {proof.kills} kills, {proof.failures} failed calls: each once, "
        f"sums equal a recount, {time.monotonic() - started:.0f} s"
    )
