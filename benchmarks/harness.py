"""The one harness of all benchmarks: speed as a ratio, measured side by side in one run.

How a case is measured, on the CPU, with a fixed number of threads that every table states:

- Correctness first: each provider's result is compared on the benchmarked inputs before anything is timed.
- Warm-up, then rounds. In each round every provider is timed once, in random order, so that a slow moment of the
  machine meets all of them; a sample lasts at least ``MIN_SAMPLE_S`` (short calls are repeated within it).
- Inputs are the same in every round: what fits the cache is read from it, by the limit as by everyone else. So nobody
  always follows the same other, whose data are in the cache then, and a sample of several calls begins with one that
  is not timed.
- Reported: median, 20th and 80th percentile; against the baseline and against the limit the ratio of medians, and
  the median and interquartile range of the ratios within a round.
- The limit is what the machine allows, timed in the same rounds: a plain threaded read of as many bytes, or a plain
  matrix product of as many multiplications.
- A baseline or limit that is slower with all threads than with one is no fair opponent, mostly because other work
  holds the processor: the case is then void and says so.
- A target that lies within the interquartile range counts as met only with at least ``MIN_PAIRS`` rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

MIN_PAIRS = 15  # rounds for a target within the interquartile range: the project's rule
MIN_SAMPLE_S = 2e-3  # a thousand times the clock's resolution and a call's overhead
WARM_UP_S = 0.2  # until caches, thread pools and the processor's clock have settled
QUICK = 3  # rounds that show that a case runs, and nothing about its speed
VOID_RATIO = 1.1  # threaded over one-thread time; smaller differences are noise, also on a quiet machine


@dataclass(frozen=True)
class Provider:
    """One way to compute a case's result: ``call`` is timed, ``setup`` runs untimed before each sample."""

    name: str
    call: Callable[[], Any]
    setup: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Target:
    """``provider`` takes at most ``at_most`` times as long as ``against``."""

    provider: str
    against: str
    at_most: float


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        providers: the contenders; each name once.
        baseline: the provider that ratios refer to.
        limit: what the machine allows (:func:`plain_read`, :func:`plain_product`, or the case's own).
        bytes_moved: what any implementation must read and write.
        check: raises AssertionError if a provider's first result is wrong.
        unchecked: providers that compute something else on purpose, such as a plain read.
        targets: what the project promises.
        flops: multiplications and additions of any implementation; 0 where bytes alone decide.
    """

    providers: Sequence[Provider]
    baseline: str
    limit: Provider
    bytes_moved: int
    check: Callable[[Any], None]
    unchecked: frozenset[str] = frozenset()
    targets: Sequence[Target] = ()
    flops: int = 0


@dataclass(frozen=True)
class Ratio:
    """How two providers' times compare over the rounds."""

    of_medians: float
    paired_median: float
    q25: float
    q75: float
    pairs: int

    @classmethod
    def of(cls, times: Sequence[float], against: Sequence[float]) -> Ratio:
        paired = [time / other for time, other in zip(times, against, strict=True)]
        of_medians = statistics.median(times) / statistics.median(against)
        return cls(of_medians, statistics.median(paired), quantile(paired, 0.25), quantile(paired, 0.75), len(paired))

    def verdict(self, at_most: float) -> str:
        """Whether a target is "met", "missed", or "undecided" because it lies within the spread of too few rounds."""
        if self.paired_median > at_most:
            return "missed"
        if self.q75 > at_most and self.pairs < MIN_PAIRS:
            return f"undecided: within the spread of {self.pairs} rounds, at least {MIN_PAIRS} are needed"
        return "met"

    def __str__(self) -> str:
        return f"{self.of_medians:.2f} ({self.paired_median:.2f} [{self.q25:.2f}, {self.q75:.2f}])"


@dataclass
class Result:
    """The times of one case in seconds, per provider one a round; ``name`` says what is computed, shapes and dtype."""

    name: str
    case: Case
    times: dict[str, list[float]]
    void: list[str] = field(default_factory=list)

    def ratio(self, provider: str, against: str) -> Ratio:
        return Ratio.of(self.times[provider], self.times[against])

    def as_dict(self) -> dict[str, Any]:
        rows = {}
        for name, times in self.times.items():
            rows[name] = {
                "median_ms": statistics.median(times) * 1e3,
                "p20_ms": quantile(times, 0.2) * 1e3,
                "p80_ms": quantile(times, 0.8) * 1e3,
                "gb_per_s": self.case.bytes_moved / statistics.median(times) / 1e9,
                "gflop_per_s": self.case.flops / statistics.median(times) / 1e9,
                "share_of_limit": self.ratio(self.case.limit.name, name).of_medians,
                "against_baseline": vars(self.ratio(name, self.case.baseline)),
                "against_limit": vars(self.ratio(name, self.case.limit.name)),
            }
        targets = [
            {**vars(target), **vars(self.ratio(target.provider, target.against)), "verdict": self.verdict(target)}
            for target in self.case.targets
        ]
        return {
            "name": self.name,
            "bytes_moved": self.case.bytes_moved,
            "flops": self.case.flops,
            "baseline": self.case.baseline,
            "limit": self.case.limit.name,
            "void": self.void,
            "providers": rows,
            "targets": targets,
        }

    def verdict(self, target: Target) -> str:
        return "void" if self.void else self.ratio(target.provider, target.against).verdict(target.at_most)

    def table(self) -> str:
        rate, unit = ("gflop_per_s", "GFLOP/s") if self.case.flops else ("gb_per_s", "GB/s")
        head = ["", "median ms", "p20 - p80", unit, f"x {self.case.baseline}", f"x {self.case.limit.name}", "of limit"]
        lines = [head]
        for name, row in self.as_dict()["providers"].items():
            spread = f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}"
            ratios = [str(self.ratio(name, other)) for other in (self.case.baseline, self.case.limit.name)]
            share = f"{row['share_of_limit']:.0%}"
            lines.append([name, f"{row['median_ms']:.3f}", spread, f"{row[rate]:.1f}", *ratios, share])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [self.name]
        text += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        for target in self.case.targets:
            ratio = self.ratio(target.provider, target.against)
            demand = f"{target.provider} at most {target.at_most:g} x {target.against}"
            text.append(f"  target: {demand}: {ratio}: {self.verdict(target)}")
        text += [f"  VOID: {reason}" for reason in self.void]
        return "\n".join(line.rstrip() for line in text)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def plain_read(bytes_moved: int) -> Provider:
    """The bandwidth limit: torch's threaded sum over one buffer of as many bytes."""
    buffer = torch.ones(max(1, bytes_moved // 4))
    return Provider(f"plain read of {bytes_moved / 1e6:.3g} MB", buffer.sum)


def plain_product(multiplications: int) -> Provider:
    """The compute limit: one square float32 matrix product of as many multiplications."""
    size = max(1, round(multiplications ** (1 / 3)))
    left, right = torch.ones(2, size, size)
    return Provider(f"plain product of {size}x{size}", lambda: left @ right)


def measure(name: str, case: Case, repeats: int, threads: int) -> Result:
    """Check, warm up and time every provider of a case.

    Raises:
        AssertionError: a provider's result is wrong; nothing was timed.
    """
    torch.set_num_threads(threads)
    for provider in case.providers:
        provider.setup()
        result = provider.call()
        if provider.name in case.unchecked:
            continue
        try:
            case.check(result)
        except AssertionError as error:
            raise AssertionError(f"{name}: {provider.name} is wrong, so nothing was timed: {error}") from error
    contenders = [*case.providers, case.limit]
    inner = {provider.name: _warm_up(provider) for provider in contenders}
    times: dict[str, list[float]] = {provider.name: [] for provider in contenders}
    with _no_garbage_collection():
        order = random.Random(0)
        for _ in range(repeats):
            for provider in order.sample(contenders, len(contenders)):
                times[provider.name].append(_sample(provider, inner[provider.name]))
        void = _slowed_by_threads(case, inner, repeats, threads) if threads > 1 else []
    return Result(name, case, times, void)


def _sample(provider: Provider, inner: int) -> float:
    """Seconds a call, the mean over ``inner`` calls."""
    provider.setup()
    if inner > 1:
        provider.call()
    start = time.perf_counter()
    for _ in range(inner):
        provider.call()
    return (time.perf_counter() - start) / inner


def _warm_up(provider: Provider) -> int:
    """Calls for ``WARM_UP_S``; returns how many calls a sample needs."""
    fastest, end = math.inf, time.perf_counter() + WARM_UP_S
    while True:
        fastest = min(fastest, _sample(provider, 1))
        if time.perf_counter() >= end:
            return max(1, math.ceil(MIN_SAMPLE_S / fastest))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _slowed_by_threads(case: Case, inner: dict[str, int], repeats: int, threads: int) -> list[str]:
    """Why the run is void: the baseline or the limit takes longer with all threads than with one."""
    reasons = []
    for provider in (*(p for p in case.providers if p.name == case.baseline), case.limit):
        threaded, alone = [], []
        for _ in range(repeats):
            for count, into in ((threads, threaded), (1, alone)):
                torch.set_num_threads(count)
                _sample(provider, 1)  # the pool of threads takes its new size
                into.append(_sample(provider, inner[provider.name]))
        torch.set_num_threads(threads)
        ratio = Ratio.of(threaded, alone)
        if ratio.paired_median > VOID_RATIO:
            reasons.append(
                f"{provider.name} with {threads} threads takes {ratio} times as long as with one: other work holds "
                "the processor (find a quiet machine), or the case is too small for threads (use --threads 1)"
            )
    return reasons


def provenance(repeats: int, threads: int) -> dict[str, Any]:
    """Machine, time and software of a run, and its command with paths that are the same on any machine."""
    import obc

    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0],
        "repeats": repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": obc.backends.chosen("cpu").name,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
    }


def update(path: Path, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write cases to ``path``: they take the place of cases of the same name there, all others stay.

    Every case carries the provenance of its own run, so that a file may be filled by several runs.
    """
    earlier = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = {case["name"]: case for case in earlier}
    cases |= {result["name"]: {**result, "provenance": dict(facts)} for result in results}
    write(path, facts, cases=list(cases.values()))


def write(path: Path, facts: Mapping[str, Any], **content: Any) -> None:
    """Write JSON of the provenance and of ``content``; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": dict(facts), **content}, indent=2) + "\n")


def parser_of(name: str, repeats: int = 21) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds a case (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds a case: to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--only", default="", help="run the cases whose name contains this; several after commas")
    parser.add_argument(
        "--out",
        nargs="?",
        type=Path,
        const=RESULTS / f"{name}.json",
        help=f"write each case as it ends (without a value: to benchmarks/results/{name}.json); others there stay",
    )
    return parser


def chosen(titles: Sequence[str], arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The titles that ``--only`` asks for."""
    found = [title for title in titles if any(part in title for part in arguments.only.split(","))]
    if not found:
        parser.error(f"no case's name contains {arguments.only!r}")
    if arguments.quick:
        arguments.repeats = QUICK
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with "+changes" where tracked files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def main(name: str, cases: Mapping[str, Callable[[], Case]], argv: Sequence[str] | None = None) -> int:
    """The command line of a benchmark file: run its cases one after another, print tables, write JSON when asked.

    Args:
        name: the results go to ``benchmarks/results/<name>.json``.
        cases: per table its name and what makes the case, so that only one case's tensors exist at a time.

    Returns:
        The exit status: 1 if a case was void, else 0. A missed target is a result, not an error.
    """
    parser = parser_of(name)
    arguments = parser.parse_args(argv)
    titles = chosen(list(cases), arguments, parser)
    facts = provenance(arguments.repeats, arguments.threads)
    print(f"{facts['cpu']}, {facts['threads']} of {facts['logical_cpus']} logical CPUs, torch {facts['torch']}")
    print(f"{arguments.repeats} rounds; ratios: of medians (median of the rounds' [interquartile range])\n")
    void = False
    for title in titles:
        result = measure(title, cases[title](), arguments.repeats, arguments.threads)
        print(result.table() + "\n", flush=True)
        void |= bool(result.void)
        if arguments.out:
            update(arguments.out, facts, [result.as_dict()])
    if arguments.out:
        print(f"written: {arguments.out}")
    return int(void)
