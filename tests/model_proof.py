"""Many calls of the model endpoint while providers break, callers leave and come again, and the gateway is killed: what must hold."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from clawplane.deployment.v1 import usage_event_pb2, usage_service_pb2, usage_service_pb2_grpc
from tests.conftest import Databases
from tests.harness import Metadata, eventually, free_port
from tests.processes import OPTIONS, ROOT, Processes
from tests.simulators.upstream import KEY, UpstreamSimulator

MODEL = "claude-opus-4.5"
CALL_S = 4
"""After so long, a call that nobody has settled is settled by estimate."""
FATES = ["good"] * 8 + ["whole", "whole", "cut", "hang", "no_usage", "html", "leaves", "leaves", "refused"]


@dataclass
class Attempt:
    """One call, told by its length: no other sends as many tokens."""

    number: int
    fate: str
    saw_end: bool = False
    raw: bytes = b""

    def __post_init__(self) -> None:
        order: dict[str, Any] = {"chunks": 20, "sleep_s": 0.005, "break_at": 9}
        if self.fate in ("cut", "hang", "no_usage", "html"):
            order["kind"] = self.fate
        if self.fate == "refused":
            order |= {"kind": "status", "status": 500}
        body: dict[str, Any] = {"model": MODEL, "stream": self.fate != "whole", "max_tokens": 100, "user": f"{self.number:06d}"}
        order["pad"] = "x" * (250 + 16 * self.number - len(json.dumps(order)))
        self.raw = json.dumps(body | {"messages": [{"role": "user", "content": json.dumps(order)}]}).encode()

    @property
    def estimate(self) -> int:
        """The tokens that the gateway takes it to send."""
        return len(self.raw) // 4 + 1


@dataclass
class Proof:
    """The running processes, and what was done to them."""

    processes: Processes
    upstream: UpstreamSimulator
    port: int = field(default_factory=free_port)
    kills: int = 0
    gateway: "subprocess.Popen[bytes] | None" = None

    def start_gateway(self) -> None:
        """Starts it, again on the same port."""
        served = [{"provider": "anthropic", "prefixes": ["claude"], "base_url": self.upstream.base_url, "api_key": KEY}]
        env = self.processes.env | {
            "CLAWPLANE_DEPLOYMENT_TARGET": f"127.0.0.1:{self.processes.ports[1]}", "CLAWPLANE_MODEL_UPSTREAMS": json.dumps(served),
            "CLAWPLANE_MODEL_UPSTREAM_TIMEOUT_S": "1",
        }  # fmt: skip
        with (self.processes.folder / "gateway.log").open("ab") as log:
            command = [sys.executable, "-m", "services.cli", "serve", "gateway", "--port", str(self.port)]
            self.gateway = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    async def ready(self) -> None:
        """Waits until it answers."""

        async def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
                    return (await http.get(f"http://127.0.0.1:{self.port}/readyz")).status_code == 200
            return False

        await eventually(answers, 30)

    async def kill_gateway(self) -> None:
        """kill -9, in the middle of whatever it does."""
        assert self.gateway is not None
        self.gateway.kill()
        self.gateway.wait()
        self.kills += 1
        self.start_gateway()
        await self.ready()

    async def call(self, http: httpx.AsyncClient, person: Metadata, attempt: Attempt) -> bool:
        """Makes the call; whether it ended as it should. A gateway that is not there is waited for."""
        headers = dict(person) | {"content-type": "application/json"}
        while True:
            with contextlib.suppress(httpx.ConnectError):
                return await self._once(http, headers, attempt)
            await asyncio.sleep(0.2)

    @staticmethod
    async def _once(http: httpx.AsyncClient, headers: dict[str, str], attempt: Attempt) -> bool:
        try:
            async with http.stream("POST", "/v1/chat/completions", content=attempt.raw, headers=headers) as answer:
                said = b""
                async for piece in answer.aiter_bytes():
                    said += piece
                    if attempt.fate == "leaves":
                        return True
        except httpx.ConnectError:
            raise
        except httpx.HTTPError:
            return False
        attempt.saw_end = answer.status_code == 200 and (b"[DONE]" in said or attempt.fate == "whole")
        return attempt.saw_end


@contextlib.asynccontextmanager
async def running(databases: Databases, folder: Path, call_s: float) -> AsyncIterator[Proof]:
    """The services, the gateway and the provider, each a process."""
    tiers = {"starter": {"price_minor": 2900, "monthly_tokens": 0, "monthly_credit_minor": 10**9, "live_deployments": 0}}
    with UpstreamSimulator() as upstream:
        processes = Processes(databases, folder, CLAWPLANE_TIERS=json.dumps(tiers), CLAWPLANE_MODEL_CALL_S=str(call_s))
        proof = Proof(processes, upstream)
        try:
            await processes.ready()
            proof.start_gateway()
            await proof.ready()
            yield proof
        finally:
            if proof.gateway is not None:
                proof.gateway.kill()
                proof.gateway.wait()
            processes.stop()


async def prove(databases: Databases, folder: Path, calls: int, kills: int, callers: int = 30) -> Counter[str]:
    """Makes so many calls and as many more as are tried again; what became of them."""
    async with running(databases, folder, CALL_S) as proof:
        return await _run(proof, calls, kills, callers)


async def away(databases: Databases, folder: Path, callers: int) -> int:
    """Streams that end while the deployment service is dead: how many were counted exactly in the end."""
    async with running(databases, folder, 120) as proof:
        person = await proof.processes.person()
        attempts = [Attempt(number, "good") for number in range(callers)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proof.port}", trust_env=False, timeout=60) as http:
            calls = [asyncio.create_task(proof.call(http, person, attempt)) for attempt in attempts]

            async def all_asked() -> bool:
                return len(await proof.upstream.calls()) == callers

            await eventually(all_asked)
            dead = proof.processes.running[1]
            dead.kill()
            dead.wait()
            began = time.monotonic()
            assert all(await asyncio.gather(*calls))
            assert time.monotonic() - began < 15
        proof.processes.running[1] = proof.processes.start(1)
        await proof.processes.ready()

        async def counted() -> int:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{proof.processes.ports[1]}", options=OPTIONS) as channel:
                stub = usage_service_pb2_grpc.UsageServiceStub(channel)
                listed = await stub.ListUsage(usage_service_pb2.ListUsageRequest(page_size=250), metadata=person)
            exact = [event for event in listed.events if not event.estimated]
            return len(exact) if len(exact) >= callers else 0

        found: int = await eventually(counted, 30)
        return found


async def _run(proof: Proof, calls: int, kills: int, callers: int) -> Counter[str]:
    chance, person = random.Random(11), await proof.processes.person()
    attempts: list[Attempt] = []
    left = iter(range(calls))
    kill_at = sorted(chance.sample(range(calls // 10, calls), kills))

    async def caller() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proof.port}", trust_env=False, timeout=20) as http:
            for _ in left:
                fate = chance.choice(FATES)
                for _ in range(3):
                    attempt = Attempt(len(attempts), fate)
                    attempts.append(attempt)
                    if await proof.call(http, person, attempt):
                        break
                    await asyncio.sleep(0.1)

    async def killer() -> None:
        for at in kill_at:
            while len(attempts) < at:
                await asyncio.sleep(0.02)
            await proof.kill_gateway()

    await asyncio.gather(killer(), *(caller() for _ in range(callers)))
    events = await _events(proof, person, attempts)
    return await _compare(proof, attempts, events)


async def _events(proof: Proof, person: Metadata, attempts: list[Attempt]) -> list[usage_event_pb2.UsageEvent]:
    """All usage events, once every call that was opened is settled."""
    # What the last killed gateway left is settled by then.
    await asyncio.sleep(CALL_S + 1.5)
    found: list[usage_event_pb2.UsageEvent] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{proof.processes.ports[1]}", options=OPTIONS) as channel:
        stub = usage_service_pb2_grpc.UsageServiceStub(channel)
        token = ""
        while True:
            request = usage_service_pb2.ListUsageRequest(page_size=250, page_token=token)
            page = await stub.ListUsage(request, metadata=person)
            found += page.events
            token = page.next_page_token
            if not token:
                break
        total = (await stub.SummarizeUsage(usage_service_pb2.SummarizeUsageRequest(), metadata=person)).total
    assert total.events == len(found) and total.tokens_total == sum(event.tokens_total for event in found)
    return found


async def _compare(proof: Proof, attempts: list[Attempt], events: list[usage_event_pb2.UsageEvent]) -> Counter[str]:
    exact = Counter(event.tokens_in for event in events if not event.estimated)
    estimated = Counter(event.tokens_in for event in events if event.estimated)
    by_length = {event.tokens_in: event for event in events if not event.estimated}
    asked = await proof.upstream.calls()
    said: Counter[str] = Counter(kills=proof.kills, attempts=len(attempts), events=len(events))
    seen = 0
    for attempt in attempts:
        known = asked.get(f"{attempt.number:06d}")
        usage = known["usage"] if known else None
        as_said = exact[usage["prompt_tokens"]] if usage else 0
        # A provider that refuses generates nothing, and is counted as nothing, by estimate.
        as_estimated = estimated[attempt.estimate]
        seen += as_said + as_estimated
        if attempt.saw_end and attempt.fate in ("good", "whole"):
            assert (as_said, as_estimated) == (1, 0), attempt.number
            event = by_length[usage["prompt_tokens"]]
            assert (event.tokens_out, event.tokens_cached) == (usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
            said["exact, and the caller saw the end"] += 1
        elif known and attempt.fate == "leaves" and known["ended"] and as_said:
            assert as_estimated == 0
            said["exact, and the caller had left"] += 1
        elif known and attempt.fate not in ("refused", "html"):
            assert as_said + as_estimated == 1, (attempt.number, attempt.fate)
            assert known["ended"] or as_said == 0
            said["exact, and the caller did not see it" if as_said else "estimated"] += 1
        else:
            assert as_said == 0 and as_estimated <= 1
            said["nothing was generated"] += 1
    refused = [event for event in events if event.estimated and event.tokens_in == 0]
    assert seen + len(refused) == len(events), (seen, len(refused), len(events), said)
    if refused:
        assert len(refused) == len([one for one in attempts if one.fate == "refused" and f"{one.number:06d}" in asked and not estimated[one.estimate]])
    said["refused by the provider"] = len(refused)
    return said
