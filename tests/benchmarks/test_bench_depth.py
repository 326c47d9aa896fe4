"""The benchmark of depth on a tiny model: cases, resumption, table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import bench_depth


def test_cases_are_run_once_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "depth.json"
    sizes = ["--calibration", "6", "--test", "3", "--length", "12", "--threads", "1", "--model", "tiny"]
    sizes += ["--rows", str(tmp_path)]
    few = ["--methods", "widths, jacobian", "blocks and widths, jacobian", "blocks, tail", "branches, jacobian"]
    bench_depth.main([*sizes, *few, "--shares", "0.4", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [case["method"] for case in cases] == ["unpruned", *few[1:]]
    assert {case["method"]: case["blocks"] for case in cases[1:]}["blocks, tail"] == 1
    for case in cases[1:]:
        assert case["parameters"] < 18000
        assert case["perplexity"] == pytest.approx(math.exp(sum(case["losses"]) / 3), rel=1e-4)
    capsys.readouterr()
    bench_depth.main([*sizes, *few, "--shares", "0.4", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("draw") for line in lines)
    assert any(line.startswith("| 40% | blocks, tail |") and "±" in line for line in lines)
    assert json.loads(out.read_text())["cases"] == cases
