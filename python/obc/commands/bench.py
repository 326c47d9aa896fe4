"""``obc bench``: the benchmarks of a source checkout, and a picture of what they found."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import obc
from obc.commands.common import USAGE_ERROR, UsageError, folder, require
from obc.commands.run_log import add_log, say
from obc.files import made_folder

# Argument -> the benchmarks that it runs.
BENCHMARKS = {
    "ops": ("bench_ops", "bench_dispatch"),
    "scoring": ("bench_scoring", "bench_criteria"),
    "equivalent": ("bench_equivalent",),
    "large": ("bench_large",),
}


def add(commands: Any) -> None:
    """Add ``obc bench`` to the subparsers."""
    bench = commands.add_parser(
        "bench",
        help="time operators, scoring, folded fine-tuning, large models; draw the ratios",
        description="Run the benchmarks of a source checkout, each provider beside its baseline and the machine's own "
        "limit; write JSON and PNG. Figures need a quiet machine; --quick only shows that everything runs.",
    )
    bench.add_argument("what", nargs="*", metavar="|".join(BENCHMARKS), help="(default: ops)")
    bench.add_argument("--quick", action="store_true", help="three rounds a case")
    bench.add_argument("--only", default="", help="cases whose name contains this; several after commas")
    bench.add_argument("--threads", type=int, help="(default: torch's)")
    bench.add_argument(
        "--out", type=Path, default=Path("obc-bench"), help="folder of JSON and PNG (default: obc-bench)"
    )
    add_log(bench)
    bench.set_defaults(command=run)


def checkout() -> Path:
    """The source checkout that has the benchmarks.

    Raises:
        UsageError: there is none.
    """
    for root in (Path.cwd(), Path(obc.__file__).parents[2]):
        if (root / "benchmarks" / "harness.py").is_file():
            return root
    raise UsageError("the benchmarks are part of obc's source checkout; run obc bench there")


def run(parsed: argparse.Namespace) -> int:
    """Run and draw the requested benchmarks, each in its own process; returns the highest exit status."""
    asked = parsed.what or ["ops"]
    if unknown := [name for name in asked if name not in BENCHMARKS]:
        raise UsageError(f"no benchmark is named {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    require({"matplotlib": "matplotlib"})
    root, out = checkout(), folder(parsed.out).resolve()
    options = ["--quick"] * parsed.quick
    options += ["--threads", str(parsed.threads)] if parsed.threads else []
    statuses = []
    for name in (file for what in dict.fromkeys(asked) for file in BENCHMARKS[what]):
        result = out / f"{name}.json"
        only = ["--sizes" if name == "bench_large" else "--only", parsed.only] if parsed.only else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, *only, "--out", str(result)]
        say(f"running {shlex.join(command)}")
        with made_folder(out):
            statuses.append(subprocess.run(command, cwd=root).returncode)
        if result.exists():
            picture = result.with_suffix(".png")
            drawn = [sys.executable, "-m", "benchmarks.report", str(result), "--out", str(picture)]
            statuses.append(subprocess.run(drawn, cwd=root).returncode)
    if parsed.only and 0 in statuses:  # the cases that --only names are in some of the benchmarks
        statuses = [status for status in statuses if status != USAGE_ERROR]
    return max(statuses)
