"""When a request is decoded and checked, and when not again."""

from dataclasses import replace
from typing import Any

import grpc
import pytest

from clawplane.options.v1 import options_pb2
from services.kit import errors, intake
from services.kit.call import Plan
from services.kit.intake import Intake
from tests.kit.echo import DESCRIPTOR, Echo, Request, refused


class Rules:
    """Stands before protovalidate and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked: list[bool] = []
        """Of each check, whether it ends at the first violation."""
        real = intake.protovalidate.collect_violations

        def collect(message: Any, *, fail_fast: bool) -> Any:
            self.checked.append(fail_fast)
            return real(message, fail_fast=fail_fast)

        monkeypatch.setattr(intake.protovalidate, "collect_violations", collect)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    """Counts checks."""
    return Rules(monkeypatch)


def of(method: str) -> Intake:
    """The intake of an RPC of the echo."""
    return Intake(Plan.of(DESCRIPTOR.services_by_name["EchoService"].methods_by_name[method]), Request.FromString)


def test_a_read_that_was_sound_is_not_checked_again(rules: Rules) -> None:
    reads, writes = of("Read"), of("Write")
    raw = Request(text="hello").SerializeToString()
    first, second = reads.take(raw), reads.take(raw)
    assert first == second and first is not second and len(rules.checked) == 1
    reads.take(Request(text="other").SerializeToString())
    assert len(rules.checked) == 2
    for _ in range(2):
        writes.take(raw)
    assert len(rules.checked) == 4


def test_what_is_wrong_or_long_is_never_remembered(rules: Rules) -> None:
    reads = of("Read")
    for _ in range(2):
        with pytest.raises(errors.InvalidFields):
            reads.take(Request(text="x" * 101).SerializeToString())
        with pytest.raises(errors.InvalidArgument):
            reads.take(b"\x0a\x03a\x00b")
    long = Request(words=["x" * 1024]).SerializeToString()
    for _ in range(2):
        reads.take(long)
    assert len(rules.checked) == 4 and not reads._sound


def test_what_is_remembered_has_a_bound() -> None:
    ours = Plan.of(DESCRIPTOR.services_by_name["EchoService"].methods_by_name["Read"])
    platforms = Intake(replace(ours, audience=options_pb2.AUDIENCE_PLATFORM), Request.FromString)
    reads = Intake(ours, Request.FromString)
    for n in range(6000):
        for one in (reads, platforms):
            one.take(Request(text=f"secret {n}").SerializeToString())
        assert 0 < len(reads._sound) <= 5000
    # Our own processes ask about everybody.
    assert len(platforms._sound) == 6000
    # Some requests hold a secret, which must not lie about.
    assert all(isinstance(one, int) for one in reads._sound)


def test_of_a_large_request_the_first_mistake_is_told(rules: Rules) -> None:
    writes = of("Write")
    for size, fast in ((100, False), (9000, True)):
        with pytest.raises(errors.InvalidFields):
            writes.take(Request(text="x" * 101, words=["x" * size]).SerializeToString())
        assert rules.checked.pop() is fast


@pytest.mark.any_engine
async def test_what_strangers_send_is_not_even_decoded(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []
    real = Intake.take

    def take(self: Intake, raw: bytes) -> Any:
        taken.append(raw)
        return real(self, raw)

    monkeypatch.setattr(Intake, "take", take)
    raw = Request(text="x").SerializeToString()
    for metadata in ((), echo.person(permitted=False), echo.person("echo.read")):
        assert (await refused(echo.raw("Write", raw, metadata))).code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    assert taken == []
    assert await echo.raw("Write", raw) == raw and taken == [raw]
