"""The ledger while the service and the database are killed: nothing acknowledged is lost, nothing counts twice."""

from pathlib import Path

import pytest

from tests.metering_proof import prove


@pytest.mark.timeout(300)
async def test_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    proof = await prove(tmp_path, events=10_000, kills=2)
    assert proof.kills == 2 and proof.failures > 0
