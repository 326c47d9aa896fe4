"""The parts of benchmarks/gpu.sh, tried without a GPU: time limits, reports, the table of defaults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from xdist.workermanage import NodeManager

from benchmarks import bench_gpu, fastest_table, gpu_budget, gpu_run, gpu_smoke, profiled_calls
from benchmarks.gpu_run import Folders, Part
from obc.backends import fastest
from obc.backends.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]


def python(program: str) -> object:
    return lambda folders, seconds: [sys.executable, "-c", program]


def archived(out: Path, name: str) -> str:
    """The text of one log in the archive."""
    with tarfile.open(out / "gpu-logs.tar.gz") as archive:
        member = archive.extractfile(name)
        assert member is not None
        return member.read().decode()


def test_parts_run_within_the_limit_and_keep_what_others_found(tmp_path: Path) -> None:
    parts = [
        Part("fails", 1, python("raise SystemExit(3)")),
        Part("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)")),
        Part("absent", 1, python(""), missing=lambda: "no such tool"),
        Part("works", 2, python("print('done')"), outcome=lambda folders: {"found": 7}),
        Part("late", 20_000, python("")),
    ]
    begun = time.monotonic()
    report = gpu_run.run(parts[:4], tmp_path, seconds=gpu_run.GRACE + 14)
    assert time.monotonic() - begun < gpu_run.GRACE + 14
    assert report == json.loads((tmp_path / "gpu-run.json").read_text())
    results = report["parts"]
    assert results["fails"]["exit_code"] == 3
    assert results["hangs"]["ended"] == "its time was over"
    assert results["hangs"]["seconds"] >= 1
    assert archived(tmp_path, "gpu-hangs.log").startswith("begun")
    assert archived(tmp_path, "gpu-works.log") == "done\n"
    assert results["absent"] == {"left_out": "no such tool"}
    assert (results["works"]["exit_code"], results["works"]["found"]) == (0, 7)
    assert gpu_run.failed(report)
    late = gpu_run.run(parts[4:], tmp_path, seconds=20)
    assert late["parts"]["late"] == {"left_out": "6 s were left, it needs 10000"}
    assert not gpu_run.failed(late)


@pytest.mark.slow
def test_parts_are_interrupted_where_a_shell_has_this_process_ignore_it(tmp_path: Path) -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hangs = Part("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)"))
        report = gpu_run.run([hangs], tmp_path, seconds=gpu_run.GRACE + 4)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert report["parts"]["hangs"]["ended"] == "its time was over"
    assert report["parts"]["hangs"]["exit_code"] == -signal.SIGINT


def test_a_run_that_is_told_to_end_keeps_what_is_there(tmp_path: Path) -> None:
    """When a machine's time is over, the running part is ended, and its log and the report are in the folder."""
    program = (
        "import sys; from pathlib import Path; from benchmarks import gpu_run\n"
        "hang = 'import os, time; print(\"begun\", os.getpid(), flush=True); time.sleep(60)'\n"
        "parts = [gpu_run.Part('quick', 1, lambda folders, seconds: [sys.executable, '-c', 'print(1)']),\n"
        "         gpu_run.Part('hangs', 1, lambda folders, seconds: [sys.executable, '-c', hang])]\n"
        "gpu_run.KEPT_EVERY = 0.1\n"
        f"gpu_run.run(parts, Path({str(tmp_path)!r}), seconds=100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    log = ""
    while not log.startswith("begun") and time.monotonic() < end:  # it is kept while the part runs
        time.sleep(0.1)
        if (tmp_path / "gpu-logs.tar.gz").exists():
            with tarfile.open(tmp_path / "gpu-logs.tar.gz") as archive:
                log = archived(tmp_path, "gpu-hangs.log") if "gpu-hangs.log" in archive.getnames() else ""
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.split()[1]), 0)
    parts = json.loads((tmp_path / "gpu-run.json").read_text())["parts"]
    assert parts["quick"]["exit_code"] == 0
    assert parts["hangs"] == {"ended": "this run was ended before the part was"}


def test_a_report_that_is_cut_short_ends_no_run(tmp_path: Path) -> None:
    def outcome(folders: Folders) -> dict[str, object]:
        (folders.logs / "gpu-tests.xml").write_text("<testsuites><testcase")
        return gpu_run.tested(folders)

    report = gpu_run.run([Part("tests", 1, python(""), outcome=outcome)], tmp_path, seconds=30)
    assert "ParseError" in report["parts"]["tests"]["outcome"]


def test_the_run_itself_imports_neither_torch_nor_obc() -> None:
    """It would hold memory of the GPU, and could report nothing where the import fails."""
    program = "import sys; import benchmarks.gpu_run; assert not {'torch', 'obc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert gpu_run.REASON == gpu_budget.REASON


@pytest.mark.parametrize("processes", [pytest.param(["-n", "1"], marks=pytest.mark.slow), []], ids=["xdist", "alone"])
def test_a_test_that_breaks_the_device_ends_its_process(processes: list[str], tmp_path: Path) -> None:
    """The other tests run in another worker under xdist, and the fault names the test that caused it."""
    (tmp_path / "test_some.py").write_text(
        "from benchmarks import gpu_budget\n"
        "def test_first(): pass\n"
        "def test_breaks():\n"
        "    gpu_budget.broken = lambda: True\n"
        "    assert 0\n"
        "def test_after(): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.gpu_budget",
        *processes,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"OBC_TESTS_END": str(time.time() + 1000), "PYTHONPATH": str(ROOT)}
    arguments = ["--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    expected = "2 passed" if processes else "broken since test_some.py::test_breaks"
    assert expected in done.stdout, done.stdout


def test_every_part_leaves_the_others_the_least_that_they_need() -> None:
    assert sum(part.least + gpu_run.GRACE / 4 for part in gpu_run.PARTS) + gpu_run.GRACE <= 525
    assert [part.name for part in gpu_run.PARTS] == [
        "build",
        "smoke-cuda",
        "smoke-triton",
        "tests",
        "profile",
        "benchmarks",
    ]
    assert all(part.least <= part.most for part in gpu_run.PARTS)


def test_every_file_with_tests_for_a_gpu_is_run() -> None:
    files = {str(path.relative_to(ROOT / "tests")): path.read_text() for path in (ROOT / "tests").glob("*/test_*.py")}
    # A test of its own, or one over all backends and devices.
    for_a_gpu = {name for name, text in files.items() if re.search(r"pytest\.mark\.gpu\b|\bTARGETS\b", text)}
    assert set(gpu_run.TEST_FILES) == for_a_gpu - {f"benchmarks/{Path(__file__).name}"}


def test_report_of_tests_counts_what_the_time_did_not_reach(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='no second device')\n"
        "def test_skipped(): pass\n"
        "def test_long(): os.environ['OBC_TESTS_END'] = '0'\n"
        "def test_late(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_budget"]
    environment = {**os.environ, "OBC_TESTS_END": str(time.time() + 1000), "PYTHONPATH": str(ROOT)}
    arguments = ["--rootdir", str(tmp_path), f"--junitxml={tmp_path / 'gpu-tests.xml'}", str(tmp_path)]
    subprocess.run([*command, *arguments], env=environment, capture_output=True)
    found = gpu_run.tested(Folders(tmp_path, tmp_path))
    assert found == {
        "passed": 2,
        "failed": ["test_some::test_bad"],
        "skipped": {"no second device": 1},
        "not_run": 1,
        "not_ended": 0,
    }


def test_a_report_of_tests_is_there_where_one_hangs(tmp_path: Path) -> None:
    """A kernel that never ends ignores interrupts: pytest writes its report when xdist gives the worker up."""
    assert gpu_run.GRACE > NodeManager.EXIT_TIMEOUT + 2
    cases = '<testcase classname="test_some" name="test_good" time="0.1" /><testcase time="0.0" />'
    (tmp_path / "gpu-tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu_run.tested(Folders(tmp_path, tmp_path))
    assert (found["passed"], found["not_ended"]) == (1, 1)


def test_where_the_build_fails_cmake_builds_what_it_can(tmp_path: Path) -> None:
    cmake = tmp_path / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    cmake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OBC_BUILD_CUDA": "1"}
    for python, called in (("true", False), ("false", True)):
        done = subprocess.run(["sh", "-c", gpu_run._BUILD, python], env=environment, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0
        assert (tmp_path / "calls").exists() == called
    configured, built = (tmp_path / "calls").read_text().splitlines()
    assert "-DOBC_BUILD_CUDA=1 -DPython_EXECUTABLE=false" in configured
    assert built == "--build build/gpu -- -k 0"


def test_shell_scripts_parse_and_name_what_they_would_run() -> None:
    for script in ("gpu.sh", "sanitize_gpu.sh"):
        subprocess.run(["sh", "-n", ROOT / "benchmarks" / script], check=True)
    command = ["sh", ROOT / "benchmarks" / "gpu.sh", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == [part.name for part in gpu_run.PARTS]


def test_few_files_come_back_and_what_parts_print_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A remote machine returns eight files; the printed output is there even if it returns none."""
    parts = [Part(f"part-{n}", 1, python(f"print('said', {n}); print('x' * 9000); print('last')")) for n in range(9)]
    gpu_run.run(parts, tmp_path, seconds=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-logs.tar.gz", "gpu-run.json"]
    assert archived(tmp_path, "gpu-part-8.log").startswith("said 8")
    printed = capsys.readouterr().out
    assert printed.count("last\n") == 9
    assert "said" not in printed  # only the end of a long log
    assert len(printed) < 9 * (gpu_run.PRINTED + 200)


def test_a_part_that_was_left_more_than_half_runs(tmp_path: Path) -> None:
    """Parts that had to be killed took some of its time: the benchmarks are worth having all the same."""
    report = gpu_run.run([Part("short", 30, python("print(1)"))], tmp_path, seconds=gpu_run.GRACE + 20)
    assert report["parts"]["short"]["exit_code"] == 0
    assert 19 < report["parts"]["short"]["allowed_seconds"] <= 20


@pytest.mark.slow
def test_a_part_is_ended_after_its_most_where_others_follow(tmp_path: Path) -> None:
    parts = [
        Part("long", 1, python("import time; time.sleep(60)"), most=2),
        Part("last", 1, python("print(1)"), most=2),
    ]
    report = gpu_run.run(parts, tmp_path, seconds=100)
    assert report["parts"]["long"]["allowed_seconds"] == 2
    assert report["parts"]["last"]["allowed_seconds"] > 2


def test_smoke_tries_every_operator_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for operator in OPERATORS:
        assert f"ok      cpu {operator} f32" in printed
    assert "ok      cpu rows of scoring" in printed
    assert printed.endswith("0 failed\n")
    on_gpu = [what for what, _, _ in gpu_smoke.attempts(["cuda", "triton"], "cuda")]
    assert {what.split(" ")[0] for what in on_gpu} == {"cuda", "triton"}


def test_smoke_shows_what_fails_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_smoke.ops, "channel_dot", wrong)
    monkeypatch.setattr(gpu_smoke.ops, "weight_moments", lambda w, g: gpu_smoke.ops.weight_dot(w, g)[0] * torch.nan)
    calls = {name: gpu_smoke.operator_calls()[name] for name in ("channel_dot", "weight_dot")}
    calls["weight_moments"] = [(gpu_smoke.ops.weight_moments, calls["weight_dot"][0][1])]
    monkeypatch.setattr(gpu_smoke, "operator_calls", lambda: calls)
    monkeypatch.setattr(gpu_smoke, "OPERATORS", tuple(calls))
    monkeypatch.setattr(gpu_smoke, "DTYPES", {"f64": torch.float64})
    assert gpu_smoke.main(["--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "no kernel image" in printed
    assert "ok      cpu weight_dot f64" in printed
    assert printed.endswith("2 failed: cpu channel_dot f64, cpu weight_moments f64\n")


def test_metrics_are_read_from_what_ncu_prints() -> None:
    printed = (
        "==PROF== Connected to process 7\n"
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","obc::channel_dot_kernel<float>(float*)","gpu__time_duration.sum","ns","1,234"\n'
        '"0","7","obc::channel_dot_kernel<float>(float*)","launch__grid_size","","264"\n'
        '"1","7","_weight_dot_kernel","gpu__time_duration.sum","ns","99"\n'
    )
    assert profiled_calls.summary(printed) == [
        {"kernel": "obc::channel_dot_kernel<float>", "gpu__time_duration.sum": "1,234 ns", "launch__grid_size": "264"},
        {"kernel": "_weight_dot_kernel", "gpu__time_duration.sum": "99 ns"},
    ]
    assert profiled_calls.summary("==ERROR== no permission\n") == []


@pytest.mark.slow
def test_sanitized_calls_run(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/sanitized_calls.py", "--backend", "cpu", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "calls checked on cpu" in done.stdout, done.stderr[-2000:]


DRY = ["defaults", "bandwidth", "launches", "pruning", "fold", "end_row"]


@pytest.mark.slow
@pytest.mark.parametrize("sections", [DRY, ["rows", "scoring"]], ids=["operators", "models"])
def test_benchmarks_dry_run(sections: list[str], tmp_path: Path) -> None:
    """The code that runs on a GPU, on the CPU: in a process of its own, because a dry run is for good."""
    arguments = ["--dry-run", "--out", tmp_path, "--sections", *sections]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu-none-a-dry-run.json").read_text())
    assert list(report["sections"]) == sections
    assert all(report["sections"].values())
    assert report["failed"] == {}
    assert report["left_out"] == report["cut_short"] == []


def test_a_section_that_fails_or_takes_too_long_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> bench_gpu.Rows:
        """Fails."""
        yield {"n": 1}
        raise RuntimeError("out of memory")

    def endless() -> bench_gpu.Rows:
        """Never ends."""
        while True:
            yield {"n": 2}

    monkeypatch.setattr(bench_gpu, "facts", lambda: {"gpu": "Some GPU"})
    monkeypatch.setattr(bench_gpu, "SECTIONS", {"failing": (failing, 1.0), "endless": (endless, 1.0)})
    report = bench_gpu.Report(tmp_path)
    report.measure("failing", end=time.monotonic() + 100)
    report.measure("endless", end=time.monotonic())
    written = json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert written["sections"] == {"failing": [{"n": 1}], "endless": [{"n": 2}]}
    assert "out of memory" in written["failed"]["failing"]
    assert written["cut_short"] == ["endless"]
    assert "out of memory" in (tmp_path / "gpu-some-gpu.txt").read_text()


def test_a_row_that_fails_is_named_and_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(row: bench_gpu.Row) -> None:
        row["half"] = row["n"] / 2
        if row["n"] == 1:
            raise RuntimeError("misaligned address")
        row["whole"] = row["n"]

    def section() -> bench_gpu.Rows:
        """Three rows."""
        for n in range(3):
            yield bench_gpu.timing.attempt({"n": n}, measure)

    monkeypatch.setattr(bench_gpu, "facts", lambda: {"gpu": "Some GPU"})
    monkeypatch.setattr(bench_gpu, "SECTIONS", {"some": (section, 1.0)})
    report = bench_gpu.Report(tmp_path)
    report.measure("some", end=time.monotonic() + 100)
    rows = report.content["sections"]["some"]
    assert [row.get("whole") for row in rows] == [0, None, 2]
    assert rows[1] == {"n": 1, "half": 0.5, "error": "RuntimeError: misaligned address"}
    assert report.content["failed"] == {"some": "row 2: RuntimeError: misaligned address\n"}


def _row(operator: str, dtype: str, size: str, cuda: float, triton: float) -> dict[str, object]:
    return {"operator": operator, "dtype": dtype, "size": size, "cuda_us": cuda, "triton_us": triton}


def test_table_of_defaults_is_made_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed table is Python that the order of backends follows."""
    rows = [
        _row("weight_dot", "f32", "small", 10.0, 9.0),
        _row("weight_dot", "f32", "large", 10.0, 9.8),  # within the spread of two runs
        _row("channel_dot", "bf16", "medium", 10.0, 12.0),
        _row("channel_dot", "f16", "large", 10.0, 5.0),
    ]
    path = tmp_path / "gpu-some.json"
    path.write_text(json.dumps({"sections": {"defaults": rows}}))
    assert fastest_table.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "gpu-some.json" in printed
    scope: dict[str, object] = {"torch": torch}
    exec(printed, scope)
    assert scope["FASTEST"] == {
        ("channel_dot", torch.float16, "large"): "triton",
        ("weight_dot", torch.float32, "small"): "triton",
    }
    scope.clear()
    exec(fastest_table.source({}, "none.json"), scope | {"torch": torch}, scope)
    assert scope["FASTEST"] == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows of the section 'defaults'"),
        ([_row("fold", "f8", "small", 1, 1)], "unknown dtype or size"),
        ([{"operator": "fold", "dtype": "f32", "size": "small", "triton_us": 1.0}], "no time of cuda"),
    ],
)
def test_table_of_defaults_refuses_other_results(
    rows: list[dict[str, object]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"sections": {"defaults": rows}}))
    with pytest.raises(SystemExit):
        fastest_table.main([str(path)])
    assert message in capsys.readouterr().err


def test_sizes_that_are_measured_lie_in_the_classes_of_their_names() -> None:
    assert tuple(bench_gpu.CLASS_SIZES) == fastest.SIZES
    assert {name: fastest.size_class(size) for name, size in bench_gpu.CLASS_SIZES.items()} == {
        name: name for name in fastest.SIZES
    }
