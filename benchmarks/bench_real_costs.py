"""The cost of compensation on a pretrained model: ``python -m benchmarks.bench_real_costs --model smollm2``.

Printed: seconds of ``obc.compensate`` over those of one forward pass of the unpruned model over the same calibration
data, and by how much the process's resident memory rises meanwhile above the two models, with sizes of the pieces that
the report names. Both times are CPU seconds of this process, so that others on the machine hardly disturb the ratio.
Half of the prunable parameters go by magnitude; what goes hardly matters here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import obc
from benchmarks import isolated
from benchmarks.bench_real import SELECTIONS, prune
from benchmarks.harness import RESULTS, provenance, write
from benchmarks.real_tasks import TASKS, Task


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def forward_pass(task: Task) -> None:
    """CPU seconds of one forward pass of the unpruned model over the calibration data."""
    with torch.no_grad():
        for batch in task.calibration:
            task.forward(task.model, batch)


def row(task: Task, mode: str, repeats: int) -> dict[str, Any]:
    """The costs of one mode: the median of the ratio, and the memory of the first run."""
    result = prune(replace(task, calibration=task.calibration[:1]), SELECTIONS["magnitude"], 0.5)
    ratios, memory, report = [], None, None
    for _ in range(repeats):
        model = copy.deepcopy(result.model)

        def compensate(model: torch.nn.Module = model) -> None:
            nonlocal report
            report = obc.compensate(
                model, task.model, result.plan, task.calibration, task.forward, mode=mode, progress=False
            )

        forward = cpu_seconds(lambda: forward_pass(task))
        start = time.process_time()
        measured = isolated.measure(compensate)
        ratios.append((time.process_time() - start) / forward)
        memory = memory or measured["peak_mib"]
    return {
        "mode": mode,
        "forward_passes": sorted(ratios)[len(ratios) // 2],
        "forward_cpu_seconds": forward,
        "peak_mib": memory,
        "stream_mib": report.stream_bytes / 2**20,
        "moment_mib": report.moment_bytes / 2**20,
    }


def shown(row: Mapping[str, Any]) -> str:
    """One line."""
    return (
        f"{row['mode']:8} {row['forward_passes']:5.1f} forward passes of {row['forward_cpu_seconds']:.1f} CPU s, "
        f"{row['peak_mib']:.0f} MiB above both models (streams {row['stream_mib']:.0f}, sums {row['moment_mib']:.0f})"
    )


def other_rows(path: Path, model: str) -> list[dict[str, Any]]:
    """The rows of other models that the file has: they are kept."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["model"] != model]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_real_costs")
    parser.add_argument("--model", choices=TASKS, default="smollm2")
    parser.add_argument("--modes", nargs="+", default=["correct"], choices=("correct", "ls", "seq"))
    parser.add_argument("--calibration", type=int, default=20, help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="the median of so many (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--out",
        nargs="?",
        type=Path,
        const=RESULTS / "bench_real_costs.json",
        help="write JSON; rows of other models are kept",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    task = TASKS[arguments.model](0, arguments.calibration, 1, arguments.length)
    facts = provenance(arguments.repeats, arguments.threads)
    weights = sum(parameter.nbytes for parameter in task.model.parameters()) / 2**20
    print(f"{arguments.model}, {arguments.calibration} x {arguments.length}, {weights:.0f} MiB of unpruned weights")
    rows = [] if arguments.out is None else other_rows(arguments.out, arguments.model)
    for mode in arguments.modes:
        found = {
            "commit": facts["commit"][:12],
            "model": arguments.model,
            "calibration": arguments.calibration,
            "length": arguments.length,
        }
        rows.append(found | row(task, mode, arguments.repeats))
        print(shown(rows[-1]), flush=True)
        if arguments.out is not None:
            write(arguments.out, facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
