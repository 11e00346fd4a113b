"""The client against a running stack: each event in the ledger once, as it was recorded, and nobody's secret anywhere else."""

import asyncio
import datetime as dt
import ipaddress
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane_client import NoUsage, Rejection, SendRefused, UsageError
from clawplane_client.events import make_event
from clawplane_client.frames import frame
from tests.client_rig import USE, Door, key_of, ledger, listed, recorder, until
from tests.harness import Person, Stack
from tests.test_client_shapes import CHAT, MESSAGE

# The client knows nothing of databases.
pytestmark = pytest.mark.any_engine
both = pytest.mark.parametrize("kind", ["sync", "aio"])


@both
async def test_an_event_arrives_as_it_was_recorded(stack: Stack, person: Person, kind: str) -> None:
    mine = await stack.order(person)
    when = dt.datetime.now(dt.UTC) - dt.timedelta(days=3)
    fields: dict[str, Any] = {
        "tokens_in": 50, "tokens_out": 40, "tokens_cached": 30, "tokens_reasoning": 20, "latency_ms": 1234, "operation_id": "op-1",
        "attempt": 2, "metadata": {"feature": "search"}, "agent_id": "agnt_" + "1" * 32, "deployment_id": mine.id,
    }  # fmt: skip
    async with recorder(kind, stack.target, await key_of(stack, person)) as it:
        made = await it.record(**fields, type="embedding", status="error", occurred_at=when)
        assert await it.flush()
        assert (it.stats.recorded, it.stats.accepted, it.stats.buffered) == (1, 1, 0)
    page = await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)
    (event,) = page.events
    assert event.id == made and event.occurred_at.ToDatetime(dt.UTC) == when and event.org_id == person.org_id
    assert {name: getattr(event, name) for name in fields} == fields
    assert (event.type, event.status) == (pb.USAGE_TYPE_EMBEDDING, pb.USAGE_STATUS_ERROR)


@both
async def test_answers_of_providers_are_recorded(stack: Stack, person: Person, kind: str) -> None:
    async with recorder(kind, stack.target, await key_of(stack, person)) as it:
        await it._do("record_openai", CHAT, operation_id="chat", latency_ms=5)
        await it._do("record_anthropic", MESSAGE, operation_id="message", model="claude-opus-4.5")
        await it._do("record_openai", {"usage": {"input_tokens": 3, "output_tokens": 1}}, provider="akashml", model="llama")
        with pytest.raises(NoUsage):
            await it._do("record_openai", {"model": "gpt-5", "usage": None})
        assert await it.flush()
    page = await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)
    found = {(event.provider, event.model): event for event in page.events}
    chat, message = found["openai", "gpt-5-mini-2025-08-07"], found["anthropic", "claude-opus-4.5"]
    assert (chat.tokens_in, chat.tokens_out, chat.tokens_cached, chat.tokens_reasoning) == (1200, 340, 1024, 256)
    assert (chat.operation_id, chat.latency_ms, message.operation_id) == ("chat", 5, "message")
    assert (message.tokens_in, message.tokens_cached) == (2209, 2000) and len(found) == 3 and ("akashml", "llama") in found


async def test_more_than_a_call_can_take(stack: Stack, person: Person) -> None:
    async with recorder("aio", stack.target, await key_of(stack, person), flush_events=6000, buffer_events=6000, flush_interval_s=60) as it:
        for _ in range(5500):
            await it.record()
        assert it.stats.accepted == 0 and await it.flush(30)
        assert (it.stats.accepted, it.stats.failures, it.stats.rejected) == (5500, 0, 0)
    sums = await stack.usage.SummarizeUsage(rpc.SummarizeUsageRequest(), metadata=person.metadata)
    assert sums.total.events == 5500


@both
async def test_an_answer_that_is_lost_counts_once(stack: Stack, person: Person, kind: str, tmp_path: Path) -> None:
    for spool in (None, tmp_path):
        async with Door(stack.target) as door, recorder(kind, door.target, await key_of(stack, person), spool_dir=spool) as it:
            first = await it.record()
            assert await it.flush()
            door.loses_answers = True
            second = await it.record()
            async with asyncio.timeout(10):
                while second not in await listed(stack, person):
                    await asyncio.sleep(0.02)
            # The service has it, and the program does not know.
            assert it.stats.accepted == 1
            await door.shut()
            await door.open()
            assert await it.flush()
            assert (it.stats.accepted, it.stats.duplicates) == (1, 1) and it.stats.failures
            found = await ledger(stack, person)
            assert found[first] == found[second] == 1
    assert (await ledger(stack, person)).total() == 4


@both
async def test_what_the_service_will_not_store_is_handed_back(
    stack: Stack, person: Person, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Rejection] = []

    def tell(rejection: Rejection) -> None:
        told.append(rejection)
        raise RuntimeError("the program's own trouble")

    async with recorder(kind, stack.target, await key_of(stack, person), on_rejected=tell) as it:
        good = [await it.record() for _ in range(3)]
        old = await it.record(occurred_at=dt.datetime.now(dt.UTC) - dt.timedelta(days=50))
        odd = await it.record(tokens_cached=2000)
        good += [await it.record() for _ in range(3)]
        assert await it.flush()
        await until(lambda: len(told) == 2)
        assert (it.stats.accepted, it.stats.rejected, it.stats.failures) == (6, 2, 0)
    assert {(one.event.id, one.field) for one in told} == {(old, "occurred_at"), (odd, "tokens_cached")}
    assert old in caplog.text and set(await ledger(stack, person)) == set(good)


@both
async def test_a_credential_that_does_not_hold_costs_no_event(
    stack: Stack, person: Person, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    good, secret = await key_of(stack, person), "claw_test_0123456789abcdef_secret"
    token, errors = [secret], list[UsageError]()
    options: dict[str, Any] = {"spool_dir": tmp_path / "spool", "on_error": errors.append}
    async with recorder(kind, stack.target, lambda: token[0], **options) as it:
        made = {await it.record() for _ in range(5)}
        await until(lambda: errors)
        assert isinstance(errors[0], SendRefused) and errors[0].code == "UNAUTHENTICATED"
        assert it.stats.spooled == 5 and not await ledger(stack, person)
        # What no header can carry is never shown by the error that says so.
        token[0] = f"{secret}\n"
        await until(lambda: errors[-1].args == ("ValueError",))
        token[0] = good
        assert await it.flush()
        assert secret not in repr(it.recorder) and good not in repr(it.recorder)
    assert set(await ledger(stack, person)) == made
    written = caplog.text + "".join(map(str, errors)) + "".join(str(path.read_bytes()) for path in tmp_path.glob("spool/*"))
    assert secret not in written and good not in written


async def test_a_missing_permission_keeps_events_too(stack: Stack, person: Person) -> None:
    errors: list[UsageError] = []
    key = str((await stack.key(person, "usage.read")).key)
    async with recorder("aio", stack.target, key, on_error=errors.append) as it:
        await it.record()
        await until(lambda: len(errors) > 1)
        assert [error.code for error in errors if isinstance(error, SendRefused)][:2] == ["PERMISSION_DENIED"] * 2
        assert it.stats.buffered == 1


@both
async def test_a_batch_refused_as_a_whole_is_divided(stack: Stack, person: Person, kind: str, tmp_path: Path) -> None:
    """A text with U+0000 makes the service refuse all that comes with it. No recorder takes one; a file may hold it all the same."""
    good = [make_event(USE) for _ in range(20)]
    bad = pb.UsageEvent.FromString(make_event(USE)[1])
    bad.metadata["a"] = "b\0c"
    events = [data for _, data in good]
    events.insert(13, bad.SerializeToString())
    (tmp_path / "1.usage").write_bytes(frame(events))
    told: list[Rejection] = []
    async with recorder(kind, stack.target, await key_of(stack, person), spool_dir=tmp_path, on_rejected=told.append) as it:
        assert await it.flush()
        await until(lambda: told)
        assert (it.stats.accepted, it.stats.rejected) == (20, 1)
    assert [one.event.id for one in told] == [bad.id] and "U+0000" in told[0].message
    assert set(await ledger(stack, person)) == {event_id for event_id, _ in good}
    assert not list(tmp_path.glob("*.usage"))


def certificate() -> tuple[bytes, bytes]:
    """(key, certificate) of 127.0.0.1, which vouches for itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, made.public_bytes(serialization.Encoding.PEM)


@both
async def test_over_tls(stack: Stack, person: Person, kind: str, tmp_path: Path) -> None:
    key, chain = certificate()
    (tmp_path / "pem").write_bytes(key + chain)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "pem")
    tls.set_alpn_protocols(["h2"])
    async with Door(stack.target, tls) as door:
        trusting = grpc.ssl_channel_credentials(root_certificates=chain)
        async with recorder(kind, door.target, await key_of(stack, person), credentials=trusting) as it:
            made = await it.record()
            assert await it.flush()
        # Whoever else listens there is told neither events nor the token.
        async with recorder(kind, door.target, "token", credentials=grpc.ssl_channel_credentials()) as it:
            await it.record()
            await until(lambda: it.stats.failures)
            assert it.stats.buffered == 1
    assert list(await ledger(stack, person)) == [made]
