"""Callers that are known without waiting, and what ends that they are."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clawplane.user.v1 import api_key_service_pb2 as keys_rpc
from services.kit import devkeys, ids
from services.kit.auth import Access, Authenticator, Caller
from services.kit.errors import NotFound
from services.kit.feed import Follower, remembered_access
from services.kit.known_keys import KnownKey, Uses, remembered_keys
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from services.user_svc.api_keys import verify
from services.user_svc.api_keys.verify import Verifier

USER, HOME, TEAM = ids.new("usr"), ids.new("org"), ids.new("org")


class Feed(Follower):
    """One that is told by the test what it hears."""

    def __init__(self) -> None:
        super().__init__(lambda seq: None)  # type: ignore[arg-type, return-value]
        self.hears()

    def hears(self, subject: str = "") -> None:
        for listener in self._listeners if subject else ():
            listener(SimpleNamespace(subject=subject, org_id=""))
        self._heard = time.monotonic() + 100

    def falls_silent(self) -> None:
        self._heard = 0.0


@pytest.fixture
def feed() -> Feed:
    return Feed()


class People:
    def __init__(self) -> None:
        self.may = frozenset({"a", "b"})

    async def __call__(self, user: str, org: str) -> Access | None:
        return Access(user, org or HOME, self.may)


@pytest.fixture
def people() -> People:
    return People()


@pytest.fixture
def authenticator(feed: Feed, people: People, tmp_path: Path) -> Authenticator:
    made = KitSettings(**devkeys.settings_for(devkeys.load_or_make(tmp_path), "cli"))  # type: ignore[arg-type]
    return Authenticator(made, remembered_access(feed, people))


def of(authenticator: Authenticator, **claims: Any) -> dict[str, str | bytes]:
    """Metadata with a new token."""
    return {"authorization": f"Bearer {TokenSigner(authenticator.settings).sign(['*'], **claims)}"}


async def test_who_was_asked_about_is_known(authenticator: Authenticator) -> None:
    who = of(authenticator, user=USER)
    assert authenticator.known(who) is None
    assert authenticator.known(who) is None
    caller = await authenticator.caller(who)
    assert authenticator.known(who) is caller


async def test_another_organization_is_another_caller(authenticator: Authenticator) -> None:
    who = of(authenticator, user=USER)
    there = who | {"clawplane-org": TEAM}
    await authenticator.caller(who)
    assert (await authenticator.caller(there)).org_id == TEAM
    # Both are remembered, and the token made the other one last.
    assert authenticator.known(who) is None and authenticator.known(there) is not None


@pytest.mark.parametrize("claims", [{}, {"user": USER, "org": HOME}])
async def test_no_known_caller_acts_where_he_does_not_belong(authenticator: Authenticator, claims: dict[str, str]) -> None:
    who = of(authenticator, **claims)
    await authenticator.caller(who)
    assert authenticator.known(who) is not None
    for org in (TEAM, "nonsense"):
        elsewhere = who | {"clawplane-org": org}
        assert authenticator.known(elsewhere) is None
        with pytest.raises(NotFound):
            await authenticator.caller(elsewhere)


async def test_what_was_taken_away_is_taken_from_every_token(authenticator: Authenticator, feed: Feed, people: People) -> None:
    one, other = of(authenticator, user=USER), of(authenticator, user=USER, lifetime_s=500)
    for who in (one, other):
        await authenticator.caller(who)
    people.may = frozenset({"a"})
    feed.hears(USER)
    assert authenticator.known(one) is None
    assert (await authenticator.caller(one)).permissions == {"a"}
    # Remembered again, but not by what this token knows.
    assert authenticator.known(other) is None
    assert (await authenticator.caller(other)).permissions == {"a"}


async def test_a_silent_feed_and_an_old_check_end_it(authenticator: Authenticator, feed: Feed) -> None:
    who, service = of(authenticator, user=USER), of(authenticator)
    for each in (who, service):
        await authenticator.caller(each)
    feed.falls_silent()
    assert authenticator.known(who) is None and authenticator.known(service) is not None
    feed.hears()
    assert authenticator.known(who) is not None
    for token in authenticator._checked.values():
        token.good_until = time.time() - 1
    assert authenticator.known(who) is None and authenticator.known(service) is None


@pytest.mark.parametrize("end", ["change", "reset", "silence", "time"])
async def test_an_answer_about_a_key_stands_until(feed: Feed, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_at = time.time() + 50

    async def find(text: str) -> KnownKey:
        caller = Caller("key", "key_1", frozenset(), HOME, USER, key_id="key_1")
        return KnownKey(caller, True, ends_at, keys_rpc.VerifyApiKeyResponse(), frozenset())

    known = remembered_keys(feed, find, lambda change: [change.subject])
    verifier = Verifier(find, known, Uses(None), None)  # type: ignore[arg-type]
    call: Any = SimpleNamespace(stands_by=lambda word: setattr(call, "word", word))
    await verifier(keys_rpc.VerifyApiKeyRequest(key="k"), call)
    assert call.word.holds()
    if end == "change":
        feed.hears("key_1")
    elif end == "reset":
        feed._reset()
    elif end == "silence":
        feed.falls_silent()
    else:
        monkeypatch.setattr(verify, "time", SimpleNamespace(time=lambda: ends_at))
    assert not call.word.holds()
    if end in ("change", "reset"):
        # What is remembered anew is another answer.
        await verifier(keys_rpc.VerifyApiKeyRequest(key="k"), SimpleNamespace(stands_by=lambda word: None))  # type: ignore[arg-type]
        assert known.peek("k") is not None and not call.word.holds()
