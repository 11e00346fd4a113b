"""The model endpoint while its gateway is killed: each call is counted once, what a caller saw the end of exactly."""

from pathlib import Path

import pytest

from tests.conftest import Databases
from tests.model_proof import away, prove


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_killed_gateway_loses_no_call(databases: Databases, tmp_path: Path) -> None:
    said = await prove(databases, tmp_path, calls=50, kills=1, callers=15)
    assert said["kills"] == 1 and said["exact, and the caller saw the end"] >= 10 and said["estimated"]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_deployment_service_that_is_away_delays_nobody_for_long(databases: Databases, tmp_path: Path) -> None:
    """It goes while thirty streams run: their callers wait one try, and each call is counted exactly when it is back."""
    assert await away(databases, tmp_path, callers=30) == 30
