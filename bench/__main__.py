"""``python -m bench``: measures, prints the table, and exits with 1 where a floor is missed beyond the spread."""

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import report, stages
from bench.metering import BATCH, BATCH_4, CHECK, COPY, EMPTY_64, RECORD, RECORD_ALONE
from bench.rig import NATIVE, ON_BOTH, Figures, Rig, rig

Rounds = dict[str, list[Figures]]
Round = dict[str, Figures]
_CALLERS = 32
_KEPT = 3
"""A run of fewer rounds says too little to be kept."""
out = Console(highlight=False, width=118)


@dataclass
class Gate:
    """A promise: a ratio of scenarios, round by round, and its bound."""

    what: str
    ratio: Callable[[Round], float]
    bound: float
    at_most: bool = False

    def judge(self, rounds: Rounds) -> tuple[list[float], str]:
        """The ratios of the rounds, and "met", "within the spread" (some round met it) or "MISSED" (none did)."""
        ratios = [self.ratio(dict(zip(rounds, figures, strict=True))) for figures in zip(*rounds.values(), strict=True)]
        met = [ratio <= self.bound if self.at_most else ratio >= self.bound for ratio in ratios]
        median = statistics.median(ratios)
        if median <= self.bound if self.at_most else median >= self.bound:
            return ratios, "met"
        return ratios, "within the spread" if any(met) else "MISSED"


def _rate(of: str, to: str) -> Callable[[Round], float]:
    return lambda one: one[of].per_s / one[to].per_s


def _cpu(of: str, to: str) -> Callable[[Round], float]:
    return lambda one: one[of].server_us / one[to].server_us


def _first_token(one: Round) -> float:
    """The endpoint's delay of the first token, over what it asks before it and one empty RPC."""
    delay = one["1 stream, model endpoint"].first_ms - one["1 stream, bare upstream"].first_ms
    return delay / (one["OpenModelCall, 1 caller"].p50_ms + one["empty, wrapped, 1 caller"].p50_ms)


_BARE, _WRAPPED = "empty, bare", "empty, wrapped"
GATES = [
    Gate("wrapped empty / bare empty, server CPU", _cpu(_WRAPPED, _BARE), 1.25, at_most=True),
    Gate("VerifyApiKey / wrapped empty, server CPU", _cpu("VerifyApiKey", _WRAPPED), 1.15, at_most=True),
    Gate("VerifyApiKey among 100,000 keys / few, server CPU", _cpu("VerifyApiKey, among 100,000 keys", "VerifyApiKey"), 1.05, at_most=True),
    Gate("ValidateSession / wrapped empty, server CPU", _cpu("ValidateSession", _WRAPPED), 1.5, at_most=True),
    Gate("GetUser / wrapped empty, calls a second", _rate("GetUser", _WRAPPED), 0.65),
    Gate("GetDeployment / wrapped empty, calls a second", _rate("GetDeployment", _WRAPPED), 0.65),
    Gate("RecordUsage / wrapped empty, 64 callers, calls a second", _rate(RECORD, EMPTY_64), 0.55),
    Gate("RecordUsage / the same with the batcher off, calls a second", _rate(RECORD, RECORD_ALONE), 1.8),
    Gate("BatchRecordUsage, 1 caller / psql \\copy, events a second", _rate(BATCH, COPY), 0.30),
    Gate("BatchRecordUsage, 4 callers / psql \\copy, events a second", _rate(BATCH_4, COPY), 0.50),
    Gate("CheckQuota / wrapped empty, 64 callers, server CPU", _cpu(CHECK, EMPTY_64), 1.6, at_most=True),
    Gate("GetUser on native / on grpcio, server CPU", _cpu(f"GetUser{NATIVE}", "GetUser"), 0.4, at_most=True),
    Gate("GetDeployment as JSON / by gRPC, calls a second", _rate("GetDeployment, JSON through the gateway", "GetDeployment"), 0.5),
    Gate("model endpoint / bare upstream, 50 streams", _rate("50 streams, model endpoint", "50 streams, bare upstream"), 0.3),
    Gate("first token: delay / (OpenModelCall + empty RPC)", _first_token, 1.0, at_most=True),
]


def measure(made: Rig, count: int, seconds: float, only: str) -> Rounds:
    """Interleaved rounds; the first one, which only warms, is thrown away."""
    scenarios = [one for one in made.scenarios(seconds) if one.name in (_BARE, _WRAPPED) or re.search(only, one.name)]
    rounds: Rounds = {scenario.name: [] for scenario in scenarios}
    for number in range(count + 1):
        for scenario in scenarios:
            figures = made.measure(scenario)
            if number:
                rounds[scenario.name].append(figures)
        print(f"round {number} of {count} {'(warming)' if not number else ''}", file=sys.stderr, flush=True)
    return rounds


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def transports(rounds: Rounds) -> list[tuple[str, str, str, str]]:
    """What was measured on both: the scenario, server CPU of a call on grpcio, on native, and the ratio."""
    rows = []
    for name in (one for one in ON_BOTH if f"{one}{NATIVE}" in rounds):
        grpcio, native = ([one.server_us for one in rounds[known]] for known in (name, f"{name}{NATIVE}"))
        ratios = [ours / theirs for ours, theirs in zip(native, grpcio, strict=True)]
        rows.append((name, _median(grpcio), _median(native), f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"))
    return rows


def show(rounds: Rounds, costs: dict[str, float]) -> list[tuple[str, str, list[float], str]]:
    """Prints everything; of each gate what, bound, ratios, verdict."""
    table = Table("", "calls/s", "/ wrapped", "server CPU, us/call", "first ms", "p50 ms", "p99 ms", title="median (least-most)")
    for name, figures in rounds.items():
        share = statistics.median(a.per_s / b.per_s for a, b in zip(figures, rounds[_WRAPPED], strict=True))
        table.add_row(
            name, _median([f.per_s for f in figures]), f"{share:.2f}", _median([f.server_us for f in figures]),
            f"{statistics.median(f.first_ms for f in figures):.2f}" if figures[0].first_ms else "",
            f"{statistics.median(f.p50_ms for f in figures):.2f}", f"{statistics.median(f.p99_ms for f in figures):.1f}",
        )  # fmt: skip
    out.print(table)
    bare = statistics.median(f.server_us for f in rounds[_BARE])
    added = statistics.median(f.server_us for f in rounds[_WRAPPED]) - bare
    table = Table("stage of the wrapper", "us", "of the bare RPC", title=f"the wrapper adds {added:.0f} us to {bare:.0f} us")
    for name, cost in costs.items():
        table.add_row(name, f"{cost:.1f}", f"{cost / bare:.1%}")
    rest = added - sum(costs.values())
    table.add_row("the rest: coroutines, trailing metadata", f"{rest:.1f}", f"{rest / bare:.1%}")
    out.print(table)
    table = Table("server CPU, us/call", "grpcio", "native", "native / grpcio", title="both transports")
    for row in transports(rounds):
        table.add_row(*row)
    out.print(table)
    table = Table("gate", "bound", "median (least-most)", "", title="gates, ratios round by round")
    judged = []
    for gate in GATES:
        try:
            ratios, verdict = gate.judge(rounds)
        except KeyError:  # Of what was left out by --only.
            continue
        bound = f"{'<=' if gate.at_most else '>='} {gate.bound:.2f}"
        judged.append((gate.what, bound, ratios, verdict))
        table.add_row(gate.what, bound, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", verdict)
    out.print(table)
    return judged


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one scenario in one round")
    parser.add_argument("--only", default="", help="measure only the scenarios whose names hold this regular expression; keeps nothing")
    parser.add_argument("--report-only", action="store_true", help="exit with 0 whatever the gates say")
    given = parser.parse_args()
    costs = stages.run()
    with tempfile.TemporaryDirectory(prefix="clawplane-bench-") as folder, rig(Path(folder)) as made:
        rounds = measure(made, given.rounds, given.seconds, given.only)
    judged = show(rounds, costs)
    if given.rounds >= _KEPT and not given.only:
        report.write(rounds, transports(rounds), judged, _CALLERS, _WRAPPED)
        out.print(f"kept in {report.FOLDER / 'latest.md'}")
    missed = any(verdict == "MISSED" for *_, verdict in judged)
    raise SystemExit(1 if missed and not given.report_only else 0)


if __name__ == "__main__":
    main()
