"""The choice of channels: every criterion of obc.prune, jointly and one by one, on small networks of three kinds.

    python -m benchmarks.bench_selection --out results.jsonl [--stage prune tune] [--seeds 0 1 2] [--only digits/vgg]
    python -m benchmarks.bench_selection --out results.jsonl --report [--plot picture.png] [--json results.json]

One case is a network (task, kind, seed; trained from scratch) and a method. Stage "prune": the network loses MACs in
steps that are the same for every method, scored again before each, and is evaluated when it passes 1.3x, 1.5x, 2x and
3x fewer: as it is ("raw", in a run whose norms are never touched), with its BatchNorm statistics re-estimated on the
training images before every re-scoring ("bn"), and that network compensated sequentially from CALIBRATION unlabelled
training images ("seq"). Stage "tune": the "bn" network at 2x and 3x is fine-tuned for a short and a longer time, with
the learning rate that was best on the validation split of seed 0 for that task, kind, method, ratio and budget.

Every case is appended to the file as one line as soon as it is done; a killed run resumes. Accuracies
are on the test split, which decides nothing: methods have no options that were chosen by it, learning rates are chosen
on the validation split.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from benchmarks.harness import provenance
from benchmarks.selection_tasks import SIZE, TASKS, Task
from benchmarks.small_vgg import VGG
from obc.demo import models
from obc.demo.data import Digits, Split
from obc.demo.train import accuracy, train
from obc.pruning.report import PruningResult

RATIOS = (1.3, 1.5, 2.0, 3.0)
STEPS = (2, 1, 2, 3)  # re-scorings on the way to each ratio, from the one before
IMAGES, BATCHES = 1024, 64  # training images that criteria read, in so many batches: the rows, if not of samples
CALIBRATION = 256
TUNED_RATIOS = (2.0, 3.0)
EPOCHS = {"short": 2, "longer": 10}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of network: how it is built with the demo's widths, and how many epochs it trains on each task."""

    name: str
    build: Any
    epochs: Mapping[str, int]
    head: str

    def network(self, classes: int) -> nn.Module:
        """A fresh network for so many classes."""
        network: nn.Module = self.build()
        parent, _, attribute = self.head.rpartition(".")
        owner = network.get_submodule(parent)
        old = getattr(owner, attribute)
        setattr(owner, attribute, nn.Linear(old.in_features, classes))
        return network


KINDS = (
    Kind("resnet", models.ResidualCNN, {"digits": 10, "textures": 8}, "head"),
    Kind("vgg", VGG, {"digits": 10, "textures": 8}, "classifier.2"),
    Kind("vit", models.Transformer, {"digits": 30, "textures": 30}, "head"),
)

PAPER: dict[str, Any] = {"selection": "independent", "slices": "all", "per_macs": False}
METHODS: dict[str, dict[str, Any]] = {
    "JC joint, per MACs": {"selection": "joint"},
    "JC independent (paper)": PAPER,
    "JC joint": {"selection": "joint", "per_macs": False},
    "JC independent, per MACs": {"selection": "independent"},
    "JC joint, label-free, per MACs": {"selection": "joint", "labels": False},
    "JC joint, sample rows, per MACs": {"selection": "joint", "rows": "sample"},
    "JC independent, sample rows, per MACs": {"selection": "independent", "rows": "sample"},
    "Taylor": PAPER | {"criterion": "taylor"},
    "Fisher": PAPER | {"criterion": "fisher"},
    "L1": PAPER | {"criterion": "l1"},
    "L2": PAPER | {"criterion": "l2"},
    "BN scale": PAPER | {"criterion": "bn_scale"},
    "FPGM": PAPER | {"criterion": "fpgm"},
    "WHC": PAPER | {"criterion": "whc"},
    "random": PAPER | {"criterion": "random"},
    "reconstruction": PAPER | {"criterion": "reconstruction"},
}


# --- networks -------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A trained network with its data and its pruned copies by (method, ratio)."""

    task: Task
    kind: Kind
    seed: int
    splits: Digits
    model: nn.Module
    pruned: dict[tuple[str, float], nn.Module] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.task.name}/{self.kind.name}/{self.seed}"


def trained(task: Task, kind: Kind, seed: int) -> Network:
    """The network of a seed, deterministic on one machine."""
    splits = task.splits(seed)
    torch.manual_seed(seed)
    model = train(kind.network(task.classes), splits.train, epochs=kind.epochs[task.name], seed=seed)
    return Network(task, kind, seed, splits, model)


def batches_of(split: Split, seed: int) -> list[Batch]:
    """``BATCHES`` batches of ``IMAGES`` images, in random order."""
    generator = torch.Generator().manual_seed(seed)
    read = Split(split.images[:IMAGES], split.labels[:IMAGES])
    return list(read.batches(IMAGES // BATCHES, generator))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) of every image."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def loss_of(method: str) -> Callable[[nn.Module, Batch], Tensor] | None:
    """The loss whose gradients a method uses."""
    options = METHODS[method]
    if not options.get("labels", True):
        return None
    return losses if options.get("rows") == "sample" else loss


def schedule() -> list[float]:
    """Shares of MACs after every step: geometric between the ratios."""
    shares, before = [], 1.0
    for ratio, steps in zip(RATIOS, STEPS, strict=True):
        after = 1 / ratio
        shares += [before * (after / before) ** (step / steps) for step in range(1, steps)] + [after]
        before = after
    return shares


# --- stages ---------------------------------------------------------------------------------------------------


def prune_network(network: Network, method: str) -> dict[str, Any]:
    """Accuracies at every ratio, raw, recalibrated and compensated, and what was kept."""
    start = time.perf_counter()
    ratios: dict[str, dict[str, Any]] = {str(ratio): {} for ratio in RATIOS}

    def recalibrated(ratio: float, result: PruningResult) -> None:
        found = ratios[str(ratio)]
        found["bn"] = accuracy(result.model, network.splits.test)
        found["macs_ratio"] = round(result.report.macs_before / result.report.macs_after, 4)
        found["seq"] = compensated_accuracy(network, result)

    def untouched(ratio: float, result: PruningResult) -> None:
        ratios[str(ratio)]["raw"] = accuracy(result.model, network.splits.test)

    report = run(network, method, True, recalibrated)
    if any(isinstance(module, nn.BatchNorm2d) for module in network.model.modules()):
        run(network, method, False, untouched)
    else:
        for found in ratios.values():
            found["raw"] = found["bn"]
    seconds = time.perf_counter() - start
    return {"ratios": ratios, "seconds": seconds, "parts": report["seconds"], "widths": report["widths"]}


def compensated_accuracy(network: Network, result: PruningResult) -> float:
    """Accuracy of a compensated copy on the test split."""
    model = copy.deepcopy(result.model)
    images = network.splits.train.images[:CALIBRATION]
    obc.compensate(model, network.model, result.plan, list(images.split(32)), mode="seq", progress=False)
    return accuracy(model, network.splits.test)


def run(
    network: Network, method: str, recalibrate: bool, at_ratio: Callable[[float, PruningResult], None]
) -> dict[str, Any]:
    """Prune a copy of the network as far as the last ratio; its report. ``at_ratio`` sees it at every ratio."""
    options = METHODS[method]
    model = copy.deepcopy(network.model)

    def on_step(result: PruningResult) -> None:
        for ratio in RATIOS:
            if result.report.steps[-1].target == 1 / ratio:
                at_ratio(ratio, result)

    result = obc.prune(
        model,
        torch.zeros(1, 1, SIZE, SIZE),
        batches_of(network.splits.train, network.seed),
        loss_of(method),
        macs=1 / RATIOS[-1],
        steps=schedule(),
        recalibrate=recalibrate,
        seed=network.seed,
        on_step=on_step,
        progress=False,
        **prunable(model),
        **options,
    )
    return result.report.as_dict()


def prunable(model: nn.Module) -> dict[str, Any]:
    """Whole heads and hidden units of a transformer, not its residual stream; otherwise all layers but the outputs."""
    if not isinstance(model, models.Transformer):
        return {}
    layers = [layer for layer in model.layers if isinstance(layer, models.EncoderLayer)]
    heads = layers[0].attention.query.out_features // layers[0].attention.head_width
    projections = [p for layer in layers for p in (layer.attention.query, layer.attention.key, layer.attention.value)]
    return {"ignored_layers": [model.embed], "num_heads": dict.fromkeys(projections, heads)}


def tune(network: Network, method: str, ratio: float, epochs: int, learning_rate: float) -> dict[str, float]:
    """Accuracies of the recalibrated pruned network after fine-tuning."""
    if (method, ratio) not in network.pruned:

        def keep(reached: float, result: PruningResult) -> None:
            network.pruned[method, reached] = copy.deepcopy(result.model)

        run(network, method, True, keep)
    model = copy.deepcopy(network.pruned[method, ratio])
    train(model, network.splits.train, epochs=epochs, learning_rate=learning_rate, seed=network.seed)
    splits = network.splits
    return {"validation": accuracy(model, splits.validation), "test": accuracy(model, splits.test)}


# --- running --------------------------------------------------------------------------------------------------


class Results:
    """Cases by key, in a file to which each is appended when it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[str, dict[str, Any]] = {}
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            self.cases = {line["key"]: line for line in lines if "key" in line}

    def begin(self) -> None:
        """Say which run the cases that follow are of."""
        self._append({"provenance": provenance(1, torch.get_num_threads())})

    def add(self, key: str, values: Mapping[str, Any]) -> None:
        self.cases[key] = {"key": key, **values}
        self._append(self.cases[key])

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def networks(seeds: Sequence[int], only: str) -> Iterator[tuple[Task, Kind, int]]:
    for seed in seeds:
        for task in TASKS:
            for kind in KINDS:
                if f"{task.name}/{kind.name}".startswith(only):
                    yield task, kind, seed


def applicable(method: str, kind: Kind) -> bool:
    return method != "BN scale" or kind.name != "vit"


def run_prune_stage(results: Results, seeds: Sequence[int], only: str, methods: Sequence[str]) -> None:
    for task, kind, seed in networks(seeds, only):
        wanted = [m for m in methods if applicable(m, kind)]
        name = f"{task.name}/{kind.name}/{seed}"
        missing = [method for method in wanted if f"prune/{name}/{method}" not in results.cases]
        if not missing:
            continue
        network = trained(task, kind, seed)
        if f"network/{name}" not in results.cases:
            results.add(f"network/{name}", {"test": accuracy(network.model, network.splits.test)})
        for method in missing:
            results.add(f"prune/{name}/{method}", prune_network(network, method))
            print(f"{name} {method}", flush=True)


def run_tune_stage(results: Results, seeds: Sequence[int], only: str, methods: Sequence[str]) -> None:
    for task, kind, seed in networks(seeds, only):
        network: Network | None = None
        for method in (m for m in methods if applicable(m, kind)):
            for ratio in TUNED_RATIOS:
                for budget, epochs in EPOCHS.items():
                    case = f"{task.name}/{kind.name}/{{}}/{method}/{ratio}/{budget}"
                    rates: Sequence[float] = LEARNING_RATES
                    if seed != min(seeds):
                        rates = [best_rate(results, case.format(min(seeds)))]
                    for rate in rates:
                        key = f"tune/{case.format(seed)}/{rate}"
                        if key not in results.cases:
                            network = network or trained(task, kind, seed)
                            results.add(key, tune(network, method, ratio, epochs, rate))
                            print(key, flush=True)


def best_rate(results: Results, case: str) -> float:
    """The learning rate that did best on the validation split."""
    return max(LEARNING_RATES, key=lambda rate: results.cases[f"tune/{case}/{rate}"]["validation"])


# --- reporting ------------------------------------------------------------------------------------------------


def accuracies(results: Results, task: str, kind: str, method: str, ratio: float, state: str) -> dict[int, float]:
    """Seed -> test accuracy in percent, of a state: raw, bn, seq, short or longer."""
    found = {}
    for key, case in results.cases.items():
        if state in EPOCHS:
            if key.startswith(f"tune/{task}/{kind}/") and f"/{method}/{ratio}/{state}/" in key:
                seed, rate = int(key.split("/")[3]), float(key.rsplit("/", 1)[1])
                first = min(int(k.split("/")[3]) for k in results.cases if k.startswith(f"tune/{task}/{kind}/"))
                first_key = f"{task}/{kind}/{first}/{method}/{ratio}/{state}"
                tried = all(
                    f"tune/{first_key}/{one}" in results.cases for one in LEARNING_RATES
                )  # else it was cut short
                if tried and rate == best_rate(results, first_key):
                    found[seed] = 100 * case["test"]
        elif key.startswith(f"prune/{task}/{kind}/") and key.split("/", 4)[4] == method:
            found[int(key.split("/")[3])] = 100 * case["ratios"][str(ratio)][state]
    return found


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation over seeds and, against another method on the same networks, paired differences."""

    mean: float
    spread: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}" if self.seeds > 1 else f"{self.mean:.1f} (one)"


def tables(results: Results) -> str:
    """Markdown: per task and kind a table of mean ± standard deviation over seeds, then paired differences."""
    lines = []
    for task in TASKS:
        for kind in KINDS:
            prefix = f"network/{task.name}/{kind.name}/"
            seeds = sorted(int(key.removeprefix(prefix)) for key in results.cases if key.startswith(prefix))
            if not seeds:
                continue
            full = Cell.of([100 * results.cases[f"{prefix}{seed}"]["test"] for seed in seeds])
            lines += [f"\n### {task.name}, {kind.name}: {full} % unpruned, {len(seeds)} seeds\n"]
            lines += _table(results, task.name, kind.name)
    if results.cases:
        for against in ("JC independent (paper)", "JC independent, per MACs"):
            lines += [f"\n### Paired differences to {against}, mean over ratios\n", *_paired(results, against)]
        lines.append(f"\n{_select_share(results)}")
    return "\n".join(lines)


def _select_share(results: Results) -> str:
    """How much of pruning obc.select takes, of methods that score by rows."""
    parts = [case["parts"] for key, case in results.cases.items() if key.startswith("prune/") and "/JC" in key]
    shares = [100 * part["select"] / sum(part.values()) for part in parts]
    return (
        f"obc.select: {statistics.median(shares):.1f} % of obc.prune (median of {len(shares)} runs)" if shares else ""
    )


def _table(results: Results, task: str, kind: str) -> list[str]:
    columns = [(ratio, state) for ratio in RATIOS for state in ("raw", "bn", "seq")]
    columns += [(ratio, budget) for ratio in TUNED_RATIOS for budget in EPOCHS]
    header = ["method", *[f"{ratio:g}x {state}" for ratio, state in columns]]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for method in METHODS:
        cells = []
        for ratio, state in columns:
            values = accuracies(results, task, kind, method, ratio, state)
            cells.append(str(Cell.of(list(values.values()))) if values else "")
        if any(cells):
            lines.append("| " + " | ".join([method, *cells]) + " |")
    return lines


def paired(results: Results, kinds: Sequence[str], method: str, against: str, state: str) -> list[float]:
    """Per network the mean over ratios of the difference in points."""
    ratios = TUNED_RATIOS if state in EPOCHS else RATIOS
    found = []
    for task in TASKS:
        for kind in kinds:
            one = [accuracies(results, task.name, kind, method, ratio, state) for ratio in ratios]
            other = [accuracies(results, task.name, kind, against, ratio, state) for ratio in ratios]
            for seed in set.intersection(*[set(values) for values in (*one, *other)]):
                found.append(statistics.mean(a[seed] - b[seed] for a, b in zip(one, other, strict=True)))
    return found


def _paired(results: Results, against: str) -> list[str]:
    """Points of accuracy above ``against``: mean ± standard deviation over n networks."""
    states = ("raw", "bn", "seq", *EPOCHS)
    header = ["method", *[f"{nets}, {state}" for nets in ("conv nets", "vit") for state in states]]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for method in METHODS:
        cells = []
        for kinds in (("resnet", "vgg"), ("vit",)):
            for state in states:
                values = paired(results, kinds, method, against, state)
                cells.append(f"{Cell.of(values)} (n={len(values)})" if values else "")
        if method != against and any(cells):
            lines.append("| " + " | ".join([method, *cells]) + " |")
    return lines


def draw(results: Results, path: Path) -> None:
    """Accuracy over ratios: a row per state, a column per task and kind."""
    from matplotlib.figure import Figure

    shown = [method for method in METHODS if any(key.endswith(f"/{method}") for key in results.cases)]
    panels = [(task.name, kind.name) for task in TASKS for kind in KINDS]
    figure = Figure(figsize=(4 * len(panels), 10), layout="constrained")
    grid = figure.subplots(3, len(panels), squeeze=False, sharex=True)
    for line, state in zip(grid, ("raw", "bn", "seq"), strict=True):
        for axis, (task, kind) in zip(line, panels, strict=True):
            for index, method in enumerate(shown):
                points = [accuracies(results, task, kind, method, ratio, state) for ratio in RATIOS]
                means = [statistics.mean(values.values()) if values else float("nan") for values in points]
                style = "-" if method.startswith("JC") else "--"
                axis.plot(RATIOS, means, style, marker="osD^vP*"[index % 7], label=method, color=f"C{index % 10}")
            axis.set_title(f"{task}, {kind}, {state}", fontsize=10)
            axis.grid(alpha=0.3)
    grid[-1][0].set_xlabel("times fewer MACs")
    grid[0][0].set_ylabel("test accuracy, %")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=90)


def write_json(results: Results, path: Path) -> None:
    """Everything in one file, with the provenance of every run that added to it."""
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    runs = [line["provenance"] for line in lines if "provenance" in line]
    path.write_text(json.dumps({"provenance": runs, "cases": list(results.cases.values())}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Which channels to remove: see the module's docstring.")
    parser.add_argument("--out", type=Path, required=True, help="the file of results, one case a line")
    parser.add_argument("--stage", nargs="+", choices=("prune", "tune"), default=["prune", "tune"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--only", default="", help="networks whose task/kind starts so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print tables of what is there, and run nothing")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.out)
    if not arguments.report:
        warnings.simplefilter("ignore", UserWarning)
        results.begin()
        if "prune" in arguments.stage:
            run_prune_stage(results, arguments.seeds, arguments.only, arguments.methods)
        if "tune" in arguments.stage:
            run_tune_stage(results, arguments.seeds, arguments.only, arguments.methods)
    print(tables(results))
    if arguments.plot:
        draw(results, arguments.plot)
    if arguments.json:
        write_json(results, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
