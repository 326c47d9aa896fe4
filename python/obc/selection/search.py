"""Allocation by evolutionary search for widths that disturb the output least, measured with units masked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from obc.selection.allocation import Allocation, Global, Uniform
from obc.selection.task import Task

_STARTS: dict[str, type[Allocation]] = {"uniform": Uniform, "global": Global}
_ATTEMPTS = 50  # mutations tried for one child before its parent is used unchanged


class Search:
    """Elitist evolution over the groups' widths (DarwinLM, Týr-the-Pruner).

    The first parents are the widths of ``starts``, so on the batches that fitness is measured on, the result disturbs
    the output no more than the best of them.

    Scores decide which units a group loses. A child moves one level from a group to another of the same kind, one to
    ``mutations`` times, and still frees the budget. Fitness is the loss of the model's output with the chosen units
    masked (:class:`obc.criteria.MaskedEvaluation`); with ``compensated`` their consumers are also compensated by plain
    least squares.

    Cost: len(starts) + generations * offspring forward passes over the batches for fitness. With ``compensated``, also
    one pass over the other batches for the consumers' Gram matrices (8 bytes times the square of their inputs each),
    and one least-squares problem for each new width of a group.

    Args:
        generations: number of generations.
        offspring: children per generation.
        survivors: number of parents of the next generation, the best of parents and children.
        levels: number of levels of a group's widths.
        mutations: the most moves that make a child.
        metric: "kl", "mse" or "loss".
        seed: seed of the mutations.
        batches: measure fitness on the first so many batches; None uses all.
        compensated: measure fitness after compensation, which uses the batches that fitness is not measured on.
        starts: "uniform" (equal shares), "global" (the widths at which units of all groups compete), or both. DarwinLM
            and Týr start from equal shares.

    Raises:
        ValueError: a number is below 1, ``levels`` below 2, or ``starts`` or ``metric`` has another value.
    """

    evaluates = True

    def __init__(
        self,
        generations: int = 10,
        offspring: int = 8,
        survivors: int = 2,
        levels: int = 16,
        mutations: int = 3,
        metric: str = "kl",
        seed: int = 0,
        batches: int | None = None,
        compensated: bool = False,
        starts: Sequence[Literal["uniform", "global"]] = ("uniform", "global"),
    ) -> None:
        counts = {"generations": generations, "offspring": offspring, "survivors": survivors}
        if batches is not None:
            counts["batches"] = batches
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if levels < 2 or mutations < 1:
            raise ValueError(f"levels must be at least 2 and mutations at least 1, got {levels} and {mutations}")
        if not starts or not set(starts) <= set(_STARTS):
            raise ValueError(f"starts takes one or both of 'uniform' and 'global', got {tuple(starts)}")
        self.generations, self.offspring, self.survivors = generations, offspring, survivors
        self.levels, self.mutations, self.metric, self.seed = levels, mutations, metric, seed
        self.batches, self.compensated, self.starts = batches, compensated, tuple(dict.fromkeys(starts))
        self.history: list[float] = []

    def select(self, task: Task) -> dict[str, Tensor]:
        """The lowest units of each group, as many as the best widths found remove."""
        if task.evaluate is None:
            raise ValueError("allocation='search' measures the model: it is for obc.prune, not for scores of a file")
        if task.families:
            raise ValueError("a search gives groups different widths: it can't be had with equal ones (uniform=True)")
        chance, order = random.Random(self.seed), {name: _ranked(values) for name, values in task.scores.items()}
        scores = {group.name: task.scores[group.name] for group in task.scored()}
        removed = [_STARTS[start]().select(replace(task, scores=scores)) for start in self.starts]
        starts = [{name: len(units.get(name, ())) for name in scores} for units in removed]

        def chosen(counts: Mapping[str, int]) -> dict[str, Tensor]:
            return {name: order[name][:count].sort().values for name, count in counts.items()}

        assert task.evaluate is not None
        parents = sorted(((task.evaluate(chosen(counts)), counts) for counts in starts), key=lambda entry: entry[0])
        self.history = [parents[0][0]]
        for _ in range(self.generations):
            children: list[tuple[float, dict[str, int]]] = []
            for index in range(self.offspring):
                child = self._child(task, parents[index % len(parents)][1], chance)
                if all(child != counts for _, counts in [*parents, *children]):
                    children.append((task.evaluate(chosen(child)), child))
            parents = sorted([*parents, *children], key=lambda entry: entry[0])[: self.survivors]
            self.history.append(parents[0][0])
        return chosen(parents[0][1])

    def _child(self, task: Task, parent: Mapping[str, int], chance: random.Random) -> dict[str, int]:
        kinds: dict[str, list[str]] = {}
        for group in task.scored():
            kinds.setdefault(group.kind, []).append(group.name)
        sizes = {group.name: group.size for group in task.scored()}
        for _ in range(_ATTEMPTS):
            child = dict(parent)
            for _ in range(chance.randint(1, self.mutations)):
                names = chance.choice([names for names in kinds.values() if len(names) > 1] or [list(sizes)])
                more, less = chance.choice(names), chance.choice(names)
                if more == less:
                    continue
                child[more] += self._step(task, more, sizes[more])
                child[less] -= self._step(task, less, sizes[less])
            if child != parent and self._fits(task, child, sizes):
                return child
        return dict(parent)

    def _step(self, task: Task, name: str, size: int) -> int:
        multiple = task.round_to.get(name, 1)
        return max(multiple, size // self.levels // multiple * multiple)

    def _fits(self, task: Task, counts: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
        for name, count in counts.items():
            stays = sizes[name] - count
            if count < 0 or stays < task.min_units.get(name, 1):
                return False
            if count and stays % task.round_to.get(name, 1):
                return False
        return task.suffices(counts)


def _ranked(values: Tensor) -> Tensor:
    scores = values if values.dim() == 1 else values.double().square().sum(0)
    return scores.argsort(stable=True).cpu()
