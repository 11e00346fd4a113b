"""Fixtures of the gateway's tests."""

from collections.abc import AsyncIterator

import pytest_asyncio
from gateway_fakes import Platform, Stack, running


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[Stack]:
    """A running gateway in front of recording servicers."""
    async with running(Platform()) as started:
        yield started
