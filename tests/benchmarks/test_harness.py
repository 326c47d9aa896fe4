"""The benchmarks' harness: its arithmetic, its gate of correctness, and when it voids a run."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Case, Provider, Ratio, Target


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "WARM_UP_S", 0.0)
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 0.0)


def case(*providers: Provider, check: object = lambda result: None, **more: object) -> Case:
    limit = Provider("limit", lambda: None)
    return Case(providers, baseline=providers[0].name, limit=limit, bytes_moved=10**9, check=check, **more)


def test_quantiles_interpolate() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [harness.quantile(values, q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert harness.quantile(values, 0.25) == 1.75
    assert harness.quantile([7.0], 0.8) == 7.0


def test_ratios_are_of_medians_and_of_pairs() -> None:
    ratio = Ratio.of([1.0, 2.0, 9.0], [1.0, 4.0, 3.0])  # pairs: 1, 0.5, 3
    assert ratio == Ratio(of_medians=2 / 3, paired_median=1.0, q25=0.75, q75=2.0, pairs=3)


@pytest.mark.parametrize(
    ("pairs", "at_most", "verdict"),
    [(5, 2.5, "met"), (5, 1.2, "undecided"), (15, 1.2, "met"), (15, 0.9, "missed"), (5, 0.5, "missed")],
)
def test_a_target_within_the_spread_needs_enough_pairs(pairs: int, at_most: float, verdict: str) -> None:
    assert Ratio(1.0, 1.0, 0.8, 1.5, pairs).verdict(at_most).startswith(verdict)


def test_a_wrong_provider_stops_the_run_before_it_is_timed() -> None:
    calls = []

    def check(result: float) -> None:
        assert result == 1, f"it is {result}"

    right, wrong = Provider("right", lambda: 1), Provider("wrong", lambda: calls.append(None) or 2)
    with pytest.raises(AssertionError, match="sums: wrong is wrong, so nothing was timed: it is 2"):
        harness.measure("sums", case(right, wrong, check=check), repeats=3, threads=1)
    assert len(calls) == 1
    harness.measure("sums", case(right, wrong, check=check, unchecked=frozenset({"wrong"})), repeats=3, threads=1)


def test_every_round_times_every_provider_after_its_setup() -> None:
    order: list[str] = []
    first = Provider("first", lambda: order.append("first"), setup=lambda: order.append("setup"))
    second = Provider("second", lambda: time.sleep(0.02))
    result = harness.measure("order", case(first, second), repeats=4, threads=1)
    assert {name: len(times) for name, times in result.times.items()} == {"first": 4, "second": 4, "limit": 4}
    assert order == ["setup", "first"] * (len(order) // 2)
    assert result.ratio("second", "first").paired_median > 1
    assert min(result.times["second"]) >= 0.02


def test_no_provider_pays_for_what_the_one_before_left_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, last = [0.0], [""]

    def provider(name: str) -> Provider:
        def call() -> None:  # a second warm, nine after another provider's data
            clock[0] += 1 if last[0] == name else 9
            last[0] = name

        return Provider(name, call)

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 20.0)
    both = dataclasses.replace(case(provider("a"), provider("b")), limit=provider("limit"))
    result = harness.measure("warm", both, repeats=3, threads=1)
    assert result.times == {name: [1, 1, 1] for name in ("a", "b", "limit")}


def test_a_baseline_that_threads_slow_down_voids_the_run(threads: None) -> None:
    crowded = Provider("crowded", lambda: time.sleep(0.1 if torch.get_num_threads() > 1 else 0.002))
    target = Target("crowded", "limit", at_most=1e9)
    result = harness.measure("crowd", case(crowded, targets=[target]), repeats=3, threads=2)
    assert "crowded with 2 threads takes" in result.void[0]
    assert result.verdict(target) == "void"
    assert "VOID: crowded with 2 threads" in result.table()
    assert harness.measure("alone", case(crowded, targets=[target]), repeats=3, threads=1).verdict(target) == "met"


def test_the_command_line_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    one = case(Provider("a", lambda: 1), Provider("b", lambda: 1), targets=[Target("a", "b", 1e9)])
    out = tmp_path / "results" / "some.json"
    argv = ["--repeats", "3", "--threads", "1", "--only", "wanted", "--out", str(out)]
    assert harness.main("some", {"wanted": lambda: one, "other": lambda: pytest.fail("not asked for")}, argv) == 0
    printed = capsys.readouterr().out
    assert "wanted" in printed
    assert "a at most 1e+09 x b" in printed
    written = json.loads(out.read_text())
    facts = written["provenance"]
    assert (facts["threads"], facts["repeats"], facts["torch"]) == (1, 3, torch.__version__)
    assert all(facts[key] for key in ("cpu", "commit", "date", "command", "backend", "python"))
    (table,) = written["cases"]
    assert table["targets"][0]["verdict"] == "met"
    assert table["providers"]["a"]["against_baseline"]["pairs"] == 3


def test_later_runs_keep_the_cases_of_earlier_ones(tmp_path: Path, threads: None) -> None:
    out = tmp_path / "some.json"
    cases = {name: lambda: case(Provider("a", lambda: 1)) for name in ("one", "two", "three")}
    common = ["--quick", "--threads", "1", "--out", str(out)]
    assert harness.main("some", cases, [*common, "--only", "one,two"]) == 0
    first = json.loads(out.read_text())
    assert harness.main("some", cases, [*common, "--only", "two"]) == 0
    second = json.loads(out.read_text())
    assert [case["name"] for case in second["cases"]] == ["one", "two"]
    assert second["cases"][0] == first["cases"][0]
    assert second["cases"][1]["providers"]["a"]["against_baseline"]["pairs"] == harness.QUICK
    assert second["cases"][1]["provenance"] == second["provenance"]


def test_a_failing_case_leaves_those_before_it_written(tmp_path: Path, threads: None) -> None:
    out = tmp_path / "some.json"
    cases = {"good": lambda: case(Provider("a", lambda: 1)), "bad": lambda: pytest.fail("this case fails")}
    with pytest.raises(pytest.fail.Exception):
        harness.main("some", cases, ["--quick", "--threads", "1", "--out", str(out)])
    assert [case["name"] for case in json.loads(out.read_text())["cases"]] == ["good"]


def test_share_of_the_limit_and_flops() -> None:
    limited = Case([Provider("a", lambda: 1)], "a", Provider("limit", lambda: 1), 8, lambda result: None, flops=10**6)
    result = harness.Result("shares", limited, {"a": [0.004, 0.005, 0.003], "limit": [0.001, 0.003, 0.002]})
    row = result.as_dict()["providers"]["a"]
    assert row["share_of_limit"] == pytest.approx(0.5)
    assert row["gflop_per_s"] == pytest.approx(1e6 / 0.004 / 1e9)
    assert "GFLOP/s" in result.table()
    assert "50%" in result.table()


def test_the_command_line_refuses_a_name_that_no_case_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main("some", {"wanted": lambda: pytest.fail("not asked for")}, ["--only", "unknown"])
    assert "no case's name contains 'unknown'" in capsys.readouterr().err


def test_rows_are_written_with_their_provenance(tmp_path: Path) -> None:
    out = tmp_path / "results" / "some.json"
    harness.write(out, {"threads": 1}, rows=[{"seed": 0}])
    assert json.loads(out.read_text()) == {"provenance": {"threads": 1}, "rows": [{"seed": 0}]}
    assert list(json.loads(out.read_text())) == ["provenance", "rows"]
    assert out.read_text().endswith("}\n")
