"""The benchmark of recovery, on a tiny model with random weights: cases, choice of the rate, resumption, table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_recovery as bench
from benchmarks.summaries import SUMMARIES

ARGUMENTS = ["--model", "tiny", "--steps", "2", "--sequences", "4", "--length", "8", "--seeds", "2", "--threads", "1"]


def rows_of(measure: Any, seeds: int) -> list[dict[str, Any]]:
    """A stand-in for a run, with figures from ``measure(case)``."""
    rows: list[dict[str, Any]] = []
    while (case := bench.next_case(rows, seeds, sign=1)) is not None:
        rows.append({"way": case.way, "half": case.half, "seed": case.seed, "validation": measure(case)})
        assert len(rows) < 100
    return rows


def test_rates_are_tried_until_the_best_has_worse_neighbours() -> None:
    peaks = {"naive": -8, "folded": -5, "lora": -9}
    rows = rows_of(lambda case: 0.0 if case.half is None else -abs(case.half - peaks[case.way]), seeds=3)
    assert [row["way"] for row in rows[:3]] == list(bench.UNTRAINED)
    tried = {way: sorted(r["half"] for r in rows if r["way"] == way and r["seed"] == 0) for way in bench.TRAINED}
    assert tried == {"naive": [-9, -8, -7], "folded": [-9, -8, -7, -6, -5, -4], "lora": [-10, -9, -8, -7, -6]}
    others = [(row["way"], row["half"], row["seed"]) for row in rows if row["seed"]]
    assert others == [(way, peaks[way], seed) for seed in (1, 2) for way in bench.TRAINED]


def test_a_rate_that_ends_in_nothing_is_no_best() -> None:
    rows = [{"way": "naive", "half": half, "seed": 0, "validation": v} for half, v in ((-8, 0.5), (-7, float("nan")))]
    chosen = bench.best(rows, "naive", sign=1)
    assert chosen is not None
    assert chosen["half"] == -8


def test_cases_are_measured_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bench_recovery_MODEL.json"
    bench.main([*ARGUMENTS, "--out", str(out), "--minutes", "-1"])
    assert not (tmp_path / "bench_recovery_tiny.json").exists()
    # Few steps say little: the first rate is called the best.
    monkeypatch.setattr(bench, "best", lambda rows, way, sign: next((r for r in rows if r["way"] == way), None))
    bench.main([*ARGUMENTS, "--out", str(out)])
    text = (tmp_path / "bench_recovery_tiny.json").read_text()
    rows = json.loads(text)["rows"]
    assert len(rows) == len(bench.UNTRAINED) + 3 * (3 + 1)
    figures = {(row["way"], row["half"], row["seed"]): row["test"] for row in rows}
    assert figures["unpruned", None, 0] != figures["pruned", None, 0]
    assert len({row["trained_parameters"] for row in rows if row["rate"]}) == 3
    assert all(row["last_loss"] > 0 for row in rows if row["rate"])
    bench.main([*ARGUMENTS, "--out", str(out)])
    assert (tmp_path / "bench_recovery_tiny.json").read_text().count('"way"') == len(rows)


def test_the_table_shows_the_chosen_rate(tmp_path: Path) -> None:
    facts = {"command": "c", "cpu": "p", "threads": 1, "logical_cpus": 2, "torch": "2", "repeats": 1}
    facts |= {"date": "2026-01-01T00", "commit": "abc"}

    def row(way: str, rate: float | None, seed: int, test: float, **more: Any) -> dict[str, Any]:
        case = {"way": way, "rate": rate, "seed": seed, "test": test, "steps": 4, "seconds": 2.0, "provenance": facts}
        return case | more

    trained = {"trained_parameters": 1_500_000}
    rows = [row("pruned", None, 0, 0.5), row("naive", 1e-3, 0, 0.6, **trained), row("naive", 1e-4, 0, 0.7, **trained)]
    rows += [row("naive", 1e-4, 1, 0.8, **trained)]
    for model in ("encoder", "smollm2"):
        (tmp_path / f"bench_recovery_{model}.json").write_text(json.dumps({"provenance": facts, "rows": rows}))
    lines = SUMMARIES["recovery"](tmp_path).splitlines()
    assert lines[2:4] == ["| pruned | - | - | - | 0.5000 |", "| naive | 1e-04 | 1.50 M | 0.50 | 0.7500 ± 0.0707 |"]
    assert "| naive | 1e-04 | 1.50 M | 0.50 | 0.75 ± 0.07 |" in lines
