"""Pages of other origins: an exact list, and nothing for anybody else."""

import pytest
from gateway_fakes import Platform, running
from pydantic import ValidationError

from gateway.settings import GatewaySettings

ORIGIN = "https://app.example.com"
PREFLIGHT = {"access-control-request-method": "PATCH", "access-control-request-headers": "authorization,content-type,clawplane-org"}


async def test_a_listed_origin_may_call() -> None:
    async with running(Platform(), cors_origins=[ORIGIN, "http://localhost:3000"]) as stack:
        asked = await stack.client.options("/v1/deployments/x", headers=PREFLIGHT | {"origin": ORIGIN})
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == ORIGIN
        assert "PATCH" in asked.headers["access-control-allow-methods"] and "clawplane-org" in asked.headers["access-control-allow-headers"].lower()
        answer = await stack.client.get("/v1/deployments/x", headers={"origin": ORIGIN, "authorization": "Bearer mine"})
        assert answer.headers["access-control-allow-origin"] == ORIGIN and "x-request-id" in answer.headers["access-control-expose-headers"]
        # Errors too, or a page could not read what is wrong; and no cookie ever counts.
        wrong = await stack.client.put("/v1/deployments", headers={"origin": ORIGIN})
        assert wrong.status_code == 405 and wrong.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-credentials" not in answer.headers and "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("origin", ["https://evil.example.com", "https://app.example.com.evil.com", "http://app.example.com", "null"])
async def test_another_origin_gets_nothing(origin: str) -> None:
    async with running(Platform(), cors_origins=[ORIGIN]) as stack:
        asked = await stack.client.options("/v1/deployments/x", headers=PREFLIGHT | {"origin": origin})
        assert asked.status_code == 400 and "access-control-allow-origin" not in asked.headers
        answer = await stack.client.get("/v1/deployments/x", headers={"origin": origin, "authorization": "Bearer mine"})
        assert "access-control-allow-origin" not in answer.headers


async def test_without_a_list_there_is_no_cors() -> None:
    async with running(Platform()) as stack:
        answer = await stack.client.get("/v1/deployments/x", headers={"origin": ORIGIN, "authorization": "Bearer mine"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["*", "app.example.com", "https://app.example.com/", "https://*.example.com", "ftp://app.example.com"])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValidationError, match="https://app.example.com"):
        GatewaySettings(cors_origins=[origin])
