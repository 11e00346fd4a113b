"""The client in programs of its own, which end, fork or are killed, and a service that is killed while they send."""

import asyncio
import contextlib
import itertools
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from tests import harness
from tests.client_rig import USE, Door, Either, key_of, ledger, listed, recorder, until
from tests.conftest import Databases
from tests.harness import Person, Stack, clean_env, eventually, free_port, running
from tests.processes import ROOT
from tests.test_client_shapes import CHAT, MESSAGE

pytestmark = pytest.mark.any_engine

BEGINNING = f"""
import asyncio, os, sys, time
from clawplane_client import AsyncUsageRecorder, UsageRecorder
target, token, spool = sys.argv[1:]
options = dict(spool_dir=spool or None, flush_interval_s=0.01, backoff_s=0.02, backoff_max_s=0.1, channel_options=[("grpc.enable_http_proxy", 0)])
USE = {USE!r}
"""
SHORT = (
    "recorder = UsageRecorder(target, token, **(options | {'flush_interval_s': 60}))\nprint(*[recorder.record(**USE) for _ in range(20)])"
)
SHORT_AIO = """
recorder = AsyncUsageRecorder(target, token, **(options | {'flush_interval_s': 60}))
async def main():
    print(*[await recorder.record(**USE) for _ in range(20)])
asyncio.run(main())
"""
FORKING = """
recorder = UsageRecorder(target, token, **(options | {'flush_interval_s': 0.001}))
for _ in range(5):
    print(*[recorder.record(**USE) for _ in range(10)], flush=True)
    # Time enough to be in the middle of a call.
    time.sleep(0.003)
    child = os.fork()
    if not child:
        print(*[recorder.record(**USE) for _ in range(5)], flush=True)
        sys.exit(not recorder.flush())
    assert os.waitpid(child, 0)[1] == 0
"""
FORKING_AIO = """
async def main():
    away = AsyncUsageRecorder("127.0.0.1:1", token, **options)
    made = [await away.record(**USE) for _ in range(10)]
    while away.stats.buffered:
        await asyncio.sleep(0.01)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        await away.close()
        there = AsyncUsageRecorder(target, token, **options)
        assert await there.flush()
        assert there.stats.accepted == 10, there.stats
    finally:
        os.kill(child, 9)
    print(*made)
asyncio.run(main())
"""
PROVIDERS = f"""
from types import SimpleNamespace
TARGET, TOKEN = target, token
openai = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=lambda **_: {CHAT!r})))
anthropic = SimpleNamespace(messages=SimpleNamespace(create=lambda **_: {MESSAGE!r}))
"""
SENDING = """
from clawplane_client import outbox
outbox._LOOK_S = 0.05
recorder = UsageRecorder(target, token, **options)
print(recorder.record(**USE), flush=True)
time.sleep(60)
"""
ENDLESS = """
recorder = UsageRecorder(target, token, **options)
print(flush=True)
while True:
    made = [recorder.record(**USE) for _ in range(20)]
    while recorder.stats.buffered:
        time.sleep(0.0005)
    print(*made, flush=True)
"""


@contextlib.asynccontextmanager
async def program(text: str, target: str, token: str, spool: Path | str = "") -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs beside; killed at the end, if it still does."""
    env = clean_env() | {"PYTHONPATH": f"{ROOT}/clients/python:{ROOT}/proto/gen"}
    command = [sys.executable, "-c", BEGINNING + text, target, token, str(spool)]
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE, limit=2**20)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process) -> list[str]:
    """The ids that a program has printed before its end."""
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode().split()


@pytest.mark.parametrize("text", [SHORT, SHORT_AIO], ids=["sync", "aio"])
async def test_a_program_that_just_ends_has_sent_everything(stack: Stack, person: Person, text: str) -> None:
    async with program(text, stack.target, await key_of(stack, person)) as process:
        made = await said(process)
    assert process.returncode == 0 and len(made) == 20
    assert await ledger(stack, person) == Counter(made)


@pytest.mark.parametrize("text", [SHORT, SHORT_AIO], ids=["sync", "aio"])
async def test_a_program_that_ends_while_the_service_is_away_leaves_it_to_the_next(
    stack: Stack, person: Person, text: str, tmp_path: Path
) -> None:  # fmt: skip
    async with program(text, f"127.0.0.1:{free_port()}", "token", tmp_path) as process:
        made = await said(process)
    assert process.returncode == 0 and len(made) == 20
    async with recorder("sync", stack.target, await key_of(stack, person), spool_dir=tmp_path) as it:
        assert await it.flush()
    assert await ledger(stack, person) == Counter(made)


async def test_what_the_readme_teaches_works(stack: Stack, person: Person, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "clients/python/README.md").read_text(), re.DOTALL)
    code = PROVIDERS + "".join(blocks).replace("/var/lib/mybot", str(tmp_path))
    async with program(code, stack.target, await key_of(stack, person)) as process:
        await said(process)
    assert process.returncode == 0 and len(blocks) == 3
    page = await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)
    found = Counter((event.provider, event.tokens_in, event.tokens_cached) for event in page.events)
    assert found == Counter([("openai", 1200, 1024), ("anthropic", 2209, 2000), ("google", 1200, 1024), ("openai", 1200, 0)])


async def test_a_fork_sends_its_own_events(stack: Stack, person: Person, tmp_path: Path) -> None:
    async with program(FORKING, stack.target, await key_of(stack, person), tmp_path) as process:
        made = await said(process)
    assert process.returncode == 0 and len(made) == 75
    assert await ledger(stack, person) == Counter(made)


async def test_a_child_that_lives_on_holds_no_file_of_its_parent(stack: Stack, person: Person, tmp_path: Path) -> None:
    async with program(FORKING_AIO, stack.target, await key_of(stack, person), tmp_path) as process:
        made = await said(process)
    assert process.returncode == 0 and len(made) == 10
    assert await ledger(stack, person) == Counter(made)


async def test_killed_while_the_service_is_away(stack: Stack, person: Person, tmp_path: Path) -> None:
    """What was in the spool when they were killed arrives, once; of what was being written then, each event wholly or not at all."""
    nowhere = f"127.0.0.1:{free_port()}"
    safe: list[str] = []
    async with contextlib.AsyncExitStack() as exits:
        programs = [await exits.enter_async_context(program(ENDLESS, nowhere, "token", tmp_path)) for _ in range(3)]
        for process in programs:
            assert process.stdout is not None
            for _ in range(3):
                safe += (await process.stdout.readline()).decode().split()
        for process in programs:
            await asyncio.sleep(random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            safe += await said(process)
            assert process.returncode == -signal.SIGKILL
    assert len(safe) >= 3 * 2 * 20 and list(tmp_path.glob("*.usage"))
    async with recorder("aio", stack.target, await key_of(stack, person), spool_dir=tmp_path) as it:
        assert await it.flush(20)
        assert it.stats.accepted >= len(safe) and it.stats.rejected == it.stats.duplicates == 0
    found = await ledger(stack, person)
    assert set(safe) <= set(found) and set(found.values()) == {1}
    assert not list(tmp_path.glob("*.usage")) and not list(tmp_path.glob("*.damaged"))


async def test_killed_while_it_sends_what_was_left(stack: Stack, person: Person, tmp_path: Path) -> None:
    """The service has stored all of a file, and whoever sent it dies before he knows: the next one sends it again, and it counts once."""
    async with program(SHORT, f"127.0.0.1:{free_port()}", "token", tmp_path) as process:
        made = await said(process)
    spool, key = tmp_path / "other", await key_of(stack, person)
    async with Door(stack.target) as door, program(SENDING, door.target, key, spool) as process:
        assert process.stdout is not None
        made += (await process.stdout.readline()).decode().split()
        await stored(stack, person, 1)
        # From here on all that it sends arrives, and no answer comes back.
        door.loses_answers = True
        for path in tmp_path.glob("*.usage"):
            path.rename(spool / path.name)
        await stored(stack, person, 21)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert list(spool.glob("*.usage"))
    async with recorder("sync", stack.target, key, spool_dir=spool) as it:
        assert await it.flush()
        assert (it.stats.accepted, it.stats.duplicates) == (0, 20)
    assert await ledger(stack, person) == Counter(made)


async def test_the_service_stops_and_starts_again_on_its_port(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "free_port", itertools.cycle([free_port(), free_port()]).__next__)
    urls, made, done = databases.make(), list[str](), asyncio.Event()
    async with contextlib.AsyncExitStack() as recorders:
        async with running(tmp_path, urls) as stack:
            person = await stack.person()
            key = await key_of(stack, person)
            one = await recorders.enter_async_context(recorder("sync", stack.target, key, spool_dir=tmp_path / "spool"))
            two = await recorders.enter_async_context(recorder("aio", stack.target, key))
            going = asyncio.create_task(go_on(made, done, one, two))
            await until(lambda: one.stats.accepted and two.stats.accepted)
        async with running(tmp_path, urls) as stack:
            await until(lambda: one.stats.failures and two.stats.failures)
            done.set()
            await going
            assert await one.flush() and await two.flush()
            assert one.stats.spooled and one.stats.rejected == two.stats.rejected == 0
            assert await ledger(stack, person) == Counter(made)


async def stored(stack: Stack, person: Person, count: int) -> None:
    """Waits until so many events are in the ledger."""

    async def enough() -> bool:
        return (await listed(stack, person)).total() >= count

    await eventually(enough)


async def go_on(made: list[str], done: asyncio.Event, *recorders: Either) -> None:
    """Records and records."""
    while not done.is_set():
        for each in recorders:
            made.append(await each.record())
        await asyncio.sleep(0.005)
