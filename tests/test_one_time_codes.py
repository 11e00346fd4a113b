"""One-time codes: three tries whatever is done, one purpose, one use, and no word of who has an account."""

import asyncio
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from clawplane.user.v1 import session_service_pb2, user_pb2, user_service_pb2
from clawplane.user.v1 import sign_in_service_pb2 as rpc
from services.kit import auth, devkeys, keys, vault
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from services.user_svc.attempts.models import Attempt
from services.user_svc.codes import repository as codes
from services.user_svc.codes import rules
from services.user_svc.codes.models import OneTimeCode, Purpose
from services.user_svc.sessions.models import Session
from services.user_svc.users.models import Identity, User
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.processes import OPTIONS
from tests.signing_in import FAILED, GOOD, OK, Somebody, UserProcesses, change, count, from_ip, refusal, winners, wrong
from tests.test_auth import bearer, code_of
from tests.test_secrets_stay_secret import everything_in
from tests.test_sessions import LIST

NOT_FOUND, INVALID = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT


def look_up(stack: Stack, email: str) -> user_service_pb2.LookupUserRequest:
    """The call that finds a user by the address."""
    return stack.users.LookupUser(user_service_pb2.LookupUserRequest(email=email), metadata=stack.operator)  # type: ignore[no-any-return]


async def test_an_address_becomes_an_account_with_its_first_code_and_not_before(stack: Stack) -> None:
    somebody = Somebody(stack, ip="198.51.100.7")
    code = await somebody.ask()
    assert (await code_of(look_up(stack, somebody.email)))[0] is NOT_FOUND
    assert await refusal(somebody.with_code(wrong(code))) == FAILED
    assert (await code_of(look_up(stack, somebody.email)))[0] is NOT_FOUND
    # As people type it.
    first = await somebody.with_code(f" {code[:3].lower()}-{code[3:]} ")
    user = await look_up(stack, somebody.email)
    assert user.id == first.session.user_id and user.email_verified and user.HasField("last_login_at") and user.HasField("email_verified_at")
    assert (first.session.ip, first.session.device, first.session.is_current) == ("198.51.100.7", "Firefox/133.0", True)
    assert first.session.fresh_until.seconds - first.session.created_at.seconds == auth.FRESH_S
    second = await somebody.sign_in()
    assert second.session.user_id == user.id and second.token != first.token and second.session.id != first.session.id
    assert await refusal(somebody.with_code(code)) == FAILED
    assert await count(stack, Identity, Identity.provider == "email", Identity.subject == somebody.email) == 1


async def test_neither_a_wrong_guess_nor_a_resend_gives_more_tries(stack: Stack) -> None:
    somebody = Somebody(stack)
    code = await somebody.ask()
    for _ in range(3):
        assert await refusal(somebody.with_code(wrong(code))) == FAILED
    assert await refusal(somebody.with_code(code)) == FAILED
    again = await somebody.ask()
    assert again != code and await refusal(somebody.with_code(again, from_ip(stack))) == FAILED
    # Ten minutes after the last guess it may be tried again; the first code has used up its own tries.
    await change(stack, sa.update(Attempt).where(Attempt.kind == "code_tried").values(expires_at=now()))
    assert await refusal(somebody.with_code(code)) == FAILED
    assert (await somebody.with_code(again)).token


async def test_fifty_guesses_at_once_count_as_three_tries(stack: Stack) -> None:
    somebody = Somebody(stack)
    code = await somebody.ask()
    _, failed = await winners([somebody.with_code(wrong(code), from_ip(stack)) for _ in range(50)])
    assert failed == {grpc.StatusCode.UNAUTHENTICATED}
    (row,) = await change(stack, sa.select(OneTimeCode.attempts).order_by(OneTimeCode.id.desc()).limit(1))
    assert row[0] == 3
    assert await refusal(somebody.with_code(code)) == FAILED


async def test_a_code_is_for_its_purpose_its_address_and_its_time(stack: Stack) -> None:
    somebody, other = Somebody(stack), Somebody(stack)
    signed_in = await somebody.sign_in()
    code = await somebody.ask()
    reset = rpc.ResetPasswordRequest(email=somebody.email, code=code, password=GOOD)
    assert await refusal(somebody.service.ResetPassword(reset, metadata=somebody.where)) == FAILED
    verify = rpc.VerifyEmailRequest(email=somebody.email, code=code, sign_up_token="x")
    assert await refusal(somebody.service.VerifyEmail(verify, metadata=somebody.where)) == FAILED
    step_up = somebody.service.StepUp(rpc.StepUpRequest(code=code), metadata=somebody.bearer(signed_in))
    assert await refusal(step_up) == (grpc.StatusCode.PERMISSION_DENIED, "SIGN_IN_FAILED")
    assert await refusal(other.with_code(code)) == FAILED
    late = await other.ask()
    await change(stack, sa.update(OneTimeCode).where(OneTimeCode.used_at.is_(None)).values(expires_at=now() - timedelta(seconds=1)))
    assert await refusal(other.with_code(late)) == FAILED


async def test_codes_are_asked_for_five_times_whoever_has_the_address(stack: Stack) -> None:
    known, unknown = Somebody(stack), Somebody(stack)
    await known.sign_in()
    await change(stack, sa.delete(Attempt).where(Attempt.kind == "code_asked"))
    seen = []
    for somebody in (known, unknown):
        request = rpc.RequestCodeRequest(email=somebody.email.upper())
        answers = [await refusal(somebody.service.RequestCode(request, metadata=from_ip(stack))) for _ in range(6)]
        seen.append(answers)
        assert len(await somebody.mail()) == 5 + (somebody is known)
    assert seen[0] == seen[1] == [(OK, "")] * 5 + [(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")]


async def test_every_answer_is_the_same_whether_there_is_an_account_or_not(stack: Stack) -> None:
    known, unknown, off = Somebody(stack), Somebody(stack), Somebody(stack)
    await known.sign_up()
    switched = (await off.sign_up()).session.user_id
    await stack.users.UpdateUserAccount(user_service_pb2.UpdateUserAccountRequest(id=switched, is_active=False), metadata=stack.operator)
    said = []
    for somebody in (known, unknown, off):
        service, where, email = somebody.service, (*somebody.where, ("x-request-id", "same")), somebody.email
        answers = [
            await service.RequestCode(rpc.RequestCodeRequest(email=email), metadata=where),
            await service.RequestPasswordReset(rpc.RequestPasswordResetRequest(email=email), metadata=where),
        ]
        up = await service.SignUp(rpc.SignUpRequest(email=email, password=GOOD), metadata=where)
        calls = [
            service.SignIn(rpc.SignInRequest(email=email, password="wrong-wrong-wrong"), metadata=where),
            service.SignInWithCode(rpc.SignInWithCodeRequest(email=email, code="222222"), metadata=where),
            service.ResetPassword(rpc.ResetPasswordRequest(email=email, code="222222", password=GOOD), metadata=where),
            service.VerifyEmail(rpc.VerifyEmailRequest(email=email, code="222222", sign_up_token=up.sign_up_token), metadata=where),
        ]
        errors = []
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            errors.append((error.value.code(), error.value.details(), tuple(error.value.trailing_metadata() or ())))
        said.append((answers, len(up.sign_up_token), errors))
        assert len(await somebody.mail()) == 3 + (somebody is not unknown)
    assert said[0] == said[1] == said[2]
    assert await refusal(off.with_code(await off.newest_code())) == FAILED and await refusal(off.with_password()) == FAILED


async def test_an_address_that_changed_hands_is_an_account_of_its_own(stack: Stack) -> None:
    """Whoever has the address today gets neither the account of who had it, nor of who is gone."""
    before = Somebody(stack)
    first = await before.sign_in()
    await change(stack, sa.update(User).where(User.id == first.session.user_id).values(email=f"moved-{before.email}"))
    second = await before.sign_in()
    assert second.session.user_id != first.session.user_id
    await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=second.session.user_id), metadata=stack.operator)
    third = await before.sign_in()
    assert third.session.user_id not in (first.session.user_id, second.session.user_id)


async def test_what_was_put_on_an_unproven_address_goes_when_it_is_proven(stack: Stack) -> None:
    """An account made with somebody else's address must not keep a way in for its maker."""
    somebody = Somebody(stack)
    wish = user_service_pb2.CreateUserRequest(
        user=user_pb2.User(email=somebody.email), identity=user_pb2.Identity(provider="clerk", subject=f"user_{somebody.email[:8]}")
    )
    made = await stack.users.CreateUser(wish, metadata=stack.operator)
    key = (await stack.key(Person(made, stack.token_for(made.id)), "deployments.list")).key
    await stack.deployments.ListDeployments(LIST, metadata=bearer(key))
    signed_in = await somebody.sign_in()
    assert signed_in.session.user_id == made.id
    user = await look_up(stack, somebody.email)
    assert user.email_verified and not user.clerk_user_id
    assert await change(stack, sa.select(Identity.provider).where(Identity.user_id == made.id)) == [("email",)]

    async def refused() -> bool:
        return (await code_of(stack.deployments.ListDeployments(LIST, metadata=bearer(key))))[0] is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, timeout_s=1.5)


async def test_nobody_elses_password_comes_with_a_code(stack: Stack) -> None:
    """The code of a sign-up that somebody else began does not fit to one's own."""
    victim = Somebody(stack)
    mine = await victim.service.SignUp(rpc.SignUpRequest(email=victim.email, password=GOOD), metadata=victim.where)
    own_code = await victim.newest_code()
    await victim.service.SignUp(rpc.SignUpRequest(email=victim.email, password="attackers-Own7-phrase-here"), metadata=from_ip(stack))
    verify = rpc.VerifyEmailRequest(email=victim.email, code=await victim.newest_code(), sign_up_token=mine.sign_up_token)
    assert await refusal(victim.service.VerifyEmail(verify, metadata=victim.where)) == FAILED
    verify.code = own_code
    await victim.service.VerifyEmail(verify, metadata=victim.where)
    assert (await victim.with_password()).token
    assert await refusal(victim.with_password("attackers-Own7-phrase-here")) == FAILED


async def test_only_hashes_are_stored(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        somebody = Somebody(stack)
        asked = await somebody.ask()
        answer = await somebody.sign_up()
        code = await somebody.newest_code()
        stored = await everything_in(stack.urls["user_svc"])
        for secret in (asked, code, GOOD, answer.token, answer.token.split("_")[3]):
            assert secret not in stored, secret
        rows = await change(stack, sa.select(OneTimeCode))
        assert rows and somebody.email not in repr(rows) and somebody.email not in repr(await change(stack, sa.select(Attempt)))


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_one_network_has_so_many_tries_and_without_its_counters_nobody_gets_in(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make(), user={"sign_ins_per_network": 3}) as stack:
        crowd = [Somebody(stack, ip="203.0.113.9") for _ in range(4)]
        answers = [await refusal(one.service.RequestCode(rpc.RequestCodeRequest(email=one.email), metadata=one.where)) for one in crowd]
        assert [code for code, _ in answers] == [OK] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED]
        elsewhere = Somebody(stack)
        code = await elsewhere.ask()
        for one in crowd[:3]:
            await refusal(one.with_code("222222"))
        assert await refusal(elsewhere.with_code(code, crowd[0].where)) == FAILED
        await change(stack, sa.text("ALTER TABLE attempts RENAME TO gone"))
        for call in (elsewhere.with_code(code), elsewhere.with_password()):
            assert (await code_of(call))[0] is not OK
        assert await count(stack, Session) == 0


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_fifty_callers_of_two_processes_use_one_code_once(databases: Databases, tmp_path: Path) -> None:
    processes = UserProcesses(databases, tmp_path)
    try:
        await processes.ready()
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) for port in processes.ports]
        stacks = [Stack(processes.keys, tmp_path, "", "http://x", {"user_svc": processes.env["CLAWPLANE_USER_DATABASE_URL"]}, one) for one in channels]
        people = [Somebody(one, email="race@example.com") for one in stacks]
        code = await people[0].ask()
        taken, failed = await winners([people[number % 2].with_code(code) for number in range(50)])
        assert len(taken) == 1 and failed == {grpc.StatusCode.UNAUTHENTICATED}
        assert await count(stacks[0], Session) == await count(stacks[0], User) == 1
        for one in channels:
            await one.close()
    finally:
        processes.stop()


async def test_a_code_that_fifty_use_at_once_is_used_by_one(stack: Stack) -> None:
    """Behind the limits, which let only three get so far: two engines with pools of their own, as in two processes."""
    somebody = Somebody(stack)
    settings = KitSettings(**devkeys.settings_for(stack.keys, "user_svc"))  # type: ignore[arg-type]
    box, engines = vault.open_box(settings), [Database(stack.urls["user_svc"], settings, "test") for _ in range(2)]
    async with engines[0].transaction(ALL) as session:
        code = await codes.make(session, box, Purpose.SIGN_IN, somebody.email)
    async with engines[0].transaction(ALL) as session:
        code_id = await codes.attempt(session, box, Purpose.SIGN_IN, somebody.email, code)
    assert code_id

    async def use(number: int) -> bool:
        return await engines[number % 2].run(lambda s: codes.use(s, box, Purpose.SIGN_IN, somebody.email, code_id), ALL) is not None

    assert sum(await asyncio.gather(*(use(number) for number in range(50)))) == 1
    for engine in engines:
        await engine.close()


@given(st.text(max_size=30))
def test_any_text_is_a_code_or_none(text: str) -> None:
    code = rules.normal(text)
    assert code == "" or (len(code) == rules.LENGTH and set(code) <= set(rules.ALPHABET) and rules.normal(code.lower()) == code)


@given(st.text(max_size=220) | st.from_regex(r"sess_(live|test)_[0-9a-f]{32}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", fullmatch=True))
def test_any_text_is_a_token_or_none(text: str) -> None:
    key = keys.parse(text, auth.SESSION, "ses")
    assert key is None or key.text == text


def test_codes_are_made_of_what_can_be_typed() -> None:
    made = {rules.new_code() for _ in range(300)}
    assert len(made) > 290 and all(rules.normal(code) == code for code in made)


async def test_odd_codes_and_tokens_get_the_documented_answer(stack: Stack) -> None:
    somebody = Somebody(stack)
    await somebody.ask()
    for odd in ("0O1IL", "\u2028", "२२२२२२", "ＡＢＣＤＥＦ", "' OR 1=1", "-"):
        assert (await refusal(somebody.with_code(odd)))[0] is grpc.StatusCode.UNAUTHENTICATED, odd
    assert (await refusal(somebody.with_code("")))[0] is INVALID
    assert (await refusal(somebody.with_code("x" * 21)))[0] is INVALID
    calls = [
        stack.sessions.ValidateSession(session_service_pb2.ValidateSessionRequest(token=odd), metadata=stack.operator)
        for odd in ("x", "sess_", "sess_test_" + "0" * 32 + "_" + "a" * 43 + "_000000", "💥", "sess_live_ _ _ ")
    ]
    assert {code for code, _ in await asyncio.gather(*(code_of(call) for call in calls))} == {NOT_FOUND}
