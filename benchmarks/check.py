"""A guard against regressions of speed: ``make bench-check``, or ``python -m benchmarks.check``.

Runs cases again and compares ratios within a run, never absolute times, with those committed in
``benchmarks/results``: of every provider of ours, the time against the case's baseline. A regression is a ratio

- whose lower quartile over this run's rounds lies above the committed upper quartile: the spreads are apart, and
- whose median is more than ``MARGIN`` times the committed one: differences below it come and go between machines.

A case that is void on this machine proves nothing, and is named as such.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import RESULTS, Case, Result, measure

MARGIN = 1.15
OURS = "obc"  # a provider whose name begins with it, and "folded" of Equivalent Pruning
# Result file -> the module whose CASES it holds.
_MODULES = {"bench_ops": "bench_ops", "bench_scoring_rows": "bench_scoring", "bench_equivalent": "bench_equivalent"}
FILES = {file: module for file, module in _MODULES.items() if (RESULTS / f"{file}.json").exists()}


@dataclass(frozen=True)
class Change:
    """One provider's ratio to its baseline, as committed and now."""

    case: str
    provider: str
    baseline: str
    committed: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def regressed(self) -> bool:
        apart = self.now["q25"] > self.committed["q75"]
        return apart and self.now["paired_median"] > MARGIN * self.committed["paired_median"]

    def __str__(self) -> str:
        before, after = (
            f"{ratio['paired_median']:.2f} [{ratio['q25']:.2f}, {ratio['q75']:.2f}]"
            for ratio in (self.committed, self.now)
        )
        return f"{self.case}: {self.provider} / {self.baseline}: committed {before}, now {after}"


def changes(committed: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Every provider of ours in both results of one case."""
    for provider in committed["providers"]:
        if _ours(provider) and provider in now["providers"] and provider != committed["baseline"]:
            ratios = (result["providers"][provider]["against_baseline"] for result in (committed, now))
            yield Change(committed["name"], provider, committed["baseline"], *ratios)


def _ours(provider: str) -> bool:
    return provider.startswith(OURS) or provider == "folded"


def compare(
    committed: Sequence[Mapping[str, Any]], cases: Mapping[str, Callable[[], Case]], repeats: int, threads: int
) -> tuple[list[Change], list[str]]:
    """Run the committed cases again: (regressions, names of cases that prove nothing here)."""
    regressions, void = [], []
    for before in committed:
        if before["name"] not in cases:
            raise SystemExit(
                f"no benchmark has the committed case {before['name']!r} any more; run it with --out again"
            )
        result: Result = measure(before["name"], cases[before["name"]](), repeats, threads)
        if result.void or before["void"]:
            void.append(before["name"])
            print(f"void       {before['name']}", flush=True)
            continue
        for change in changes(before, result.as_dict()):
            print(f"{'REGRESSION' if change.regressed else 'as before '} {change}", flush=True)
            regressions += [change] if change.regressed else []
    return regressions, void


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description="Compare ratios with the committed."
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds a case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--only", default="", help="cases whose name contains this; several after commas")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.files) - set(FILES):
        parser.error(f"unknown file {sorted(unknown)[0]!r}; known are {', '.join(FILES)}")
    regressions: list[Change] = []
    for file in arguments.files or FILES:
        content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        facts = content["provenance"]
        print(f"{file}: committed on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}")
        committed = [
            case for case in content["cases"] if any(part in case["name"] for part in arguments.only.split(","))
        ]
        module = importlib.import_module(f"benchmarks.{FILES[file]}")
        torch.manual_seed(0)
        found, _ = compare(committed, module.CASES, arguments.repeats, arguments.threads)
        regressions += found
    print(f"{len(regressions)} regressions beyond noise")
    return int(bool(regressions))


if __name__ == "__main__":
    sys.exit(main())
