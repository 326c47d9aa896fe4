"""The comparison: train a network, prune copies of it by each criterion, evaluate them on unseen digits.

All criteria share one protocol: Torch-Pruning's pruner with global ranking removes a fixed share of the channels per
step, and the criterion is scored again on the training digits before each step, until the network reaches a target of
fewer MACs. There it is evaluated without fine-tuning: as pruned, and recovered in each way of :mod:`obc.demo.recover`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.autograd.profiler import profile

from obc.demo.criteria import CRITERIA, Ranking
from obc.demo.data import Digits, digits
from obc.demo.models import IMAGE_SIZE, ResidualCNN, Transformer
from obc.demo.recover import recovered
from obc.demo.train import accuracy, train
from obc.integrations.torch_pruning.removable import removed_groups
from obc.model.timing import median_seconds
from obc.recovery import PruningPlan
from obc.structures.traced_plan import prune_step

TARGETS = (1.3, 1.5, 2.0)  # times fewer MACs
Weights = dict[str, np.ndarray[Any, Any]]
STEPS = 32  # each removes 1 / STEPS of the original channels


@dataclass(frozen=True)
class Recipe:
    """A network of the demo and how long it trains."""

    name: str
    build: Callable[[], nn.Module]
    epochs: int


@dataclass(frozen=True)
class PrunedNetwork:
    """One pruned network: its target and actual reduction of MACs, and its accuracy on the test split.

    ``accuracy`` has a value for each way of ``obc.demo.recover.WAYS``, None if that way does not apply.
    """

    target: float
    macs_ratio: float
    accuracy: Mapping[str, float | None]


@dataclass(frozen=True)
class CriterionResult:
    """The networks pruned by one criterion, and the cost of scoring the unpruned network by it."""

    criterion: str
    points: tuple[PrunedNetwork, ...]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class ModelResult:
    """One network: unpruned, and its results."""

    model: str
    accuracy: float
    macs: int
    parameters: int
    criteria: tuple[CriterionResult, ...]


RECIPES = (Recipe("residual CNN", ResidualCNN, epochs=10), Recipe("transformer", Transformer, epochs=30))


def run(
    seed: int = 0,
    recipes: Sequence[Recipe] = RECIPES,
    criteria: Sequence[Ranking] = CRITERIA,
    targets: Sequence[float] = TARGETS,
    say: Callable[[str], None] = lambda line: None,
    *,
    processes: int = 1,
) -> list[ModelResult]:
    """Train and prune every network by every criterion. Deterministic given ``seed``, except for the seconds.

    Args:
        seed: seed of the splits, the initial weights, the order of training and the random criterion.
        targets: times fewer MACs, ascending.
        say: called with a line before each long part.
        processes: how many networks are trained and pruned at a time. More than 1 starts Python anew for each of
            them, so recipes and criteria must be picklable. Scoring is timed alone, afterwards.
    """
    data = digits(seed)
    slowest_first = criteria[::-1]  # those that read data stand last; no process waits long for another at the end
    with one_thread(), _in_processes(processes) as each:
        say(f"Training on {len(data.train)} digits: " + ", ".join(f"{r.name}, {r.epochs} epochs" for r in recipes))
        models, pruning, pruned = dict[Recipe, nn.Module](), [], {}
        for recipe, weights in zip(recipes, each(_trained, recipes, repeat(seed)), strict=True):
            models[recipe] = _network(recipe, weights)  # and pruned while others are trained
            pruning.append(each(_pruned, repeat(recipe), slowest_first, repeat(weights), repeat(targets), repeat(seed)))
        for recipe, found in zip(recipes, pruning, strict=True):
            for criterion in slowest_first:
                say(f"Pruning the {recipe.name} by {criterion.name}")
                pruned[recipe, criterion] = next(found)
    with one_thread():
        return [_measured(recipe, models[recipe], criteria, pruned, data, say) for recipe in recipes]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the block: more don't help such small networks, and sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _in_processes(number: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields a ``map`` that runs ``number`` calls at a time, each in a process with one thread, or here if it is 1."""
    if number == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, context, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor.map


def _weights(network: nn.Module) -> Weights:
    """The network's tensors as arrays: torch passes tensors on in shared memory, which is small in containers."""
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def _network(recipe: Recipe, weights: Weights) -> nn.Module:
    """The network with these tensors, in eval mode."""
    network = recipe.build()
    network.load_state_dict({name: torch.tensor(array, device="cpu") for name, array in weights.items()})
    return network.eval()


def _trained(recipe: Recipe, seed: int) -> Weights:
    seeded(seed)
    return _weights(train(recipe.build(), digits(seed).train, epochs=recipe.epochs, seed=seed))


def _pruned(
    recipe: Recipe, criterion: Ranking, weights: Weights, targets: Sequence[float], seed: int
) -> tuple[tuple[PrunedNetwork, ...], int]:
    """What :func:`prune` finds for the network with these weights, and the peak bytes of scoring it."""
    model, scored, data = _network(recipe, weights), _network(recipe, weights), digits(seed)
    seeded(seed)
    points = prune(model, criterion, data, targets)
    return points, peak_bytes(scoring(scored, criterion, data))


def _measured(
    recipe: Recipe,
    model: nn.Module,
    criteria: Sequence[Ranking],
    pruned: Mapping[tuple[Recipe, Ranking], tuple[tuple[PrunedNetwork, ...], int]],
    data: Digits,
    say: Callable[[str], None],
) -> ModelResult:
    """What was found for one network, with the seconds of scoring it by each criterion."""
    say(f"Timing the criteria on the {recipe.name}")
    calls = [scoring(copy.deepcopy(model), criterion, data) for criterion in criteria]
    seconds = median_seconds(calls, torch.device("cpu"), repeats=3, warm_ups=1)
    compared = []
    for criterion, taken in zip(criteria, seconds, strict=True):
        points, peak = pruned[recipe, criterion]
        compared.append(CriterionResult(criterion.name, points, taken, peak))
    return ModelResult(recipe.name, accuracy(model, data.test), *count(model), tuple(compared))


def seeded(seed: int) -> None:
    """Seed every generator that training and pruning draw from."""
    torch.manual_seed(seed)
    random.seed(seed)  # Torch-Pruning 1.5 draws its random importance from here


def example() -> torch.Tensor:
    """A zero image, (1, 1, size, size)."""
    return torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE, device="cpu")


def count(model: nn.Module) -> tuple[int, int]:
    """MACs of one image and parameters, as Torch-Pruning counts them."""
    macs, parameters = tp.utils.count_ops_and_params(model, example())
    return int(macs), int(parameters)


def make_pruner(model: Any, importance: Any) -> Any:
    """The global pruner of Torch-Pruning that every criterion of the demo uses."""
    return tp.pruner.MagnitudePruner(
        model,
        example(),
        importance,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=model.unpruned_layers(),
        # Torch-Pruning's default dictionaries are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )


def prune(model: nn.Module, criterion: Ranking, data: Digits, targets: Sequence[float]) -> tuple[PrunedNetwork, ...]:
    """Prune ``model`` in place, and evaluate it when it first reaches each target."""
    original = copy.deepcopy(model)
    full, _ = count(model)
    points = []
    for target, plan in steps(model, criterion, data, targets):
        kept = recovered(model, original, plan, data.train, lambda network: accuracy(network, data.test))
        points.append(PrunedNetwork(target, full / count(model)[0], kept))
    return tuple(points)


def steps(
    model: nn.Module, criterion: Ranking, data: Digits, targets: Sequence[float]
) -> Iterator[tuple[float, PruningPlan]]:
    """Prune ``model`` in place step by step; yields each target with the plan when the model first reaches it.

    Raises:
        RuntimeError: the pruner's steps ended before a target.
    """
    importance = criterion.importance()
    pruner = make_pruner(model, importance)
    full, _ = count(model)
    left, plan = full, PruningPlan()
    for target in targets:
        while full < target * left:
            if pruner.current_step == STEPS:
                raise RuntimeError(f"{criterion.name}: {STEPS} steps of pruning do not reach {target}x fewer MACs")
            criterion.score(importance, pruner, data.train)
            plan = prune_step(pruner, plan)
            left, _ = count(model)
        yield target, plan


def scoring(model: nn.Module, criterion: Ranking, data: Digits) -> Callable[[], None]:
    """A call that scores all groups of ``model`` once, data included."""
    importance = criterion.importance()
    pruner = make_pruner(model, importance)
    groups = list(removed_groups(pruner))

    def score() -> None:
        criterion.score(importance, pruner, data.train)
        for group in groups:
            importance(group)
        model.zero_grad()

    return score


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had handed out during ``call``, above the amount at its start.

    Counted from every allocation and release in torch's profiler, so it does not depend on the machine. Memory that
    kernels allocate elsewhere is not included.
    """
    # Kineto reads this when it first runs; otherwise it would print its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    gc.collect()  # otherwise reference cycles of earlier calls would count as released during this one
    with profile(use_kineto=True, profile_memory=True) as profiler:  # torch.profiler's would import inductor first
        call()
    assert profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak
