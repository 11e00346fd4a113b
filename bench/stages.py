"""What each stage of the wrapper costs, timed alone in this process: it tells where the wrapper's share goes."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import protovalidate
from google.protobuf import descriptor_pool, empty_pb2

from bench import echo
from services.kit import ids, rpc, telemetry
from services.kit.auth import TokenSigner
from services.kit.call import Call, Plan

_ROUNDS, _TIMES = 5, 4000


async def measure() -> dict[str, float]:
    """Microseconds of each stage, the least of several rounds."""
    telemetry.configure_logs("warning")
    with tempfile.TemporaryDirectory() as folder:
        kit = echo.wrapped_kit(Path(folder))
        service = descriptor_pool.Default().FindServiceByName(echo.SERVICE)
        plan = Plan.of(service.methods_by_name["Empty"])
        token = TokenSigner(kit.settings).sign(["*"], user=ids.new("usr"), lifetime_s=900)
        metadata = {"authorization": f"Bearer {token}", "user-agent": "grpc-python"}
        context: Any = SimpleNamespace(invocation_metadata=lambda: metadata)
        request, meter = empty_pb2.Empty(), telemetry.meter(plan.method)
        caller = await kit.authenticator.caller(metadata)
        stages: dict[str, Callable[[], Any]] = {
            "request id": lambda: rpc._request_id(metadata),
            "caller": lambda: kit.authenticator.caller(metadata),
            "rule": lambda: Call(kit, plan, caller, "id", context).permit(),
            "rate limit": lambda: kit.limiter.hit_here(caller.subject, kit.settings.rate_limit),
            "field rules": lambda: protovalidate.collect_violations(request),
            "metrics and log": lambda: rpc._report(meter, plan, "OK", time.perf_counter(), "id", caller),
        }
        costs = {name: min([await _time(stage) for _ in range(_ROUNDS)]) for name, stage in stages.items()}
        await kit.db.close()
        return costs


async def _time(stage: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(_TIMES):
        made = stage()
        if isinstance(made, Awaitable):
            await made
    return (time.perf_counter() - started) / _TIMES * 1e6


def run() -> dict[str, float]:
    """Microseconds of each stage."""
    return asyncio.run(measure())
