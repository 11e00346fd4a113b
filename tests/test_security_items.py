"""What docs/security.md says of passwords, codes, pages and tokens, where no other test shows it."""

import ast
import asyncio
import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from clawplane.user.v1 import user_pb2, user_service_pb2
from services.kit import devkeys, keys
from services.kit.clerk import fresh_until
from services.kit.columns import now
from services.user_svc.codes import rules as codes
from services.user_svc.passwords import rules
from services.user_svc.passwords.models import Password
from tests.conftest import Databases
from tests.harness import Metadata, Person, Stack, eventually, running
from tests.signing_in import FAILED, GOOD, OK, Somebody, change, refusal
from tests.test_auth import code_of
from tests.test_clerk_sessions import Clerk, signed_in  # noqa: F401 - a fixture
from tests.test_contract import methods
from tests.test_dashboard import COOKIE, PAGES, _is_away, window
from tests.test_migrations import metadata_of
from tests.test_sessions import who

# What the services do with the database is asked of both engines elsewhere.
pytestmark = pytest.mark.any_engine

ROOT = Path(__file__).resolve().parent.parent
DENIED, INVALID = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
PASSWORDS = [
    "lanternquiltzebraharbour", "860159274036518294730561", "!?&%$#*+~^<>|=;:!?&%$", "  LANTERN quilt zebra  ", "лошадь скрепка батарея верно",
    "🦓🏮🧵🛶🦓🪡🎐🧭🏮🎏🪁🧶", ("Zq7 lantern harbour " * 10)[:200],
]  # fmt: skip
OF_PEOPLE = ("/account", "/organization", "/organizations/new", "/keys", "/keys/new", "/step-up", "/audit")
WITH_PASSWORDS = ("/sign-in/password", "/sign-up", "/account", "/step-up")
JITTER = {
    "services/kit/db.py", "services/kit/loops.py", "services/user_svc/mail/sender.py", "services/deployment_svc/deployments/blame.py",
    "services/deployment_svc/deployments/steps.py", "gateway/models/settle.py",
}  # fmt: skip
"""Where plain randomness only spreads waiting."""


def test_words_of_the_context_make_no_good_password() -> None:
    about = ("zanzibarova.weatherby@quillfeather.example.com", "Ottoline Zanzibarova", "weatherby77")
    for word in ("zanzibarovaweatherby", "OttolineZanzibarova", "Zanzibarova2024", "weatherby77quillfeather", "Ottoline Zanzibarova", "Zanzibarova, Ottoline!"):
        assert not rules.problem(word), f"{word} is refused whoever takes it"
        assert rules.problem(word, *about), word
    assert rules.problem("clawplaneclawplane") and rules.problem("ClawPlane2026!") and rules.problem("ClawPlane 2026!")
    assert not rules.problem(GOOD, *about)


async def test_passwords_of_any_composition_and_length_are_taken_as_they_are(stack: Stack) -> None:
    async def taken(password: str) -> None:
        ada = Somebody(stack)
        await ada.sign_up(password)
        for other in {password.strip(), password.swapcase(), password[:-1], password[:72]} - {password}:
            assert await refusal(ada.with_password(other)) == FAILED, repr(other)
        assert (await ada.with_password(password)).token
        form = {"email": ada.email, "password": password}
        async with window(stack) as browser:
            assert (await browser.post("/dashboard/sign-in/password", data=form | {"password": password[1:]})).status_code == 400
            assert (await browser.post("/dashboard/sign-in/password", data=form)).status_code == 303

    await asyncio.gather(*(taken(password) for password in PASSWORDS))


async def test_a_password_does_not_age(stack: Stack) -> None:
    ada = Somebody(stack)
    user_id = (await ada.sign_up()).session.user_id
    long_ago = {"changed_at": now() - timedelta(days=3650), "created_at": now() - timedelta(days=3650)}
    await change(stack, sa.update(Password).where(Password.user_id == user_id).values(**long_ago))
    assert (await ada.with_password()).token


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_a_new_installation_has_nobody_in_it(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make(), user={"sign_in_links": False}) as stack:
        listed = await stack.users.ListUsers(user_service_pb2.ListUsersRequest(show_deleted=True), metadata=stack.operator)
        assert not listed.users
        for password in ("admin", "password", "clawplane"):
            assert await refusal(Somebody(stack, email="operator@clawplane.local").with_password(password)) == FAILED
    assert len({devkeys.make("k1")["operator_token"] for _ in range(3)}) == 3 and len(stack.keys["operator_token"]) >= 32


def test_there_are_no_hints_and_no_questions() -> None:
    hints = re.compile(r"hint|question|maiden|recovery")
    names = {field.name for method in methods() for message in (method.input_type, method.output_type) for field in message.fields}
    names |= {column.name for column in metadata_of("user_svc").tables["users"].columns} | set(metadata_of("user_svc").tables)
    assert not [name for name in names if hints.search(name)]


def test_nothing_secret_is_made_of_weak_randomness() -> None:
    found = set()
    for path in [*(ROOT / "services").rglob("*.py"), *(ROOT / "gateway").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Import) and any(one.name == "random" for one in node.names)) or (
                isinstance(node, ast.ImportFrom) and node.module == "random"
            ):
                found.add(str(path.relative_to(ROOT)))
    assert found == JITTER


def test_codes_and_tokens_are_long_enough() -> None:
    assert len(set(codes.ALPHABET)) == len(codes.ALPHABET) and codes.LENGTH * math.log2(len(codes.ALPHABET)) >= 20
    made = [keys.mint("sess", "test", "ses").text.split("_")[3] for _ in range(200)]
    assert len(set(made)) == 200 and {len(one) for one in made} == {43} and len(set("".join(made))) == 62
    assert 43 * math.log2(62) >= 128


@pytest.mark.parametrize(
    ("claims", "until"),
    [({"iat": 1000, "fva": [0, -1]}, 4600), ({"iat": 1000, "fva": [10, -1]}, 4000), ({"iat": 1000, "fva": [-1, -1]}, 0),
     ({"iat": 1000}, 0), ({"iat": 1000, "fva": []}, 0), ({"iat": 1000, "fva": ["0"]}, 0), ({"iat": 1000, "fva": [10**9]}, 0)],
)  # fmt: skip
def test_how_fresh_a_token_of_clerk_is(claims: dict[str, Any], until: float) -> None:
    assert fresh_until(claims) == until


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_a_token_of_clerk_is_as_fresh_as_it_says(signed_in: tuple[Stack, Clerk, str, user_pb2.User]) -> None:  # noqa: F811
    stack, clerk, sub, _ = signed_in

    def delete(**claims: Any) -> Any:
        metadata = (("authorization", f"Bearer {clerk.session(sub, **claims)}"),)
        return refusal(stack.users.DeleteSelf(user_service_pb2.DeleteSelfRequest(), metadata=metadata))

    for stale in ([61, -1], [-1, -1], None):
        assert await delete(fva=stale) == (DENIED, "STEP_UP_REQUIRED"), stale
    assert await delete(fva=[0, -1]) == (OK, "")


async def test_nobody_changes_the_address_that_he_signs_in_with(stack: Stack, person: Person) -> None:
    wish = user_pb2.User(id=person.user.id, email="somebody.else@example.com")
    update = user_service_pb2.UpdateUserRequest(user=wish)
    update.update_mask.paths.append("email")
    assert (await refusal(stack.users.UpdateUser(update, metadata=person.metadata)))[0] is INVALID
    found = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=person.user.id), metadata=person.metadata)
    assert found.email == person.user.email


async def test_password_fields_hide_and_take_what_is_pasted(stack: Stack) -> None:
    ada = Somebody(stack)
    token = (await ada.sign_up()).token
    async with window(stack) as nobody, window(stack, token) as browser:
        for path in WITH_PASSWORDS:
            page = await (browser if path in OF_PEOPLE else nobody).get(f"/dashboard{path}")
            inputs = [one for one in re.findall(r"<input[^>]*>", page.text) if re.search(r'name="\w*password"', one)]
            assert page.status_code == 200 and inputs, path
            for one in inputs:
                assert 'type="password"' in one and re.search(r'autocomplete="(current|new)-password"', one), (path, one)
                assert "readonly" not in one and int(re.search(r'maxlength="(\d+)"', one)[1]) >= rules.MOST  # type: ignore[index]
    scripts = [path.read_text() for path in (ROOT / "gateway").rglob("*") if path.suffix in {".js", ".html"}]
    assert scripts and not [text for text in scripts if re.search(r"onpaste|['\"]paste['\"]|autocomplete=\"off\"[^>]*password", text)]


async def test_a_browser_that_signs_in_again_ends_its_old_session(stack: Stack) -> None:
    ada = Somebody(stack)
    await ada.sign_up()
    form = {"email": ada.email, "password": GOOD}
    async with window(stack) as browser:
        await browser.post("/dashboard/sign-in/password", data=form)
        first = browser.cookies[COOKIE]
        await browser.post("/dashboard/sign-in/password", data=form)
        assert browser.cookies[COOKIE] != first and (await browser.get("/dashboard")).status_code == 200
    async with window(stack, first) as thief:
        await eventually(lambda: _is_away(thief), timeout_s=2)


async def test_every_page_has_the_way_out(stack: Stack) -> None:
    operator = await stack.sign_in()
    async with window(stack, operator.metadata[0][1].removeprefix("Bearer ")) as browser:
        for path in (*PAGES, *OF_PEOPLE, "/no-such-page"):
            page = await browser.get(f"/dashboard{path}")
            assert 'action="/dashboard/sign-out"' in page.text and "Sign out" in page.text, (path, page.status_code)


async def test_sessions_of_before_do_not_come_back(stack: Stack) -> None:
    for number in range(2):
        ada = Somebody(stack)
        began = await ada.sign_in()
        user_id, own = began.session.user_id, ada.bearer(began)
        if number:
            await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=user_id), metadata=stack.operator)
            await stack.users.UndeleteUser(user_service_pb2.UndeleteUserRequest(id=user_id), metadata=stack.operator)
        else:
            for is_active in (False, True):
                switch = user_service_pb2.UpdateUserAccountRequest(id=user_id, is_active=is_active)
                await stack.users.UpdateUserAccount(switch, metadata=stack.operator)

        async def is_refused(own: Metadata = own) -> bool:
            return (await code_of(who(stack, own)))[0] is grpc.StatusCode.UNAUTHENTICATED

        await eventually(is_refused, timeout_s=2)
        # He signs in anew.
        await who(stack, ada.bearer(await ada.sign_in()))
