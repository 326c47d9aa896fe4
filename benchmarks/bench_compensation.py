"""Compensation of small networks on handwritten digits: ``python -m benchmarks.bench_compensation``.

The demo's networks, trained on scikit-learn's digits, pruned by the Jacobian Criterion with the demo's protocol to half
their MACs, and evaluated on the test split without fine-tuning: as pruning left them ("naive"), with BatchNorm
statistics estimated anew ("BN"), and compensated ("ls", "seq", "correct"), each from 100 and from 1000 training images
without labels. Then what compensation costs: seconds, the running sums' memory and the peak of torch's CPU allocator,
against one epoch of forward passes of the unpruned network over the training split.

Accuracies depend on the seed alone, seconds on the machine and what else it does: the JSON has the load average.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, provenance, write
from benchmarks.small_vgg import VGG
from obc.demo.criteria import CRITERIA
from obc.demo.data import Digits, digits
from obc.demo.run import RECIPES, Recipe, count, peak_bytes, seeded, steps
from obc.demo.train import accuracy, train
from obc.model.timing import median_seconds
from obc.recovery import PruningPlan, compensate, recalibrate_norms
from obc.recovery.calibration import batch_norms

TIMES_FEWER_MACS = 2.0
SAMPLES = (100, 1000)
BATCH = 20
Mode = Literal["correct", "ls", "seq"]
MODES: tuple[Mode, ...] = ("ls", "seq", "correct")
NETWORKS = (*RECIPES, Recipe("VGG", VGG, epochs=10))


@dataclass(frozen=True)
class Pruned:
    """A trained network, its pruned copy, and the data of its seed."""

    original: nn.Module
    model: nn.Module
    plan: PruningPlan
    data: Digits

    def calibration(self, samples: int) -> list[Tensor]:
        """The first training images, no labels."""
        return list(self.data.train.images[:samples].split(BATCH))

    def compensated(self, mode: Mode, samples: int) -> tuple[nn.Module, Any]:
        """A compensated copy, and the report."""
        model = copy.deepcopy(self.model)
        return model, compensate(model, self.original, self.plan, self.calibration(samples), mode=mode, progress=False)

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy in percent on the test split."""
        return 100 * accuracy(model, self.data.test)


def pruned(recipe: Recipe, seed: int) -> Pruned:
    """Train with ``seed`` and prune to half the MACs, scored again before each step."""
    data = digits(seed)
    seeded(seed)
    model = train(recipe.build(), data.train, epochs=recipe.epochs, seed=seed)
    original = copy.deepcopy(model)
    (criterion,) = (c for c in CRITERIA if c.name == "Jacobian")
    ((_, plan),) = steps(model, criterion, data, [TIMES_FEWER_MACS])
    return Pruned(original, model, plan, data)


def accuracies(network: Pruned) -> dict[str, float | None]:
    """Test accuracy of every way; None if there is no BatchNorm to re-estimate."""
    found: dict[str, float | None] = {
        "unpruned": network.accuracy(network.original),
        "naive": network.accuracy(network.model),
    }
    for samples in SAMPLES:
        found[f"BN {samples}"] = None
        if batch_norms(network.model):
            model = copy.deepcopy(network.model)
            recalibrate_norms(model, network.calibration(samples))
            found[f"BN {samples}"] = network.accuracy(model)
        for mode in MODES:
            found[f"{mode} {samples}"] = network.accuracy(network.compensated(mode, samples)[0])
    return found


def _seconds(call: Callable[[], object], repeats: int) -> float:
    return median_seconds([call], torch.device("cpu"), repeats=repeats, warm_ups=1)[0]


def costs(network: Pruned) -> dict[str, Any]:
    """Seconds and bytes of compensation and of one epoch of forward passes."""

    def epoch() -> None:
        with torch.no_grad():
            for batch in network.data.train.images.split(BATCH):
                network.original(batch)

    found: dict[str, Any] = {"epoch_seconds": _seconds(epoch, 3), "epoch_peak_bytes": peak_bytes(epoch)}
    for samples in SAMPLES:
        for mode in MODES:

            def call(mode: Mode = mode, samples: int = samples) -> Any:
                return network.compensated(mode, samples)[1]

            name = f"{mode}_{samples}"
            found[f"{name}_seconds"] = _seconds(call, 1)
            found[f"{name}_peak_bytes"] = peak_bytes(call)
            found[f"{name}_moment_bytes"] = call().moment_bytes
    return found


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Accuracy of each network and seed, and the mean and spread over the seeds."""
    ways = list(rows[0]["accuracy"])
    yield f"{'test accuracy, %':16} {'seed':>4} " + " ".join(f"{way:>9}" for way in ways)
    for name in dict.fromkeys(row["network"] for row in rows):
        network_rows = [row for row in rows if row["network"] == name]
        for row in network_rows:
            cells = ("-" if row["accuracy"][way] is None else f"{row['accuracy'][way]:.1f}" for way in ways)
            yield f"{name:16} {row['seed']:4} " + " ".join(f"{cell:>9}" for cell in cells)
        if len(network_rows) > 1:
            columns = ([row["accuracy"][way] for row in network_rows] for way in ways)
            means = ("-" if None in c else f"{statistics.mean(c):.1f}±{statistics.stdev(c):.1f}" for c in columns)
            yield f"{'':16} {'mean':>4} " + " ".join(f"{cell:>9}" for cell in means)


def cost_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The costs for the first seed of each network."""
    yield f"{'compensation':24} {'seconds':>8} {'epochs':>7} {'sums KiB':>9} {'peak MiB':>9}"
    for name in dict.fromkeys(row["network"] for row in rows):
        cost = next(row["cost"] for row in rows if row["network"] == name)
        epoch, peak = cost["epoch_seconds"], cost["epoch_peak_bytes"] / 2**20
        yield f"{name + ', an epoch':24} {epoch:8.2f} {1:7.1f} {'':9} {peak:9.1f}"
        for samples in SAMPLES:
            for mode in MODES:
                seconds, sums, peak = (
                    cost[f"{mode}_{samples}_{what}"] for what in ("seconds", "moment_bytes", "peak_bytes")
                )
                line = f"{seconds:8.2f} {seconds / epoch:7.1f} {sums / 2**10:9.0f} {peak / 2**20:9.1f}"
                yield f"{f'  {mode}, {samples} images':24} {line}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_compensation")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="networks so small gain nothing from more (%(default)s)")
    parser.add_argument("--network", choices=[recipe.name for recipe in NETWORKS], help="only this one")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_compensation.json", help="write JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(1, arguments.threads)
    rows = []
    for recipe in NETWORKS:
        if arguments.network not in (None, recipe.name):
            continue
        for seed in range(arguments.seeds):
            network = pruned(recipe, seed)
            ratio = count(network.original)[0] / count(network.model)[0]
            row = {"network": recipe.name, "seed": seed, "macs_ratio": ratio, "accuracy": accuracies(network)}
            rows.append(row | ({"cost": costs(network)} if seed == 0 else {}))
            print(f"{recipe.name}, seed {seed}: {ratio:.2f} times fewer MACs", flush=True)
    print("", *table(rows), "", *cost_table(rows), sep="\n")
    if arguments.out:
        write(arguments.out, facts, rows=rows)
        print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
