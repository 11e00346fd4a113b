"""No tenant sees, changes or can tell the existence of what another one has: every RPC, by every kind of stranger."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor

from clawplane.options.v1 import options_pb2
from clawplane.user.v1.organization_pb2 import Role
from gateway.httprule import Binding, bindings, services
from services.deployment_svc.claw_keys.repository import PERMISSIONS as OF_CLAW_KEYS
from services.kit import ids
from services.kit.call import Plan
from services.user_svc.organizations.roles import PERMISSIONS
from tests.conftest import Databases
from tests.harness import Metadata, Person
from tests.simulators.market import MarketSimulator
from tests.tenancy import Answer, Scene, Victim, is_personal, scene_on
from tests.test_auth import bearer, forged
from tests.test_contract import methods
from tests.valid import Request, unknown

Code = grpc.StatusCode
PLANS = {method.full_name: Plan.of(method) for method in methods()}
# Whom a public RPC concerns is no question of tenants: its own tests say what it may tell to nobody in particular.
RPCS = sorted((m for m in methods() if PLANS[m.full_name].audience != options_pb2.AUDIENCE_PUBLIC), key=lambda m: str(m.full_name))
HTTP = [binding for service in services() for binding in bindings(service) if binding.rpc in RPCS]
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


def same(about: Answer, instead: Answer, request: Request) -> bool:
    """Whether two answers differ in nothing but the words that the caller himself sent."""
    raw = instead.raw
    for text in request.texts:
        raw = raw.replace(unknown(text).encode(), text.encode())
    return about.code == instead.code and about.raw == raw


def of_others(scene: Scene, answer: Answer, request: Request, person: Person) -> list[bytes]:
    """What an answer says of the victim or of any other tenant, beside what the caller himself sent."""
    named = set(re.findall(rb"(?:org|usr)_[0-9a-f]{32}", answer.raw)) - {person.org_id.encode(), person.user.id.encode()}
    sent = request.message.SerializeToString()
    return [mark for mark in scene.victim.marks | named if mark in answer.raw and mark not in sent]


async def learns_nothing(scene: Scene, method: MethodDescriptor, request: Request, who: Metadata, person: Person) -> None:
    """The law of the stranger."""
    answer = await scene.ask(method, request, who)
    if is_platform(method):
        assert (answer.code, answer.permission) == (Code.PERMISSION_DENIED, permission_of(method)), answer
        return
    if request.required:
        assert answer.code is Code.NOT_FOUND, answer
    if request.texts:
        assert same(answer, instead := await scene.ask(method, request.instead(), who), request), (answer, instead)
    assert not of_others(scene, answer, request, person), answer


async def reads_but_changes_nothing(scene: Scene, method: MethodDescriptor, request: Request) -> None:
    """The law of the viewer in the victim's organization."""
    answer = await scene.ask(method, request, scene.viewer)
    if is_platform(method) or permission_of(method) not in PERMISSIONS[Role.ROLE_VIEWER]:
        assert (answer.code, answer.permission) == (Code.PERMISSION_DENIED, permission_of(method)), answer
    elif request.references and all(is_personal(reference.prefix) for reference in request.references):
        # What belongs to a person is not the organization's to show.
        assert answer.code is Code.NOT_FOUND and same(answer, await scene.ask(method, request.instead(), scene.viewer), request), answer
    else:
        assert PLANS[method.full_name].is_read, "a viewer may not change a thing of the organization"
        # What is asked without an id may be about the caller, who has nothing.
        assert answer.code is Code.OK or (answer.code is Code.NOT_FOUND and not request.required), answer


async def is_nobody(scene: Scene, method: MethodDescriptor, request: Request) -> None:
    """The law of those whom no credential stands for."""
    now = int(time.time())
    expired = forged(scene.stack, user=scene.victim.person.user.id, iat=now - 700, exp=now - 100)
    answers = [await scene.ask(method, request, who) for who in (bearer(expired), bearer("no.such.token"), bearer("claw_live_x"), bearer("sess_test_x"), ())]
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
        await learns_nothing(scene, method, request, scene.stranger.metadata, scene.stranger)
        await learns_nothing(scene, method, request, scene.elsewhere, scene.guest)
        await reads_but_changes_nothing(scene, method, request)
        bot = await scene.ask(method, request, scene.claw_key)
        if permission_of(method) in OF_CLAW_KEYS and not is_platform(method):
            await learns_nothing(scene, method, request, scene.claw_key, scene.stranger)
        else:
            # The user service knows no bots at all.
            assert bot.code is Code.UNAUTHENTICATED or bot.permission == permission_of(method), bot
    changed = before ^ await scene.snapshot()
    assert not changed, "\n".join(sorted(changed))


@each_rpc
async def test_the_same_requests_reach_their_rows_when_they_may(scene: Scene, method: MethodDescriptor) -> None:
    """Without this, a refusal could mean no more than that the request was wrong."""
    harmless = PLANS[method.full_name].is_read or (is_platform(method) and not any(sent.texts for sent in scene.victim.requests(method)))
    victim = scene.victim if harmless else await scene.plant(sacrificed=True)
    who = scene.stack.operator if is_platform(method) else victim.person.metadata
    for request in victim.requests(method):
        answer = await scene.ask(method, request, who)
        wrong = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.INTERNAL)
        assert answer.code not in wrong, (answer, request)
        if method.name.startswith("List") and not is_platform(method):
            assert [mark for mark in victim.marks if mark in answer.raw], f"the victim has nothing that {method.name} lists: make a row in Scene.plant"


@pytest.mark.parametrize("method", [m for m in RPCS if m.server_streaming and not is_platform(m)], ids=lambda method: str(method.full_name))
async def test_streams_tell_strangers_nothing_later(scene: Scene, method: MethodDescriptor) -> None:
    if scene.victim.requests(method)[0].required:
        return  # The first answer is the last: NOT_FOUND.
    victim = await scene.plant(sacrificed=True)
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
            inner = inner[parent]
        path = path.replace(f"{{{variable}}}", inner.pop("".join([last.split("_")[0], *map(str.title, last.split("_")[1:])])))
    if binding.body == "*":
        return {"method": binding.http_method, "url": path, "json": left}
    body = left.pop(binding.body, None) if binding.body else None
    return {"method": binding.http_method, "url": path, "params": left, "json": body}
