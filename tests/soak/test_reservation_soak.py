"""Eight processes, one organization: a minute of reserving, settling, renewing, releasing and being late, with kills."""

from pathlib import Path

import pytest

from tests.conftest import Databases
from tests.reservation_proof import prove


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_eight_processes_never_hold_more_than_there_is(databases: Databases, tmp_path: Path) -> None:
    said = await prove(databases, tmp_path, processes=8, callers=64, seconds=60, kills=6)
    print("\n" + ", ".join(f"{count:,} {what}" for what, count in said.most_common()))
    assert said["granted"] > 500 and said["refused"] > 50 and said["settled"] > 100 and said["looks"] > 200, said
