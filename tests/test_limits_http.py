"""Limits as they are met over HTTP: 429, when to come back, and whose network it is."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Person, Stack, running

pytestmark = pytest.mark.any_engine


def limited(answer: httpx.Response, rate: str) -> None:
    """An answer that says which limit was reached, and when to come back."""
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 3600
    error = answer.json()["error"]
    assert error["status"] == "RESOURCE_EXHAUSTED" and rate in error["message"]
    reasons = [detail.get("reason") for detail in error["details"]]
    assert "RATE_LIMITED" in reasons and any("retryDelay" in detail for detail in error["details"])


async def who_am_i(stack: Stack, person: Person | None = None, **headers: str) -> httpx.Response:
    """WhoAmI as somebody."""
    if person is not None:
        headers |= dict(person.metadata)
    return await stack.http.get("/v1/access:whoAmI", headers=headers)


async def test_limits_over_http(tmp_path: Path, databases: Any) -> None:
    user = {"rate_limit": "5/hour", "failed_rate_limit": "3/hour"}
    async with running(tmp_path, databases.make(), user=user, gateway={"trusted_proxies": ["127.0.0.1"]}) as stack:
        eager, other = await stack.person(), await stack.person()
        for _ in range(5):
            assert (await who_am_i(stack, eager)).status_code == 200
        limited(await who_am_i(stack, eager), "5/hour")
        assert (await who_am_i(stack, other)).status_code == 200
        guess = {"authorization": "Bearer sess_guess"}
        for _ in range(4):
            assert (await who_am_i(stack, **guess, **{"x-forwarded-for": "192.0.2.1"})).status_code == 401
        limited(await who_am_i(stack, **guess, **{"x-forwarded-for": "192.0.2.1"}), "3/hour")
        # The gateway forwards for everybody, and is not held up for one of them.
        assert (await who_am_i(stack, **guess, **{"x-forwarded-for": "192.0.2.2"})).status_code == 401
        assert (await who_am_i(stack, other, **{"x-forwarded-for": "192.0.2.1"})).status_code == 200
