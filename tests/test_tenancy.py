"""No tenant sees, changes or can tell the existence of what another one has: every RPC, by every kind of stranger."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.api import field_behavior_pb2
from google.protobuf import json_format, timestamp_pb2
from google.protobuf.descriptor import MethodDescriptor

from clawplane.audit.v1.audit_event_pb2 import AUDIT_OUTCOME_DONE, AUDIT_OUTCOME_READ
from clawplane.options.v1 import options_pb2
from clawplane.user.v1.organization_pb2 import Role
from gateway.httprule import Binding, bindings, services
from services.deployment_svc.claw_keys.repository import PERMISSIONS as OF_CLAW_KEYS
from services.kit import ids
from services.kit.call import Plan
from services.user_svc.organizations.roles import OF_EVERY_KEY, PERMISSIONS, PERSONAL
from tests.conftest import Databases
from tests.harness import Metadata, Person
from tests.simulators.market import MarketSimulator
from tests.tenancy import FOR_KEYS, WEAK, Answer, Scene, Victim, is_personal, scene_on
from tests.test_auth import bearer, forged
from tests.test_contract import methods
from tests.valid import Request, behaviour, unknown

Code = grpc.StatusCode
PLANS = {method.full_name: Plan.of(method) for method in methods()}
# Whom a public RPC concerns is no question of tenants: its own tests say what it may tell to nobody in particular.
RPCS = sorted((m for m in methods() if PLANS[m.full_name].audience != options_pb2.AUDIENCE_PUBLIC), key=lambda m: str(m.full_name))
HTTP = [binding for service in services() for binding in bindings(service) if binding.rpc in RPCS]
OF_ALL_ORGANIZATIONS = {"ListOrganizations", "CreateOrganization"}
"""RPCs about all organizations that the caller is a member of, whichever he acts in."""
ENDS_HERE = {"LeaveOrganization", "DeleteSelf"}
"""RPCs that name nobody, and after which the caller is not there any more for what comes next; every member may. Their own tests say
what they do."""
each_rpc = pytest.mark.parametrize("method", RPCS, ids=lambda method: str(method.full_name))


@pytest_asyncio.fixture(scope="module")
async def scene(databases: Databases, market: MarketSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """One victim and everybody who tries, on each engine."""
    async with scene_on(tmp_path_factory.mktemp("tenancy"), databases.make(), market.url) as made:
        yield made


def permission_of(method: MethodDescriptor) -> str:
    """The permission that an RPC needs."""
    return PLANS[method.full_name].permission


def is_platform(method: MethodDescriptor) -> bool:
    """Whether an RPC is for services and operators alone."""
    return PLANS[method.full_name].audience == options_pb2.AUDIENCE_PLATFORM


def same(about: Answer, instead: Answer, request: Request, method: MethodDescriptor | None = None) -> bool:
    """Whether two answers differ in nothing but the words that the caller himself sent."""
    raw = instead.raw
    for text in request.texts:
        raw = raw.replace(unknown(text).encode(), text.encode())
    return about.code == instead.code and lasting(about, method) == lasting(replace(instead, raw=raw), method)


def lasting(answer: Answer, method: MethodDescriptor | None) -> bytes:
    """What an answer says but for the id and the times of what it has made, which are others each time."""
    if method is None or PLANS[method.full_name].is_read or answer.code is not Code.OK:
        return answer.raw
    said = PLANS[method.full_name].answer.FromString(answer.raw)
    for field, value in said.ListFields():
        if field_behavior_pb2.IDENTIFIER in behaviour(field) or isinstance(value, timestamp_pb2.Timestamp):
            said.ClearField(field.name)
    return bytes(said.SerializeToString(deterministic=True))


def of_others(scene: Scene, answer: Answer, request: Request, person: Person, method: MethodDescriptor | None = None) -> list[bytes]:
    """What an answer says of the victim or of any other tenant, beside what the caller himself sent."""
    named = set(re.findall(rb"(?:org|usr)_[0-9a-f]{32}", answer.raw)) - {person.org_id.encode(), person.user.id.encode()}
    sent = request.message.SerializeToString()
    found = [mark for mark in scene.victim.marks | named if mark in answer.raw and mark not in sent]
    if method is None or method.name not in OF_ALL_ORGANIZATIONS:
        return found
    # Where he is a member, he may see that there is something, and what organizations he has made since are his.
    own = {scene.victim.person.org_id} if person is scene.guest else set()
    return [mark for mark in found if mark in scene.victim.marks and not any(mark in each.encode() for each in own)]


OF_KEYS_ALONE = OF_EVERY_KEY - PERMISSIONS[Role.ROLE_OWNER]
KEYS_OF_ALL = "api_keys.admin"
"""Without it, a member sees and changes only the keys that he made himself."""


def names_a_key(request: Request) -> bool:
    """Whether a request is about an API key."""
    return any(reference.prefix == "key" for reference in request.references)


async def learns_nothing(scene: Scene, method: MethodDescriptor, request: Request, who: Metadata, person: Person) -> None:
    """The law of the stranger."""
    if method.name == "DeleteSelf":
        return  # He may, and would be nobody for all that comes after.
    answer = await scene.ask(method, request, who)
    if is_platform(method):
        assert (answer.code, answer.permission) == (Code.PERMISSION_DENIED, permission_of(method)), answer
        return
    if request.required:
        assert answer.code is Code.NOT_FOUND, answer
    if request.texts:
        assert same(answer, instead := await scene.ask(method, request.instead(), who), request, method), (answer, instead)
    assert not of_others(scene, answer, request, person, method), answer


async def does_what_the_role_may(scene: Scene, method: MethodDescriptor, request: Request, role: int) -> None:
    """The law of the members of the victim's organization: the table of roles, and not one thing more."""
    permission, who = permission_of(method), scene.members[role]
    if is_platform(method) or permission not in PERMISSIONS[role]:
        answer = await scene.ask(method, request, who)
        assert (answer.code, answer.permission) == (Code.PERMISSION_DENIED, permission), answer
    elif permission in PERSONAL:
        answer = await scene.ask(method, request, who)
        assert answer.permission != permission, answer
        # What belongs to a person is not the organization's to show.
        if request.texts:
            assert answer.code is Code.NOT_FOUND and same(answer, await scene.ask(method, request.instead(), who), request), answer
    elif PLANS[method.full_name].is_read:
        answer = await scene.ask(method, request, who)
        of_another = names_a_key(request) and KEYS_OF_ALL not in PERMISSIONS[role]
        # A filter only mentions whom it is about: his usage of the organization is the organization's.
        personal = request.required and request.references and all(is_personal(reference.prefix) for reference in request.references)
        if of_another or personal:
            assert answer.code is Code.NOT_FOUND and same(answer, await scene.ask(method, request.instead(), who), request), answer
            return
        # What is asked without an id may be about the caller, who has nothing.
        assert answer.code is Code.OK or (answer.code is Code.NOT_FOUND and not request.required), answer


async def keys_do_no_more_than_they_may(scene: Scene, method: MethodDescriptor, request: Request) -> None:
    """The law of keys: a stranger's, which may all that a key can; a bot's; and the victim's own, which may one thing."""
    for who, permissions in ((scene.strangers_key, FOR_KEYS), (scene.claw_key, OF_CLAW_KEYS), (scene.weak_key, {WEAK})):
        if permission_of(method) in OF_KEYS_ALONE:
            continue  # Each ends itself, which its own tests show.
        if permission_of(method) not in permissions | OF_EVERY_KEY or is_platform(method):
            answer = await scene.ask(method, request, who)
            assert (answer.code, answer.permission) == (Code.PERMISSION_DENIED, permission_of(method)), answer
        elif PLANS[method.full_name].fresh:
            assert (await scene.ask(method, request, who)).code is Code.PERMISSION_DENIED
        elif who is not scene.weak_key:
            # What a key may do is done now, and the answers that are compared are those of a second and a third time.
            await scene.ask(method, request, who)
            await learns_nothing(scene, method, request, who, scene.stranger)


async def is_nobody(scene: Scene, method: MethodDescriptor, request: Request) -> None:
    """The law of those whom no credential stands for."""
    now = int(time.time())
    expired = forged(scene.stack, user=scene.victim.person.user.id, iat=now - 700, exp=now - 100)
    nobodies = (*(bearer(text) for text in (expired, "no.such.token", "claw_live_x", "cp_live_x", "sess_test_x")), (), *scene.over)
    answers = [await scene.ask(method, request, who) for who in nobodies]
    assert {answer.code for answer in answers} == {Code.UNAUTHENTICATED}
    assert len({answer.raw for answer in answers}) == 1, answers


@each_rpc
async def test_strangers_learn_and_change_nothing(scene: Scene, method: MethodDescriptor) -> None:
    before = await scene.snapshot()
    org_id = scene.victim.person.org_id
    requests = scene.victim.requests(method)
    # What is wrong with these callers is seen before anyone looks at what they ask.
    await is_nobody(scene, method, requests[0])
    theirs, nobodys = [await scene.ask(method, requests[0], scene.at(scene.stranger.metadata, org)) for org in (org_id, ids.new("org"))]
    assert theirs.code is Code.NOT_FOUND and theirs == nobodys
    for request in requests:
        if method.name not in ENDS_HERE:
            await learns_nothing(scene, method, request, scene.stranger.metadata, scene.stranger)
            await learns_nothing(scene, method, request, scene.elsewhere, scene.guest)
            for role in scene.members:
                await does_what_the_role_may(scene, method, request, role)
        await keys_do_no_more_than_they_may(scene, method, request)
    changed = before ^ await scene.snapshot()
    assert not changed, "\n".join(sorted(changed))


def secrets_in(message: Any) -> list[str]:
    """The values of the fields that are marked as secret."""
    found = []
    for field, value in message.ListFields():
        if field.GetOptions().debug_redact:
            found.append(str(value))
        elif field.message_type is not None and not field.is_repeated:
            found += secrets_in(value)
    return found


async def is_in_the_audit_log(scene: Scene, method: MethodDescriptor, request: Request, answer: Answer, request_id: str) -> None:
    """The law of the audit log: one row for what was done or for a secret that was shown, with who and from where, without any secret."""
    rows, plan = await scene.audit_rows(method, request_id), PLANS[method.full_name]
    if not plan.audited or answer.code is not Code.OK:
        assert rows == [], rows
        return
    (row,) = rows
    said = plan.answer.FromString(answer.raw)
    assert (row["method"], row["ip"], row["outcome"]) == (plan.method, "127.0.0.1", AUDIT_OUTCOME_READ if plan.is_read else AUDIT_OUTCOME_DONE)
    credential = "operator" if is_platform(method) else "key" if plan.permission == "api_keys.revoke_self" else "user"
    assert row["credential"] == credential and row["subject"] and row["written"]
    assert not [secret for secret in [*secrets_in(request.message), *secrets_in(said)] if secret in repr(row)], row
    if "update_mask" in method.input_type.fields_by_name:
        changed = list(request.message.update_mask.paths)  # type: ignore[attr-defined]
        assert list(row["after"]) == changed and list(row["before"]) == changed, row


@each_rpc
async def test_the_same_requests_reach_their_rows_when_they_may(scene: Scene, method: MethodDescriptor) -> None:
    """Without this, a refusal could mean no more than that the request was wrong."""
    harmless = PLANS[method.full_name].is_read or (is_platform(method) and not any(sent.texts for sent in scene.victim.requests(method)))
    victim = scene.victim if harmless else await scene.sacrifice()
    owner = scene.stack.operator if is_platform(method) else victim.person.metadata
    if permission_of(method) in OF_KEYS_ALONE:
        owner = bearer(victim.key)
    who = owner if harmless or is_platform(method) else await least_who_may(scene, method, victim)
    for request in victim.requests(method):
        request_id = ids.uuid7().hex
        answer = await scene.ask(method, request, who, request_id=request_id)
        if answer.permission and answer.permission != permission_of(method):
            # A rule of its own about ranks.
            answer = await scene.ask(method, request, owner, request_id=request_id)
        await is_in_the_audit_log(scene, method, request, answer, request_id)
        wrong = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.INTERNAL)
        assert answer.code not in wrong, (answer, request)
        if method.name.startswith("List") and not is_platform(method):
            assert [mark for mark in victim.marks if mark in answer.raw], f"the victim has nothing that {method.name} lists: make a row in Scene.plant"


async def least_who_may(scene: Scene, method: MethodDescriptor, victim: Victim) -> Metadata:
    """A member of the victim's organization whose role is the lowest with the permission; the victim himself for what is his own."""
    if permission_of(method) in OF_KEYS_ALONE:
        return bearer(victim.key)
    needed = {permission_of(method)} | ({KEYS_OF_ALL} if any(map(names_a_key, victim.requests(method))) else set())
    role = min(role for role, permissions in PERMISSIONS.items() if needed <= permissions)
    if role == max(PERMISSIONS) or permission_of(method) in PERSONAL:
        return victim.person.metadata
    return await scene.join(victim, role)


@pytest.mark.parametrize("method", [m for m in RPCS if m.server_streaming and not is_platform(m)], ids=lambda method: str(method.full_name))
async def test_streams_tell_strangers_nothing_later(scene: Scene, method: MethodDescriptor) -> None:
    if scene.victim.requests(method)[0].required:
        return  # The first answer is the last: NOT_FOUND.
    victim = await scene.sacrifice()
    request = victim.requests(method)[0]
    own, strangers = [
        asyncio.create_task(scene.ask(method, request, who, quiet_s=10)) for who in (victim.person.metadata, scene.stranger.metadata)
    ]
    await asyncio.sleep(0.3)
    await scene.order(victim.person, "gemini-3-flash")
    assert victim.person.org_id.encode() in (await own).raw, "an order is no event of this stream: make one that is"
    await asyncio.wait({strangers}, timeout=0.3)
    assert not strangers.done() or not of_others(scene, strangers.result(), request, scene.stranger)
    strangers.cancel()


async def test_a_kind_without_a_row_is_told(scene: Scene) -> None:
    nothing = Victim(scene.victim.person, {})
    for method in RPCS:
        if any(sent.references for sent in scene.victim.requests(method)):
            with pytest.raises(AssertionError, match=r"no row in \w+ \(\w+_\.\.\.\): make one in Scene\.plant|knows no valid value"):
                nothing.requests(method)


# What the services answer is asked of both engines above; here it is asked whether the gateway adds to it.
@pytest.mark.any_engine
@pytest.mark.parametrize("binding", HTTP, ids=lambda binding: f"{binding.http_method} {binding.template}")
async def test_strangers_learn_nothing_over_http(scene: Scene, binding: Binding) -> None:
    for request in scene.victim.requests(binding.rpc):
        if not request.texts:
            continue
        headers = {**dict(scene.stranger.metadata), "x-request-id": "tenancy"}
        (status, theirs), (other, nobodys) = [await over_http(scene, as_http(binding, sent), headers) for sent in (request, request.instead())]
        if is_platform(binding.rpc):
            assert status == 403 and permission_of(binding.rpc) in theirs, theirs
        elif request.required:
            assert status == 404, theirs
        for real in request.texts:
            nobodys = nobodys.replace(unknown(real), real)
        assert (status, theirs) == (other, nobodys)


async def over_http(scene: Scene, request: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
    """Status and text; a stream that is let in has none yet."""
    async with scene.stack.http.stream(**request, headers=headers) as answer:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return answer.status_code, ""
        return answer.status_code, (await answer.aread()).decode()


def as_http(binding: Binding, request: Request) -> dict[str, Any]:
    """A request in the form that the gateway takes."""
    left = json_format.MessageToDict(request.message)
    path = binding.template
    for variable in binding.variables:
        *parents, last = variable.split(".")
        inner = left
        for parent in parents:
            inner = inner[in_json(parent)]
        path = path.replace(f"{{{variable}}}", inner.pop(in_json(last)))
    if binding.body == "*":
        return {"method": binding.http_method, "url": path, "json": left}
    body = left.pop(in_json(binding.body), None) if binding.body else None
    return {"method": binding.http_method, "url": path, "params": left, "json": body}


def in_json(name: str) -> str:
    """The name of a field in JSON."""
    first, *rest = name.split("_")
    return first + "".join(map(str.title, rest))
