"""How much one process, one subject and one network may ask at a time."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.kit import limits, rates
from services.kit.call import Call
from services.kit.limits import Guesses, Limiter
from services.kit.rpc import Registrar
from services.kit.settings import KitSettings
from services.kit.table import Table
from tests.kit.echo import Answer, Echo, EchoService, add_to_server, detail, refused, running

Code = grpc.StatusCode


class Clock:
    """Time that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The clock of the limits."""
    made = Clock()
    monkeypatch.setattr(limits, "time", made)
    yield made


async def test_more_calls_than_the_cap_are_refused_at_once(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, max_concurrent_calls=3) as echo:
        go = asyncio.Event()

        async def waits(request: Any, call: Call) -> Any:
            await go.wait()
            return Answer()

        echo.service.on["Write"] = waits
        who = echo.person()
        calls = [asyncio.ensure_future(_answer(echo.call("Write", metadata=who))) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert REGISTRY.get_sample_value("clawplane_rpc_in_flight", {"service": "echo"}) == 3
        started = time.monotonic()
        error = await refused(echo.call("Read", metadata=who))
        assert error.code() is Code.UNAVAILABLE and time.monotonic() - started < 0.5
        assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        go.set()
        await asyncio.gather(*calls)
        assert (await echo.call("Read", "x", who)).text == "x"
        assert REGISTRY.get_sample_value("clawplane_rpc_in_flight", {"service": "echo"}) == 0


async def limited(call: Any, rate: str) -> None:
    """A call is refused for a rate, and says which and for how long."""
    error = await refused(call)
    assert error.code() is Code.RESOURCE_EXHAUSTED, error
    info = detail(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.metadata["limit"]) == ("RATE_LIMITED", rate)
    assert 0 < detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() <= rates.parse(rate).period_s * 1000


@pytest.mark.any_engine
async def test_a_rate_is_kept_for_each_subject_but_not_for_the_platform(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, rate_limit="3/hour") as echo:
        eager, other = echo.person(), echo.person()
        for _ in range(3):
            await echo.call("Read", metadata=eager)
        await limited(echo.call("Read", metadata=eager), "3/hour")
        await limited(echo.call("Watch", metadata=eager), "3/hour")
        await echo.call("Read", metadata=other)
        for _ in range(5):
            await echo.call("Manage", metadata=echo.operator)


@pytest.mark.any_engine
async def test_a_method_has_a_rate_of_its_own(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, method_rates_factor=1) as echo:
        eager, other = echo.person(), echo.person()
        for who in (eager, other):
            for _ in range(2):
                await echo.call("Rare", metadata=who)
            await limited(echo.call("Rare", metadata=who), "2/hour")
            await echo.call("Read", metadata=who)
        # Whoever may not call it does not use it up.
        for _ in range(3):
            await echo.call("Rare", metadata=echo.operator)
        for _ in range(2):
            await echo.call("RareOpen", metadata=())
        await limited(echo.call("RareOpen", metadata=()), "2/hour")
        await echo.call("Open", metadata=())
    async with running(tmp_path, kit_url, method_rates_factor=2) as echo:
        for _ in range(4):
            await echo.call("Rare", metadata=(who := echo.person())) and await echo.call("Rare", metadata=who)


def test_a_rate_that_is_none_stops_the_start(kit_url: str, echo: Echo) -> None:
    with pytest.raises(ValueError, match=r"kit_echo\.BadRateService\.Write: a rate is a number and a period"):
        add_to_server(EchoService(), Registrar(Table(), echo.kit), "kit_echo.BadRateService")  # type: ignore[arg-type]
    for name in ("rate_limit", "public_rate_limit", "failed_rate_limit"):
        for wrong in ("", "0/minute", "-1/minute", "10", "10/week", "10 / minute", "10/minute;5/hour", "１/minute"):
            with pytest.raises(ValueError, match=name):
                KitSettings(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.any_engine
async def test_a_key_has_the_rate_that_it_was_given(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url) as echo:
        slow, fast = echo.key("2/hour"), echo.key()
        for _ in range(2):
            await echo.call("Read", metadata=slow)
        await limited(echo.call("Read", metadata=slow), "2/hour")
        await limited(echo.call("Rare", metadata=slow), "2/hour")
        for _ in range(4):
            await echo.call("Read", metadata=fast)


@pytest.mark.any_engine
async def test_whoever_comes_without_a_credential_is_counted_by_network_before_anything_is_read(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, public_rate_limit="3/hour") as echo:
        for _ in range(3):
            await echo.call("Open", metadata=())
        # Bytes that are no message would be INVALID_ARGUMENT, were they read.
        await limited(echo.raw("Open", b"\xff" * 40, ()), "3/hour")
        # One subscriber's line: the first 64 bits of an address of version 6.
        for n in range(3):
            await echo.call("Open", metadata=echo.from_address(f"2001:db8:1:2::{n}"))
        await limited(echo.call("Open", metadata=echo.from_address("2001:db8:1:2:ffff::1")), "3/hour")
        await echo.call("Open", metadata=echo.from_address("2001:db8:1:3::1"))
        await echo.call("Open", metadata=echo.from_address("192.0.2.1"))
        # Nobody else is believed about where a call comes from.
        await limited(echo.call("Open", metadata=(("clawplane-client-ip", "192.0.2.2"),)), "3/hour")
        # People are counted by themselves.
        await echo.call("Read")


@pytest.mark.any_engine
async def test_who_guesses_credentials_is_held_up_and_who_shares_the_network_is_not(kit_url: str, tmp_path: Path) -> None:
    async with running(tmp_path, kit_url, failed_rate_limit="3/hour") as echo:
        known, right = echo.key(), echo.key()
        await echo.call("Read", metadata=known)

        def guess(n: int) -> Any:
            return echo.call("Read", metadata=(("authorization", f"Bearer key_{n}"),))

        # Who brings nothing guesses nothing.
        for _ in range(5):
            assert (await refused(echo.call("Read", metadata=()))).code() is Code.UNAUTHENTICATED
        for n in range(4):
            assert (await refused(guess(n))).code() is Code.UNAUTHENTICATED
        # From now on not even a right guess is told.
        await limited(guess(5), "3/hour")
        await limited(echo.call("Read", metadata=right), "3/hour")
        await echo.call("Read", metadata=known)
        # Nobody guesses a signature, and our own processes sign new tokens all the time.
        await echo.call("Read", metadata=echo.person())
        await echo.call("Open", metadata=())
        elsewhere = echo.from_address("192.0.2.1")
        assert (await refused(echo.call("Read", metadata=(*elsewhere, ("authorization", "Bearer key_6"))))).code() is Code.UNAUTHENTICATED
        await echo.call("Read", metadata=(*elsewhere, *right))
        # It has held there, so it is no guess here.
        await echo.call("Read", metadata=right)
        # Tokens that do not hold have a count of their own.
        forged = (("authorization", "Bearer a.b.c"),)
        for _ in range(3):
            assert (await refused(echo.call("Read", metadata=forged))).code() is Code.UNAUTHENTICATED
        await limited(echo.call("Read", metadata=forged), "3/hour")
        await echo.call("Read", metadata=echo.person())


def test_a_network_is_let_in_again(clock: Clock) -> None:
    guesses = Guesses()
    guesses.refuse("192.0.2.1", 10)
    assert guesses.wait_s("Bearer a", lambda: "192.0.2.1") == 10 and guesses.wait_s("Bearer a", lambda: "192.0.2.2") == 0
    clock.now += 10
    assert guesses.wait_s("Bearer a", lambda: "192.0.2.1") == 0
    assert guesses.wait_s("Bearer a", pytest.fail) == 0, "nobody is refused any more, so nobody's address is looked at"


def limiter(**settings: Any) -> Limiter:
    """A limiter in memory."""
    return Limiter(KitSettings(**settings), "test")


def test_windows_slide(clock: Clock) -> None:
    made = limiter()
    clock.now -= clock.now % 60
    for _ in range(10):
        assert made.hit_here("a", "10/minute") == 0
    assert made.hit_here("a", "10/minute") == 60
    # Half of the ten are less than a minute ago; at the edge of fixed windows all ten were forgotten.
    clock.now += 90
    assert [made.hit_here("a", "10/minute") for _ in range(6)][:5] == [0] * 5
    assert 0 < made.hit_here("a", "10/minute") <= 6
    clock.now += 120
    assert [made.hit_here("a", "10/minute") for _ in range(10)] == [0] * 10


@given(
    most=st.integers(1, 20),
    steps=st.lists(st.tuples(st.floats(0, 100, allow_nan=False), st.sampled_from("ab")), min_size=1, max_size=150),
    start=st.floats(0, 60, allow_nan=False),
)
def test_no_window_lets_in_too_many_and_the_wait_is_what_it_takes(most: int, steps: list[tuple[float, str]], start: float) -> None:
    clock = Clock()
    clock.now += start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "time", clock)
        made = limiter()
        let_in: dict[tuple[str, int], int] = {}
        for pause, subject in steps:
            clock.now += pause / most
            wait_s = made.hit_here(subject, f"{most}/minute")
            assert 0 <= wait_s <= 60
            if wait_s:
                clock.now += wait_s + 0.01
                assert made.hit_here(subject, f"{most}/minute") == 0, wait_s
            window = (subject, int(clock.now // 60))
            let_in[window] = let_in.get(window, 0) + 1
            assert let_in[window] <= most


def test_workers_count_their_share(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers, rate, share in (("1", "10/minute", 10), ("4", "10/minute", 2), ("4", "3/minute", 1)):
        monkeypatch.setenv("CLAWPLANE_WORKER_COUNT", workers)
        made = limiter()
        assert sum(made.hit_here("a", rate) == 0 for _ in range(20)) == share


def test_a_flood_of_subjects_is_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_SUBJECTS", 100)
    made = limiter()
    for n in range(1000):
        made.hit_here(f"subject-{n}", "5/day")
    windows = made._windows[86400]
    assert len(windows._counts) + len(windows._before) <= 101


async def _answer(call: Any) -> Any:
    return await call
