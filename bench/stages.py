"""What each stage of the wrapper costs, timed alone in this process: it tells where the wrapper's share goes."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protovalidate
from google.protobuf import descriptor_pool, empty_pb2

from bench import echo
from services.kit import ids, rpc, telemetry
from services.kit.call import Call, Plan
from services.kit.tokens import TokenSigner

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
        request, meter = empty_pb2.Empty(), telemetry.meter(plan.method)
        call = Call(kit, plan, metadata, None)
        call.caller = caller = await kit.caller(plan, metadata)
        assert kit.known_caller(plan, metadata) is caller
        stages: dict[str, Callable[[], Any]] = {
            "caller": lambda: kit.known_caller(plan, metadata),
            "call": lambda: Call(kit, plan, metadata, None),
            "rule": call.permit,
            "rate limit": lambda: kit.limiter.hit_here(caller.subject, kit.settings.rate_limit),
            "field rules": lambda: protovalidate.collect_violations(request),
            "metrics and log": lambda: rpc._report(meter, call, "OK"),
        }
        costs = {name: min(_time(stage) for _ in range(_ROUNDS)) for name, stage in stages.items()}
        await kit.db.close()
        return costs


def _time(stage: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(_TIMES):
        stage()
    return (time.perf_counter() - started) / _TIMES * 1e6


def run() -> dict[str, float]:
    """Microseconds of each stage."""
    return asyncio.run(measure())
