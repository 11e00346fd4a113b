"""The wrapper around every RPC, over a real server."""

import asyncio
import json
import logging
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
import structlog
from google.rpc import error_details_pb2
from prometheus_client import REGISTRY

from services.kit import ids, rpc
from services.kit.call import Call
from services.kit.db import ALL
from services.kit.errors import InvalidState
from services.kit.rpc import Registrar
from services.kit.table import Table
from tests.harness import eventually
from tests.kit.echo import SERVICE, Answer, AuditEvent, Echo, EchoService, Note, Request, add_to_server, detail, fields_of, refused

Code = grpc.StatusCode


def counted(method: str, code: str) -> float:
    """Calls so far."""
    return REGISTRY.get_sample_value("clawplane_rpc_calls_total", {"method": f"/{SERVICE}/{method}", "code": code}) or 0.0


async def audits(echo: Echo, request_id: str) -> list[AuditEvent]:
    """The audit rows of a call."""
    async with echo.kit.db.read(ALL) as session:
        return list(await session.scalars(sa.select(AuditEvent).where(AuditEvent.request_id == request_id)))


def named(request_id: str) -> tuple[str, str]:
    """Metadata that names a call."""
    return ("x-request-id", request_id)


@pytest.mark.any_engine
async def test_checks_come_in_their_order(echo: Echo) -> None:
    """Each call breaks one rule less than the one before."""
    stranger, reader = echo.person(permitted=False), echo.person("echo.read")
    bad = b"\x0a\x02\xff\xfe"
    for metadata, payload, code in (
        ((), bad, Code.UNAUTHENTICATED),
        (stranger, bad, Code.UNAUTHENTICATED),
        (reader, bad, Code.PERMISSION_DENIED),
        (echo.person(), bad, Code.INVALID_ARGUMENT),
        (echo.person(), Request(text="x" * 101).SerializeToString(), Code.INVALID_ARGUMENT),
        (echo.person(), Request(text="x").SerializeToString(), Code.OK),
    ):
        if code is Code.OK:
            assert (await echo.raw("Write", payload, metadata)) == payload
        else:
            assert (await refused(echo.raw("Write", payload, metadata))).code() is code


@pytest.mark.any_engine
async def test_a_permission_is_named_and_the_platform_is_kept_apart(echo: Echo) -> None:
    error = await refused(echo.call("Write", metadata=echo.person("echo.read")))
    info = detail(error, error_details_pb2.ErrorInfo)
    assert "echo.write" in (error.details() or "") and info.metadata["permission"] == "echo.write"
    assert (info.domain, info.reason) == ("clawplane", "PERMISSION_DENIED")
    assert "echo.manage" in ((await refused(echo.call("Manage"))).details() or "")
    assert (await echo.call("Manage", "x", echo.operator)).text == "x"
    # Whoever comes without a credential.
    assert (await echo.call("Open", "x", ())).text == "x"


@pytest.mark.any_engine
def test_an_rpc_without_a_rule_stops_the_start(echo: Echo) -> None:
    with pytest.raises(ValueError, match=r"kit_echo\.NoRuleService\.Write"):
        add_to_server(EchoService(), Registrar(Table(), echo.kit), "kit_echo.NoRuleService")


@pytest.mark.any_engine
@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"\x0a\x02\xff\xfe", "text"),
        (b"\x12\x04\x0a\x02\xff\xfe", "inner.text"),
        (b"\x0a\x01a\x1a\x03\x0a\x01b\x1a\x04\x0a\x02\xff\xfe", "many.text"),
        (b"\xa2\x01\x02\xc3\x28", "words"),
        (b"\x0a\x03a\x00b", "text"),
        (b"\x12\x05\x0a\x03a\x00b", "inner.text"),
        (b"\x1a\x05\x0a\x03a\x00b", "many.text"),
        (b"\xa2\x01\x01\x00", "words"),
        (b"\x0a\x66" + b"x" * 102, "text"),
        (b"\x0a\x05ab", ""),
        (b"\xff" * 40, ""),
        (b"\x0b", ""),
        (b"\x12\x82\x00" * 200, ""),
    ],
)
async def test_a_request_that_cannot_be_taken_names_its_field(echo: Echo, payload: bytes, field: str) -> None:
    for name in ("Write", "Read"):
        error = await refused(echo.raw(name, payload))
        assert error.code() is Code.INVALID_ARGUMENT, error
        assert fields_of(error) == [field]


@pytest.mark.any_engine
async def test_unknown_fields_are_passed_over(echo: Echo) -> None:
    assert Answer.FromString(await echo.raw("Write", Request(text="x").SerializeToString() + b"\xf8\x3f\x01")).text == "x"


@pytest.mark.any_engine
async def test_a_defect_says_nothing_and_its_log_no_secret(echo: Echo) -> None:
    async def broken(request: Any, call: Call) -> Any:
        raise KeyError(f"PLANTED {request.text}")

    echo.service.on["Write"] = broken
    before = counted("Write", "INTERNAL")
    with structlog.testing.capture_logs() as logs:
        error = await refused(echo.call("Write", "PLANTED-TOO", (*echo.person(), named("defect-1"))))
    assert error.code() is Code.INTERNAL and counted("Write", "INTERNAL") == before + 1
    assert detail(error, error_details_pb2.RequestInfo).request_id == "defect-1"
    assert detail(error, error_details_pb2.ErrorInfo).reason == "INTERNAL"
    assert "PLANTED" not in str(error) and "KeyError" not in str(error) and "/" not in (error.details() or "")
    (line,) = [line for line in logs if line["event"] == "rpc.defect"]
    assert line["request_id"] == "defect-1" and line["method"] == f"/{SERVICE}/Write"


@pytest.mark.any_engine
async def test_what_is_no_answer_is_a_defect(echo: Echo) -> None:
    async def says_nothing(request: Any, call: Call) -> Any:
        return None

    echo.service.on["Read"] = says_nothing
    with structlog.testing.capture_logs() as logs:
        error = await refused(echo.call("Read"))
    assert error.code() is Code.INTERNAL and "NoneType" not in (error.details() or "")
    assert [line["event"] for line in logs] == ["rpc.defect"]
    assert logs[0]["request_id"] == detail(error, error_details_pb2.RequestInfo).request_id != ""
    # What was done before is audited all the same.
    echo.service.on["Write"] = says_nothing
    error = await refused(echo.call("Write", metadata=(*echo.person(), named("no-answer"))))
    assert error.code() is Code.INTERNAL and len(await audits(echo, "no-answer")) == 1


@pytest.mark.any_engine
async def test_request_ids_are_taken_made_and_given_back(echo: Echo) -> None:
    async def trailing(call: Any) -> str:
        return str(dict(await call.trailing_metadata() or ()).get("x-request-id", ""))

    who = echo.person()
    assert await trailing(echo.call("Write", metadata=(*who, named("mine")))) == "mine"
    many = [f"mine-{number}" for number in range(200)]
    crossed = await asyncio.gather(*(trailing(echo.call("Write", metadata=(*who, named(one)))) for one in many))
    assert crossed == many, "a call was given the metadata of another"
    made = {await trailing(echo.call("Write", metadata=(*who, named(bad)))) for bad in ("", "x" * 65, "a b")}
    assert len(made) == 3 and all(made) and "mine" not in made
    # One that was made is the same everywhere.
    said = await trailing(echo.call("Write"))
    (row,) = await audits(echo, said)
    assert row.method == f"/{SERVICE}/Write"
    secret = echo.call("Show")
    assert len(await audits(echo, await trailing(secret))) == 1
    # A read has an id too, and tells it when there is something to look up.
    error = await refused(echo.call("Read", "x" * 101, (*who, named("mine"))))
    assert dict(error.trailing_metadata() or ())["x-request-id"] == "mine"
    error = await refused(echo.call("Write", "x" * 101, (*who, named("mine"))))
    assert dict(error.trailing_metadata() or ())["x-request-id"] == "mine"
    assert detail(error, error_details_pb2.RequestInfo).request_id == "mine"

    async def two(request: Any, call: Call) -> Any:
        yield Answer(text=call.request_id)

    echo.service.on["Watch"] = two
    stream = echo.call("Watch", metadata=(*who, named("mine")))
    assert [answer.text async for answer in stream] == ["mine"] and await trailing(stream) == "mine"


async def test_an_audit_row_lives_and_dies_with_its_change(echo: Echo) -> None:
    tries = 0

    async def write(request: Any, call: Call) -> Any:
        nonlocal tries

        async def work(session: Any) -> None:
            nonlocal tries
            tries += 1
            session.add(Note(name=request.text))
            call.audit(request.text, after={"try": tries})
            await session.flush()
            if request.text.startswith("fails"):
                raise InvalidState("no")

        if request.text.startswith("by hand"):
            for fails in (True, False):
                try:
                    async with call.transaction() as session:
                        await work(session)
                        if fails:
                            raise ZeroDivisionError
                except ZeroDivisionError:
                    pass
            async with call.transaction() as session:
                await session.execute(sa.select(Note.id))
        else:
            await call.run(work)
        return Answer()

    echo.service.on["Write"] = echo.service.on["Read"] = write
    who, tag = echo.person(), ids.new("agnt")
    await echo.call("Write", f"works {tag}", (*who, named(f"w-{tag}")))
    (row,) = await audits(echo, f"w-{tag}")
    assert (row.method, row.resource_id, row.org_id, row.after) == (f"/{SERVICE}/Write", f"works {tag}", echo.org_id, {"try": 1})
    assert row.subject.startswith("usr_")
    assert (await refused(echo.call("Write", f"fails {tag}", (*who, named(f"f-{tag}"))))).code() is Code.FAILED_PRECONDITION
    assert (await refused(echo.call("Write", f"works {tag}", (*who, named(f"d-{tag}"))))).code() is Code.ALREADY_EXISTS
    assert await audits(echo, f"f-{tag}") == await audits(echo, f"d-{tag}") == []
    # A first transaction that left nothing takes no audit row with it; a third one has nothing to add.
    await echo.call("Write", f"by hand {tag}", (*who, named(f"h-{tag}")))
    assert len(await audits(echo, f"h-{tag}")) == 1
    # Reads leave no trace.
    await echo.call("Read", f"reads {tag}", (*who, named(f"r-{tag}")))
    assert await audits(echo, f"r-{tag}") == []


async def test_cancelled_calls_are_counted_and_leave_nothing(echo: Echo) -> None:
    async def slow(request: Any, call: Call) -> Any:
        async with call.transaction() as session:
            session.add(Note(name=request.text))
            await session.flush()
            if echo.kit.db.is_sqlite:
                await asyncio.sleep(20)
            else:
                await session.execute(sa.text("SELECT pg_sleep(20)"))

    echo.service.on["Write"] = slow
    before = counted("Write", "CANCELLED")
    tag = ids.new("agnt")
    calls = [asyncio.ensure_future(_settled(echo.call("Write", f"{tag}-{n}"))) for n in range(20)]

    async def all_there() -> bool:
        return echo.kit.in_flight == 20

    await eventually(all_there)
    await asyncio.sleep(0.5)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)

    async def gone() -> bool:
        return counted("Write", "CANCELLED") == before + 20 and echo.kit.in_flight == 0

    await eventually(gone)
    assert REGISTRY.get_sample_value("clawplane_db_pool_in_use", {"database": echo.kit.db.name}) == 0
    async with echo.kit.db.transaction(ALL) as session:
        assert await session.scalar(sa.select(Note.id).where(Note.name.startswith(tag))) is None
        if not echo.kit.db.is_sqlite:
            running_ = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(20)%' AND state = 'active'"
            assert await session.scalar(sa.text(running_)) == 0


async def _settled(call: Any) -> None:
    await call


@pytest.mark.any_engine
async def test_a_deadline_ends_the_work(echo: Echo) -> None:
    async def slow(request: Any, call: Call) -> Any:
        await asyncio.sleep(20)

    echo.service.on["Read"] = slow
    rpc = echo.channel.unary_unary(f"/{SERVICE}/Read", Request.SerializeToString, Answer.FromString)
    assert (await refused(rpc(Request(), metadata=echo.person(), timeout=0.2))).code() is Code.DEADLINE_EXCEEDED

    async def idle() -> bool:
        return echo.kit.in_flight == 0

    await eventually(idle, 3)


@pytest.mark.any_engine
async def test_calls_are_logged_without_what_they_carry(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    told = structlog.testing.LogCapture()
    # The suite logs warnings only, so this one line is heard by a logger of its own.
    monkeypatch.setattr(rpc.telemetry, "level", lambda: logging.INFO)
    monkeypatch.setattr(rpc, "log", structlog.wrap_logger(None, processors=[told], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)))
    await echo.call("Write", "PLANTED", (*echo.person(), named("logged")))
    await echo.call("Read", "PLANTED")
    (line,) = told.entries
    assert (line["code"], line["method"], line["request_id"], line["org"]) == ("OK", f"/{SERVICE}/Write", "logged", echo.org_id)
    assert line["ms"] >= 0 and "PLANTED" not in json.dumps(told.entries) and "Bearer" not in json.dumps(told.entries)
