"""The command line: ``obc demo`` and ``obc info``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import obc

USAGE_ERROR = 2

# What the demo imports -> the package that brings it.
DEMO_PACKAGES = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning", "matplotlib": "matplotlib"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    return int(parsed.command(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="obc", description="Structural pruning by Optimal Brain Connection.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train small networks on digits, prune them by four criteria, print what each kept",
        description="Train a residual CNN and a transformer on scikit-learn's digits, prune them by random, L1, Taylor "
        "and Jacobian criteria, and print held-out accuracy, scoring time and peak memory. Needs no network.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of splits, weights and the random criterion (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("obc-demo"), help="folder of demo.png (default: obc-demo)")
    demo.set_defaults(command=_demo)
    info = commands.add_parser("info", help="print what is installed, what is missing, and how to get it")
    info.set_defaults(command=_info)
    return parser


def _demo(parsed: argparse.Namespace) -> int:
    if missing := _missing(DEMO_PACKAGES):
        print(f"obc demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"obc demo: can't make the folder {parsed.out}: {error}; choose another --out", file=sys.stderr)
        return USAGE_ERROR
    from obc.demo import report
    from obc.demo.run import run

    start = time.perf_counter()
    results = run(parsed.seed, say=lambda line: print(line, flush=True))
    picture = parsed.out / "demo.png"
    report.draw(results, picture)
    for part in (*map(report.table, results), report.protocol()):
        print(f"\n{part}")
    print(f"\nDrawn in {picture}. Seed {parsed.seed}, {time.perf_counter() - start:.0f} s.")
    return 0


def _missing(packages: Mapping[str, str]) -> list[str]:
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


def _info(parsed: argparse.Namespace) -> int:
    print("\n".join(_lines(obc.info())))
    return 0


def _lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """``key: value`` lines, what is nested indented under its key."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_words(value)}")
    return lines


def _words(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
