"""Logs (JSON, one line an event, no secret in it) and metrics (Prometheus)."""

import logging
import sys
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import orjson
import structlog
from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine

IN_FLIGHT = Gauge("clawplane_rpc_in_flight", "Unary RPCs being handled", ["service"])
POOL_WAITING = Gauge("clawplane_db_pool_waiting", "Units of work that wait for a connection", ["database"])
POOL_TIMEOUTS = Counter("clawplane_db_pool_timeouts_total", "Waits for a connection that were given up", ["database"])
DB_RETRIES = Counter("clawplane_db_retries_total", "Units of work repeated after a clash", ["database"])
UNCOUNTED = Counter("clawplane_rate_limits_uncounted_total", "Calls let in because Redis did not count them", ["service"])
LOOP_RUNS = Counter("clawplane_loop_runs_total", "Runs of background loops", ["loop", "outcome"])

_pools: dict[str, AsyncEngine] = {}
_level = logging.DEBUG
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def level() -> int:
    """The least level that is logged."""
    return _level


class _PoolCollector(Collector):
    """Connections in use, read from the pools when Prometheus asks."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("clawplane_db_pool_in_use", "Connections in use", labels=["database"])
        for name, engine in list(_pools.items()):
            in_use = getattr(engine.pool, "checkedout", lambda: 0)
            family.add_metric([name], in_use())
        yield family


REGISTRY.register(_PoolCollector())


def watch_pool(name: str, engine: AsyncEngine) -> None:
    """Adds a pool to the metrics."""
    _pools[name] = engine


class Meter:
    """Counts the calls of one RPC. Plain numbers, read when Prometheus asks: its own counters cost a call more than all else here."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.codes: dict[str, int] = {}
        self.buckets = [0] * (len(_BOUNDS) + 1)
        self.seconds = 0.0

    def count(self, code: str, seconds: float) -> None:
        """A call has ended with a status code."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.buckets[bisect_left(_BOUNDS, seconds)] += 1
        self.seconds += seconds


_meters: dict[str, Meter] = {}


def meter(method: str) -> Meter:
    """The one meter of an RPC."""
    return _meters.setdefault(method, Meter(method))


class _RpcCollector(Collector):
    """What the meters have counted."""

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily("clawplane_rpc_calls", "RPCs by method and status code", labels=["method", "code"])
        seconds = HistogramMetricFamily("clawplane_rpc_seconds", "Duration of RPCs", labels=["method"])
        for one in list(_meters.values()):
            for code, number in list(one.codes.items()):
                calls.add_metric([one.method, code], number)
            bounds = [*(str(bound) for bound in _BOUNDS), "+Inf"]
            seconds.add_metric([one.method], list(zip(bounds, accumulate(one.buckets), strict=True)), one.seconds)
        yield calls
        yield seconds


REGISTRY.register(_RpcCollector())


@contextmanager
def waiting_for_pool(name: str) -> Iterator[None]:
    """Counts a wait for a connection, and whether it was given up."""
    gauge = POOL_WAITING.labels(name)
    gauge.inc()
    try:
        yield
    except PoolTimeout:
        POOL_TIMEOUTS.labels(name).inc()
        raise
    finally:
        gauge.dec()


def configure_logs(level: str = "info", *, pretty: bool = False) -> None:
    """JSON lines on standard error; ``pretty`` for people at a terminal. Call once, when the process starts."""
    global _level
    numeric = _level = getattr(logging, level.upper())
    renderer: Any = structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, _format_exception, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log parameters and headers at their own levels: only their warnings pass.
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_LibraryLines())
    logging.basicConfig(level=logging.WARNING, handlers=[lines], force=True)


class _LibraryLines(logging.Formatter):
    """What libraries log, in our form: the first line of the text, and of an exception only its type and where it came from."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        text = (record.getMessage().splitlines() or [""])[0]
        at = datetime.fromtimestamp(record.created, UTC).isoformat()
        event: dict[str, Any] = {"event": text, "logger": record.name, "level": record.levelname.lower(), "timestamp": at}
        if record.exc_info:
            event["exc_info"] = record.exc_info[1]
        return orjson.dumps(_format_exception(None, "", event)).decode()


def _format_exception(logger: Any, name: str, event: Any) -> Any:
    """An exception as its type and where it came from. Its text may hold a value (a driver quotes parameters), so it is left out."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}:{trace.tb_frame.f_code.co_name}")
            trace = trace.tb_next
        event["exception"] = type(error).__name__
        event["trace"] = frames[-12:]
    return event
