"""Published tables agree with the committed results; the guard finds exactly the regressions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_large, check, harness, isolated, report, tables
from benchmarks.harness import Case, Provider
from obc import cli
from obc.commands import bench

ROOT = Path(__file__).parents[2]

FACTS = {
    "cpu": "a CPU",
    "threads": 2,
    "logical_cpus": 4,
    "torch": "2.13.0",
    "repeats": 21,
    "date": "2026-11-21T00:00:00",
    "commit": "0123456789abcdef",
    "command": "python -m benchmarks.some",
}


def row(median: float, spread: float = 0.1) -> dict[str, Any]:
    ratio = {"paired_median": median, "q25": median - spread, "q75": median + spread}
    return {
        "median_ms": median,
        "p20_ms": 0.9 * median,
        "p80_ms": 1.1 * median,
        "gb_per_s": 1 / median,
        "against_baseline": ratio,
    }


def case(obc: float, spread: float = 0.1) -> dict[str, Any]:
    rows = {"obc": row(obc, spread), "reference": row(1.0), "the limit": row(0.25)}
    return {"name": "one", "baseline": "reference", "limit": "the limit", "void": [], "providers": rows, "flops": 0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "some.json").write_text(json.dumps({"provenance": FACTS, "cases": [case(0.5)]}))
    listed = [{"criterion": "L1", "share": 0.25, "similarity": 0.81234, "steps": [1]}]
    (tmp_path / "listed.json").write_text(json.dumps({"provenance": FACTS, "rows": listed}))
    return tmp_path


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_pages_are_what_the_committed_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run make bench-tables"


def test_readme_and_the_page_of_measurements_have_tables() -> None:
    with_tables = {page.name for page in tables.pages() if tables.names(page.read_text(encoding="utf-8"))}
    assert {"README.md", "measured.md"} <= with_tables


def test_a_page_is_filled_and_filling_it_again_changes_nothing(results: Path) -> None:
    page = (
        "before\n<!-- table cases some -->\nold\n<!-- end -->\nbetween\n<!-- table rows listed -->\n<!-- end -->\nafter"
    )
    text = tables.filled(page, results)
    assert tables.names(text) == ["cases some", "rows listed"]
    assert "| obc | 0.500 | 0.450 - 0.550 | 2.0 | 0.50 [0.40, 0.60] | 50% |" in text
    assert "| L1 | 0.25 | 0.8123 |" in text
    assert "python -m benchmarks.some`: a CPU, 2 of 4 logical CPUs" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert tables.filled(text, results) == text


def test_flops_decide_the_unit(results: Path) -> None:
    counted = case(0.5) | {"flops": 10**9}
    text = tables.all_cases({"provenance": FACTS, "cases": [counted]})
    assert "GFLOP/s" in text
    assert "| obc | 0.500 | 0.450 - 0.550 | 2000.0 |" in text


def test_memory_and_refusals_of_criteria_are_shown() -> None:
    measured = case(0.5) | {"refused": {"Opacus": "not installed"}}
    measured["providers"]["obc"]["peak_mib"] = 12.4
    text = tables.all_cases({"provenance": FACTS, "cases": [measured]})
    assert "| MiB above the model |" in text
    assert "| 50% | 12 |" in text
    assert "Not run: Opacus: not installed." in text


def test_rows_of_growth_have_every_field() -> None:
    rows = [{"name": "a, obc", "way": "obc", "peak_mib": 2.5}, {"name": "a, plain", "way": "plain", "failed": "memory"}]
    text = tables.all_rows({"provenance": FACTS, "cases": rows})
    assert text.splitlines()[:4] == [
        "| way | peak_mib | failed |",
        "| --- | ---: | ---: |",
        "| obc | 2.5 | - |",
        "| plain | - | memory |",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("unknown", "no table is named 'unknown'"), ("cases none", "there is no none.json"), ("rows some", "has no rows")],
)
def test_a_block_that_cannot_be_filled_is_named(name: str, reason: str, results: Path) -> None:
    with pytest.raises(tables.TableError, match=reason):
        tables.filled(f"<!-- table {name} -->\n<!-- end -->", results)


def test_a_case_that_is_missing_is_named(results: Path) -> None:
    (results / "bench_ops.json").write_text(json.dumps({"provenance": FACTS, "cases": []}))
    with pytest.raises(tables.TableError, match="no case 'weight_dot 4096x4096'"):
        tables.filled("<!-- table operators -->\n<!-- end -->", results)


# --- the guard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "spread", "regressed"),
    [(0.5, 0.1, False), (0.9, 0.1, True), (0.65, 0.1, False), (0.9, 0.5, False), (0.2, 0.01, False)],
    ids=["same", "slower", "within-the-spreads", "too-noisy", "faster"],
)
def test_a_regression_is_beyond_both_spreads(now: float, spread: float, regressed: bool) -> None:
    (change,) = check.changes(case(0.5), case(now, spread))
    assert (change.provider, change.baseline) == ("obc", "reference")
    assert change.regressed == regressed


def test_small_differences_are_no_regression_however_sure() -> None:
    (change,) = check.changes(case(0.5, 0.0001), case(0.5 * check.MARGIN - 0.001, 0.0001))
    assert not change.regressed


def test_the_guard_runs_cases_again_and_names_what_got_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = case(0.5)

    def measured(times: float, void: list[str]) -> Callable[..., harness.Result]:
        def measure(name: str, case: Case, repeats: int, threads: int) -> harness.Result:
            return harness.Result(
                name, case, {"obc": [times] * 3, "reference": [1.0] * 3, "the limit": [0.25] * 3}, void
            )

        return measure

    made = Case([Provider("obc", int), Provider("reference", int)], "reference", Provider("the limit", int), 1, print)
    for times, void, expected in ((0.9, [], 1), (0.5, [], 0), (0.9, ["busy"], 0)):
        monkeypatch.setattr(check, "measure", measured(times, void))
        regressions, proves_nothing = check.compare([committed], {"one": lambda: made}, repeats=3, threads=1)
        assert len(regressions) == expected
        assert proves_nothing == (["one"] if void else [])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["REGRESSION", "as", "void"]
    assert "one: obc / reference: committed 0.50 [0.40, 0.60], now 0.90" in printed[0]


def test_the_guard_refuses_a_committed_case_that_is_gone() -> None:
    with pytest.raises(SystemExit, match="no benchmark has the committed case 'one' any more"):
        check.compare([copy.deepcopy(case(0.5))], {}, repeats=3, threads=1)


def test_every_committed_case_can_be_run_again() -> None:
    import importlib

    for file, module in check.FILES.items():
        content = json.loads((harness.RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        cases = importlib.import_module(f"benchmarks.{module}").CASES
        assert {case["name"] for case in content["cases"]} <= set(cases)


# --- pictures, and obc bench ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cases", "growth"])
def test_results_are_drawn(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
    grown = [{"name": f"{mib}", "way": "obc", "weights_mib": mib, "peak_mib": 2.0 * mib} for mib in (1.0, 2.0)]
    content = {"cases": [case(0.5), case(0.7)], "growth": [*grown, {"name": "c", "way": "obc", "failed": "memory"}]}
    file, picture = tmp_path / "some.json", tmp_path / "some.png"
    file.write_text(json.dumps({"provenance": FACTS, "cases": content[kind]}))
    assert report.main([str(file)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"drawn: {picture}\n"


def test_obc_bench_runs_and_draws_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        out = Path(command[command.index("--out") + 1])
        out.write_text("{}")
        return subprocess.CompletedProcess(command, int("bench_dispatch" in command[2]))

    monkeypatch.setattr(bench.subprocess, "run", run)
    out = tmp_path / "out"
    arguments = ["bench", "ops", "large", "--quick", "--only", "x", "--threads", "1", "--out", str(out)]
    assert cli.main(arguments) == 1  # the worst of the statuses
    assert [command[0] for command in commands] == [
        "benchmarks.bench_ops",
        "benchmarks.report",
        "benchmarks.bench_dispatch",
        "benchmarks.report",
        "benchmarks.bench_large",
        "benchmarks.report",
    ]
    assert commands[0][1:] == ["--quick", "--threads", "1", "--only", "x", "--out", str(out / "bench_ops.json")]
    assert commands[4][4:6] == ["--sizes", "x"]


@pytest.mark.parametrize(
    ("only", "ops", "dispatch", "status"), [("x", 0, 2, 0), ("x", 2, 2, 2), ("x", 1, 2, 2), ("", 0, 2, 2)]
)
def test_cases_of_some_of_the_benchmarks_are_enough(
    only: str, ops: int, dispatch: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A benchmark ends with 2 if none of its cases has the name."""
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
    statuses = {"benchmarks.bench_ops": ops, "benchmarks.bench_dispatch": dispatch}
    ran = lambda command, cwd: subprocess.CompletedProcess(command, statuses[command[2]])  # noqa: E731
    monkeypatch.setattr(bench.subprocess, "run", ran)
    assert cli.main(["bench", "ops", "--only", only, "--out", str(tmp_path)]) == status


def test_obc_bench_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "everything"]) == 2
    assert "there are ops, scoring, equivalent, large" in capsys.readouterr().err


def test_every_benchmark_of_obc_bench_is_there() -> None:
    files = {file for files in bench.BENCHMARKS.values() for file in files}
    assert all((bench.checkout() / "benchmarks" / f"{file}.py").is_file() for file in files)


def test_the_slope_is_of_the_line() -> None:
    assert bench_large.slope([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx(2.0)


def test_peaks_are_measured_above_the_start() -> None:
    """Uses a fresh process, because memory freed by earlier tests would be reused unseen."""
    call = "lambda: bytes(bytearray(b'x') * 2**26)"  # a copy beside the original
    program = f"from benchmarks import isolated; print(isolated.measure({call})['peak_mib'])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 100 < float(ran.stdout) < 200


@pytest.mark.slow
def test_a_process_that_fails_says_why() -> None:
    assert "no size contains 'none'" in isolated.run("bench_large", ["--sizes", "none"])["failed"]
