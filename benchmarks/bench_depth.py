"""Blocks, widths, and both under one budget, without training: ``python -m benchmarks.bench_depth``.

A pretrained language model loses a share of the parameters of its blocks: whole blocks alone (by the Jacobian
Criterion's gate on what a block adds, by block influence, the last ones, the cheapest consecutive ones), branches
alone, channels and heads alone, and all of them in one joint selection. Measured is the perplexity on other text, with
the difference to widths alone and its standard error over the sequences, paired; no compensation, no training.

Rows and block similarity are read once, of the unpruned model; rows are kept in the folder of ``--rows``, so that a
run that resumes does not read them again. Cases that the file of ``--out`` already has are not run again; ``--minutes``
ends a run after the case in which they are over. The seconds of each case are those of pruning and of measuring it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import obc
from benchmarks.depth_table import BASELINE, table
from benchmarks.harness import RESULTS, provenance, write
from benchmarks.real_tasks import TASKS, Task
from obc.criteria import Subject
from obc.criteria.protocol import MeasuredCriterion
from obc.criteria.rows import read_rows
from obc.files import atomic_write
from obc.model.evaluation import evaluating
from obc.model.usable_batches import UsableBatches
from obc.structures.proof import Proof
from obc.structures.transformers import TransformersStructure

SHARES = (0.1, 0.2)
_WIDTHS = ("ffn", "heads")


@dataclass(frozen=True)
class Method:
    """The kinds to remove, and their choice: by rows, or by block influence."""

    kinds: Sequence[str]
    rows: bool = True
    allocation: str = "global"


METHODS: dict[str, Method] = {
    BASELINE: Method(_WIDTHS),
    "blocks, jacobian": Method(("layers",)),
    "blocks and widths, jacobian": Method(("layers", *_WIDTHS)),
    "blocks, influence": Method(("layers",), rows=False),
    "blocks, tail": Method(("layers",), rows=False, allocation="tail"),
    "branches, jacobian": Method(("sublayers",)),
    "branches and widths, jacobian": Method(("sublayers", *_WIDTHS)),
    "blocks, jacobian, window": Method(("layers",), allocation="window"),
    "blocks, influence, window": Method(("layers",), rows=False, allocation="window"),
}


class Read(MeasuredCriterion):
    """Rows and scores of the unpruned model, read once for every method."""

    def __init__(self, task: Task, file: Path) -> None:
        self.task, self.file = task, file
        self._rows: dict[str, Tensor] | None = None
        self._influence: dict[str, Tensor] | None = None

    def measure(self, subject: Subject) -> dict[str, Tensor]:
        if self._influence is None:
            found = obc.collect(self.task.model, self.task.calibration, statistics="blocks", progress=False)
            self._influence = {
                name: torch.tensor([1 - sums.cosine / sums.count], dtype=torch.float64)
                for name, sums in found.blocks.items()
            }
        return {group.name: self._influence[group.name] for group in subject.groups if group.name in self._influence}

    def measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        if self._rows is None and self.file.exists():
            self._rows = load_file(self.file)
        if self._rows is None:
            groups = TransformersStructure(self.task.model, ["layers", "sublayers", *_WIDTHS]).groups
            batches, generator = UsableBatches(self.task.calibration), torch.Generator()
            whole = Subject(
                self.task.model, groups, batches, self.task.loss, self.task.forward, "gate", "batch", generator
            )
            read = read_rows(whole).rows
            found = {group.name: group.gate_rows(read) for group in groups}
            self._rows = {name: rows.contiguous() for name, rows in found.items() if rows is not None}
            with atomic_write(self.file) as file:
                file.write(save(self._rows))
        return {group.name: self._rows[group.name] for group in subject.groups if group.name in self._rows}


def pruned(task: Task, read: Read, method: Method, share: float) -> obc.PruningResult:
    """A copy of the model without that share of its blocks' parameters."""
    model = copy.deepcopy(task.model)
    structure = TransformersStructure(model, method.kinds)
    structure.proof = Proof()  # tests/structures try these groups; here a case would take twice as long
    return obc.prune(
        model,
        None,
        task.calibration,
        task.loss,
        params=1 - share * parameters_of_blocks(task) / sum(parameter.numel() for parameter in model.parameters()),
        structure=structure,
        criterion=read,
        selection="joint" if method.rows else "independent",
        allocation=method.allocation,
        steps=1,
        forward_fn=task.forward,
        verify=False,
        progress=False,
    )


def parameters_of_blocks(task: Task) -> int:
    """The whole that shares refer to: all parameters inside the blocks."""
    model: Any = task.model
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


_NAMED = ("model", "draw", "method", "share", "calibration", "test", "length")


def key_of(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in _NAMED)


def measured(task: Task, model: Any, case: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    with evaluating(model):
        losses = [value for batch in task.test for value in task.measure(model, batch)]
    shown = math.exp(statistics.mean(losses))
    case = case | {"seconds": round(case.get("seconds", 0.0) + time.perf_counter() - start, 1)}
    took = f"{case['seconds']:6.1f} s"
    print(f"draw {case['draw']} {case['share']:4.0%} {case['method']:30} {shown:9.3f} {took}", flush=True)
    return case | {"losses": [round(loss, 6) for loss in losses], "perplexity": shown}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_depth")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()), help="folder (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--calibration", type=int, default=32, help="sequences (%(default)s)")
    parser.add_argument("--test", type=int, default=32, help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=RESULTS / "bench_depth.json", help="write JSON, and resume"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    start, facts, out = time.perf_counter(), provenance(1, arguments.threads), arguments.out
    cases = json.loads(out.read_text())["cases"] if out is not None and out.exists() else []
    done = {key_of(case) for case in cases}
    sizes = {"calibration": arguments.calibration, "test": arguments.test, "length": arguments.length}

    def keep(case: dict[str, Any]) -> None:
        cases.append(case | {"commit": facts["commit"]})
        if out is not None:  # after each case: a run takes long
            write(out, facts, cases=cases)

    for draw in arguments.draws:
        task, read = None, None
        named = {"model": arguments.model, "draw": draw, **sizes}
        wanted = [named | {"method": "unpruned", "share": 0.0}]
        wanted += [named | {"method": name, "share": share} for share in arguments.shares for name in arguments.methods]
        for case in wanted:
            if key_of(case) in done or time.perf_counter() - start > 60 * arguments.minutes:
                continue
            task = task or TASKS[arguments.model](draw, *sizes.values())
            if read is None:
                said = "-".join(str(named[key]) for key in ("model", "draw", "calibration", "length"))
                read = Read(task, arguments.rows / f"obc_depth_rows-{said}.safetensors")
            if case["method"] == "unpruned":
                keep(measured(task, task.model, case))
                continue
            begun = time.perf_counter()
            result = pruned(task, read, METHODS[case["method"]], case["share"])
            depth = result.plan.depth
            gone = {"blocks": sum(len(one.removed) for one in depth.lists.values()), "branches": len(depth.stand_ins)}
            gone |= {"removed": depth.removed, "parameters": result.report.parameters_after}
            gone["seconds"] = time.perf_counter() - begun
            keep(measured(task, result.model, case | gone))
    print("\n".join(["", *table(cases)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
