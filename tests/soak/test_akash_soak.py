"""A hundred bots at once over twenty providers of which six are bad."""

import time
from pathlib import Path

import pytest

from tests.conftest import Databases
from tests.learning import learning_stack, prove
from tests.simulators.akash import AkashSimulator

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


async def test_a_hundred_over_twenty(databases: Databases, tmp_path: Path) -> None:
    with AkashSimulator() as console:
        async with learning_stack(tmp_path, databases.make(), console) as stack:
            began = time.monotonic()
            failures = await prove(stack, console, deployments=100, providers=20, bad=6)
            print(f"\n{databases.engine}: 100 ACTIVE in {time.monotonic() - began:.0f} s; failures before exclusion: {failures}")
