"""The dashboard over real HTTP: who gets in, what forms may do, what pages must not say, and how quick they are."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import user_service_pb2
from gateway.dashboard.chat import Chat, _is_inside, _Outside
from gateway.dashboard.render import exact_money, relative, small_money
from gateway.dashboard.visit import own_path
from services.deployment_svc.deployments.models import Deployment
from services.kit import auth, keys
from services.kit.columns import now
from services.kit.db import ALL
from services.user_svc.sessions import repository as sessions
from services.user_svc.users.models import User
from tests.browser import history
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running

PAGES = ("", "/deployments", "/deployments/new", "/usage", "/usage?days=90&show=tokens", "/usage?by=key&days=1", "/prices", "/providers", "/providers/outcomes", "/webhooks", "/webhooks?of=people", "/users")
OPERATORS = ("/prices", "/providers", "/providers/outcomes", "/webhooks", "/webhooks?of=people", "/users")
COOKIE = "clawplane"


class Window(httpx.AsyncClient):
    """A browser without scripts."""

    async def submit(self, path: str, on: str, **fields: Any) -> httpx.Response:
        """Sends a form with the proof that stands on a page."""
        return await self.post(f"/dashboard{path}", data={"csrf": await self.csrf(on)} | fields)

    async def csrf(self, on: str) -> str:
        """The proof that a page's forms carry."""
        found = re.search(r'name="csrf" value="([0-9a-f]{64})"', (await self.get(f"/dashboard{on}")).text)
        assert found
        return found.group(1)


def window(stack: Stack, token: str = "", **headers: str) -> Window:
    """A browser, signed in with a session's token."""
    return Window(base_url=stack.url, trust_env=False, timeout=30, cookies={COOKIE: token} if token else {}, headers=headers)


@asynccontextmanager
async def signed_in(stack: Stack) -> AsyncIterator[Window]:
    """The operator's browser, let in by a link as a person would be."""
    async with window(stack) as browser:
        answer = await browser.post("/dashboard/sign-in", data={"token": await stack.link()})
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
        yield browser


async def customer(stack: Stack) -> tuple[Person, Window]:
    """A person who is no operator, signed in."""
    person = await stack.person()
    db = history.database(stack, "user_svc")
    async with db.transaction(ALL) as session:
        _, token = sessions.start(session, await session.get_one(User, person.user.id), "test")
    await db.close()
    return person, window(stack, token)


async def test_the_way_in_and_out(stack: Stack) -> None:
    link = await stack.link()
    async with window(stack) as browser:
        away = await browser.get("/dashboard/usage?days=7")
        assert (away.status_code, away.headers["location"]) == (303, "/dashboard/sign-in?next=/dashboard/usage%3Fdays%3D7")
        assert (await browser.get("/")).headers["location"] == "/dashboard"
        # To look at a link does not use it up.
        for _ in range(3):
            assert "works once" in (await browser.get("/dashboard/sign-in", params={"token": link})).text
        answer = await browser.post("/dashboard/sign-in", data={"token": link, "next": "/dashboard/usage"})
        assert answer.headers["location"] == "/dashboard/usage"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Max-Age=604800" in cookie and "Path=/" in cookie
        token = browser.cookies[COOKIE]
        assert keys.parse(token, auth.SESSION, "ses") and token not in (page := await browser.get("/dashboard")).text
        assert page.status_code == 200 and "operator@clawplane.local" in page.text
        again = await window(stack).post("/dashboard/sign-in", data={"token": link})
        assert again.status_code == 404 and "does not work" in again.text and "set-cookie" not in again.headers
        out = await browser.submit("/sign-out", "")
        assert out.headers["location"] == "/dashboard/sign-in?done=signed-out" and 'clawplane=""' in out.headers["set-cookie"]
    async with window(stack, token) as thief:
        # The session has ended in the services, not in one browser alone.
        await eventually(lambda: _is_away(thief), timeout_s=2)


async def _is_away(browser: Window) -> bool:
    return (await browser.get("/dashboard")).status_code == 303


@pytest.mark.any_engine
@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_over_tls_the_cookie_is_the_hosts_own(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make(), gateway={"public_url": "https://claws.example.com"}) as stack, window(stack) as browser:
        answer = await browser.post("/dashboard/sign-in", data={"token": await stack.link()}, headers={"origin": "https://claws.example.com"})
        assert answer.headers["set-cookie"].startswith("__Host-clawplane=sess_") and "Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("path", ["//evil.example", "https://evil.example", "/dashboard//evil.example", "/dashboardx", "/v1/users", "/dashboard\\evil", "/dashboard/\nx", ""])
def test_signing_in_leads_nowhere_else(path: str) -> None:
    assert own_path(path) == "/dashboard"
    assert own_path("/dashboard/usage?days=7") == "/dashboard/usage?days=7"


async def test_forms_of_others_do_nothing(stack: Stack) -> None:
    person, browser = await customer(stack)
    d = await stack.order(person)
    async with browser:
        path = f"/dashboard/deployments/{d.id}/cancel"
        proof = await browser.csrf(f"/deployments/{d.id}")
        _, other = await customer(stack)
        async with other:
            foreign = await other.csrf("/deployments/new")
        for data, headers in (
            ({}, {}), ({"csrf": "0" * 64}, {}), ({"csrf": foreign}, {}), ({"csrf": "ä"}, {}),
            ({"csrf": proof}, {"origin": "https://evil.example"}), ({"csrf": proof}, {"sec-fetch-site": "cross-site"}), ({"csrf": proof}, {"origin": "null"}),
        ):  # fmt: skip
            answer = await browser.post(path, data=data, headers=headers)
            assert answer.status_code == 403 and "This is not for you" in answer.text
        # A link to it does nothing either.
        again = await browser.get(path)
        assert (again.status_code, again.headers["location"]) == (303, f"/dashboard/deployments/{d.id}")
        assert (await stack.get(d.id)).state == deployment_pb2.STATE_PENDING
        assert (await browser.post(path, data={"csrf": proof}, headers={"origin": stack.url})).status_code == 303
        assert (await stack.get(d.id)).state == deployment_pb2.STATE_CANCELED


async def test_nobody_sees_or_changes_what_is_anothers(stack: Stack) -> None:
    victim, stranger = await stack.person(), (await customer(stack))[1]
    d = await stack.order(victim)
    none = f"dep_{'0' * 32}"
    async with stranger:
        for suffix in ("", "/stream"):
            theirs, nobodys = [await stranger.get(f"/dashboard/deployments/{wanted}{suffix}") for wanted in (d.id, none)]
            assert theirs.status_code == nobodys.status_code == 404
            assert _bare(theirs.text, d.id) == _bare(nobodys.text, none)
        for action in ("retry", "cancel", "close", "delete", "rotate", "change", "chat"):
            answer = await stranger.submit(f"/deployments/{d.id}/{action}", "/deployments/new", message="hello", display_name="mine")
            assert answer.status_code == 404, action
        assert d.id not in (await stranger.get("/dashboard/deployments")).text
        assert (await stranger.get("/dashboard/deployments/nonsense")).status_code == 404
        for path in OPERATORS:
            answer = await stranger.get(f"/dashboard{path}")
            assert answer.status_code == 403 and "permission" in answer.text
        for path in ("/providers/exclude", "/providers/admit", "/webhooks/replay", "/users/change"):
            answer = await stranger.submit(path, "/deployments/new", provider_address="p", reason="r", days="7", id=victim.user.id, tier="pro", active="0")
            assert answer.status_code == 403, path
        page = (await stranger.get("/dashboard")).text
        assert "Operator" not in page and "/dashboard/users" not in page
    assert (await stack.get(d.id)).state == deployment_pb2.STATE_PENDING


def _bare(text: str, wanted: str) -> str:
    """A page without what differs by itself: the request's id and what was asked for."""
    return re.sub(r"[0-9a-f]{12}-\d+", "", text.replace(wanted, ""))


@pytest.mark.any_engine
async def test_every_page_has_the_strict_policy(stack: Stack) -> None:
    async with signed_in(stack) as browser:
        for path in (*PAGES, "/sign-in?next=/dashboard", "/nothing", "/usage/nothing"):
            answer = await browser.get(f"/dashboard{path}")
            assert answer.status_code == (404 if path.endswith("/nothing") else 200), path
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert not re.search(r"<script(?![^>]* src=\"/static/)|<style|\sstyle=|\son[a-z]+=|javascript:|(src|href|action)=\"(https?:)?//(?!127\.0\.0\.1)", answer.text), path
            assert answer.headers["cache-control"] == "no-store"


async def test_whoever_has_nothing_yet_is_told_what_to_do(stack: Stack) -> None:
    _, browser = await customer(stack)
    async with browser:
        for path, words in (("", "Order your first bot"), ("/deployments", "Order your first bot"), ("/deployments?state=failed", "Nothing fits"), ("/usage", "No usage")):
            answer = await browser.get(f"/dashboard{path}")
            assert answer.status_code == 200 and words in answer.text, path


async def test_what_people_type_stays_text(stack: Stack) -> None:
    evil = '"><script>alert(1)</script>'
    async with signed_in(stack) as browser:
        made = await browser.submit("/deployments/new", "/deployments/new", model="claude-opus-4.5", channel="web", request_id="")
        path = made.headers["location"].removeprefix("/dashboard")
        assert (await browser.submit(f"{path}/change", path, display_name=evil)).status_code == 303
        for shown in (path, "/deployments", "", f"/users?prefix={evil}", f"/providers?exclude={evil}", f"/providers/outcomes?address={evil}", f"/deployments?model={evil}"):
            assert "<script>alert" not in (await browser.get(f"/dashboard{shown}")).text, shown
        assert "<script>alert" not in (await browser.submit("/deployments/new", "/deployments/new", model=evil, channel=evil)).text
        await browser.submit(f"{path}/cancel", path)


async def test_the_order_form_names_what_is_wrong_and_orders_once(stack: Stack) -> None:
    person, browser = await customer(stack)
    secret = "123456789:short"
    async with browser:
        wrong = await browser.submit("/deployments/new", "/deployments/new", model="claude-opus-4.5", channel="telegram", channel_token=secret)
        assert wrong.status_code == 400 and 'id="channel_token-problem"' in wrong.text and secret not in wrong.text
        assert re.search(r'value="telegram" required checked', wrong.text)
        wrong = await browser.submit("/deployments/new", "/deployments/new", model="none-such", channel="web")
        assert wrong.status_code == 400 and 'id="model-problem"' in wrong.text
        page = (await browser.get("/dashboard/deployments/new")).text
        sent = {name: re.search(rf'name="{name}" value="([^"]+)"', page).group(1) for name in ("csrf", "request_id")}  # type: ignore[union-attr]
        sent |= {"model": "claude-opus-4.5", "channel": "web"}
        first, again = [await browser.post("/dashboard/deployments/new", data=sent) for _ in range(2)]
        assert first.status_code == 303 and first.headers["location"] == again.headers["location"]
        for _ in range(3):
            refused = await browser.submit("/deployments/new", "/deployments/new", model="gpt-3.2", channel="telegram", channel_token=f"123456789:{'B' * 34}{_}")
        assert refused.status_code == 429 and "notice-warn" in refused.text, re.findall(r"<p class=.notice.*", refused.text)
    listed = await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    assert len(listed.deployments) == 3


async def test_events_come_as_a_stream(stack: Stack) -> None:
    person, browser = await customer(stack)
    d = await stack.order(person)
    async with browser, browser.stream("GET", f"/dashboard/deployments/{d.id}/stream") as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        seen = ""
        async for line in answer.aiter_lines():
            seen += line
            if "STATE_PENDING" in line:
                assert (await stack.sandbox_act(d, "pay")).status_code == 200
            if '"state.active"' in seen:
                break
    assert '"state.deploying"' in seen and '"state.active"' in seen


@pytest.mark.any_engine
async def test_a_stream_without_its_visitor_is_refused_and_not_led_to_a_page(stack: Stack) -> None:
    """What follows events takes any 200 that is no stream for a defect of the server, as a sign-in page after a redirect."""
    person, browser = await customer(stack)
    d = await stack.order(person)
    paths = ("/dashboard/stream", f"/dashboard/deployments/{d.id}/stream")
    ended = {"cookie": f"{COOKIE}={browser.cookies[COOKIE]}"}
    async with browser, window(stack) as nobody, window(stack, **ended) as thief:
        assert (await browser.submit("/sign-out", "/deployments/new")).status_code == 303
        await eventually(lambda: _is_away(thief), timeout_s=2)
        for visitor in (nobody, thief):
            for path in paths:
                refused = await visitor.get(path)
                assert refused.status_code == 401 and refused.json()["error"]["status"] == "UNAUTHENTICATED"


async def test_chat_goes_to_the_bot_alone(databases: Databases, tmp_path: Path) -> None:
    """A bot of the local driver answers here; in production an address of the own network is not even asked."""
    async with running(tmp_path / "a", databases.make()) as stack:
        person, browser = await customer(stack)
        d = await stack.live(person)
        async with browser:
            said = await browser.submit(f"/deployments/{d.id}/chat", f"/deployments/{d.id}", message="Hello <b>you</b>")
            assert said.status_code == 200 and said.text.count('class="turn turn-bot"') == 1 and "<b>you</b>" not in said.text
            empty = await browser.submit(f"/deployments/{d.id}/chat", f"/deployments/{d.id}", message=" ")
            assert empty.status_code == 400 and "message-problem" in empty.text
            # Nobody else stops the bot.
            assert (await browser.submit(f"/deployments/{d.id}/close", f"/deployments/{d.id}")).status_code == 303
        await stack.until(d.id, deployment_pb2.STATE_CLOSED)
    async with running(tmp_path / "b", databases.make(), gateway={"sandbox_enabled": False}) as stack:
        person, browser = await customer(stack)
        d = await stack.order(person)
        db = history.database(stack, "deployment_svc")
        async with db.transaction(ALL) as session:
            row = await session.get_one(Deployment, d.id)
            row.state, row.provider_url, row.due_at = deployment_pb2.STATE_ACTIVE, stack.url, None
        await db.close()
        async with browser:
            refused = await browser.submit(f"/deployments/{d.id}/chat", f"/deployments/{d.id}", message="Hello")
            assert refused.status_code == 502 and "not one of the internet" in refused.text


async def test_a_bot_may_answer_in_pieces() -> None:
    async def bot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n")
        for piece in (b'{"reply": "in', b' two', b' pieces"}', b""):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()

    chat = Chat(allow_local=True)
    async with await asyncio.start_server(bot, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        assert await chat._ask(f"http://{host}:{port}", "hello") == ("in two pieces", "")
    await chat.close()


@pytest.mark.any_engine
async def test_a_wrong_request_id_is_no_missing_deployment(stack: Stack) -> None:
    person, browser = await customer(stack)
    d = await stack.order(person)
    async with browser:
        answer = await browser.submit(f"/deployments/{d.id}/retry", f"/deployments/{d.id}", request_id="nonsense")
        assert answer.status_code == 400 and "There is no such thing here" not in answer.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://10.1.2.3", "http://169.254.169.254/latest", "http://[::1]:9", "http://[fd00::1]", "http://0.0.0.0"])
def test_addresses_of_the_own_network_are_known_by_their_number(url: str) -> None:
    assert _is_inside(url) and not _is_inside("http://93.184.216.34") and not _is_inside("http://bots.example.com")


async def test_names_of_the_own_network_resolve_to_nothing() -> None:
    with pytest.raises(OSError, match="no address of the internet"):
        await _Outside().resolve("localhost", 80, socket.AF_INET)


@pytest.mark.any_engine
async def test_a_service_that_is_away_is_said_so(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make(), gateway={"call_timeout_s": 0.5}) as stack:
        async with signed_in(stack) as browser:
            assert stack.stack.grpc is not None
            await stack.stack.grpc.drain()
            answer = await browser.get("/dashboard")
            assert answer.status_code in (503, 504) and "does not answer" in answer.text and "<h1>" in answer.text
            stack.stack.grpc = None


@pytest.mark.alone
async def test_a_thousand_deployments_take_no_longer_than_a_blink(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        operator = await stack.sign_in()
        await history.plant(stack, operator)
        await history.many(stack, operator, 1000)
        token = operator.metadata[0][1].removeprefix("Bearer ")
        async with window(stack, token) as browser:
            slow: dict[str, float] = {}
            # What others do on the machine only adds: a page is as slow as in its quietest round.
            for _ in range(5):
                for path in [path for path in PAGES if slow.get(path, 100) >= 100]:
                    took = []
                    for _ in range(5):
                        answer = await browser.get(f"/dashboard{path}")
                        assert answer.status_code == 200
                        took.append(float(answer.headers["server-timing"].partition("dur=")[2]))
                    slow[path] = min(sorted(took)[2], slow.get(path, 1e9))
            print({path: f"{ms:.0f} ms" for path, ms in slow.items()})
            assert max(slow.values()) < 100, slow


def test_times_and_amounts_for_people() -> None:
    at = now()
    for seconds, words in ((0, "just now"), (90, "1 min ago"), (7300, "2 h ago"), (-90, "in 1 min"), (200_000, "2 d ago")):
        assert relative(at - timedelta(seconds=seconds), at) == words
    assert (exact_money("", "usd"), exact_money("1234.5", "usd"), exact_money("0.0012", "usd")) == ("0.00 USD", "1,234.50 USD", "0.0012 USD")
    assert exact_money("0.00000012", "usd") == "<0.000001 USD"
    # Never rounded to nothing.
    assert small_money(Decimal("0.00001")) == "<0.0001" and small_money(Decimal("0.5")) == "0.5000"


async def test_lists_page_and_keep_their_filters(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        operator = await stack.sign_in()
        await history.many(stack, operator, 120)
        async with window(stack, operator.metadata[0][1].removeprefix("Bearer ")) as browser:
            seen: list[str] = []
            path = "/dashboard/deployments?state=failed"
            while path:
                page = (await browser.get(path)).text
                seen += re.findall(r'<code class="id" data-copy>(dep_[0-9a-f]{32})', page)
                following = re.search(r'href="([^"]+)">Next page', page)
                path = following.group(1).replace("&amp;", "&") if following else ""
                assert not path or "state=failed" in urlsplit(path).query
            assert len(seen) == len(set(seen)) == 40
            bad = await browser.get("/dashboard/deployments?page_token=nonsense")
            assert bad.status_code == 400 and "belongs to another query" in bad.text


async def test_an_operator_who_loses_his_account_loses_the_pages(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack, signed_in(stack) as browser:
        operator = await stack.sign_in()
        assert (await browser.get("/dashboard/users")).status_code == 200
        off = user_service_pb2.UpdateUserAccountRequest(id=operator.user.id, is_active=False)
        await stack.users.UpdateUserAccount(off, metadata=stack.operator)
        started = time.monotonic()
        await eventually(lambda: _is_away(browser), timeout_s=2)
        assert time.monotonic() - started < 2
