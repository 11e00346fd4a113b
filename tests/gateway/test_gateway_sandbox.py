"""The sandbox's page, from the button to the payment event."""

import grpc
import pytest
from gateway_fakes import DEPLOYMENT_ID, SERVICE_TOKEN, SESSION_ID, Platform, Stack, running

from clawplane.deployment.v1 import payment_pb2
from gateway import sandbox_events

pytestmark = pytest.mark.asyncio
PAGE = f"/sandbox/checkout/{SESSION_ID}"
HTML = {"accept": "text/html"}
JSON = {"accept": "application/json"}


async def test_page(stack: Stack) -> None:
    page = await stack.client.get(PAGE, headers=HTML)
    assert page.status_code == 200
    assert "29.00 USD" in page.text and "no money moves" in page.text and "31 January 2030, 12:00" in page.text
    assert "&lt;b&gt;Bot&lt;/b&gt;" in page.text and "<script" not in page.text and "style=" not in page.text
    for action in ("pay", "fail", "expire"):
        assert f'action="{PAGE}/{action}"' in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; form-action 'self'") and "unsafe" not in policy
    assert page.headers["referrer-policy"] == "same-origin" and page.headers["cache-control"] == "no-store"
    style = await stack.client.get("/static/sandbox.css")
    assert (style.status_code, style.headers["content-type"]) == (200, "text/css; charset=utf-8")


async def test_pay_and_refund(stack: Stack) -> None:
    answer = await stack.client.post(
        f"{PAGE}/pay", headers={**HTML, "sec-fetch-site": "same-origin", "origin": stack.settings.public_url}
    )
    assert (answer.status_code, answer.headers["location"]) == (303, PAGE)
    event = stack.platform.events[0]
    assert (event.provider, event.kind, event.paid) == ("sandbox", payment_pb2.PAYMENT_EVENT_KIND_COMPLETED, True)
    assert (event.session_id, event.payment_id, event.deployment_id) == (SESSION_ID, "pi_sandbox_0123456789abcdef", DEPLOYMENT_ID)
    assert (event.amount_minor, event.currency, event.livemode) == (2900, "usd", False)
    assert event.external_id.startswith("evt_sandbox_")
    assert {one["authorization"] for one in stack.platform.metadata} == {SERVICE_TOKEN}
    page = await stack.client.get(PAGE, headers=HTML)
    assert "Paid. The deployment starts now." in page.text and "https://example.test/done" in page.text and "/pay" not in page.text
    again = await stack.client.post(f"{PAGE}/pay", headers=HTML)
    assert (again.status_code, again.headers["location"]) == (303, PAGE)
    assert len(stack.platform.events) == 1
    tool = await stack.client.post(f"{PAGE}/pay", headers=JSON)
    assert (tool.status_code, tool.json()["error"]["status"]) == (400, "FAILED_PRECONDITION")
    refund = await stack.client.post(f"{PAGE}/refund", headers=JSON)
    assert refund.json() == {"status": "complete", "webhook": "delivered"}
    assert (stack.platform.events[1].kind, stack.platform.events[1].refunded_minor) == (
        payment_pb2.PAYMENT_EVENT_KIND_REFUNDED,
        2900,
    )
    assert "Paid back." in (await stack.client.get(PAGE, headers=HTML)).text


async def test_fail_then_expire(stack: Stack) -> None:
    assert (await stack.client.post(f"{PAGE}/fail", headers=JSON)).json()["status"] == "open"
    assert stack.platform.events[0].kind == payment_pb2.PAYMENT_EVENT_KIND_ASYNC_FAILED
    page = await stack.client.get(PAGE, headers=HTML)
    assert "The bank refused" in page.text and f"{PAGE}/pay" in page.text
    assert (await stack.client.post(f"{PAGE}/expire", headers=JSON)).json()["status"] == "expired"
    assert stack.platform.events[1].kind == payment_pb2.PAYMENT_EVENT_KIND_EXPIRED
    assert "closed without payment" in (await stack.client.get(PAGE, headers=HTML)).text
    assert (await stack.client.get(PAGE, headers=JSON)).json() == {"status": "expired"}


async def test_webhook_is_sent_again(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_events, "TRY_DELAYS_S", (0.0, 0.01, 0.01))
    stack.platform.fail = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
    answer = await stack.client.post(f"{PAGE}/pay", headers=JSON)
    assert answer.json() == {"status": "complete", "webhook": "delivered"}
    assert len(stack.platform.events) == 1


async def test_webhook_given_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_events, "TRY_DELAYS_S", (0.0, 0.0))
    stack.platform.fail = [grpc.StatusCode.UNAVAILABLE] * 2
    answer = await stack.client.post(f"{PAGE}/pay", headers=HTML)
    assert answer.headers["location"] == PAGE + "?webhook=delayed"
    assert "did not answer the webhook" in (await stack.client.get(answer.headers["location"], headers=HTML)).text


async def test_other_sites_are_refused(stack: Stack) -> None:
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.test"},
        {"origin": "null"},
        {"origin": "https://evil.test", "sec-fetch-site": "same-origin"},
    ):
        for accept in (HTML, JSON):
            assert (await stack.client.post(f"{PAGE}/pay", headers={**headers, **accept})).status_code == 403
    assert stack.platform.events == []


async def test_unknown_sessions(stack: Stack) -> None:
    for name in ("cs_sandbox_" + "9" * 20, "cs_test_1", "x", SESSION_ID + "%0a"):
        for answer in (
            await stack.client.get(f"/sandbox/checkout/{name}", headers=HTML),
            await stack.client.get(f"/sandbox/checkout/{name}", headers=JSON),
        ):
            assert answer.status_code == 404
    assert (await stack.client.post(f"{PAGE}/steal", headers=HTML)).status_code == 404
    assert (await stack.client.get(f"{PAGE}/pay", headers=HTML)).status_code == 405


async def test_dangerous_links_are_not_shown() -> None:
    platform = Platform()
    platform.session.status = 2  # type: ignore[assignment]
    platform.session.success_url = "javascript:alert(1)"
    async with running(platform) as stack:
        assert "javascript" not in (await stack.client.get(PAGE, headers=HTML)).text
