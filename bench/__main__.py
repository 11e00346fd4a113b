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
from bench.rig import NATIVE, ON_BOTH, Figures, Rig, Scenario, rig

Rounds = dict[str, list[Figures]]
Round = dict[str, Figures]
_CALLERS = 32
_KEPT = 3
"""A run of fewer rounds says too little to be kept."""
out = Console(highlight=False, width=118)


@dataclass
class Gate:
    """A promise: a ratio of scenarios that are measured in turn, and its bound."""

    what: str
    of: tuple[str, ...]
    """The scenarios that ``ratio`` compares."""
    ratio: Callable[[Round], float]
    bound: float
    at_most: bool = False
    turns: int = 1
    times: int = 1
    """How many times as long as the others it is measured: where the bound is closer than two seconds can tell."""

    def judge(self, ratios: list[float]) -> str:
        """Of the ratios of the rounds: "met", "within the spread" (some round met it) or "MISSED" (none did)."""
        met = [ratio <= self.bound if self.at_most else ratio >= self.bound for ratio in ratios]
        median = statistics.median(ratios)
        if median <= self.bound if self.at_most else median >= self.bound:
            return "met"
        return "within the spread" if any(met) else "MISSED"


def _rate(what: str, of: str, to: str, bound: float) -> Gate:
    """In one turn: callers begin and end together, and in short ones that would count against the slower side."""
    return Gate(what, (of, to), lambda one: one[of].per_s / one[to].per_s, bound)


def _cpu(what: str, of: str, to: str, bound: float, times: int = 1) -> Gate:
    return Gate(f"{what}, server CPU", (of, to), lambda one: one[of].server_us / one[to].server_us, bound, True, 8, times)


_STREAM, _UPSTREAM = "1 stream, model endpoint", "1 stream, bare upstream"
_OPEN, _ALONE = "OpenModelCall, 1 caller", "empty, wrapped, 1 caller"


def _first_token(one: Round) -> float:
    """The endpoint's delay of the first token, over what it asks before it and one empty RPC."""
    return (one[_STREAM].first_ms - one[_UPSTREAM].first_ms) / (one[_OPEN].p50_ms + one[_ALONE].p50_ms)


_BARE, _WRAPPED, _VERIFY = "empty, bare", "empty, wrapped", "VerifyApiKey"
GATES = [
    _cpu("wrapped empty / bare empty", _WRAPPED, _BARE, 1.25),
    _cpu("VerifyApiKey / wrapped empty", _VERIFY, _WRAPPED, 1.15),
    _cpu("VerifyApiKey among 100,000 keys / few", "VerifyApiKey, among 100,000 keys", _VERIFY, 1.05, times=3),
    _cpu("ValidateSession / wrapped empty", "ValidateSession", _WRAPPED, 1.5),
    _rate("GetUser / wrapped empty, calls a second", "GetUser", _WRAPPED, 0.65),
    _rate("GetDeployment / wrapped empty, calls a second", "GetDeployment", _WRAPPED, 0.65),
    _rate("RecordUsage / wrapped empty, 64 callers, calls a second", RECORD, EMPTY_64, 0.55),
    _rate("RecordUsage / the same with the batcher off, calls a second", RECORD, RECORD_ALONE, 1.8),
    _rate("BatchRecordUsage, 1 caller / psql \\copy, events a second", BATCH, COPY, 0.30),
    _rate("BatchRecordUsage, 4 callers / psql \\copy, events a second", BATCH_4, COPY, 0.50),
    _cpu("CheckQuota / wrapped empty, 64 callers", CHECK, EMPTY_64, 1.6),
    _cpu("GetUser on native / on grpcio", f"GetUser{NATIVE}", "GetUser", 0.4),
    _rate("GetDeployment as JSON / by gRPC, calls a second", "GetDeployment, JSON through the gateway", "GetDeployment", 0.5),
    _rate("model endpoint / bare upstream, 50 streams", "50 streams, model endpoint", "50 streams, bare upstream", 0.3),
    Gate("first token: delay / (OpenModelCall + empty RPC)", (_STREAM, _UPSTREAM, _OPEN, _ALONE), _first_token, 1.0, at_most=True, turns=4),
]
_SHORTEST_S = 0.2


def measure(made: Rig, count: int, seconds: float, only: str) -> tuple[Rounds, dict[str, list[float]]]:
    """Interleaved rounds; the first one, which only warms, is thrown away. Of each scenario what its rounds gave, of each gate its ratios.

    The machine's own speed wanders by a fifth within seconds, so what a gate compares is measured in turn, CPU a fraction of a second
    each."""
    scenarios = {one.name: one for one in made.scenarios(seconds) if one.name in (_BARE, _WRAPPED) or re.search(only, one.name)}
    gates = [gate for gate in GATES if scenarios.keys() >= set(gate.of)]
    gated = {name for gate in gates for name in gate.of}
    rounds: Rounds = {name: [] for name in scenarios}
    ratios: dict[str, list[float]] = {gate.what: [] for gate in gates}
    for number in range(count + 1):
        together = {name: Figures() for name in scenarios}
        for gate in gates:
            # The other way round in every other round, for gates of one turn.
            compared = [scenarios[name].for_longer(gate.times) for name in gate.of[:: -1 if number % 2 else 1]]
            one = in_turn(made, compared, gate.times * max(1, min(gate.turns, int(seconds / _SHORTEST_S))))
            for name, figures in one.items():
                together[name].add(figures)
            if number:
                ratios[gate.what].append(gate.ratio(one))
        for name, scenario in scenarios.items():
            if name not in gated:
                together[name] = made.measure(scenario)
        if number:
            for name, figures in together.items():
                rounds[name].append(figures)
        print(f"round {number} of {count} {'(warming)' if not number else ''}", file=sys.stderr, flush=True)
    return rounds, ratios


def in_turn(made: Rig, scenarios: list[Scenario], turns: int) -> Round:
    """Each scenario so many times, one after the other, there and back again."""
    taken = {one.name: Figures() for one in scenarios}
    for number in range(turns):
        for scenario in scenarios[:: -1 if number % 2 else 1]:
            taken[scenario.name].add(made.measure(scenario, turns))
    return taken


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


def show(rounds: Rounds, gates: dict[str, list[float]], costs: dict[str, float]) -> list[tuple[str, str, list[float], str]]:
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
        if gate.what not in gates:  # It compares what was left out by --only.
            continue
        ratios = gates[gate.what]
        verdict = gate.judge(ratios)
        bound = f"{'<=' if gate.at_most else '>='} {gate.bound:.2f}"
        judged.append((gate.what, bound, ratios, verdict))
        table.add_row(gate.what, bound, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", verdict)
    out.print(table)
    return judged


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a scenario is measured in a round, in each comparison")
    parser.add_argument("--only", default="", help="measure only the scenarios whose names hold this regular expression; keeps nothing")
    parser.add_argument("--report-only", action="store_true", help="exit with 0 whatever the gates say")
    given = parser.parse_args()
    costs = stages.run()
    with tempfile.TemporaryDirectory(prefix="clawplane-bench-") as folder, rig(Path(folder)) as made:
        rounds, ratios = measure(made, given.rounds, given.seconds, given.only)
    judged = show(rounds, ratios, costs)
    if given.rounds >= _KEPT and not given.only:
        report.write(rounds, transports(rounds), judged, _CALLERS, _WRAPPED)
        out.print(f"kept in {report.FOLDER / 'latest.md'}")
    missed = any(verdict == "MISSED" for *_, verdict in judged)
    raise SystemExit(1 if missed and not given.report_only else 0)


if __name__ == "__main__":
    main()
