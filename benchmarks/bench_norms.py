"""The effect of recalibrating BatchNorms on few images, on EfficientNet-Lite0: ``python -m benchmarks.bench_norms``.

Printed: agreement of the first class with the unpruned model on photographs of ImageNet, of the unpruned model and of
one without a share of its MACs (the Jacobian Criterion, one step): as it is, with the statistics of the calibration
images, and with statistics that are compared with the unpruned model's on the same images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import obc
from benchmarks.bench_real import SELECTIONS, Selection, prune
from benchmarks.harness import RESULTS, provenance, write
from benchmarks.real_tasks import Task, efficientnet
from obc.model.evaluation import evaluating

_WAYS = ("as it is", "statistics of the images", "compared with the unpruned model")


def rows(task: Task, share: float) -> list[dict[str, Any]]:
    """Agreement of both models by each way."""
    chosen = SELECTIONS["jacobian"]
    chosen = Selection(chosen.criterion, {**chosen.options, "recalibrate": False})
    result = prune(task, chosen, share)
    models = {"unpruned": (task.model, obc.PruningPlan()), f"{share:.0%} fewer MACs": (result.model, result.plan)}
    return [
        {"model": name, "way": way, "agreement": agreement(task, recalibrated(task, model, plan, way))}
        for name, (model, plan) in models.items()
        for way in _WAYS
    ]


def recalibrated(task: Task, model: nn.Module, plan: obc.PruningPlan, way: str) -> nn.Module:
    """A copy with other statistics."""
    model = copy.deepcopy(model)
    if way != _WAYS[0]:
        original = task.model if way == _WAYS[2] else None
        obc.recalibrate_norms(model, task.calibration, task.forward, original_model=original, plan=plan)
    return model


def agreement(task: Task, model: nn.Module) -> float:
    with evaluating(model):
        return 1 - statistics.mean(value for batch in task.test for value in task.measure(model, batch))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_norms")
    parser.add_argument("--calibration", type=int, default=3, help="batches of 32 images (%(default)s)")
    parser.add_argument("--test", type=int, default=3, help="likewise (%(default)s)")
    parser.add_argument("--share", type=float, default=0.25, help="of the MACs that goes (%(default)s)")
    parser.add_argument("--draw", type=int, default=0, help="seed of the images (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_norms.json", help="write JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = rows(efficientnet(arguments.draw, arguments.calibration, arguments.test, 0), arguments.share)
    for row in found:
        print(f"{row['model']:20} {row['way']:34} {row['agreement']:.3f}")
    if arguments.out is not None:
        write(arguments.out, provenance(1, arguments.threads), rows=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
