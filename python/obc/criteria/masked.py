"""Masked evaluation: the model with units at zero, one forward pass over the batches for each unit or set of units."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

import torch

from obc.criteria.masked_model import Evaluation, Masks, Metric, nothing_masked, units_left, with_unit
from obc.criteria.protocol import About, CriterionError, GroupScores, MeasuredCriterion
from obc.criteria.subject import Subject
from obc.model.arguments import one_of
from obc.model.usable_batches import UsableBatches


class MaskedEvaluation(MeasuredCriterion):
    """S_u = metric with u at zero minus metric of the present model: the oracle; ``rounds`` > 1 is a greedy search.

    It measures what the pruned model would compute (:mod:`obc.structures.masking`). "loss": the mean loss over the
    batches. "kl": KL(unpruned || masked) of the outputs' softmax over the last dimension. "mse": mean squared
    difference of the outputs.

    Greedy: in each of ``rounds`` rounds the cheapest share of the remaining units of all groups is removed, then the
    others are measured again. A unit's score is its metric in the round of its removal, at least that of earlier
    rounds.

    Cost: one forward pass over the batches per unit and round: suits small models, or few units such as heads.

    Args:
        metric: "loss", "kl" or "mse".
        rounds: 1 measures every unit alone.

    Raises:
        ValueError: ``rounds`` is below 1, or the metric unknown.
    """

    name = "masked"
    about = About(
        "oracle, MultiPruner and BlockPruner (greedy), HierarchicalPrune",
        "oracle: arXiv 1611.06440; MultiPruner: arXiv 2501.09949",
        "loss, KL or MSE with u masked, minus that of the present model",
        "labels",
        missing="MultiPruner's order of kinds",
    )
    per_cost = True

    def __init__(self, metric: Metric = "loss", rounds: int = 1) -> None:
        one_of("metric", metric, get_args(Metric))
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.metric, self.rounds = metric, rounds

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: the increase of the metric if the unit is masked; a pass per unit and round."""
        evaluation = Evaluation(subject, self.metric)
        masks = nothing_masked(subject)
        base = evaluation(masks)
        found = {
            name: torch.full(mask.shape, float("nan"), dtype=torch.float64, device="cpu")
            for name, mask in masks.items()
        }
        total = sum(map(len, masks.values()))
        highest = -float("inf")
        for turn in range(self.rounds):
            scores = [(evaluation(with_unit(masks, name, unit)) - base, name, unit) for name, unit in units_left(masks)]
            gone = total * (turn + 1) // self.rounds - total * turn // self.rounds
            last = turn == self.rounds - 1
            worst, name, unit = max(scores, default=(0.0, "", 0))
            if worst == math.inf:
                raise CriterionError(
                    f"with unit {unit} of {name!r} masked, the {self.metric} is not finite, although it is without; "
                    "leave the layer out with ignored_layers, or pass another criterion="
                )
            for value, name, unit in sorted(scores)[: len(scores) if last else gone]:
                highest = max(highest, value) if self.rounds > 1 else value
                found[name][unit] = highest
                masks[name][unit] = True
        return found


class BeamSearch(MeasuredCriterion):
    """A unit's score is the metric when it was removed, in the best of the sets that a beam search keeps.

    From the ``width`` best sets of s units each, all sets of s + 1 are measured, and the ``width`` best are kept. Units
    outside the final set score the metric of that set plus the unit, as if after one more step.

    Cost: width forward passes over the batches for every unit and removal.

    Args:
        removals: number of units that the search removes.
        width: number of sets that are kept.
        metric: "mse" (Skrr), "kl" or "loss".
        null: further batches whose mean metric is added: Skrr's null prompt.

    Raises:
        ValueError: ``removals`` or ``width`` is below 1, or the metric unknown.
    """

    name = "beam"
    about = About(
        "Skrr (skip)",
        "arXiv 2502.08690",
        "MSE(f, f with the set masked) when u joins the best set of a beam; plus that of the null prompt",
        "forward",
        kinds="channels, heads, blocks",
        missing="re-use of a neighbouring block if the distance falls",
    )
    per_cost = False

    def __init__(
        self, removals: int = 1, width: int = 3, metric: Metric = "mse", null: Iterable[Any] | None = None
    ) -> None:
        if removals < 1 or width < 1:
            raise ValueError(f"removals and width must be at least 1, got {removals} and {width}")
        one_of("metric", metric, get_args(Metric))
        self.removals, self.width, self.metric, self.null = removals, width, metric, null

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: the metric when a unit was removed, or if it were removed next."""
        evaluations = [Evaluation(subject, self.metric)]
        if self.null is not None:
            evaluations.append(Evaluation(replace(subject, batches=UsableBatches(list(self.null))), self.metric))
        empty = nothing_masked(subject)
        beam: list[tuple[list[tuple[float, str, int]], Masks]] = [([], empty)]
        removals = min(self.removals, sum(map(len, empty.values())) - 1)
        for _ in range(removals):
            found: dict[frozenset[tuple[str, int]], tuple[list[tuple[float, str, int]], Masks]] = {}
            for path, masks in beam:
                for name, unit in units_left(masks):
                    key = frozenset([*((n, u) for _, n, u in path), (name, unit)])
                    if key not in found:
                        masked = with_unit(masks, name, unit)
                        value = sum(evaluation(masked) for evaluation in evaluations)
                        found[key] = ([*path, (value, name, unit)], masked)
            beam = sorted(found.values(), key=lambda entry: entry[0][-1])[: self.width]
        path, masks = beam[0]
        scores = {name: torch.zeros(mask.shape, dtype=torch.float64, device="cpu") for name, mask in empty.items()}
        highest = -float("inf")
        for value, name, unit in path:
            highest = max(highest, value)
            scores[name][unit] = highest
        for name, unit in units_left(masks):
            value = sum(evaluation(with_unit(masks, name, unit)) for evaluation in evaluations)
            scores[name][unit] = max(highest, value)
        return scores
