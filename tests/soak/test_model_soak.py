"""A thousand calls of the model endpoint with random breaks, retries, and kills of the gateway."""

from pathlib import Path

import pytest

from tests.conftest import Databases
from tests.model_proof import prove

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


async def test_a_thousand_calls(databases: Databases, tmp_path: Path) -> None:
    said = await prove(databases, tmp_path, calls=1000, kills=8)
    print(f"\n{databases.engine}: {dict(said)}")
    assert said["kills"] == 8 and said["exact, and the caller saw the end"] >= 400
