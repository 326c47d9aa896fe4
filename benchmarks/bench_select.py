"""Time and memory of ``obc.select``: ``python -m benchmarks.bench_select``.

Synthetic rows like those of a network: units share directions, their norms spread over a factor of e^3. Half of the
MACs of a chain of 3x3 convolutions go, by joint selection with everything else at its default.

Tables: each form of the Gram matrix beside a plain NumPy greedy with the whole matrix, which picks the same units, and
beside one matrix product of as many multiplications as the whole Gram matrix has. After the tables: one run for each
number of channels and rows in a process of its own, with the form that is chosen by size, and how far it raises the
process's peak memory. The largest take minutes each: ``--channels`` and ``--rows`` say which. ``--targets`` makes the
two runs that have a target alone, in about a minute and a half.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import obc
from benchmarks.harness import RESULTS, Case, Provider, measure, plain_product, provenance, write
from obc.selection import Costs
from obc.selection.interactions import FORMS, Form, choose_form, estimated_shrinkage

MAX_BYTES = 2**31  # the default of obc.select
TABLES = ((1000, 64), (1000, 512), (1000, 2048), (4000, 512))
RUN_CHANNELS, RUN_ROWS = (1000, 10_000, 100_000), (64, 512, 2048)
TARGETS = {(15_000, 512): 2.0, (100_000, 512): 60.0}  # (channels, rows) -> seconds
WIDTH = 500  # units of a group
POSITIONS = 64


def make_rows(channels: int, count: int) -> dict[str, Tensor]:
    """(count, WIDTH) float32 rows of ``channels`` / WIDTH groups."""
    generator = torch.Generator().manual_seed(0)
    rank = max(4, count // 4)
    shared = torch.randn(count, rank, generator=generator) / rank**0.5
    rows = {}
    for place in range(channels // WIDTH):
        values = shared @ torch.randn(rank, WIDTH, generator=generator)
        values += 0.5 * torch.randn(count, WIDTH, generator=generator)
        rows[f"layer {place}"] = values.mul_(torch.rand(WIDTH, generator=generator).mul(3).exp())
    return rows


def make_costs(groups: int) -> Costs:
    """MACs of 3x3 convolutions, each of which reads the one before; the first reads an image."""
    quadratic = torch.diag(torch.full((groups - 1,), 9.0 * POSITIONS), 1)
    linear = torch.zeros(groups)
    linear[0], linear[-1] = 27 * POSITIONS, 10
    return Costs([f"layer {place}" for place in range(groups)], [WIDTH] * groups, linear=linear, quadratic=quadratic)


def select(rows: dict[str, Tensor], form: Form | None) -> dict[str, Tensor]:
    """The problem to measure: half of the MACs are removed."""
    costs = make_costs(len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are fewer rows than channels is the point of some
        return obc.select(rows, costs, 0.5 * costs.total(), form=form, max_bytes=MAX_BYTES)


def plain_select(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same picks, written down plainly for NumPy."""
    costs = make_costs(len(rows))
    units = np.concatenate([values.numpy() for values in rows.values()], 1).T.astype(np.float64)
    few = units.shape[1] < len(units)
    keep = 1 - estimated_shrinkage(torch.from_numpy(units)) if few else 1.0
    gram = units @ units.T
    increments, widths, freed, removed = gram.diagonal().copy(), costs.widths.clone(), 0.0, []
    while freed < 0.5 * costs.total():
        marginal = costs.marginal(widths).numpy()
        cost = np.where(widths.numpy() > 1, marginal, np.nan).repeat(WIDTH)
        unit = int(np.nanargmin(np.where(increments < 0, increments * cost, increments / cost)))
        freed += marginal[unit // WIDTH]
        widths[unit // WIDTH] -= 1
        increments += 2 * keep * gram[unit]
        increments[unit] = np.inf
        removed.append(unit)
    gone = torch.zeros(len(units), dtype=torch.bool)
    gone[removed] = True
    return {name: part.nonzero().flatten() for name, part in zip(rows, gone.split(WIDTH), strict=True)}


def table(channels: int, count: int) -> Case:
    """Every form compared with plain NumPy."""
    rows = make_rows(channels, count)
    expected = plain_select(rows)

    def check(found: dict[str, Tensor]) -> None:
        assert all(torch.equal(found[name], units) for name, units in expected.items()), "other units were picked"

    def form_times(form: Form) -> Callable[[], dict[str, Tensor]]:
        return lambda: select(rows, form)

    return Case(
        [Provider("NumPy", lambda: plain_select(rows)), *(Provider(form, form_times(form)) for form in FORMS)],
        baseline="NumPy",
        limit=plain_product(channels * channels * count),
        bytes_moved=4 * channels * count,
        check=check,
    )


# --- one run in a process of its own ------------------------------------------------------------------------------


def _peak_mib() -> float:
    """The peak of this process alone; ``resource`` includes the peak of the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def single_run(channels: int, count: int, threads: int) -> dict[str, Any]:
    """Seconds and growth of peak memory of one call, after a small one that loads what is loaded once."""
    torch.set_num_threads(threads)
    select(make_rows(2 * WIDTH, 2), None)
    rows = make_rows(channels, count)
    before = _peak_mib()
    start, start_cpu = time.perf_counter(), time.process_time()
    removed = select(rows, None)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    stand_in = torch.empty(1, dtype=torch.float64).expand(channels, count)
    return {
        "channels": channels,
        "rows": count,
        "form": choose_form(stand_in, [WIDTH] * len(rows), chunks=False, max_bytes=MAX_BYTES),
        "removed": sum(map(len, removed.values())),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_mib": _peak_mib() - before,
        "rows_mib": 4 * channels * count / 2**20,
    }


def run_apart(channels: int, count: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_select", "--single", *map(str, (channels, count, threads))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Prints tables and runs; returns 1 if a table is void."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_select")
    parser.add_argument("--repeats", type=int, default=21, help="rounds a table (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--channels", type=int, nargs="*", default=RUN_CHANNELS, help="of the single runs")
    parser.add_argument("--rows", type=int, nargs="*", default=RUN_ROWS, help="of the single runs")
    parser.add_argument("--targets", action="store_true", help="only the single runs that have a target")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_select.json", help="write JSON here")
    arguments = parser.parse_args()
    facts = provenance(arguments.repeats, arguments.threads)
    print(f"{facts['cpu']}, {facts['threads']} of {facts['logical_cpus']} logical CPUs, torch {facts['torch']}")
    tables, runs = [], []
    for channels, count in TABLES if arguments.repeats and not arguments.targets else ():
        name = f"{channels} channels, {count} rows"
        result = measure(name, table(channels, count), arguments.repeats, arguments.threads)
        print(result.table() + "\n", flush=True)
        tables.append(result.as_dict())
    print("channels   rows  form      removed   seconds  of CPU  target  memory MiB  (the rows themselves)")
    sizes = list(TARGETS) if arguments.targets else itertools.product(arguments.channels, arguments.rows)
    for channels, count in sizes:
        run = run_apart(channels, count, arguments.threads)
        runs.append(run)
        target = TARGETS.get((channels, count))
        print(
            f"{channels:8d} {count:6d}  {run['form']:8s} {run['removed']:8d} {run['seconds']:9.2f} "
            f"{run['cpu_seconds']:7.2f} {'' if target is None else f'< {target:.0f}':>7} "
            f"{run['memory_mib']:11.0f}  ({run['rows_mib']:.0f})",
            flush=True,
        )
    if arguments.out:
        write(arguments.out, facts, cases=tables, runs=runs)
        print(f"written: {arguments.out}")
    return int(any(case["void"] for case in tables))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--single"]:
        print(json.dumps(single_run(*map(int, sys.argv[2:5]))))
        sys.exit()
    sys.exit(main())
