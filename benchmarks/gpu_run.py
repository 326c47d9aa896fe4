"""Everything that needs a GPU, part by part within one time limit; ``benchmarks/gpu.sh`` starts it.

Each part has what is left of the time, less what later parts need at least, and is ended when that is over. What it
made by then is kept: ``gpu-run.json`` and the archive of all logs, ``gpu-logs.tar.gz``, are written again every few
seconds and when this process is told to end. A part that fails loses no other's results. The folder of results gets
four files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import profiled_calls

# This process imports neither torch nor obc: it holds no memory of the GPU, and where they can't be imported the report
# says so. The plugin benchmarks.gpu_budget has the same words.
REASON = "the time for the tests was spent"

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which a part that was asked to end is killed. pytest needs eleven to write its report where a worker
# hangs: xdist waits ten for it. They are kept free at the end of all, and a quarter of them before each part.
GRACE = 14.0

# The files of operators' tests have thousands of tests, for each of which Triton compiles kernels; those that look for
# races, wrong addresses and wrong streams are few and come first.
TEST_FILES = (
    "backends/test_triton_gpu.py",
    "backends/test_cuda.py",
    "scoring/test_scorer_gpu.py",
    "selection/test_select.py",
    "ops/test_end_row.py",
    "ops/test_fold.py",
    "ops/test_weight_dot.py",
    "ops/test_channel_dot.py",
    "ops/test_channel_moments.py",
)

# The last characters of a part's log that are printed when it ends, and all of a short one: what is printed is all that
# is left where the files are lost.
PRINTED = 3000
# Failed tests that are named at the end; gpu-run.json has all.
SHOWN = 30


@dataclass(frozen=True)
class Folders:
    """The destinations of results.

    Attributes:
        out: what is kept as files of their own.
        logs: what goes into the archive.
    """

    out: Path
    logs: Path


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        least: seconds that earlier parts leave to it; with less than half of them, which would be of no use, it is left
            out. Parts that have to be killed take up to two times :data:`GRACE` of it.
        command: of (:class:`Folders`, seconds that it has).
        most: seconds after which it is ended whatever is left, because other parts follow; the last one has all.
        environment: what it has besides, of the seconds.
        outcome: what its results say, of :class:`Folders`, read when it has ended.
        missing: why it can't run here, or None.
    """

    name: str
    least: float
    command: Callable[[Folders, float], Sequence[str]]
    most: float = float("inf")
    environment: Callable[[float], Mapping[str, str]] = lambda seconds: {}
    outcome: Callable[[Folders], Mapping[str, Any]] = lambda folders: {}
    missing: Callable[[], str | None] = lambda: None


# Prints 9.0 for an H100: asked of a process of its own, because what asks keeps a part of the GPU.
_CAPABILITY = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"


def _build_environment(seconds: float) -> dict[str, str]:
    """CUDA kernels for this GPU alone, unless TORCH_CUDA_ARCH_LIST says otherwise: a third of the compiling."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        return {}
    try:
        asked = subprocess.run([sys.executable, "-c", _CAPABILITY], capture_output=True, text=True, timeout=40)
    except subprocess.TimeoutExpired:
        return {}
    return {"TORCH_CUDA_ARCH_LIST": asked.stdout.strip()} if asked.returncode == 0 else {}


# With setuptools too old for pyproject.toml, or where one library does not compile, CMake builds what it can by itself.
_BUILD = (
    '"$0" setup.py build_ext --inplace && exit; echo again by CMake alone, as much as can be built; '
    'set -- -DBUILD_TESTING=OFF -DOBC_BUILD_CUDA="${OBC_BUILD_CUDA:-auto}" -DPython_EXECUTABLE="$0"; '
    'cmake -S . -B build/gpu -G Ninja "$@" && cmake --build build/gpu -- -k 0'
)


def _build_command(folders: Folders, seconds: float) -> list[str]:
    return ["sh", "-c", _BUILD, sys.executable]


def built(folders: Folders) -> dict[str, Any]:
    """The native libraries that exist now."""
    folder = ROOT / "python" / "obc"
    return {"libraries": sorted(path.name for path in (*folder.glob("_lib/*.so"), *folder.glob("_native*.so")))}


def _smoke_of(backend: str) -> Callable[[Folders, float], list[str]]:
    def command(folders: Folders, seconds: float) -> list[str]:
        # Python's own start, and the last attempt, take time too.
        limit = f"{max(5.0, seconds - 8):.0f}"
        return [sys.executable, "-m", "benchmarks.gpu_smoke", "--backends", backend, "--seconds", limit]

    return command


def _benchmarks_command(folders: Folders, seconds: float) -> list[str]:
    # The last row to start, and Python's own start, take time too.
    budget = f"{max(10.0, seconds - 30):.0f}"
    return [sys.executable, "-m", "benchmarks.bench_gpu", "--seconds", budget, "--out", str(folders.out)]


def _profile_command(folders: Folders, seconds: float) -> list[str]:
    # The clocks of a borrowed machine are not changed.
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    return [
        "ncu",
        *options,
        "--metrics",
        ",".join(profiled_calls.METRICS),
        sys.executable,
        "-m",
        "benchmarks.profiled_calls",
    ]


def _profile_missing() -> str | None:
    return None if shutil.which("ncu") else "no ncu on the path (the CUDA toolkit has it)"


def profiled(folders: Folders) -> dict[str, Any]:
    """The metrics of each kernel."""
    log = folders.logs / "gpu-profile.log"
    return {"kernels": profiled_calls.summary(log.read_text(errors="replace")) if log.exists() else []}


def _tests_command(folders: Folders, seconds: float) -> list[str]:
    files = [f"tests/{name}" for name in TEST_FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.gpu_budget",
    ]
    command += ["-o", "faulthandler_timeout=60"]  # where a test hangs is in the log
    if importlib.util.find_spec("pytest_timeout"):  # and others run on
        command += ["--timeout=90", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist"):  # compiling is work for the processors: several share the GPU
        workers = min(8, max(1, (os.cpu_count() or 1) // 2))
        # One test at a time, so that all workers begin with those that come first.
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1"]
    return [*command, f"--junitxml={folders.logs / 'gpu-tests.xml'}", *files]


def _tests_environment(seconds: float) -> dict[str, str]:
    # The last tests to start, and pytest's own end, take time too.
    return {"OBC_TESTS_END": str(time.time() + max(0.0, seconds - 20))}


def tested(folders: Folders) -> dict[str, Any]:
    """Counts of the tests, the names of those that failed, and how many did not run, or not end, for want of time."""
    path = folders.logs / "gpu-tests.xml"
    if not path.exists():
        return {"tests": "no report was written"}
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}, "not_run": 0, "not_ended": 0}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.get("name") is None:  # the run was ended before the test was
            found["not_ended"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is None:
            found["passed"] += 1
        elif REASON in (reason := skipped.get("message") or ""):
            found["not_run"] += 1
        else:
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
    return found


# In the order of what would be missed most: whether anything runs, whether it is right, how fast it is. Kernels are
# profiled before the benchmarks, which take whatever time is left.
PARTS = (
    Part(
        "build",
        60,
        _build_command,
        environment=_build_environment,
        outcome=built,
    ),
    # A process each: where a kernel of one backend breaks the GPU's context, the other's are tried all the same.
    Part("smoke-cuda", 20, _smoke_of("cuda"), most=45),
    Part("smoke-triton", 25, _smoke_of("triton"), most=60),
    Part("tests", 120, _tests_command, most=180, environment=_tests_environment, outcome=tested),
    Part("profile", 30, _profile_command, most=45, outcome=profiled, missing=_profile_missing),
    Part("benchmarks", 220, _benchmarks_command),
)


def run(parts: Sequence[Part], out: Path, seconds: float) -> dict[str, Any]:
    """Run the parts one after another; returns, and keeps in ``gpu-run.json``, what became of each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="obc-gpu-logs-") as logs, _told_to_end():
        folders = Folders(out, Path(logs))
        for index, part in enumerate(parts):
            # A part that can't run here needs nothing.
            later = sum(other.least + GRACE / 4 for other in parts[index + 1 :] if other.missing() is None)
            left = end - time.monotonic() - GRACE
            needed = part.least / 2
            most = part.most if index + 1 < len(parts) else float("inf")
            allowed = min(most, max(min(part.least, left), left - later))
            if reason := part.missing():
                result: dict[str, Any] = {"left_out": reason}
            elif left < needed:
                result = {"left_out": f"{max(left, 0):.0f} s were left, it needs {needed:.0f}"}
            else:
                report["parts"][part.name] = {"ended": "this run was ended before the part was"}
                keep = lambda: _keep(report, folders)  # noqa: E731
                result = _run_part(part, folders, allowed, keep)
            report["parts"][part.name] = result
            _keep(report, folders)
            print(f"{part.name}: {_told(result)}", flush=True)
    return report


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end this process like an exception: the running part is ended, results are kept."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(report: Mapping[str, Any], folders: Folders) -> None:
    """Write the results so far."""
    (folders.out / "gpu-run.json").write_text(json.dumps(report, indent=1) + "\n")
    _archive(folders)


def _archive(folders: Folders) -> None:
    """All logs so far as one file, so that few files have to be brought back from the machine."""
    whole = folders.logs / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as archive:
        for path in sorted(folders.logs.iterdir()):
            if path != whole:
                archive.add(path, path.name)
    shutil.move(whole, folders.out / "gpu-logs.tar.gz")  # at once: never half an archive


def _run_part(part: Part, folders: Folders, allowed: float, keep: Callable[[], None]) -> dict[str, Any]:
    log = folders.logs / f"gpu-{part.name}.log"
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command(folders, allowed),
            cwd=ROOT,
            env={**os.environ, **part.environment(allowed), "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Started in the background by a shell, this process ignores SIGINT, and so would its children.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            ended = _wait(process, allowed, keep)
        except BaseException:
            _end(process)
            keep()
            raise
    seconds = round(time.monotonic() - begun, 1)
    result = {"exit_code": process.returncode, "seconds": seconds, "allowed_seconds": round(allowed, 1)}
    if not ended:
        result["ended"] = "its time was over"
    text = log.read_text(errors="replace")
    print(text if len(text) <= PRINTED else f"…{text[-PRINTED:]}", flush=True)
    result |= {"log": log.name}
    try:
        return result | dict(part.outcome(folders))
    except Exception as error:  # a report that is cut short is not to be read; the log is there
        return result | {"outcome": f"unreadable: {error!r}"}


# Seconds between two writings of the archive while a part runs.
KEPT_EVERY = 15.0


def _wait(process: subprocess.Popen[Any], allowed: float, keep: Callable[[], None]) -> bool:
    """Whether the process ended by itself in time; else it and its children are ended. ``keep`` is called meanwhile."""
    end = time.monotonic() + allowed
    while (left := end - time.monotonic()) > 0:
        try:
            process.wait(min(left, KEPT_EVERY))
            return True
        except subprocess.TimeoutExpired:
            keep()
    _end(process)
    return False


def _end(process: subprocess.Popen[Any]) -> None:
    """Interrupt a process and its children, and kill them if need be."""
    for send in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, send)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            break


def _told(result: Mapping[str, Any]) -> str:
    """One line of a part's result; lists by their length."""
    if "left_out" in result:
        return f"left out: {result['left_out']}"
    words = [f"{key} {len(value) if isinstance(value, list) else value}" for key, value in result.items()]
    return ", ".join(words)


def failed(report: Mapping[str, Any]) -> bool:
    """Whether a part that ran ended with an error; being cut short is none where its results are kept."""
    return any(result.get("exit_code", 0) != 0 for result in report["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, print a line each and the benchmarks' tables; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").split(";")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=525, help="for everything together (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], default=[p.name for p in PARTS])
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if part.name in options.parts]
    if options.dry_run:
        for part in parts:
            why = part.missing()
            command = shlex.join(part.command(Folders(options.out, Path("LOGS")), part.least))
            print(f"{part.name} (at least {part.least:.0f} s): {command}{f'  [left out here: {why}]' if why else ''}")
        return 0
    report = run(parts, options.out.resolve(), options.seconds)
    # Once more at the end: of a long output often only that is left.
    for name, result in report["parts"].items():
        print(f"{name}: {_told(result)}")
    for test in report["parts"].get("tests", {}).get("failed", [])[:SHOWN]:
        print(f"FAILED {test}")
    print(f"written: {', '.join(sorted(str(path) for path in options.out.glob('gpu-*')))}")
    return 1 if failed(report) else 0


if __name__ == "__main__":
    sys.exit(main())
