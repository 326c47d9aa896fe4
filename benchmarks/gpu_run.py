"""Everything that needs a GPU, part by part within one time limit; ``benchmarks/gpu.sh`` starts it.

Each part has what is left of the time, less what later parts need at least, and is ended when that is over. What it
made by then is kept, and ``gpu-run.json`` is written again after each part. A part that fails loses no other's results.
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
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_budget import REASON

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which a part that was asked to end is killed: enough for pytest to write its report. It is kept free at
# the end of all, and a quarter of it before each part.
GRACE = 8.0

# The files of operators' tests have thousands of tests, for each of which Triton compiles kernels; those that look for
# races, wrong addresses and wrong streams are few and come first.
TEST_FILES = (
    "backends/test_triton_gpu.py",
    "backends/test_cuda.py",
    "scoring/test_scorer_gpu.py",
    "ops/test_end_row.py",
    "ops/test_fold.py",
    "ops/test_weight_dot.py",
    "ops/test_channel_dot.py",
    "ops/test_channel_moments.py",
)


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        least: seconds that it needs to be of use; earlier parts leave them, and with less it is left out.
        command: of (folder of the results, seconds that it has).
        environment: what it has besides, of the seconds.
        outcome: what its results say, read when it has ended.
        missing: why it can't run here, or None.
    """

    name: str
    least: float
    command: Callable[[Path, float], Sequence[str]]
    environment: Callable[[float], Mapping[str, str]] = lambda seconds: {}
    outcome: Callable[[Path], Mapping[str, Any]] = lambda out: {}
    missing: Callable[[], str | None] = lambda: None


def _build_environment(seconds: float) -> dict[str, str]:
    """CUDA kernels for this GPU alone, unless TORCH_CUDA_ARCH_LIST says otherwise: a third of the compiling."""
    import torch

    if "TORCH_CUDA_ARCH_LIST" in os.environ or not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def built(out: Path) -> dict[str, Any]:
    """Which native libraries lie in place now."""
    folder = ROOT / "python" / "obc"
    return {"libraries": sorted(path.name for path in (*folder.glob("_lib/*.so"), *folder.glob("_native*.so")))}


def _benchmarks_command(out: Path, seconds: float) -> list[str]:
    # The last row to start, and Python's own start, take time too; after 200 s there is little left to learn.
    budget = max(10.0, min(seconds, 200) - 30)
    return [sys.executable, "-m", "benchmarks.bench_gpu", "--seconds", f"{budget:.0f}", "--out", str(out)]


def _tests_command(out: Path, seconds: float) -> list[str]:
    files = [f"tests/{name}" for name in TEST_FILES if (ROOT / "tests" / name).exists()]
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
    if importlib.util.find_spec("xdist"):  # compiling is work for the processors: several share the GPU
        command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
    return [*command, f"--junitxml={out / 'gpu-tests.xml'}", *files]


def _tests_environment(seconds: float) -> dict[str, str]:
    # The last tests to start, and pytest's own end, take time too.
    return {"OBC_TESTS_END": str(time.time() + max(0.0, seconds - 20))}


def tested(out: Path) -> dict[str, Any]:
    """Counts of the tests, the names of those that failed, and how many did not run for want of time."""
    path = out / "gpu-tests.xml"
    if not path.exists():
        return {"tests": "no report was written"}
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}, "not_run": 0}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is None:
            found["passed"] += 1
        elif REASON in (reason := skipped.get("message") or ""):
            found["not_run"] += 1
        else:
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
    return found


def _sanitizer_missing() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "no compute-sanitizer on the path (the CUDA toolkit has it)"
    if "libobc_cuda.so" not in built(ROOT)["libraries"]:
        return "the CUDA kernels were not built (see gpu-build.log)"
    return None


def sanitized(out: Path) -> dict[str, Any]:
    """The line of each tool."""
    path = out / "gpu-sanitizer.txt"
    return {"tools": path.read_text().splitlines() if path.exists() else []}


TOOLS = 4  # of compute-sanitizer

PARTS = (
    Part(
        "build",
        60,
        lambda out, seconds: [sys.executable, "setup.py", "build_ext", "--inplace"],
        _build_environment,
        built,
    ),
    Part("benchmarks", 150, _benchmarks_command),
    Part("tests", 120, _tests_command, _tests_environment, tested),
    Part(
        "sanitizer",
        60,
        lambda out, seconds: ["sh", "benchmarks/sanitize_gpu.sh", str(out)],
        lambda seconds: {"SECONDS_PER_TOOL": f"{seconds / TOOLS - 1:.0f}", "PYTHON": sys.executable},
        sanitized,
        _sanitizer_missing,
    ),
)


def run(parts: Sequence[Part], out: Path, seconds: float) -> dict[str, Any]:
    """Run the parts one after another; returns, and keeps in ``gpu-run.json``, what became of each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "parts": {}}
    for index, part in enumerate(parts):
        # A part that can't run here needs nothing.
        later = sum(other.least + GRACE / 4 for other in parts[index + 1 :] if other.missing() is None)
        left = end - time.monotonic() - GRACE
        allowed = left if left < part.least else max(part.least, left - later)
        if reason := part.missing():
            result: dict[str, Any] = {"left_out": reason}
        elif left < part.least:
            result = {"left_out": f"{max(left, 0):.0f} s were left, it needs {part.least:.0f}"}
        else:
            result = _run_part(part, out, allowed)
        report["parts"][part.name] = result
        (out / "gpu-run.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{part.name}: {_told(result)}", flush=True)
    return report


def _run_part(part: Part, out: Path, allowed: float) -> dict[str, Any]:
    log = out / f"gpu-{part.name}.log"
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command(out, allowed),
            cwd=ROOT,
            env={**os.environ, **part.environment(allowed), "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Started in the background by a shell, this process ignores SIGINT, and so would its children.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        ended = _wait(process, allowed)
    seconds = round(time.monotonic() - begun, 1)
    result = {"exit_code": process.returncode, "seconds": seconds, "allowed_seconds": round(allowed, 1)}
    if not ended:
        result["ended"] = "its time was over"
    return result | {"log": log.name} | dict(part.outcome(out))


def _wait(process: subprocess.Popen[Any], allowed: float) -> bool:
    """Whether the process ended by itself in time; else it and its children are interrupted, and killed if need be."""
    try:
        process.wait(allowed)
        return True
    except subprocess.TimeoutExpired:
        pass
    for send in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, send)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            break
    return False


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
            command = shlex.join(part.command(options.out, part.least))
            print(f"{part.name} (at least {part.least:.0f} s): {command}{f'  [left out here: {why}]' if why else ''}")
        return 0
    report = run(parts, options.out.resolve(), options.seconds)
    log = options.out / "gpu-benchmarks.log"
    if log.exists():
        print(log.read_text())
    print(f"written: {options.out / 'gpu-run.json'}")
    return 1 if failed(report) else 0


if __name__ == "__main__":
    sys.exit(main())
