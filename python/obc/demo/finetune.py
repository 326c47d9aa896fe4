"""``obc demo --full``: short fine-tuning after pruning: naive, compensated, and Equivalent Pruning.

All start from the same pruned network and have the same budget: epochs, batches and their order, optimizer, schedule
and learning rates to try. Each chooses its learning rate by the validation split; the test split is used once, for the
chosen network.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from obc.demo.criteria import CRITERIA, Ranking
from obc.demo.data import Digits, Split, digits
from obc.demo.recover import calibration
from obc.demo.run import RECIPES, Recipe, one_thread, seeded, steps
from obc.demo.train import accuracy, train
from obc.recovery import PruningPlan, compensate, equivalent_pruning

SEEDS = 3
TARGET = 2.0  # times fewer MACs
EPOCHS = 5
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Pruned:
    """A pruned network, the unpruned network, and what was kept."""

    model: nn.Module
    original: nn.Module
    plan: PruningPlan


@dataclass(frozen=True)
class Way:
    """A way to fine-tune: ``train`` turns a pruned network, data, a learning rate and a seed into a plain model."""

    name: str
    train: Callable[[Pruned, Digits, float, int], nn.Module]


@dataclass(frozen=True)
class FineTuned:
    """One network and one way: per seed, the chosen learning rate and the test accuracy after it."""

    way: str
    learning_rates: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.fmean(self.accuracies)


@dataclass(frozen=True)
class FineTuning:
    """One network: per seed, its accuracy unpruned and right after pruning, and the results of fine-tuning."""

    model: str
    unpruned: tuple[float, ...]
    pruned: tuple[float, ...]
    ways: tuple[FineTuned, ...]


def _naive(pruned: Pruned, data: Digits, learning_rate: float, seed: int) -> nn.Module:
    return _tune(copy.deepcopy(pruned.model), data, learning_rate, seed)


def _compensated(pruned: Pruned, data: Digits, learning_rate: float, seed: int) -> nn.Module:
    model = copy.deepcopy(pruned.model)
    compensate(model, pruned.original, pruned.plan, calibration(data.train), mode="ls", progress=False)
    return _tune(model, data, learning_rate, seed)


def _equivalent(pruned: Pruned, data: Digits, learning_rate: float, seed: int) -> nn.Module:
    folded = equivalent_pruning(copy.deepcopy(pruned.model), pruned.original.state_dict(), pruned.plan)
    groups = folded.param_groups(learning_rate, WEIGHT_DECAY)
    _tune(folded.model, data, learning_rate, seed, groups)
    return folded.merge()


def _tune(
    model: nn.Module, data: Digits, learning_rate: float, seed: int, groups: Sequence[dict[str, Any]] | None = None
) -> nn.Module:
    return train(
        model,
        data.train,
        epochs=EPOCHS,
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        parameters=groups,
    )


WAYS = (Way("naive", _naive), Way("compensated (ls) first", _compensated), Way("Equivalent Pruning", _equivalent))


def run(
    seed: int = 0,
    recipes: Sequence[Recipe] = RECIPES,
    *,
    seeds: int = SEEDS,
    criterion: Ranking = CRITERIA[-1],
    say: Callable[[str], None] = lambda line: None,
) -> list[FineTuning]:
    """Prune every network by ``criterion`` to ``TARGET`` and fine-tune it in every way, for ``seeds`` seeds."""
    with one_thread():
        return [_compare(recipe, range(seed, seed + seeds), criterion, say) for recipe in recipes]


def _compare(recipe: Recipe, seeds: range, criterion: Ranking, say: Callable[[str], None]) -> FineTuning:
    unpruned, after, found = [], [], []
    for seed in seeds:
        say(f"Fine-tuning the {recipe.name}, seed {seed}: {len(WAYS)} ways, {len(LEARNING_RATES)} learning rates each")
        data = digits(seed)
        pruned = _prune(recipe, criterion, data, seed)
        unpruned.append(accuracy(pruned.original, data.test))
        after.append(accuracy(pruned.model, data.test))
        found.append([_best(way, pruned, data, seed) for way in WAYS])
    ways = []
    for way, by_seed in zip(WAYS, zip(*found, strict=True), strict=True):
        rates, accuracies = zip(*by_seed, strict=True)
        ways.append(FineTuned(way.name, rates, accuracies))
    return FineTuning(recipe.name, tuple(unpruned), tuple(after), tuple(ways))


def _prune(recipe: Recipe, criterion: Ranking, data: Digits, seed: int) -> Pruned:
    seeded(seed)
    original = train(recipe.build(), data.train, epochs=recipe.epochs, seed=seed)
    model = copy.deepcopy(original)
    ((_, plan),) = steps(model, criterion, data, [TARGET])
    return Pruned(model, original, plan)


def _best(way: Way, pruned: Pruned, data: Digits, seed: int) -> tuple[float, float]:
    """(learning rate, test accuracy) of the learning rate that does best on the validation split."""
    tried = []
    for rate in LEARNING_RATES:
        seeded(seed)
        model = way.train(pruned, data, rate, seed)
        merit = (accuracy(model, data.validation), -_loss(model, data.validation))  # the loss breaks ties
        tried.append((merit, rate, model))
    _, rate, model = max(tried, key=itemgetter(0))
    return rate, accuracy(model, data.test)


@torch.no_grad()
def _loss(model: nn.Module, split: Split) -> float:
    return float(F.cross_entropy(model(split.images), split.labels))
