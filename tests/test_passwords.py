"""Passwords: hashed with argon2id, locked after five failures without a word, and never the only way in."""

import asyncio
import threading
import time
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from clawplane.user.v1 import sign_in_service_pb2 as rpc
from clawplane.user.v1 import user_service_pb2
from services.kit.columns import now
from services.user_svc.attempts.models import Attempt
from services.user_svc.passwords import hashing, rules
from services.user_svc.passwords.models import Password
from services.user_svc.settings import UserSettings
from tests.conftest import Databases
from tests.harness import CHEAP_PASSWORDS, Stack, eventually, running
from tests.signing_in import FAILED, GOOD, Somebody, change, count, from_ip, refusal, winners
from tests.test_auth import code_of
from tests.test_sessions import who

OTHER = "another-Quiet9-harbour-song"
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED


async def test_sign_up_then_sign_in(stack: Stack) -> None:
    ada = Somebody(stack)
    assert await refusal(ada.with_password()) == FAILED
    answer = await ada.sign_up()
    user = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=answer.session.user_id), metadata=ada.bearer(answer))
    assert (user.email, user.full_name, user.email_verified) == (ada.email, "Ada Example", True)
    again = await ada.with_password()
    assert again.session.user_id == user.id and again.token != answer.token
    assert await refusal(ada.with_password(GOOD.upper())) == FAILED
    # The same characters from another keyboard: composed or not.
    accented = Somebody(stack)
    await accented.sign_up("na\u00efve-Zebra7-lantern-caf\u00e9")
    assert (await accented.with_password("nai\u0308ve-Zebra7-lantern-cafe\u0301")).token


async def test_a_second_sign_up_is_told_by_mail_alone(stack: Stack) -> None:
    ada = Somebody(stack)
    await ada.sign_up()
    up = await ada.service.SignUp(rpc.SignUpRequest(email=ada.email, password=OTHER), metadata=from_ip(stack))
    assert (await ada.mail())[0].subject == "You already have an account" and up.sign_up_token
    assert await refusal(ada.with_password(OTHER)) == FAILED and (await ada.with_password()).token


async def test_five_failures_lock_an_address_on_one_network_without_telling(stack: Stack) -> None:
    ada, elsewhere = Somebody(stack), from_ip(stack)
    session = await ada.sign_up()
    for _ in range(4):
        assert await refusal(ada.with_password("wrong-wrong-wrong")) == FAILED
    # A success forgets them.
    assert (await ada.with_password()).token
    for _ in range(5):
        assert await refusal(ada.with_password("wrong-wrong-wrong")) == FAILED
    assert await refusal(ada.with_password()) == FAILED
    assert (await ada.with_password(where=elsewhere)).token
    assert (await ada.sign_in()).token
    await who(stack, ada.bearer(session))
    until = (await change(stack, sa.select(Attempt.expires_at).where(Attempt.kind == "password", Attempt.count == 5).order_by(Attempt.updated_at.desc())))[0][0]
    assert timedelta(minutes=14) < until - now() <= timedelta(minutes=15)
    await change(stack, sa.update(Attempt).where(Attempt.kind == "password").values(expires_at=now()))
    assert (await ada.with_password()).token


async def test_fifty_guesses_at_once_on_one_network_are_five_and_fifty_networks_are_one_address(stack: Stack) -> None:
    ada = Somebody(stack)
    await ada.sign_up()
    await winners([ada.with_password("wrong-wrong-wrong") for _ in range(50)])
    counts = [row[0] for row in await change(stack, sa.select(Attempt.count).where(Attempt.kind == "password").order_by(Attempt.created_at.desc()))]
    assert counts[0] == 5
    taken, failed = await winners([ada.with_password("wrong-wrong-wrong", from_ip(stack)) for _ in range(45)])
    assert not taken and failed == {grpc.StatusCode.UNAUTHENTICATED}
    # Fifty by now, wherever they came from: the address is locked everywhere, but for codes.
    assert await refusal(ada.with_password(where=from_ip(stack))) == FAILED
    assert (await ada.sign_in()).token


async def test_which_passwords_are_refused(stack: Stack) -> None:
    ada = Somebody(stack, email=f"augusta.lovelace@t{time.time_ns()}.example.com")
    for bad in ("short-Zq7!", "passwordpassword", "123456789012", "qwertyuiop123", "iloveyou1234", "augusta.lovelace", "aaaaaaaaaaaaaa", "Clawplane2024"):
        call = ada.service.SignUp(rpc.SignUpRequest(email=ada.email, password=bad), metadata=ada.where)
        code, text = await code_of(call)
        assert code is INVALID and "password" in text, bad
    assert not await ada.mail()
    assert rules.problem("x" * 201) and not rules.problem("Zq7!" * 3 + "lantern quilt " * 13) and not rules.problem(GOOD)
    assert rules.problem("Ada Example 1815", "ada@example.com", "Ada Example")


async def test_change_and_reset(stack: Stack) -> None:
    ada = Somebody(stack)
    here = await ada.sign_up()
    there = await ada.with_password()
    change_it = rpc.ChangePasswordRequest(old_password="wrong-wrong-wrong", new_password=OTHER)
    assert await refusal(ada.service.ChangePassword(change_it, metadata=ada.bearer(here))) == (DENIED, "SIGN_IN_FAILED")
    change_it.old_password = GOOD
    await ada.service.ChangePassword(change_it, metadata=ada.bearer(here))
    assert (await ada.mail())[0].subject == "Your password was changed"
    await who(stack, ada.bearer(here))
    assert (await code_of(who(stack, ada.bearer(there))))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert await refusal(ada.with_password(GOOD)) == FAILED and (await ada.with_password(OTHER)).token
    await ada.service.RequestPasswordReset(rpc.RequestPasswordResetRequest(email=ada.email), metadata=ada.where)
    reset = rpc.ResetPasswordRequest(email=ada.email, code=await ada.newest_code(), password="password1234")
    assert (await refusal(ada.service.ResetPassword(reset, metadata=ada.where)))[0] is INVALID
    reset.password = GOOD
    await ada.service.ResetPassword(reset, metadata=ada.where)
    assert await refusal(ada.service.ResetPassword(reset, metadata=ada.where)) == FAILED

    async def refused() -> bool:
        return (await code_of(who(stack, ada.bearer(here))))[0] is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, timeout_s=1.5)
    assert (await ada.with_password(GOOD)).token


async def test_resetting_makes_no_account_and_gives_a_first_password(stack: Stack) -> None:
    nobody, ada = Somebody(stack), Somebody(stack)
    await nobody.service.RequestPasswordReset(rpc.RequestPasswordResetRequest(email=nobody.email), metadata=nobody.where)
    assert (await nobody.mail())[0].subject == "There is no account with this address" and not await nobody.newest_code()
    signed_in = await ada.sign_in()
    change_it = rpc.ChangePasswordRequest(old_password=GOOD, new_password=OTHER)
    assert (await refusal(ada.service.ChangePassword(change_it, metadata=ada.bearer(signed_in))))[0] is grpc.StatusCode.FAILED_PRECONDITION
    await ada.service.RequestPasswordReset(rpc.RequestPasswordResetRequest(email=ada.email), metadata=ada.where)
    reset = rpc.ResetPasswordRequest(email=ada.email, code=await ada.newest_code(), password=GOOD)
    await ada.service.ResetPassword(reset, metadata=ada.where)
    assert (await ada.with_password()).token


async def test_a_password_of_an_address_that_is_no_longer_proven_gets_a_code_instead(stack: Stack) -> None:
    ada = Somebody(stack)
    user_id = (await ada.sign_up()).session.user_id
    await stack.users.UpdateUserAccount(user_service_pb2.UpdateUserAccountRequest(id=user_id, email_verified=False), metadata=stack.operator)
    before = len(await ada.mail())
    assert await refusal(ada.with_password("wrong-wrong-wrong")) == FAILED and len(await ada.mail()) == before
    assert await refusal(ada.with_password()) == FAILED and len(await ada.mail()) == before + 1
    assert (await ada.with_code(await ada.newest_code())).session.user_id == user_id


async def test_a_hash_of_other_parameters_is_made_anew(databases: Databases, tmp_path: Path) -> None:
    urls = databases.make()
    stored = sa.select(Password.hash, Password.changed_at)
    async with running(tmp_path, urls) as stack:
        ada = Somebody(stack)
        await ada.sign_up()
        ((first, changed_at),) = await change(stack, stored)
        await ada.with_password()
        assert first.startswith("$argon2id$") and (await change(stack, stored))[0][0] == first
    async with running(tmp_path, urls, user={"password_time_cost": 2}) as stack:
        ada = Somebody(stack, email=ada.email)
        assert (await ada.with_password()).token
        ((second, still),) = await change(stack, stored)
        assert "t=2" in second and "t=1" in first and still == changed_at
        assert (await ada.with_password()).token and await count(stack, Password) == 1


async def test_hashing_leaves_the_loop_free_and_runs_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hasher = hashing.Hasher(UserSettings(**CHEAP_PASSWORDS))
    at_once, most, lock = 0, 0, threading.Lock()

    def slow(text: str) -> str:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return text

    monkeypatch.setattr(rules, "normal", slow)
    tasks = [asyncio.create_task(hasher.verify(None, GOOD)) for _ in range(10)]
    started = time.monotonic()
    await asyncio.sleep(0)
    assert time.monotonic() - started < 0.02
    assert await asyncio.gather(*tasks) == [False] * 10 and most == 2
    crowd = await asyncio.gather(*(hasher.verify(None, GOOD) for _ in range(80)), return_exceptions=True)
    assert sum(isinstance(one, Exception) for one in crowd) == 80 - 64
    await hasher.close()


def test_production_does_not_take_cheap_hashes() -> None:
    with pytest.raises(ValueError, match="PASSWORD_MEMORY_KIB"):
        UserSettings(environment="production", **CHEAP_PASSWORDS)
