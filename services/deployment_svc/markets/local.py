"""The ``local`` driver: each deployment a real process on this machine, at one of several local "providers".

Everything it knows is in files, so that the next process can go on after a crash. Whether a bot lives is told by a lock that the bot
holds while it does: the kernel lets go of it at any death, and it cannot be recycled as a pid can.
"""

import asyncio
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil

from services.deployment_svc.markets import bot
from services.deployment_svc.markets.driver import Lease, Observation, Offer, Order, ProviderError, Secrets, Spec

PRICES = {"local-a": Decimal("0.010"), "local-b": Decimal("0.012"), "local-c": Decimal("0.015")}
_ORDER = re.compile(r"ord-[0-9a-f]{32}")
_START_S = 10.0
"""Longest start of a bot."""
_SILENT_S, _SILENT_TIMES = 3.0, 3
"""A bot that does not answer this long and this often in a row is lost."""
_KILL_AFTER_S, _STOP_S = 2.0, 10.0
"""A bot is killed when it has not ended by itself, and given up on when that does not help either."""
_HALF_MADE_S = 60.0
"""A folder without an order is what a crash left, unless it is younger."""


class LocalDriver:
    """Implements Driver. ``model_url`` is where bots ask their models; ``providers`` are names and prices an hour."""

    name = "local"

    def __init__(self, state_dir: Path, model_url: str, providers: Mapping[str, Decimal] | None = None) -> None:
        self.root, self.model_url, self.providers = state_dir.resolve(), model_url, dict(providers or PRICES)
        self._http = httpx.AsyncClient(trust_env=False, timeout=2)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._silent: dict[str, tuple[int, float]] = {}

    async def create(self, spec: Spec, secrets: Secrets, start_id: str) -> Order:
        given = {
            "start_id": start_id, "deployment_id": spec.deployment_id, "model": spec.model, "channel": spec.channel,
            "base_url": self.model_url, "api_key": secrets.claw_key,
            "channel_token": secrets.channel_token, "channel_api_key": secrets.channel_api_key,
        }  # fmt: skip
        order = Order(f"ord-{uuid.uuid4().hex}", spec.name, json.dumps(given))
        folder = self.root / order.id
        await asyncio.to_thread(folder.mkdir, 0o700, True)
        content = {"name": spec.name, "deployment_id": spec.deployment_id, "model": spec.model, "channel": spec.channel, "at": time.time()}
        await asyncio.to_thread(bot.write_atomically, folder / "order.json", json.dumps(content))
        return order

    async def find(self, name: str) -> list[str]:
        def scan() -> list[str]:
            found = []
            for folder in self.root.glob("ord-*"):
                order = _read(folder / "order.json")
                if order is None:
                    _sweep(folder)
                elif order["name"] == name:
                    found.append(folder.name)
            return found

        return await asyncio.to_thread(scan)

    async def offers(self, order: Order) -> list[Offer]:
        if not (self._folder(order.id) / "order.json").exists():
            raise ProviderError(f"there is no order {order.id}", "order")
        return [Offer(provider, price, Decimal(1), f"{provider}/{order.id}") for provider, price in self.providers.items()]

    async def lease(self, order: Order, offer: Offer) -> Lease:
        try:
            return await asyncio.to_thread(self._lease, self._folder(order.id), offer, order.manifest)
        except FileNotFoundError:
            raise ProviderError(f"there is no order {order.id}", "order") from None

    def _lease(self, folder: Path, offer: Offer, manifest: str) -> Lease:
        with _only_one(folder / "lease.lock"):
            if not (folder / "order.json").exists():
                raise FileNotFoundError
            known = _read(folder / "lease.json")
            if known and _is_alive(folder):
                return Lease(known["lease_id"], known["provider"])
            lease = Lease(f"{offer.provider}/{folder.name}", offer.provider)
            (folder / "bot.json").unlink(missing_ok=True)
            intent = {"lease_id": lease.id, "provider": offer.provider, "start_id": json.loads(manifest)["start_id"], "at": time.time()}
            bot.write_atomically(folder / "lease.json", json.dumps(intent))
            child = self._children[folder.name] = self._spawn(folder, manifest)
            deadline = time.monotonic() + _START_S
            while not (folder / "bot.json").exists():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise ProviderError(f"the bot at {offer.provider} ended with {child.poll()} before it listened", "provider")
                time.sleep(0.01)
            return lease

    def _spawn(self, folder: Path, manifest: str) -> "subprocess.Popen[bytes]":
        with (folder / "bot.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-I", str(Path(bot.__file__)), str(folder)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True, cwd=folder, env={"PATH": os.environ.get("PATH", "")},
            )  # fmt: skip
        # Through a pipe: arguments and environment of a process can be read by others.
        assert child.stdin is not None
        try:
            child.stdin.write(manifest.encode() + b"\n")
            child.stdin.close()
        except BrokenPipeError:
            pass  # It ended at once; the caller sees that.
        return child

    async def observe(self, order_id: str) -> Observation:
        folder = self._folder(order_id)
        if not (folder / "order.json").exists():
            return Observation("absent")
        lease = _read(folder / "lease.json")
        if lease is None:
            return Observation("ordered")
        fact = _read(folder / "bot.json")
        about = {"lease_id": lease["lease_id"], "provider": lease["provider"], "start_id": (fact or lease)["start_id"]}
        child = self._children.get(order_id)
        ended = child.poll() if child is not None else None
        if not await asyncio.to_thread(_is_alive, folder):
            if ended is None and time.time() - lease["at"] < _START_S and fact is None:
                return Observation("starting", **about)
            return Observation("lost", reason=f"its process ended{f' with {ended}' if ended is not None else ''}", **about)
        if fact is None:
            late = time.time() - lease["at"] > _START_S
            return Observation("lost" if late else "starting", reason="it never listened" if late else "", **about)
        url = f"http://127.0.0.1:{fact['port']}"
        if await self._answers(url, fact["start_id"]):
            self._silent.pop(order_id, None)
            return Observation("ready", url=url, **about)
        times, since = self._silent.get(order_id, (0, time.monotonic()))
        self._silent[order_id] = (times + 1, since)
        if times + 1 >= _SILENT_TIMES and time.monotonic() - since >= _SILENT_S:
            return Observation("lost", reason="its process hangs", **about)
        return Observation("starting", **about)

    async def _answers(self, url: str, start_id: str) -> bool:
        try:
            answer = await self._http.get(f"{url}/health")
            return bool(answer.status_code == 200 and answer.json()["start_id"] == start_id)
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False

    async def close(self, order_id: str) -> None:
        folder = self._folder(order_id)
        if folder.exists():
            with suppress(FileNotFoundError):  # Somebody else closed it in the same moment.
                await asyncio.to_thread(self._close, folder)
        self._silent.pop(order_id, None)

    def _close(self, folder: Path) -> None:
        with _only_one(folder / "lease.lock"):
            self._stop(folder)
            # The order last: until it is gone, the folder is still found by name.
            for path in folder.iterdir():
                if path.name not in ("order.json", "lease.lock"):
                    path.unlink()
            (folder / "order.json").unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def _stop(self, folder: Path) -> None:
        """Ends the bot of a folder: politely, then not."""
        deadline = time.monotonic() + _KILL_AFTER_S
        process = _holder(folder)
        if process is not None:
            _signal(process, signal.SIGTERM)
        while _is_alive(folder):
            if process is None:
                process = _holder(folder)
            elif time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
            if time.monotonic() > deadline + _STOP_S:
                raise ProviderError("the bot's process does not end", "market")
            time.sleep(0.02)
        child = self._children.pop(folder.name, None)
        if child is not None:
            if child.poll() is None:
                child.kill()  # It did not get as far as the lock.
            child.wait()

    async def stop_all(self) -> None:
        """Stops every bot and keeps the orders: at the next start they are seen as lost, and started again."""

        def stop(folder: Path) -> None:
            # A start in hand ends first, or its bot would come after us.
            with suppress(FileNotFoundError), _only_one(folder / "lease.lock"):
                self._stop(folder)

        folders = [path.parent for path in self.root.glob("ord-*/order.json")]
        await asyncio.gather(*(asyncio.to_thread(stop, folder) for folder in folders))

    async def shutdown(self) -> None:
        await self._http.aclose()

    def _folder(self, order_id: str) -> Path:
        if not _ORDER.fullmatch(order_id):
            raise ProviderError("that is no order of the local driver", "request")
        return self.root / order_id


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One caller at a time, over all processes. FileNotFoundError when the order's folder is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Removes what a crash in the middle of create or close left."""
    with suppress(FileNotFoundError):
        if time.time() - folder.stat().st_mtime > _HALF_MADE_S and not _is_alive(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    """Whether a bot holds the folder's lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _holder(folder: Path) -> psutil.Process | None:
    """The process that holds the lock, if its pid is written and it really is the bot of this folder."""
    try:
        process = psutil.Process(int((folder / "lock").read_text()))
        return process if str(folder) in process.cmdline() and _is_alive(folder) else None
    except (OSError, ValueError, psutil.Error):
        return None


def _signal(process: psutil.Process, number: int) -> None:
    try:
        # psutil compares the start time before it signals, so a recycled pid is left alone.
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content
