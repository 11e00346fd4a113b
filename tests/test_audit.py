"""The audit log as people see it: who did what, with which fields, listed and exported, and verified from the command line."""

import asyncio
import base64
import json
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict

from clawplane.audit.v1 import audit_event_pb2 as log
from clawplane.deployment.v1 import blacklist_service_pb2, deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import user_pb2, user_service_pb2
from services.kit import devkeys, ids
from services.kit.audit import REDACTED, diff
from services.kit.db import Database
from services.kit.migrate import migrate
from services.kit.settings import KitSettings
from tests.audit import KEY, Trial, trial_on
from tests.conftest import Databases
from tests.harness import TELEGRAM, Person, Stack, clean_env, eventually
from tests.processes import ROOT

Code = grpc.StatusCode


async def events(stack: Stack, person: Person, **asked: Any) -> list[log.AuditEvent]:
    """What the organization's owner sees of its account, newest first."""
    answer = await stack.audit.ListAuditEvents(log.ListAuditEventsRequest(**asked), metadata=person.metadata)
    return list(answer.events)


async def rename(stack: Stack, person: Person, name: str, *metadata: tuple[str, str]) -> None:
    """A change of a user."""
    request = user_service_pb2.UpdateUserRequest(user=user_pb2.User(id=person.user.id, full_name=name), update_mask={"paths": ["full_name"]})
    await stack.users.UpdateUser(request, metadata=(*person.metadata, *metadata))


async def test_a_change_says_who_what_and_from_where(stack: Stack, person: Person) -> None:
    await rename(stack, person, "New Name", ("x-request-id", "rename-1"))
    changed, made = await events(stack, person)
    assert (changed.actor, changed.credential, changed.org_id, changed.resource_id) == (person.user.id, "user", person.org_id, person.user.id)
    assert (changed.method, changed.request_id, changed.ip) == ("/clawplane.user.v1.UserService/UpdateUser", "rename-1", "127.0.0.1")
    assert (list(changed.fields), changed.outcome) == (["full_name"], log.AUDIT_OUTCOME_DONE)
    assert (changed.before["full_name"], changed.after["full_name"]) == ("Test Person", "New Name")
    assert (made.actor, made.credential, made.after["email"]) == ("operator", "operator", person.user.email) and not made.before
    session = await stack.sign_in()
    await rename(stack, session, f"Operator {ids.uuid7().hex}")
    (newest, redeemed) = (await events(stack, session))[:2]
    assert newest.credential_id.startswith("ses_") and newest.actor == session.user.id
    # Whoever signs in has no credential yet; the log says who it turned out to be.
    assert (redeemed.credential, redeemed.actor) == ("public", session.user.id)


async def test_an_order_holds_no_secret_and_says_what_became_of_it(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    update = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=deployment_pb2.Deployment(id=d.id, display_name="Bot"), update_mask={"paths": ["display_name"]}
    )
    await stack.deployments.UpdateDeployment(update, metadata=person.metadata)
    answer = await stack.deployment_audit.ListAuditEvents(log.ListAuditEventsRequest(resource_id=d.id), metadata=person.metadata)
    changed, ordered = answer.events
    assert MessageToDict(changed.after) == {"display_name": "Bot"} and ordered.method.endswith("/CreateDeployment")
    assert TELEGRAM not in str(answer)


def test_secrets_and_long_values_are_named_and_not_shown() -> None:
    request = deployment_service_pb2.CreateDeploymentRequest(model="m", channel_token="PLANTED", channel_api_key="PLANTED")
    assert diff(None, request) == {"before": {}, "after": {"model": "m", "channel_token": REDACTED, "channel_api_key": REDACTED}}
    assert diff(request, None)["before"]["channel_token"] == REDACTED
    one, other = user_pb2.User(bio="x", etag="1", is_active=True), user_pb2.User(bio="y" * 600, etag="2", full_name="N", is_active=False)
    other.updated_at.GetCurrentTime()
    assert diff(one, other) == {
        "before": {"bio": "x", "full_name": "", "is_active": True}, "after": {"bio": "[602 bytes]", "full_name": "N", "is_active": False},
    }  # fmt: skip
    other.last_login_at.FromSeconds(1)
    assert diff(one, other)["before"]["last_login_at"] is None and diff(one, other)["after"]["last_login_at"] == "1970-01-01T00:00:01Z"
    # Also a secret that lies deeper.
    nested = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address="p")
    assert "PLANTED" not in str(diff(nested, nested)) and diff(nested, nested) == {"before": {}, "after": {}}


async def test_events_are_found_by_what_they_say(stack: Stack, person: Person) -> None:
    for number in range(5):
        await rename(stack, person, f"Name {number}")
    account = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, tier="pro")
    await stack.users.UpdateUserAccount(account, metadata=stack.operator)
    everything = await events(stack, person)
    assert [event.id for event in everything] == sorted((event.id for event in everything), reverse=True) and len(everything) == 7
    assert (everything[0].before["tier"], everything[0].after["tier"]) == ("starter", "pro")
    assert len(await events(stack, person, actor=person.user.id)) == 5 and len(await events(stack, person, actor="operator")) == 2
    assert len(await events(stack, person, resource_id=person.user.id)) == 7 and not await events(stack, person, resource_id="usr_")
    assert len(await events(stack, person, method_prefix="/clawplane.user.v1.UserService/Update")) == 6
    assert not await events(stack, person, method_prefix="%")
    third = everything[2].created_at
    since, before = await events(stack, person, start=third), await events(stack, person, end=third)
    assert [event.id for event in (*since, *before)] == [event.id for event in everything] and len(since) == 3
    request, seen = log.ListAuditEventsRequest(page_size=2), []
    while True:
        answer = await stack.audit.ListAuditEvents(request, metadata=person.metadata)
        seen += [event.id for event in answer.events]
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert seen == [event.id for event in everything]
    # Operators look at one organization, or at all; nobody else at another's.
    mine = await stack.audit.ListAuditEvents(log.ListAuditEventsRequest(org_id=person.org_id), metadata=stack.operator)
    assert [event.id for event in mine.events] == seen
    stranger = await stack.person()
    assert len(await events(stack, stranger)) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await events(stack, stranger, org_id=person.org_id)
    assert refusal.value.code() is Code.NOT_FOUND


async def exported(stack: Stack, metadata: Any, **asked: Any) -> list[log.AuditEvent]:
    """Everything that an export gives."""
    return [answer.event async for answer in stack.audit.ExportAuditEvents(log.ExportAuditEventsRequest(**asked), metadata=metadata)]


async def test_an_export_streams_everything_once_and_is_an_event_itself(stack: Stack, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kit.audit_events._PAGE", 3)
    await asyncio.gather(*(rename(stack, person, f"Name {number}") for number in range(7)))
    everything = [event.id for event in reversed(await events(stack, person))]
    given = await exported(stack, person.metadata)
    assert [event.id for event in given] == everything and len(given) == 8
    after_that = (await events(stack, person))[0]
    assert (after_that.method.rpartition("/")[2], after_that.outcome) == ("ExportAuditEvents", log.AUDIT_OUTCOME_READ)
    assert [event.id for event in await exported(stack, person.metadata, after_event_id=given[4].id)][:3] == everything[5:]
    narrowed = await exported(stack, person.metadata, start=given[2].created_at, end=given[5].created_at)
    assert {event.id for event in narrowed} <= set(everything) and 1 <= len(narrowed) <= 4
    of_org = await exported(stack, stack.operator, org_id=person.org_id)
    assert [event.id for event in of_org][:8] == everything
    # What an operator takes along of an organization stands in that organization's log.
    assert (await events(stack, person))[0].actor == "operator"
    # An export of nothing is an event too.
    count = len(await events(stack, person))
    assert await exported(stack, person.metadata, end={"seconds": 1}) == [] and len(await events(stack, person)) == count + 1


async def test_events_over_http(stack: Stack, person: Person) -> None:
    headers = dict(person.metadata)
    await stack.order(person)
    account = (await stack.http.get("/v1/auditEvents/account", headers=headers)).json()["events"]
    ordered = (await stack.http.get("/v1/auditEvents/deployments", params={"methodPrefix": "/clawplane"}, headers=headers)).json()["events"]
    assert account[0]["fields"] and ordered[0]["actor"] == person.user.id
    answer = await stack.http.get("/v1/auditEvents/account:export", headers=headers)
    data = [json.loads(line[6:])["event"]["id"] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data == [event["id"] for event in reversed(account)]
    resumed = await stack.http.get("/v1/auditEvents/account:export", headers=headers | {"last-event-id": data[-1]})
    assert next(line for line in resumed.text.splitlines() if line.startswith("data: ")).count("ExportAuditEvents") == 1


async def test_events_are_sealed_within_seconds(stack: Stack, person: Person) -> None:
    async def sealed() -> Any:
        found = await events(stack, person)
        return found if all(event.seal_number for event in found) else None

    await rename(stack, person, "Sealed")
    assert [event.seal_number for event in await eventually(sealed)] == [2, 1]


def verify(env: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``clawplane audit verify``."""
    command = [sys.executable, "-m", "services.cli", "audit", "verify", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest_asyncio.fixture
async def trial(databases: Databases) -> AsyncIterator[tuple[Trial, dict[str, str]]]:
    """A log in databases of its own, and the environment in which the command finds them."""
    urls = databases.make()
    other = Database(urls["deployment_svc"], KitSettings(), "deployment_svc")
    await migrate(other, "deployment_svc")
    await other.close()
    env = {
        "CLAWPLANE_ENVIRONMENT": "production", "CLAWPLANE_AUDIT_KEY": base64.b64encode(KEY).decode(), "CLAWPLANE_SANDBOX_ENABLED": "true",
        "CLAWPLANE_USER_DATABASE_URL": urls["user_svc"], "CLAWPLANE_DEPLOYMENT_DATABASE_URL": urls["deployment_svc"],
    }  # fmt: skip
    async with trial_on(urls["user_svc"]) as made:
        yield made, clean_env() | env


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_sealers_are_killed_and_the_command_finds_what_is_done_to_their_log(trial: tuple[Trial, dict[str, str]], tmp_path: Path) -> None:
    """Two processes seal while fifty write; one of them is killed in the middle of it."""
    log_, env = trial
    command = [sys.executable, "-m", "tests.sealing", log_.db.url.render_as_string(hide_password=False)]
    with (tmp_path / "sealers.log").open("wb") as said:
        sealers = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=said) for _ in range(2)]
        try:
            for process in sealers:
                assert process.stdout is not None and await asyncio.to_thread(process.stdout.readline) == b"sealing\n"
            writing = asyncio.gather(*(log_.write(8) for _ in range(50)))
            await asyncio.sleep(random.uniform(0.05, 0.5))
            sealers[0].kill()
            await writing

            async def all_sealed() -> Any:
                rows = await log_.rows()
                return None if any(row.seal_number is None for row in rows) else rows

            rows = await eventually(all_sealed, 30)
        finally:
            for process in sealers:
                process.kill()
                process.wait()
    assert [row.seal_number for row in rows] == list(range(1, 401)) and await log_.problems() == []
    with_log = ("--log", str(tmp_path / "sealers.log"))
    done = await asyncio.to_thread(verify, env, *with_log)
    assert done.returncode == 0 and "intact" in done.stdout, done.stdout + done.stderr
    assert "user_svc: 1 organizations, 400 rows, 0 of them not sealed yet" in done.stdout
    await log_.sql("UPDATE audit_events SET subject = 'usr_x' WHERE org_id = :org AND seal_number = 7")
    await log_.sql("DELETE FROM audit_events WHERE org_id = :org AND seal_number > 390")
    await log_.sql("DELETE FROM audit_heads WHERE org_id = :org")
    done = await asyncio.to_thread(verify, env, *with_log, "--org", log_.org_id)
    assert done.returncode == 1 and re.search(rf"^user_svc: edited +{rows[6].id}: ", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "there is no head" in done.stdout and "the log tells of 400 sealed rows, the table has 390" in done.stdout


def test_the_command_says_what_is_missing_and_makes_nothing(tmp_path: Path) -> None:
    done = verify(clean_env(), "--data-dir", str(tmp_path / "none"))
    assert done.returncode == 2 and "there is no database" in done.stderr and not (tmp_path / "none").exists()


def test_files_of_keys_from_before_get_the_new_one_once(tmp_path: Path) -> None:
    keys = devkeys.load_or_make(tmp_path)
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({name: value for name, value in keys.items() if name != "audit_key"}))
    # Each opens the lock for itself, so that threads exclude each other as processes do.
    with ThreadPoolExecutor(6) as racing:
        said = {made["audit_key"] for made in racing.map(lambda _: devkeys.load_or_make(tmp_path), range(6))}
    after = devkeys.load_or_make(tmp_path)
    assert said == {after["audit_key"]} and {**after, "audit_key": keys["audit_key"]} == keys
    assert path.stat().st_mode & 0o777 == 0o600 and sorted(one.name for one in tmp_path.iterdir()) == ["keys.json", "keys.lock"]
