"""The pages of identity and access over real HTTP: the ways in, organizations, invitations, keys, accounts; and what nobody may there."""

import csv
import io
import re
import secrets
import uuid
from datetime import timedelta
from typing import Any

import httpx
import orjson
import pytest

from clawplane.user.v1 import api_key_service_pb2, member_service_pb2, session_service_pb2
from gateway.dashboard.account import device
from gateway.dashboard.api_keys import groups
from gateway.dashboard.audit import deed
from gateway.exports import guarded
from gateway.settings import GatewaySettings
from services.kit import devkeys
from services.kit.columns import now
from services.kit.db import ALL
from services.user_svc.sessions import repository as sessions
from services.user_svc.users.models import User
from tests.browser import history
from tests.harness import Person, Stack, eventually
from tests.signing_in import GOOD, wrong
from tests.teams import invite, mailed_token, mails, team
from tests.test_dashboard import COOKIE, Window, _bare, window

# Pages show what the services answer; what those answer is asked of both engines elsewhere.
pytestmark = pytest.mark.any_engine

ORG = "clawplane-org"
PAGES = ("/account", "/organization", "/organizations/new", "/keys", "/keys/new", "/audit", "/audit?of=deployments", "/step-up", "/invitation?token=none")
DOORS = ("/sign-in", "/sign-in/password", "/sign-up", "/reset", "/mailbox")
OF_ROLES = {
    "viewer": {"invite": False, "keys": False, "audit": False, "delete": False},
    "developer": {"invite": False, "keys": True, "audit": False, "delete": False},
    "admin": {"invite": True, "keys": True, "audit": True, "delete": False},
    "owner": {"invite": True, "keys": True, "audit": True, "delete": True},
}


async def browser_of(stack: Stack, person: Person, org: str = "", *, fresh: bool = True) -> Window:
    """A person's browser; one that is not fresh signed in two hours ago."""
    db = history.database(stack, "user_svc")
    async with db.transaction(ALL) as session:
        row, token = sessions.start(session, await session.get_one(User, person.user.id), "test")
        row.fresh_at -= timedelta(hours=0 if fresh else 2)
    await db.close()
    browser = window(stack)
    for name, value in ((COOKIE, token), (ORG, org)):
        if value:
            browser.cookies.set(name, value, domain="127.0.0.1", path="/")
    return browser


async def code_of(stack: Stack, address: str) -> str:
    """The code in the newest mail to an address, as the mailbox page shows it to anybody."""
    async with window(stack) as browser:
        page = (await browser.get("/dashboard/mailbox", params={"to": address})).text
    found = re.search(r"^    ([2-9A-Z]{6})$", page, re.MULTILINE)
    assert found, page
    return found.group(1)


def address() -> str:
    return f"{secrets.token_hex(8)}@example.com"


async def is_in(browser: Window, email: str) -> bool:
    page = await browser.get("/dashboard/account")
    return page.status_code == 200 and email in page.text


async def test_a_code_signs_in_and_its_page_keeps_the_address(stack: Stack) -> None:
    email = address()
    async with window(stack) as browser:
        sent = await browser.post("/dashboard/sign-in", data={"email": email, "next": "/dashboard/keys?state=on"})
        assert (sent.status_code, sent.headers["location"]) == (303, "/dashboard/sign-in/code?next=/dashboard/keys%3Fstate%3Don")
        assert email not in sent.headers["location"] and "HttpOnly" in sent.headers["set-cookie"] and "Max-Age=600" in sent.headers["set-cookie"]
        for _ in range(2):
            # Whoever looks into the mail and comes back finds the page as it was.
            assert email in (await browser.get(sent.headers["location"])).text
        code = await code_of(stack, email)
        refused = await browser.post("/dashboard/sign-in/code", data={"code": wrong(code)})
        assert refused.status_code == 400 and "That did not work" in refused.text and code not in refused.text and COOKIE not in browser.cookies
        let_in = await browser.post("/dashboard/sign-in/code", data={"code": code.lower(), "next": "/dashboard/keys?state=on"})
        assert (let_in.status_code, let_in.headers["location"]) == (303, "/dashboard/keys?state=on")
        assert await is_in(browser, email)
        again = await browser.post("/dashboard/sign-in/code", data={"code": code})
        assert again.status_code == 303 and again.headers["location"].startswith("/dashboard/sign-in")
    async with window(stack) as other:
        assert (await other.get("/dashboard/sign-in/code")).headers["location"] == "/dashboard/sign-in"


async def test_no_door_tells_who_has_an_account(stack: Stack) -> None:
    known, unknown = (await stack.person()).user.email, address()
    async with window(stack) as browser:
        for path, fields in (
            ("/sign-in", {}), ("/reset", {}), ("/sign-up", {"password": GOOD}), ("/sign-in/password", {"password": GOOD}),
        ):  # fmt: skip
            answers = []
            for email in (known, unknown):
                browser.cookies.clear()
                answer = await browser.post(f"/dashboard{path}", data={"email": email, **fields})
                shown = await browser.get(answer.headers["location"]) if answer.status_code == 303 else answer
                answers.append((answer.status_code, answer.headers.get("location"), _bare(shown.text, email)))
            assert answers[0] == answers[1], path
        for path in ("/sign-in", "/reset", "/sign-in/password", "/sign-up"):
            bad = await browser.post(f"/dashboard{path}", data={"email": "nonsense", "password": GOOD})
            assert bad.status_code == 400 and 'id="email-problem"' in bad.text, path


async def test_signing_up_with_a_password_and_forgetting_it(stack: Stack) -> None:
    email, other = address(), "another-Zebra8-lantern-quilt"
    async with window(stack) as browser:
        short = await browser.post("/dashboard/sign-up", data={"email": email, "password": "short"})
        assert short.status_code == 400 and 'id="password-problem"' in short.text and 'value="short"' not in short.text
        sent = await browser.post("/dashboard/sign-up", data={"email": email, "password": GOOD, "full_name": "Ada <b>Example"})
        assert sent.headers["location"] == "/dashboard/sign-up/code"
        code = await code_of(stack, email)
        async with window(stack) as thief:
            # The code alone is worth nothing: it is tied to the browser in which the sign-up began.
            thief.cookies.set("clawplane-address", email)
            assert (await thief.post("/dashboard/sign-up/code", data={"code": code})).status_code != 200 and COOKIE not in thief.cookies
        assert (await browser.post("/dashboard/sign-up/code", data={"code": code})).headers["location"] == "/dashboard"
        page = (await browser.get("/dashboard/account")).text
        assert "Ada &lt;b&gt;Example" in page and "<b>Example" not in page
        first = browser.cookies[COOKIE]
        changed = await browser.submit("/account/password", "/account", old_password=GOOD, new_password=other)
        assert changed.headers["location"] == "/dashboard/account?done=password-changed"
        refused = await browser.submit("/account/password", "/account", old_password=GOOD, new_password=f"{other}!")
        assert refused.status_code == 403 and 'id="old_password-problem"' in refused.text and other not in refused.text
        # A sign-in ends the session that this browser had.
        assert (await browser.post("/dashboard/sign-in/password", data={"email": email, "password": other})).status_code == 303
        assert browser.cookies[COOKIE] != first
        async with window(stack, first) as stale:
            await eventually(lambda: _is_out(stale), timeout_s=2)
        reset = await browser.submit("/account/set-password", "/account")
        assert reset.headers["location"] == "/dashboard/reset/code"
        done = await browser.post("/dashboard/reset/code", data={"code": await code_of(stack, email), "password": GOOD})
        assert done.headers["location"] == "/dashboard/sign-in/password?done=password-set"
        await eventually(lambda: _is_out(browser), timeout_s=2)
        assert (await browser.post("/dashboard/sign-in/password", data={"email": email, "password": other})).status_code == 400
        assert (await browser.post("/dashboard/sign-in/password", data={"email": email, "password": GOOD})).status_code == 303


async def _is_out(browser: Window) -> bool:
    return (await browser.get("/dashboard/account")).status_code == 303


@pytest.mark.parametrize("path", ["/sign-in", "/sign-in/code", "/sign-in/password", "/sign-up", "/sign-up/code", "/reset", "/reset/code"])
async def test_other_sites_cannot_sign_anybody_in(stack: Stack, path: str) -> None:
    async with window(stack) as browser:
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
            answer = await browser.post(f"/dashboard{path}", data={"email": address(), "password": GOOD, "code": "ABCDEF"}, headers=headers)
            assert answer.status_code == 403 and "set-cookie" not in answer.headers
    async with window(stack) as browser:
        assert (await browser.get("/dashboard/sign-in/with/google", headers={"sec-fetch-site": "cross-site"})).status_code == 403


async def test_every_page_has_the_strict_policy_and_says_no_secret(stack: Stack) -> None:
    person = await stack.person()
    async with window(stack) as nobody, await browser_of(stack, person) as browser:
        for visitor, paths in ((nobody, DOORS), (browser, PAGES)):
            for path in paths:
                answer = await visitor.get(f"/dashboard{path}")
                assert answer.status_code == (404 if "invitation" in path else 200), path
                policy = answer.headers["content-security-policy"]
                assert "unsafe" not in policy and "default-src 'none'" in policy and "form-action 'self'" in policy
                assert not re.search(r"<script(?![^>]* src=\"/static/)|<style|\sstyle=|\son[a-z]+=|javascript:", answer.text), path
                assert answer.headers["cache-control"] == "no-store" and browser.cookies[COOKIE] not in answer.text
                # Whoever is not signed in is led to the door, with the way back.
                if visitor is browser:
                    away = await nobody.get(f"/dashboard{path}")
                    assert away.status_code == 303 and away.headers["location"].startswith("/dashboard/sign-in?next=/dashboard/"), path


@pytest.mark.parametrize("role", OF_ROLES)
async def test_each_role_is_offered_what_it_may_and_refused_the_rest(stack: Stack, role: str) -> None:
    made = await team(stack, *({role} - {"owner"}), "viewer2")
    may = OF_ROLES[role]
    async with await browser_of(stack, made.people[role], made.id) as browser:
        page = (await browser.get("/dashboard/organization")).text
        assert ("/dashboard/organization/invite" in page) == may["invite"] and ("/dashboard/organization/delete" in page) == may["delete"]
        assert ('href="/dashboard/keys"' in page) == may["keys"] and ('href="/dashboard/audit"' in page) == may["audit"]
        assert ("/dashboard/organization/leave" in page) == (role != "owner") and ('value="transfer"' in page) == (role == "owner")
        assert ('value="remove"' in page) == may["invite"] and made.people["viewer2"].user.email in page
        assert (await browser.get("/dashboard/keys")).status_code == (200 if may["keys"] else 403)
        for path in ("/audit", "/audit/export", "/audit/export?of=deployments"):
            assert (await browser.get(f"/dashboard{path}")).status_code == (200 if may["audit"] else 403), path
        assert ("New deployment" in (await browser.get("/dashboard/deployments")).text) == (role != "viewer")
        before = await made.roles()
        for path, fields, allowed in (
            ("/organization/invite", {"email": address(), "role": "viewer", "days": "7"}, may["invite"]),
            ("/organization/member", {"act": "role", "user_id": made.user("viewer2"), "role": "viewer"}, may["invite"]),
            ("/organization", {"name": "Renamed"}, may["invite"]),
            ("/organization/member", {"act": "transfer", "user_id": made.user(role), "role": "admin"}, False),
            # Who is one already stays what he is.
            ("/organization/member", {"act": "role", "user_id": made.user(role), "role": "admin"}, role == "admin"),
        ):
            answer = await browser.submit(path, "/account", **fields)
            assert (answer.status_code == 303) == allowed, (path, answer.status_code)
            assert allowed or ("This is not for you" in answer.text or "notice-bad" in answer.text), path
        assert await made.roles() == before


async def test_the_switcher_switches_and_falls_back(stack: Stack) -> None:
    made, other = await team(stack, "developer"), await team(stack)
    person = made.people["developer"]
    async with await browser_of(stack, person) as browser:
        page = (await browser.get("/dashboard")).text
        assert f'value="{made.id}"' in page and other.id not in page
        switched = await browser.submit("/organizations/switch", "", org=made.id, next="/dashboard/usage")
        assert switched.headers["location"] == "/dashboard/usage" and made.id in switched.headers["set-cookie"]
        assert made.id in (await browser.get("/dashboard/organization")).text
        foreign = await browser.submit("/organizations/switch", "", org=other.id)
        assert foreign.status_code == 404 and "set-cookie" not in foreign.headers and made.organization.name not in _main(foreign.text)
        # A form that was opened in one organization does nothing in another.
        stale = await browser.submit("/account", "/account", full_name="Elsewhere", username="elsewhere", for_org=person.org_id)
        assert stale.status_code == 409 and "opened in another organization" in stale.text
        # What is not an organization of the visitor, or none at all, leads back to the personal one.
        for choice in (other.id, "org_" + "0" * 32, "nonsense", "org_x; Path=/"):
            browser.cookies.clear()
            async with await browser_of(stack, person, choice) as lost:
                assert await _falls_back(lost)
        removed = member_service_pb2.RemoveMemberRequest(user_id=person.user.id)
        async with await browser_of(stack, person, made.id) as member:
            proof = await member.csrf("/organization")
            await stack.members.RemoveMember(removed, metadata=made.at("owner"))
            await eventually(lambda: _falls_back(member, keep=made.id), timeout_s=2)
            member.cookies.set(ORG, made.id, domain="127.0.0.1", path="/")
            nothing = await member.post("/dashboard/account", data={"csrf": proof, "full_name": "Moved"})
            assert nothing.headers["location"] == "/dashboard?done=organization-gone"
            assert "Moved" not in (await member.get("/dashboard/account")).text


def _main(page: str) -> str:
    return page.partition("<main")[2]


async def _falls_back(browser: Window, keep: str = "") -> bool:
    """To the personal organization, with a notice, and the choice forgotten."""
    if keep:
        browser.cookies.set(ORG, keep, domain="127.0.0.1", path="/")
    answer = await browser.get("/dashboard/organization")
    if answer.status_code != 303:
        return False
    assert answer.headers["location"] == "/dashboard?done=organization-gone" and f'{ORG}=""' in answer.headers["set-cookie"]
    page = await browser.get(answer.headers["location"])
    return page.status_code == 200 and "You are in your personal one" in page.text


async def test_an_invitation_is_for_its_address_alone(stack: Stack) -> None:
    made, guest = await team(stack), await stack.person()
    _, token = await invite(stack, made.at("owner"), guest.user.email)
    link = f"/dashboard/invitation?token={token}"
    async with window(stack) as nobody, await browser_of(stack, await stack.person()) as stranger, await browser_of(stack, guest) as browser:
        away = await nobody.get(link)
        assert away.status_code == 303 and away.headers["location"] == f"/dashboard/sign-in?next=/dashboard/invitation%3Ftoken%3D{token}"
        theirs, nobodys = await stranger.get(link), await stranger.get("/dashboard/invitation?token=nonsense")
        assert theirs.status_code == nobodys.status_code == 404 and made.organization.name not in theirs.text
        assert (await stranger.submit("/invitation", "/account", token=token, act="accept")).status_code == 404
        for _ in range(2):
            # To look at it uses nothing up.
            assert made.organization.name in (await browser.get(link)).text
        accepted = await browser.submit("/invitation", "/account", token=token, act="accept")
        assert accepted.headers["location"] == "/dashboard/organization?done=accepted" and made.id in accepted.headers["set-cookie"]
        assert made.id in (await browser.get("/dashboard/organization")).text
        assert (await browser.get(link)).status_code == 404
    async with await browser_of(stack, made.people["owner"], made.id) as owner:
        sent = await owner.submit("/organization/invite", "/organization", email="second@example.com", role="developer", days="1")
        assert sent.status_code == 303
        twice = await owner.submit("/organization/invite", "/organization", email="second@example.com", role="developer", days="1")
        assert twice.status_code == 409 and "send that one again" in twice.text
        bad = await owner.submit("/organization/invite", "/organization", email="nonsense", role="developer", days="1")
        assert bad.status_code == 400 and 'id="email-problem"' in bad.text
        page = (await owner.get("/dashboard/organization")).text
        found = re.search(r'name="id" value="(inv_[0-9a-f]{32})"', page)
        assert found and token not in page and await mailed_token(stack, "second@example.com") not in page
        for act, done in (("resend", 2), ("revoke", 2)):
            assert (await owner.submit("/organization/invitation", "/organization", act=act, id=found.group(1))).status_code == 303
            assert len(await mails(stack, "second@example.com")) == done
        assert "second@example.com" in (await owner.get("/dashboard/organization?invitations=all")).text
        assert "second@example.com" not in (await owner.get("/dashboard/organization")).text


async def test_a_key_from_its_form_to_its_end(stack: Stack) -> None:
    made = await team(stack, "developer")
    async with await browser_of(stack, made.people["developer"], made.id) as browser:
        page = (await browser.get("/dashboard/keys/new")).text
        assert 'value="deployments.list"' in page and 'value="api_keys.create"' not in page and 'value="audit.list"' not in page
        sent = {
            "name": "Report <i>", "environment": "test", "permissions": ["deployments.list", "usage.read"], "days": "30", "rate_count": "60",
            "rate_period": "minute", "request_id": re.search(r'name="request_id" value="([^"]+)"', page).group(1),  # type: ignore[union-attr]
        }  # fmt: skip
        proof = await browser.csrf("/keys/new")
        for change, field in (({"permissions": []}, "permissions"), ({"name": ""}, "name"), ({"rate_count": "0"}, "rate"), ({"permissions": ["audit.list"]}, "permissions")):
            wrong_one = await browser.post("/dashboard/keys/new", data={"csrf": proof} | sent | change | {"request_id": ""})
            assert wrong_one.status_code == 400 and f'id="{field}-problem"' in wrong_one.text, (change, wrong_one.status_code)
        first, again = [await browser.post("/dashboard/keys/new", data={"csrf": proof} | sent) for _ in range(2)]
        text = _key_on(first)
        # The same form sent twice is one key.
        assert _key_on(again) == text and "Report &lt;i&gt;" in first.text
        key_id = re.search(r"key_[0-9a-f]{32}", first.text).group(0)  # type: ignore[union-attr]
        assert text not in (await browser.get(f"/dashboard/keys/{key_id}")).text + (await browser.get("/dashboard/keys")).text
        assert await _holds(stack, text)
        shown = await browser.submit(f"/keys/{key_id}/rotate", f"/keys/{key_id}", grace="3600", request_id=str(uuid.uuid4()))
        other = _key_on(shown)
        assert other != text and await _holds(stack, text) and await _holds(stack, other)
        changed = await browser.submit(f"/keys/{key_id}", f"/keys/{key_id}", name="Report", permissions="usage.read", days="keep", etag="")
        assert changed.headers["location"] == f"/dashboard/keys/{key_id}?done=saved"
        key = await stack.api_keys.GetApiKey(api_key_service_pb2.GetApiKeyRequest(id=key_id), metadata=made.at("developer"))
        assert (list(key.permissions), key.rate, key.HasField("expires_at")) == (["usage.read"], "", True)
        for action, holds in (("deactivate", False), ("activate", True), ("revoke", False)):
            done = await browser.submit(f"/keys/{key_id}/{action}", f"/keys/{key_id}", reason="It leaked")
            assert done.headers["location"] == f"/dashboard/keys/{key_id}?done=key-{action}"
            await eventually(lambda: _is(stack, other, holds), timeout_s=2)  # noqa: B023
        ended = (await browser.get(f"/dashboard/keys/{key_id}")).text
        assert "It leaked" in ended and "/rotate" not in ended
    async with await browser_of(stack, await stack.person()) as stranger:
        for path in (f"/keys/{key_id}", "/keys/nonsense"):
            assert (await stranger.get(f"/dashboard{path}")).status_code == 404
            for action in ("", "/rotate", "/activate", "/revoke"):
                refused = await stranger.submit(f"{path}{action}", "/account", name="mine", permissions="usage.read", request_id=str(uuid.uuid4()))
                assert refused.status_code == 404, (path, action)


def _key_on(page: httpx.Response) -> str:
    found = re.search(r'data-copy id="key">(cp_test_[^<]+)<', page.text)
    assert page.status_code == 200 and found, (page.status_code, re.findall("(?:notice-bad|problem).*", page.text))
    return found.group(1)


async def _holds(stack: Stack, text: str) -> bool:
    answer = await stack.api_keys.VerifyApiKey(api_key_service_pb2.VerifyApiKeyRequest(key=text, uncounted=True), metadata=stack.operator)
    return answer.outcome == api_key_service_pb2.API_KEY_OUTCOME_VALID


async def _is(stack: Stack, text: str, holds: bool) -> bool:
    return await _holds(stack, text) == holds


async def test_whoever_signed_in_long_ago_proves_it_and_comes_back(stack: Stack) -> None:
    made = await team(stack, "admin")
    owner = made.people["owner"]
    async with await browser_of(stack, owner, made.id, fresh=False) as browser:
        # A form to fill in asks before, one button asks when it is pressed; both lead back to where they were.
        form = await browser.get("/dashboard/keys/new")
        assert form.headers["location"] == "/dashboard/step-up?next=/dashboard/keys/new"
        pressed = await browser.post(
            "/dashboard/organization/member", data={"csrf": await browser.csrf("/organization"), "act": "transfer", "user_id": made.user("admin")},
            headers={"referer": f"{stack.url}/dashboard/organization"},
        )  # fmt: skip
        assert pressed.headers["location"] == "/dashboard/step-up?next=/dashboard/organization"
        assert (await made.roles())[owner.user.id] != (await made.roles())[made.user("admin")]
        before = browser.cookies[COOKIE]
        sent = await browser.submit("/step-up/send", "/step-up", next="/dashboard/keys/new")
        assert sent.headers["location"] == "/dashboard/step-up?next=/dashboard/keys/new&sent=1"
        code = await code_of(stack, owner.user.email)
        refused = await browser.submit("/step-up", "/step-up?sent=1", code=wrong(code), next="/dashboard/keys/new")
        assert refused.status_code == 400 and "That did not work" in refused.text and 'name="code"' in refused.text
        proven = await browser.submit("/step-up", "/step-up?sent=1", code=code, next="/dashboard/keys/new")
        assert proven.headers["location"] == "/dashboard/keys/new" and browser.cookies[COOKIE] != before
        assert (await browser.get("/dashboard/keys/new")).status_code == 200
        async with window(stack, before) as stale:
            await eventually(lambda: _is_out(stale), timeout_s=2)
        over = await browser.submit("/organization/member", "/organization", act="transfer", user_id=made.user("admin"))
        assert over.headers["location"] == "/dashboard/organization?done=member-transfer"


async def test_the_account_page(stack: Stack) -> None:
    person, other = await stack.person(), await stack.person()
    async with await browser_of(stack, person) as browser, await browser_of(stack, person) as second, await browser_of(stack, other) as stranger:
        page = (await browser.get("/dashboard/account")).text
        assert page.count(">this one<") == 1 and other.user.email not in page
        etag = re.search(r'name="etag" value="([^"]*)"', page).group(1)  # type: ignore[union-attr]
        fields = {"full_name": "Ada", "username": f"ada-{secrets.token_hex(4)}", "website_url": "https://example.com", "etag": etag}
        assert (await browser.submit("/account", "/account", **fields)).headers["location"] == "/dashboard/account?done=saved"
        lost = await browser.submit("/account", "/account", **fields | {"full_name": "Lost"})
        assert lost.status_code == 409 and "changed by someone else" in lost.text
        bad = await browser.submit("/account", "/account", **fields | {"username": "!", "etag": ""})
        assert bad.status_code == 400 and 'id="username-problem"' in bad.text
        listed = await stack.sessions.ListSessions(session_service_pb2.ListSessionsRequest(), metadata=_bearer(second))
        mine = next(each.id for each in listed.sessions if each.is_current)
        assert (await stranger.submit("/account/sessions", "/account", which=mine)).status_code == 404
        assert (await browser.submit("/account/sessions", "/account", which=mine)).headers["location"] == "/dashboard/account?done=session-ended"
        await eventually(lambda: _is_out(second), timeout_s=2)
        assert not await _is_out(browser)
        kept = await browser.submit("/account/delete", "/account", email=other.user.email)
        assert kept.status_code == 400 and 'id="confirm-problem"' in kept.text
        gone = await browser.submit("/account/delete", "/account", email=person.user.email)
        assert gone.headers["location"] == "/dashboard/sign-in?done=account-deleted"
    async with await browser_of(stack, other) as browser:
        out = await browser.submit("/account/sessions", "/account", which="all")
        assert out.headers["location"] == "/dashboard/sign-in?done=signed-out" and 'clawplane=""' in out.headers["set-cookie"]


def _bearer(browser: Window) -> Any:
    return (("authorization", f"Bearer {browser.cookies[COOKIE]}"),)


async def test_organizations_are_made_deleted_and_brought_back(stack: Stack) -> None:
    person = await stack.person()
    async with await browser_of(stack, person) as browser:
        blank = await browser.submit("/organizations/new", "/organizations/new", name="  ", request_id="")
        assert blank.status_code == 400 and ('id="name-problem"' in blank.text or "notice-bad" in blank.text)
        made = await browser.submit("/organizations/new", "/organizations/new", name="Acme <u>", request_id=str(uuid.uuid4()))
        assert made.headers["location"] == "/dashboard/organization?done=organization-created"
        page = (await browser.get("/dashboard/organization")).text
        assert "<h1>Acme &lt;u&gt;</h1>" in page and "<u>" not in page
        kept = await browser.submit("/organization/delete", "/organization", name="Other")
        assert kept.status_code == 400 and 'id="confirm-problem"' in kept.text
        gone = await browser.submit("/organization/delete", "/organization", name="Acme <u>")
        assert gone.headers["location"] == "/dashboard?done=organization-deleted" and f'{ORG}=""' in gone.headers["set-cookie"]
        page = (await browser.get("/dashboard/organizations/new")).text
        back = await browser.submit("/organizations/undelete", "/account", id=re.search(r'name="id" value="(org_\w+)"', page).group(1))  # type: ignore[union-attr]
        assert back.headers["location"] == "/dashboard/organization?done=organization-back"
        assert "Acme" in (await browser.get("/dashboard/organization")).text


async def test_the_audit_log_and_its_files(stack: Stack) -> None:
    made, other = await team(stack, "viewer"), await team(stack)
    async with await browser_of(stack, made.people["owner"], made.id) as browser:
        await browser.submit("/organization", "/organization", name='=HYPERLINK("x")')
        page = (await browser.get("/dashboard/audit")).text
        assert "Update organization" in page and "<ins>=HYPERLINK" in page and other.id not in page and other.people["owner"].user.id not in page
        owner = made.people["owner"].user.id
        filtered = (await browser.get("/dashboard/audit", params={"actor": made.user("viewer"), "from": f"{now():%Y-%m-%d}"})).text
        assert "Accept invitation" in filtered and "Update organization" not in filtered
        assert (await browser.get("/dashboard/audit?from=tomorrow")).status_code == 400
        rows = list(csv.DictReader(io.StringIO((await browser.get("/dashboard/audit/export")).text)))
        assert {row["actor"] for row in rows} >= {owner, made.user("viewer")} and rows == sorted(rows, key=lambda row: row["created_at"])
        lines = [orjson.loads(line) for line in (await browser.get("/dashboard/audit/export?format=ndjson")).text.splitlines()]
        assert {line["id"] for line in lines} >= {row["id"] for row in rows} and {line["org_id"] for line in lines} == {made.id}
        assert (await browser.get("/dashboard/audit/export?of=deployments")).text.startswith("created_at,")


def test_what_is_written_for_people_and_spreadsheets() -> None:
    assert deed("/clawplane.user.v1.ApiKeyService/CreateApiKey") == "Create API key" and deed("/x/FinishOAuth") == "Finish OAuth"
    assert deed("/x/SignInWithCode") == "Sign in with code"
    assert [guarded(text) for text in ("=1+1", "@x", "plain", "-5.25", "-5-5")] == ["'=1+1", "'@x", "plain", "-5.25", "'-5-5"]
    assert groups(["usage.read", "api_keys.list"]) == {"API keys": [("api_keys.list", "List")], "Usage": [("usage.read", "Read")]}
    chrome = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36"
    assert (device(chrome), device("grpc-python/1.85"), device("")) == ("Chrome on Linux", "grpc-python", "Unknown device")
    assert device(chrome + " Edg/131.0") == "Edge on Linux"


def test_the_mailbox_stays_on_the_machine(tmp_path: Any) -> None:
    settings = devkeys.settings_for(devkeys.load_or_make(tmp_path), "gateway")
    with pytest.raises(ValueError, match="loopback"):
        GatewaySettings(**settings, mailbox_enabled=True, http_host="0.0.0.0")  # type: ignore[arg-type]
    assert not GatewaySettings(**settings).mailbox_enabled  # type: ignore[arg-type]
