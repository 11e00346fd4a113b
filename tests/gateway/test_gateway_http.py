"""Errors, metadata, limits, headers, health and metrics."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from gateway_fakes import DEPLOYMENT_ID, Platform, Stack, running
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import HTTP_STATUS
from gateway.settings import GatewaySettings

pytestmark = pytest.mark.asyncio

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["thing", "id", "count", "parts", "extra", "labels", "tags", "flag", "madeAt", "note"]), inner
        )
    ),
    max_leaves=20,
)


async def test_codes(stack: Stack) -> None:
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        stack.platform.fail.append(code)
        answer = await stack.client.get(f"/v1/deployments/{DEPLOYMENT_ID}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["status"]) == (HTTP_STATUS[code.value[0]], answer.status_code, code.name)
    stack.platform.fail.append(grpc.StatusCode.UNAUTHENTICATED)
    assert (await stack.client.get("/v1/deployments/x")).headers["www-authenticate"] == "Bearer"


async def test_details_and_retry_after(stack: Stack) -> None:
    answer = await stack.client.get("/v1/deployments/details")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    error = answer.json()["error"]
    assert (error["message"], error["status"]) == ("too many calls", "RESOURCE_EXHAUSTED")
    assert error["details"][0] == {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "RATE_LIMITED",
        "domain": "clawplane",
    }
    assert error["details"][1]["retryDelay"] == "1.500s"
    assert error["details"][2] == {"@type": "type.googleapis.com/nobody.Knows"}


async def test_nothing_of_the_inside_leaks(stack: Stack) -> None:
    answer = await stack.client.get("/v1/deployments/boom")
    assert answer.status_code == 500
    assert "RuntimeError" not in answer.text and "secret" not in answer.text


async def test_unreachable_service() -> None:
    async with running(Platform()) as stack, grpc.aio.insecure_channel("127.0.0.1:1") as dead:
        from gateway.app import create_app

        app = create_app(stack.settings, dict.fromkeys(("clawplane.user.v1", "clawplane.deployment.v1"), dead), list)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t", trust_env=False) as client:
            answer = await client.get("/v1/payments")
            assert answer.status_code == 503 and "127.0.0.1" not in answer.text
            ready = await client.get("/readyz")
            assert ready.status_code == 503
            assert set(ready.json()["parts"].values()) == {"unreachable"}


async def test_unexpected_exception(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.request.build", lambda *_: 1 / 0)
    answer = await stack.client.get("/v1/payments", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].endswith("mine.") and "division" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-request-id"] == "mine"


async def test_deadline() -> None:
    async with running(Platform(), call_timeout_s=0.2) as stack:
        assert (await stack.client.get("/v1/deployments/slow")).status_code == 504


async def test_unknown_path_and_method(stack: Stack) -> None:
    for path in (
        "/nope",
        "/v1/deployments/",
        "/v1/deployments/x:nope",
        "/v1//payments",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
    ):
        answer = await stack.client.get(path)
        assert (answer.status_code, answer.json()["error"]["status"]) == (404, "NOT_FOUND"), path
    wrong = await stack.client.put("/v1/blacklist/x")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (405, "DELETE, GET, HEAD", 405)
    assert (await stack.client.patch("/v1/deployments")).headers["allow"] == "GET, HEAD, POST"
    assert (await stack.client.delete("/healthz")).headers["allow"] == "GET, HEAD"
    head = await stack.client.head(f"/v1/deployments/{DEPLOYMENT_ID}")
    assert (head.status_code, head.content) == (200, b"")


async def test_forwarded_metadata(stack: Stack) -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    headers = {
        "authorization": "Bearer mine",
        "clawplane-org": "org_1",
        "x-request-id": "r.1",
        "traceparent": trace,
        "x-other": "no",
    }
    answer = await stack.client.get("/v1/deployments/x", headers=headers)
    seen = stack.platform.metadata[-1]
    assert {name: seen.get(name) for name in headers} == {**headers, "x-other": None}
    assert answer.headers["x-request-id"] == "r.1"
    assert 25 < stack.platform.deadlines[-1] < 31
    await stack.client.get("/v1/deployments/x")
    # Without a credential of the caller's there is none: the gateway's own must not stand in.
    assert "authorization" not in stack.platform.metadata[-1]
    for bad in ("x" * 65, "a b", "a;b", "\u00e9"):
        made = (await stack.client.get("/healthz", headers={"x-request-id": bad.encode("latin-1")})).headers["x-request-id"]
        assert made != bad and 0 < len(made) <= 64
    await stack.client.get("/v1/deployments/x", headers={"traceparent": "nonsense"})
    assert "traceparent" not in stack.platform.metadata[-1]
    for bad_value in (b"Bearer \xff", b"Bearer " + b"x" * 5000):
        refused = await stack.client.get("/v1/deployments/x", headers={"authorization": bad_value})
        assert refused.status_code == 400 and "authorization" in refused.text
    twice = await stack.client.get("/v1/deployments/x", headers=[("authorization", "a"), ("authorization", "b")])
    assert twice.status_code == 400


async def chunks(total: int, sent: list[int]) -> AsyncIterator[bytes]:
    """A body without a length."""
    for _ in range(total // 65536):
        sent.append(65536)
        yield b" " * 65536
        await asyncio.sleep(0)


async def test_huge_bodies(stack: Stack) -> None:
    announced = await stack.client.post("/v1/echo", content=b" " * (1024 * 1024 + 1))
    assert (announced.status_code, announced.json()["error"]["code"]) == (413, 413)
    counted = await stack.client.post("/v1/echo", content=chunks(4 * 1024 * 1024, []))
    assert counted.status_code == 413
    webhook = await stack.client.post("/webhooks/stripe", content=chunks(600 * 1024 + 65536, []))
    assert webhook.status_code == 413
    assert "TOO_LARGE" in webhook.text
    fits = await stack.client.post("/v1/echo", content=chunks(1024 * 1024, []))
    assert fits.status_code == 200


async def test_security_headers(stack: Stack) -> None:
    for path in ("/v1/payments", "/nope", "/healthz"):
        headers = (await stack.client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert headers["cache-control"] == "no-store"
        assert "strict-transport-security" not in headers
    async with running(Platform(), public_url="https://clawplane.test") as https:
        assert "strict-transport-security" in (await https.client.get("/healthz")).headers


async def test_health_and_metrics(stack: Stack) -> None:
    assert (await stack.client.get("/healthz")).json() == {"status": "ok"}
    assert (await stack.client.get("/readyz")).json()["status"] == "ready"
    await stack.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    unready = await stack.client.get("/readyz")
    assert (unready.status_code, unready.json()["parts"]["clawplane.user.v1"]) == (503, "not serving")
    await stack.client.get("/v1/deployments/secret-id?pageSize=1")
    await stack.client.get("/nope/secret-id")
    text = (await stack.client.get("/metrics")).text
    assert 'clawplane_gateway_requests_total{method="GET",route="/v1/deployments/{id}",status="400"}' in text
    assert 'route="unmatched",status="404"' in text and "secret-id" not in text
    assert "clawplane_gateway_request_seconds_bucket" in text


async def test_settings_refuse_dangerous_combinations() -> None:
    good = "whsec_0123456789abcdef"
    for values in (
        {"stripe_webhook_secrets": [""]},
        {"sandbox_enabled": True},
        {"sandbox_enabled": True, "sandbox_webhook_secret": good, "stripe_webhook_secrets": [good]},
        {"sandbox_enabled": True, "sandbox_webhook_secret": good, "http_host": "0.0.0.0"},
    ):
        with pytest.raises(ValueError, match="CLAWPLANE_|loopback"):
            GatewaySettings(**values)  # type: ignore[arg-type]
    assert GatewaySettings(http_host="::", http_port=1).own_base_url() == "http://[::1]:1"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=300),
    value=JSON,
    query=st.text(max_size=40),
    key=st.sampled_from(["thing.count", "note", "thing.made_at", "x"]),
)
async def test_random_input_is_never_a_defect(stack: Stack, raw: bytes, value: object, query: str, key: str) -> None:
    answers = [
        await stack.client.post("/v1/echo", content=raw),
        await stack.client.post("/v1/echo", json=value),
        await stack.client.patch("/v1/echo/x", json=value),
        await stack.client.post("/webhooks/stripe", content=raw, headers={"stripe-signature": raw[:50].hex()}),
        await stack.client.get("/v1/echo", params={key: query}),
    ]
    for answer in answers:
        assert answer.status_code < 500, answer.text
        assert "Traceback" not in answer.text
        assert answer.status_code == 200 or answer.json()["error"]["code"] == answer.status_code
