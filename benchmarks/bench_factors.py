"""Fine-tuning with whole factors against factors of the dropped channels: ``python -m benchmarks.bench_factors``.

The demo's networks, pruned by the Jacobian Criterion to half their MACs as in :mod:`benchmarks.bench_compensation`,
then fine-tuned for a few epochs: naively, and by Equivalent Pruning with ``factors="full"`` and "reduced". All
have the same epochs, batches, optimizer, schedule and learning rates to try; each takes the one that does best on the
validation split, and the table shows its accuracy on the test split, which is read once.
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

from benchmarks.bench_compensation import NETWORKS, Pruned, pruned
from benchmarks.harness import RESULTS, provenance, write
from obc.demo.train import accuracy, train
from obc.recovery import equivalent_pruning

WAYS = ("naive", "full", "reduced")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAY = 0.05


def tuned(network: Pruned, way: str, learning_rate: float, epochs: int, seed: int) -> torch.nn.Module:
    """A fine-tuned plain copy of the pruned network."""
    model = copy.deepcopy(network.model)
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "weight_decay": WEIGHT_DECAY}
    if way == "naive":
        return train(model, network.data.train, seed=seed, **options)
    folded = equivalent_pruning(model, network.original.state_dict(), network.plan, factors=way)  # type: ignore[arg-type]
    groups = folded.param_groups(learning_rate, WEIGHT_DECAY)
    train(folded.model, network.data.train, seed=seed, parameters=groups, **options)
    return folded.merge()


def row(network: Pruned, way: str, epochs: int, seed: int) -> dict[str, Any]:
    """The learning rate that the validation split chose, and the accuracies in percent."""
    tried = {rate: tuned(network, way, rate, epochs, seed) for rate in LEARNING_RATES}
    validation = {rate: 100 * accuracy(model, network.data.validation) for rate, model in tried.items()}
    best = max(LEARNING_RATES, key=validation.__getitem__)
    return {"way": way, "learning_rate": best, "validation": validation, "test": network.accuracy(tried[best])}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_factors")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="networks so small gain nothing from more (%(default)s)")
    parser.add_argument("--network", choices=[recipe.name for recipe in NETWORKS], help="only this one")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_factors.json", help="write JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(1, arguments.threads) | {"epochs": arguments.epochs}
    print(f"{'test accuracy, %':16} {'seed':>4} {'pruned':>7} " + " ".join(f"{way:>9}" for way in WAYS))
    rows: list[dict[str, Any]] = []
    for recipe in NETWORKS:
        if arguments.network not in (None, recipe.name):
            continue
        network_rows = []
        for seed in range(arguments.seeds):
            network = pruned(recipe, seed)
            found = [row(network, way, arguments.epochs, seed) for way in WAYS]
            network_rows.append([entry["test"] for entry in found])
            rows += [{"network": recipe.name, "seed": seed, **entry} for entry in found]
            cells = " ".join(f"{test:9.1f}" for test in network_rows[-1])
            print(f"{recipe.name:16} {seed:4} {network.accuracy(network.model):7.1f} {cells}", flush=True)
        if len(network_rows) > 1:
            means = (f"{statistics.fmean(c):.1f}±{statistics.stdev(c):.1f}" for c in zip(*network_rows, strict=True))
            print(f"{'':16} mean {'':7} " + " ".join(f"{cell:>9}" for cell in means))
    if arguments.out:
        write(arguments.out, facts, rows=rows)
        print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
