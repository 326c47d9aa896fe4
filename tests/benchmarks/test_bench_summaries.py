"""The tables of the pages that are means over rows, or parts of a result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bench_tables import FACTS

from benchmarks.markdown import TableError
from benchmarks.summaries import SUMMARIES


def table(tmp_path: Path, name: str, file: str, content: dict[str, Any]) -> list[str]:
    """The lines of a summary, without its head and its source."""
    (tmp_path / f"{file}.json").write_text(json.dumps({"provenance": FACTS, **content}))
    return [line for line in SUMMARIES[name](tmp_path).splitlines() if line.startswith("|")][2:]


def test_compensation_is_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    rows = [
        {"network": "CNN", "seed": seed, "accuracy": {"naive": 80.0 + 2 * seed, "BN 100": None}} for seed in (0, 1, 2)
    ]
    lines = table(tmp_path, "compensation", "bench_compensation", {"rows": rows})
    assert lines == ["| naive | 82.0 ± 2.0 |", "| BN 100 | - |"]


def test_costs_are_in_epochs(tmp_path: Path) -> None:
    cost = {"epoch_seconds": 0.5, "epoch_peak_bytes": 2**20, "seq_100_seconds": 2.0, "seq_100_peak_bytes": 3 * 2**20}
    lines = table(tmp_path, "compensation-costs", "bench_compensation", {"rows": [{"network": "CNN", "cost": cost}]})
    assert lines == [
        "| an epoch of forward passes | 0.50 s, 1.0 epochs, 1.0 MiB |",
        "| seq, 100 images | 2.00 s, 4.0 epochs, 3.0 MiB |",
    ]


def test_factors_are_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    rows = [{"network": "CNN", "way": "full", "test": test} for test in (90.0, 92.0)]
    assert table(tmp_path, "factors", "bench_factors", {"rows": rows}) == ["| full | 91.0 ± 1.4 |"]


def test_rows_of_other_sentences_are_another_line(tmp_path: Path) -> None:
    def row(sentences: int, seed: int, share: float, naive: float) -> dict[str, Any]:
        return {
            "corpus": "docstrings",
            "sentences": sentences,
            "seed": seed,
            "criterion": "JC",
            "share": share,
            "naive": naive,
        }

    rows = [row(512, 1, 0.25, 0.9), row(512, 2, 0.25, 0.92), row(512, 1, 0.5, 0.8), row(1024, 1, 0.25, 0.95)]
    lines = table(tmp_path, "encoder", "bench_compensation_encoder", {"rows": rows})
    assert lines[0] == "| JC, 512 sentences, n = 2 | 0.910 ± 0.014 | 0.800 |"
    assert lines[1] == "| JC, 1024 sentences, n = 1 | 0.950 | - |"


def test_runs_of_select(tmp_path: Path) -> None:
    run = {"channels": 1000, "rows": 64, "form": "rows", "removed": 293, "seconds": 0.123, "memory_mib": 4.2}
    lines = table(tmp_path, "select", "bench_select", {"runs": [run | {"rows_mib": 0.24}]})
    assert lines == ["| 1,000 channels, 64 rows | rows | 293 | 0.12 | 4 | 0 |"]


def test_a_size_that_does_not_fit_says_so(tmp_path: Path) -> None:
    rows = [
        {"size": "small", "way": "obc", "weights_mib": 10.4, "peak_mib": 3.6, "seconds_per_row": 0.5},
        {"size": "small", "way": "authors' way", "weights_mib": 10.4, "failed": "needs more than 18 GiB"},
    ]
    lines = table(tmp_path, "large", "bench_large", {"cases": rows})
    assert lines == ["| small, 10 MiB of weights | 4, 0.50 | needs more than 18 GiB |"]


def test_criteria_stand_beside_each_other(tmp_path: Path) -> None:
    def case(name: str, **ratios: float) -> dict[str, Any]:
        providers = {way: {"against_baseline": {"paired_median": r}, "peak_mib": 10 * r} for way, r in ratios.items()}
        return {"name": name, "baseline": "plain", "providers": providers}

    cases = [case("VGG", plain=1.0, obc=0.6), case("Llama", plain=1.0)]
    lines = table(tmp_path, "criteria", "bench_criteria", {"cases": cases})
    assert lines == ["| plain | 1.00, 10 MiB | 1.00, 10 MiB |", "| obc | 0.60, 6 MiB | - |"]


def test_a_result_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"there is no bench_factors\.json"):
        SUMMARIES["factors"](tmp_path)


def test_pretrained_models_have_a_table_each(tmp_path: Path) -> None:
    def case(model: str, selection: str, share: float, losses: list[float]) -> dict[str, Any]:
        facts = {"model": model, "kinds": "all", "calibration": 4, "test": 2, "length": 8, "draw": 0, "what": "loss"}
        how = "none" if selection == "none" else "correct"
        facts |= {"selection": selection, "share": share, "compensation": how, "losses": losses}
        return facts | {"shown": sum(losses) / len(losses)}

    cases = [case("a", "none", 0.0, [1.0, 1.0]), case("a", "jacobian", 0.5, [2.0, 2.0])]
    cases += [case("a", "flap", 0.25, [3.0, 1.0]), case("b", "none", 0.0, [1.0, 1.0]), case("b", "l2", 0.5, [1.0, 4.0])]
    lines = table(tmp_path, "real", "bench_real", {"cases": cases})
    assert lines[:2] == ["| jacobian+correct | - | 2 |", "| flap+correct | 2 | - |"]
    assert lines[-1] == "| l2+correct | 2.5 |"
