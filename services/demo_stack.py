"""The stack that a demo talks to: the one that runs, or one of its own."""

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from rich.console import Console

T = TypeVar("T")
_WAIT_S = 60.0


class DemoError(Exception):
    """A step did not do what it should."""


@dataclass(frozen=True)
class Where:
    """The stack that the demo talks to."""

    user: str
    deployment: str
    http: str
    data_dir: Path
    is_here: bool = True
    """Whether it runs on that data directory, on this machine."""


@asynccontextmanager
async def stack(data_dir: Path, out: Console) -> AsyncIterator[Where]:
    """The stack that runs on ``data_dir``, or a fresh one that is stopped afterwards."""
    running = await running_on(data_dir)
    if running:
        out.print(f"[dim]using the stack at {running.http}[/]")
        yield running
        return
    async with own_stack(out, {}) as found:
        yield found


@asynccontextmanager
async def own_stack(out: Console, env: dict[str, str]) -> AsyncIterator[Where]:
    """A fresh stack, stopped afterwards."""
    with tempfile.TemporaryDirectory(prefix="clawplane-demo-") as folder:
        ports = free_ports()
        out.print("[dim]starting a stack for this demo[/]")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.cli", "up", "--data-dir", folder, "--grpc-port", str(ports[0]), "--http-port", str(ports[1]),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, env=os.environ | {"CLAWPLANE_LOG_LEVEL": "error"} | env,
        )  # fmt: skip

        async def started() -> Where | None:
            if process.returncode is not None:
                raise DemoError(f"the stack ended at its start ({process.returncode}): `clawplane up` says why")
            return await running_on(Path(folder))

        try:
            yield await until("the stack to start", started)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await process.wait()
            out.print("[dim]stopped the stack again[/]")


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return int(first.getsockname()[1]), int(second.getsockname()[1])


async def running_on(data_dir: Path) -> Where | None:
    try:
        note = json.loads((data_dir / "up.json").read_text())
        async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
            answer = await client.get(f"{note['http']}/readyz")
    except (OSError, ValueError, KeyError, httpx.HTTPError):
        return None
    return Where(note["grpc"], note["grpc"], note["http"], data_dir) if answer.status_code == 200 else None


async def until(what: str, check: Callable[[], Awaitable[T | None]]) -> T:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        found = await check()
        if found:
            return found
        await asyncio.sleep(0.1)
    raise DemoError(f"waited {_WAIT_S:.0f} s for {what}")
