"""What is kept of a run of the bench."""

from pathlib import Path

from bench import report
from bench.rig import Figures


def test_a_run_is_kept_as_a_table_and_a_picture(tmp_path: Path) -> None:
    rounds = {
        "empty": [Figures(1000.0 * number, 200, 5, 9) for number in (1, 2, 3)],
        "stream": [Figures(500.0 * number, 300, 6, 10, 0.25) for number in (1, 2, 3)],
    }
    both = [("empty", "200 (190-210)", "50 (40-60)", "0.25 (0.20-0.30)")]
    report.write(rounds, both, [("stream / empty", ">= 0.30", [0.4, 0.5, 0.6], "met")], 32, "empty", tmp_path)
    table = (tmp_path / "latest.md").read_text()
    assert "| stream | 1,000 (500-1,500) | 300 (300-300) | 0.25 | 6.00 | 10.0 |" in table
    assert "| empty | 200 (190-210) | 50 (40-60) | 0.25 (0.20-0.30) |" in table
    assert "| stream / empty | >= 0.30 | 0.50 (0.40-0.60) | met |" in table
    picture = (tmp_path / "latest.svg").read_text()
    assert ">50 %<" in picture and ">100 %<" in picture and "<script" not in picture
