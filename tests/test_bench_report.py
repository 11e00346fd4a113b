"""What is kept of a run of the bench."""

from pathlib import Path
from typing import cast

from bench import report
from bench.__main__ import Gate, measure
from bench.load import Order
from bench.rig import Figures, Rig, Scenario


def test_a_run_is_kept_as_a_table_and_a_picture(tmp_path: Path) -> None:
    rounds = {
        "empty": [Figures(1000 * number, 1, 0.2 * number, [0.005] * 100) for number in (1, 2, 3)],
        "stream": [Figures(500 * number, 1, 0.15 * number, [0.006] * 97 + [0.010] * 3, [0.00025]) for number in (1, 2, 3)],
    }
    both = [("empty", "200 (190-210)", "50 (40-60)", "0.25 (0.20-0.30)")]
    report.write(rounds, both, [("stream / empty", ">= 0.30", [0.4, 0.5, 0.6], "met")], 32, "empty", tmp_path)
    table = (tmp_path / "latest.md").read_text()
    assert "| stream | 1,000 (500-1,500) | 300 (300-300) | 0.25 | 6.00 | 10.0 |" in table
    assert "| empty | 200 (190-210) | 50 (40-60) | 0.25 (0.20-0.30) |" in table
    assert "| stream / empty | >= 0.30 | 0.50 (0.40-0.60) | met |" in table
    picture = (tmp_path / "latest.svg").read_text()
    assert ">50 %<" in picture and ">100 %<" in picture and "<script" not in picture


def test_turns_add_up() -> None:
    together = Figures()
    for one in (Figures(100, 0.5, 0.02, [0.004] * 100, [0.001]), Figures(200, 1.5, 0.10, [0.008] * 200, [0.003], 100)):
        together.add(one)
    assert (together.calls, together.per_s, together.p50_ms, together.first_ms) == (300, 150, 8, 2)
    # Of all calls together, not of the turns, and of those that warmed.
    assert round(together.server_us) == 300


def test_a_gate_is_met_by_its_median_and_missed_only_beyond_the_spread() -> None:
    gate = Gate("", ("a", "b"), lambda one: one["a"].per_s / one["b"].per_s, 1.05, at_most=True)
    assert [gate.judge(ratios) for ratios in ([1.0, 1.05, 2.0], [1.0, 1.1, 1.1], [1.1, 1.1, 1.1])] == ["met", "within the spread", "MISSED"]


def test_what_a_gate_compares_is_measured_in_turn() -> None:
    asked: list[str] = []

    class Made:
        def scenarios(self, seconds: float) -> list[Scenario]:
            return [Scenario(name, name, Order("", "", [], [], seconds=seconds)) for name in ("empty, bare", "empty, wrapped", "other")]

        def measure(self, scenario: Scenario, turns: int = 1) -> Figures:
            asked.append(scenario.name)
            # Each time slower, as a machine that tires: there and back again, that does not show.
            return Figures(1000, scenario.order.seconds / turns, len(asked) * 0.1)

    rounds, ratios = measure(cast(Rig, Made()), 2, 1.0, "")
    bare, wrapped = "empty, bare", "empty, wrapped"
    # The first round, which warms, and the second: that one begins at the other side.
    assert asked[:11] == [wrapped, bare, bare, wrapped, wrapped, bare, bare, wrapped, wrapped, bare, "other"]
    assert asked[11:15] == [bare, wrapped, wrapped, bare]
    assert {name: len(figures) for name, figures in rounds.items()} == {"empty, bare": 2, "empty, wrapped": 2, "other": 2}
    assert rounds["other"][0].calls == 1000
    assert rounds["empty, bare"][0].calls == 5000
    assert list(ratios) == ["wrapped empty / bare empty, server CPU"]
    assert [round(ratio, 1) for ratio in next(iter(ratios.values()))] == [1.0, 1.0]
