"""Whatever is sent, to every RPC and every HTTP route: a clear error, never a defect."""

import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.api import annotations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import deployment_service_pb2
from tests.harness import Person, Stack
from tests.test_contract import methods

NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DATA_LOSS}
RPCS = sorted(methods(), key=lambda method: method.full_name)


async def raw_call(stack: Stack, method: MethodDescriptor, payload: bytes, metadata: Any) -> tuple[grpc.StatusCode, list[str], str]:
    """Sends bytes as they are: status code, named fields, text."""
    call = stack.channel.unary_unary(f"/{method.containing_service.full_name}/{method.name}", lambda raw: raw, lambda raw: raw)
    try:
        await call(payload, metadata=metadata, timeout=1 if method.server_streaming else 20)
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        fields: list[str] = []
        for detail in status.details if status else ():
            bad = error_details_pb2.BadRequest()
            if detail.Unpack(bad):
                fields += [violation.field for violation in bad.field_violations]
        return error.code(), fields, error.details() or ""
    return grpc.StatusCode.OK, [], ""


def clear(code: grpc.StatusCode, text: str) -> None:
    """An answer that a client may see."""
    assert code not in NEVER, (code, text)
    for leak in ("Traceback", "sqlalchemy", "asyncpg", "sqlite", "SELECT ", "INSERT ", "/services/"):
        assert leak not in text, text


def bad_requests(method: MethodDescriptor) -> Iterator[tuple[str, bytes]]:
    """(the field that is wrong, the request)."""
    kind = message_factory.GetMessageClass(method.input_type)
    for field in method.input_type.fields:
        if field.type != FieldDescriptor.TYPE_STRING or field.is_repeated:
            continue
        for value in ("usr_" + "1" * 32 if field.name != "user_id" else "dep_" + "1" * 32, "x" * 5000, "' OR 1=1 --", "a\0b", "\u202e"):
            yield field.name, kind(**{field.name: value}).SerializeToString()
        # A text that is no UTF-8: tag, length, bytes.
        tag = (field.number << 3) | 2
        yield "", bytes([tag] if tag < 128 else [tag & 0x7F | 0x80, tag >> 7]) + b"\x02\xff\xfe"
    yield "", b"\xff" * 40


# The engine that takes less: what slips through would fail there.
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
@pytest.mark.parametrize("method", RPCS, ids=lambda method: str(method.full_name))
async def test_bad_requests_are_told_by_field(stack: Stack, person: Person, method: MethodDescriptor) -> None:
    for who in (stack.operator, person.metadata):
        clear(*(await raw_call(stack, method, b"", who))[::2])
        for field, payload in bad_requests(method):
            code, fields, text = await raw_call(stack, method, payload, who)
            clear(code, text)
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                assert fields, (field, text)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(payload=st.binary(max_size=200), seed=st.integers(0, 10_000))
async def test_random_bytes(stack: Stack, person: Person, payload: bytes, seed: int) -> None:
    method = random.Random(seed).choice(RPCS)
    for who in (stack.operator, person.metadata, ()):
        code, _, text = await raw_call(stack, method, payload, who)
        clear(code, text)


async def test_a_huge_message_is_refused(stack: Stack, person: Person) -> None:
    request = deployment_service_pb2.CreateDeploymentRequest(model="x" * 5_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stack.deployments.CreateDeployment(request, metadata=person.metadata)
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_page_tokens_of_other_queries(stack: Stack, person: Person) -> None:
    for n in range(3):
        await stack.order(person, f"60000000{n}:" + "G" * 35)
    list_all = deployment_service_pb2.ListDeploymentsRequest(page_size=1)
    token = (await stack.deployments.ListDeployments(list_all, metadata=person.metadata)).next_page_token
    assert token
    other = await stack.person()
    cases = [
        (deployment_service_pb2.ListDeploymentsRequest(page_token=token, states=[1]), person.metadata),
        (deployment_service_pb2.ListDeploymentsRequest(page_token=token), other.metadata),
        (deployment_service_pb2.ListDeploymentsRequest(page_token=token[:-2]), person.metadata),
        (deployment_service_pb2.ListDeploymentsRequest(page_token="x" + token), person.metadata),
        (deployment_service_pb2.ListDeploymentsRequest(page_token="💥"), person.metadata),
    ]
    for request, who in cases:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stack.deployments.ListDeployments(request, metadata=who)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "page_token" in (refusal.value.details() or "")
    seen, token = [], ""
    while True:
        page = await stack.deployments.ListDeployments(
            deployment_service_pb2.ListDeploymentsRequest(page_size=2, page_token=token), metadata=person.metadata
        )
        seen += [d.id for d in page.deployments]
        token = page.next_page_token
        if not token:
            break
    assert len(seen) == len(set(seen)) == 3 and seen == sorted(seen, reverse=True)


def routes() -> Iterator[tuple[str, str, bool]]:
    """(HTTP method, path, whether it takes a body) of every RPC that has one."""
    for method in RPCS:
        http = method.GetOptions().Extensions[annotations_pb2.http]
        verb = http.WhichOneof("pattern")
        if verb:
            yield verb.upper(), getattr(http, verb), bool(http.body)


BODIES: list[bytes] = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"nonsense": 1}', b'{"model": 5}', b'{"model": {"a": []}}', b'{"channel": "NO_CHANNEL"}',
    b'{"model": "a", "model": "b"}', b"[" * 10_000, b'{"email": "\\ud800"}', b'{"model": "\\u0000"}', json.dumps({"model": "x" * 100_000}).encode(),
]  # fmt: skip


# The gateway and what checks requests are the same on both engines; what reaches a database is tried on both above.
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_every_route_survives_every_body(stack: Stack, person: Person) -> None:
    headers = {"authorization": dict(person.metadata)["authorization"], "content-type": "application/json"}
    for verb, template, takes_body in routes():
        for value in ("dep_" + "1" * 32, "nonsense", "%00", "%ff", "..%2f..", "x" * 3000):
            path = template.replace("{id}", value).replace("{deployment_id}", value).replace("{provider_address}", value).replace("{user.id}", value)
            for body in BODIES if (takes_body and value == "nonsense") or "{" not in template else [b"{}" if takes_body else b""]:
                async with stack.http.stream(verb, path, content=body or None, headers=headers) as answer:
                    # A watch that was opened has no end.
                    opened = answer.headers.get("content-type", "").startswith("text/event-stream")
                    text = "" if opened else (await answer.aread()).decode()
                assert answer.status_code < 500, (verb, path, body[:50], text)
                assert "Traceback" not in text
    query = await stack.http.get("/v1/deployments?pageSize=many", headers=headers)
    assert query.status_code == 400 and "page_size" in query.text
    unknown = await stack.http.get("/v1/deployments?colour=red", headers=headers)
    assert unknown.status_code == 400 and "colour" in unknown.text
    assert (await stack.http.get("/v1/deployments", headers={})).status_code == 401


async def test_a_huge_body_is_refused(stack: Stack, person: Person) -> None:
    headers = {"authorization": dict(person.metadata)["authorization"], "content-type": "application/json"}

    async def chunks() -> Any:
        for _ in range(64):
            yield b" " * 65_536

    answer = await stack.http.post("/v1/deployments", content=chunks(), headers=headers)
    assert answer.status_code == 413

