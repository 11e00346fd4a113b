"""Signing in with Google, Microsoft and GitHub: once, in the same browser, by a token that holds, and never into somebody else's account."""

import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from clawplane.user.v1 import oauth_service_pb2 as rpc
from clawplane.user.v1 import user_pb2, user_service_pb2
from services.kit import keys
from services.kit.columns import now
from services.user_svc.oauth import rules
from services.user_svc.oauth.models import OAuthState
from services.user_svc.sessions.models import Session
from services.user_svc.settings import UserSettings
from services.user_svc.users.models import Identity
from tests.conftest import Databases
from tests.harness import Stack, free_port, running
from tests.processes import OPTIONS
from tests.signing_in import FAILED, OK, Somebody, UserProcesses, change, count, refusal, winners
from tests.simulators.market import NO_TLS
from tests.simulators.oauth import TENANT, OAuthSimulator
from tests.test_secrets_stay_secret import everything_in
from tests.test_sessions import who

NOT_VERIFIED = (grpc.StatusCode.FAILED_PRECONDITION, "EMAIL_NOT_VERIFIED")
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")


@dataclass
class Door:
    """A browser before a stack and the providers."""

    stack: Stack
    simulator: OAuthSimulator

    def __post_init__(self) -> None:
        self.browser = secrets.token_urlsafe(32)

    async def start(self, provider: str, redirect_path: str = "") -> str:
        """The provider's page."""
        request = rpc.StartOAuthRequest(provider=provider, redirect_path=redirect_path, browser_token=self.browser)
        return str((await self.stack.oauth.StartOAuth(request)).authorization_url)

    async def agree(self, url: str) -> rpc.FinishOAuthRequest:
        """What the browser comes back with, once its person has agreed."""
        async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as http:
            answer = await http.get(url)
        assert answer.status_code == 302, answer.text
        back = parse_qs(urlsplit(answer.headers["location"]).query)
        return rpc.FinishOAuthRequest(state=back["state"][0], code=back["code"][0], browser_token=self.browser)

    async def back_as(self, provider: str, **person: Any) -> rpc.FinishOAuthRequest:
        """The same for somebody whom the provider knows."""
        await self.simulator.post("/control/person", {"provider": provider, "person": person})
        return await self.agree(await self.start(provider))

    def finish(self, request: rpc.FinishOAuthRequest) -> Any:
        """The call that ends the sign-in."""
        return self.stack.oauth.FinishOAuth(request)


@pytest.fixture(scope="module")
def simulator() -> Iterator[OAuthSimulator]:
    """The providers."""
    with OAuthSimulator() as started:
        yield started


@pytest_asyncio.fixture(scope="module")
async def signs_in(databases: Databases, simulator: OAuthSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack that knows the providers."""
    async with running(tmp_path_factory.mktemp("oauth"), databases.make(), user=simulator.settings()) as stack:
        await simulator.post("/control/register", {"redirect_uri": f"{stack.url}/dashboard/oauth/callback"})
        yield stack


@pytest.fixture
def door(signs_in: Stack, simulator: OAuthSimulator) -> Door:
    """A new browser."""
    return Door(signs_in, simulator)


def google(email: str = "", **more: Any) -> dict[str, Any]:
    """Somebody at Google."""
    return {"sub": secrets.token_hex(10), "email": email or f"{secrets.token_hex(6)}@example.com", "email_verified": True, "name": "Grace"} | more


def github(email: str, *, verified: bool = True) -> dict[str, Any]:
    """Somebody at GitHub."""
    number = secrets.randbelow(10**9) + 1
    emails = [{"email": f"old-{email}", "primary": False, "verified": True}, {"email": email, "primary": True, "verified": verified}]
    return {"user": {"id": number, "login": f"grace-{number}", "name": "Grace", "avatar_url": "https://avatars.example/1"}, "emails": emails}


def microsoft(email: str, **more: Any) -> dict[str, Any]:
    """Somebody at Microsoft."""
    return {"sub": secrets.token_hex(10), "tid": TENANT, "oid": secrets.token_hex(8), "email": email, "name": "Grace", "xms_edov": True} | more


async def test_each_provider_signs_in_and_makes_one_account(door: Door) -> None:
    listed = await door.stack.oauth.ListOAuthProviders(rpc.ListOAuthProvidersRequest())
    assert [one.id for one in listed.providers] == ["google", "github", "microsoft"]
    for provider in ("google", "github", "microsoft"):
        email = f"{secrets.token_hex(6)}@Example.com"
        person = {"google": google, "github": github, "microsoft": microsoft}[provider](email)
        first = await door.finish(await door.back_as(provider, **person))
        user = await door.stack.users.GetUser(user_service_pb2.GetUserRequest(id=first.session.user_id), metadata=door.stack.operator)
        assert (user.email, user.email_verified, user.full_name) == (email.lower(), True, "Grace")
        assert user.github_username == (person["user"]["login"] if provider == "github" else "")
        await who(door.stack, (("authorization", f"Bearer {first.token}"),))
        # The same person, with another address there by now: the identity decides.
        if provider == "google":
            person["email"] = "moved@example.com"
        again = await door.finish(await door.back_as(provider, **person))
        assert again.session.user_id == first.session.user_id and again.token != first.token
        # And the mailbox still leads to the same account.
        assert (await Somebody(door.stack, email=email).sign_in()).session.user_id == first.session.user_id


async def test_a_state_holds_once_in_its_browser_and_in_time(door: Door) -> None:
    other = Door(door.stack, door.simulator)
    request = await door.back_as("google", **google())
    stolen = rpc.FinishOAuthRequest(state=request.state, code=request.code, browser_token=other.browser)
    assert await refusal(other.finish(stolen)) == FAILED
    assert await refusal(door.finish(request)) == (OK, "")
    assert await refusal(door.finish(request)) == FAILED
    late = await door.back_as("google", **google())
    await change(door.stack, sa.update(OAuthState).where(OAuthState.used_at.is_(None)).values(expires_at=now() - timedelta(seconds=1)))
    assert await refusal(door.finish(late)) == FAILED
    for odd in ("x", keys.mint("state", "test", "oas").text, keys.mint("sess", "test", "ses").text, "state_test_" + "0" * 32 + "_x_y", "💥"):
        assert await refusal(door.finish(rpc.FinishOAuthRequest(state=odd, code="x", browser_token=door.browser))) == FAILED, odd


async def test_codes_and_secrets_are_bound_to_the_sign_in_that_asked(door: Door) -> None:
    """A code that was given in another sign-in, perhaps an attacker's, fits to no other: PKCE at the provider says so."""
    mine, theirs = await door.back_as("github", **github("a@example.com")), await door.back_as("github", **github("b@example.com"))
    mixed = rpc.FinishOAuthRequest(state=mine.state, code=theirs.code, browser_token=door.browser)
    assert await refusal(door.finish(mixed)) == FAILED
    url = await door.start("google")
    query = parse_qs(urlsplit(url).query)
    assert query["code_challenge_method"] == ["S256"] and "code_verifier" not in query and len(query["nonce"][0]) == 43
    assert query["redirect_uri"] == [f"{door.stack.url}/dashboard/oauth/callback"]
    stored = await everything_in(door.stack.urls["user_svc"])
    state, nonce = query["state"][0], query["nonce"][0]
    assert state.split("_")[3] not in stored and nonce not in stored and door.browser not in stored


BAD_TOKENS: dict[str, dict[str, Any]] = {
    "nonce of another": {"claims": {"nonce": "x" * 43}}, "no nonce": {"claims": {"nonce": None}}, "another audience": {"claims": {"aud": "other"}},
    "another issuer": {"claims": {"iss": "https://accounts.google.com"}}, "expired": {"claims": {"iat": 1, "exp": 2}},
    "no expiry": {"claims": {"exp": None}}, "for another party": {"claims": {"aud": ["clawplane-at-simulator", "x"], "azp": "x"}},
    "unsigned": {"sign": "none"}, "a shared secret": {"sign": "shared"}, "a stranger's key": {"sign": "stranger"}, "an unknown key": {"sign": "unknown"},
    "nobody": {"claims": {"sub": None}}, "a number": {"claims": {"sub": 5}},
}  # fmt: skip


async def test_id_tokens_that_do_not_hold(door: Door) -> None:
    sessions = await count(door.stack, Session)
    for what, fault in BAD_TOKENS.items():
        request = await door.back_as("google", **google())
        await door.simulator.post("/control/fault", {"pattern": "token", "fault": fault})
        assert await refusal(door.finish(request)) == FAILED, what
    assert await count(door.stack, Session) == sessions
    # Of all tenants' issuer, a token of one tenant that names another.
    request = await door.back_as("microsoft", **microsoft("x@example.com"))
    await door.simulator.post("/control/fault", {"pattern": "token", "fault": {"claims": {"tid": "another-tenant"}}})
    assert await refusal(door.finish(request)) == FAILED


async def test_only_addresses_that_both_sides_have_verified_are_linked(door: Door) -> None:
    owner = Somebody(door.stack)
    account = (await owner.sign_in()).session.user_id
    for provider, person in (
        ("google", google(owner.email, email_verified=False)), ("google", google(owner.email, email_verified="true")),
        ("github", github(owner.email, verified=False)), ("github", github(owner.email) | {"emails": []}),
        ("microsoft", microsoft(owner.email, xms_edov=False)), ("microsoft", microsoft(owner.email, xms_edov=None)),
    ):  # fmt: skip
        assert await refusal(door.finish(await door.back_as(provider, **person))) == NOT_VERIFIED, (provider, person)
    assert await change(door.stack, sa.select(Identity.provider).where(Identity.user_id == account)) == [("email",)]
    linked = await door.finish(await door.back_as("microsoft", **microsoft(owner.email.upper(), xms_edov="1")))
    assert linked.session.user_id == account
    # The same object of another tenant is somebody else.
    (subject,) = (await change(door.stack, sa.select(Identity.subject).where(Identity.user_id == account, Identity.provider == "microsoft")))[0]
    other = await door.back_as("microsoft", **microsoft("mallory@example.com", tid="evil", oid=subject.split(":")[1]))
    assert (await door.finish(other)).session.user_id != account
    # An account that somebody made with an address that he never proved.
    unproven = f"{secrets.token_hex(6)}@example.com"
    made = user_service_pb2.CreateUserRequest(user=user_pb2.User(email=unproven))
    await door.stack.users.CreateUser(made, metadata=door.stack.operator)
    assert await refusal(door.finish(await door.back_as("google", **google(unproven)))) == NOT_VERIFIED


async def test_who_is_switched_off_or_deleted_is_not_let_in_by_a_provider(door: Door) -> None:
    person = google()
    first = (await door.finish(await door.back_as("google", **person))).session.user_id
    off = user_service_pb2.UpdateUserAccountRequest(id=first, is_active=False)
    await door.stack.users.UpdateUserAccount(off, metadata=door.stack.operator)
    assert await refusal(door.finish(await door.back_as("google", **person))) == FAILED
    await door.stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=first), metadata=door.stack.operator)
    second = (await door.finish(await door.back_as("google", **person))).session.user_id
    assert second != first


async def test_a_provider_that_fails_is_told_and_leaves_nothing(door: Door) -> None:
    faults: list[tuple[str, dict[str, Any]]] = [("google", {"status": 503}), ("google", {"cut": True}), ("github", {"text": "<html>"}), ("github", {"status": 500})]
    for provider, fault in faults:
        request = await door.back_as(provider, **(google() if provider == "google" else github("x@example.com")))
        await door.simulator.post("/control/fault", {"pattern": "token", "fault": fault})
        assert await refusal(door.finish(request)) == UNAVAILABLE, fault
        # The state was used up all the same.
        assert await refusal(door.finish(request)) == FAILED
    request = await door.back_as("github", **github("x@example.com"))
    await door.simulator.post("/control/fault", {"pattern": "api", "fault": {"status": 502}})
    assert await refusal(door.finish(request)) == UNAVAILABLE


async def test_keys_that_the_provider_changes_are_read_anew(databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.user_svc.oauth.oidc._REFRESH_S", 0.0)
    # A provider of its own: whoever else had just read the keys would refuse the new ones for a while.
    with OAuthSimulator() as simulator:
        async with running(tmp_path, databases.make(), user=simulator.settings()) as stack:
            await _keys_change(stack, simulator)


async def _keys_change(stack: Stack, simulator: OAuthSimulator) -> None:
    await simulator.post("/control/register", {"redirect_uri": f"{stack.url}/dashboard/oauth/callback"})
    await simulator.post("/control/fault", {"pattern": "configuration", "fault": {"status": 503}})
    door = Door(stack, simulator)
    assert await refusal(stack.oauth.StartOAuth(rpc.StartOAuthRequest(provider="google", browser_token=door.browser))) == UNAVAILABLE
    for _ in range(2):
        assert (await door.finish(await door.back_as("google", **google()))).token
        await simulator.post("/control/rotate", {})


async def test_where_a_sign_in_goes_on(door: Door) -> None:
    for wish, path in {
        "/dashboard/usage?month=1": "/dashboard/usage?month=1", "": "/dashboard", "https://evil.example/dashboard": "/dashboard",
        "//evil.example": "/dashboard", "/dashboard//evil.example": "/dashboard", "/dashboard/\\evil": "/dashboard", "/dashboardevil": "/dashboard",
    }.items():  # fmt: skip
        await door.simulator.post("/control/person", {"provider": "google", "person": google()})
        answer = await door.finish(await door.agree(await door.start("google", wish)))
        assert answer.redirect_path == path, wish


@given(st.text(max_size=60) | st.text("/dashborevil.\\?:#@", max_size=30).map(lambda text: f"/dashboard{text}"))
def test_no_path_leads_elsewhere(path: str) -> None:
    found = rules.own_path(path)
    assert found.startswith("/dashboard") and not urlsplit(found).netloc and "\\" not in found and found.isascii() and found.isprintable()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3), max_leaves=6)
NAMES = st.sampled_from(["sub", "email", "email_verified", "tid", "oid", "xms_edov", "name", "picture", "id", "login", "avatar_url", "primary", "verified"])


@given(st.dictionaries(NAMES, JSON), st.lists(st.dictionaries(NAMES, JSON) | JSON, max_size=3))
def test_any_claims_are_a_profile(claims: dict[str, Any], emails: list[Any]) -> None:
    for profile in (rules.of_google(claims), rules.of_microsoft(claims), rules.of_github(claims, emails)):
        assert all(isinstance(text, str) for text in (profile.subject, profile.email, profile.full_name)) and len(profile.subject) <= 255


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_fifty_callers_of_two_processes_end_one_sign_in_once(databases: Databases, simulator: OAuthSimulator, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    env = {f"CLAWPLANE_{name.upper()}": value for name, value in simulator.settings().items()}
    processes = UserProcesses(databases, tmp_path, CLAWPLANE_PUBLIC_URL=url, **env)
    try:
        await processes.ready()
        await simulator.post("/control/register", {"redirect_uri": f"{url}/dashboard/oauth/callback"})
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) for port in processes.ports]
        stacks = [Stack(processes.keys, tmp_path, "", "http://x", {"user_svc": processes.env["CLAWPLANE_USER_DATABASE_URL"]}, one) for one in channels]
        door = Door(stacks[0], simulator)
        request = await door.back_as("google", **google())
        before = (await simulator.post("/control/none", {}))["exchanges"]
        taken, failed = await winners([stacks[number % 2].oauth.FinishOAuth(request) for number in range(50)])
        assert len(taken) == 1 and failed == {grpc.StatusCode.UNAUTHENTICATED}
        assert (await simulator.post("/control/none", {}))["exchanges"] == before + 1 and await count(stacks[0], Session) == 1
        for one in channels:
            await one.close()
    finally:
        processes.stop()


async def test_what_is_not_set_up_does_not_exist(stack: Stack) -> None:
    assert not (await stack.oauth.ListOAuthProviders(rpc.ListOAuthProvidersRequest())).providers
    call = stack.oauth.StartOAuth(rpc.StartOAuthRequest(provider="google", browser_token="x" * 32))
    assert (await refusal(call))[0] is grpc.StatusCode.NOT_FOUND
    for wrong in ({"oauth_google_client_id": "x"}, {"environment": "production", "oauth_github_url": "http://github.com"}):
        with pytest.raises(ValueError, match="CLAWPLANE_OAUTH"):
            UserSettings(**wrong)
