"""Masked evaluation: the model with units at zero, one forward pass over the batches for each unit."""

from __future__ import annotations

import math

import torch

from obc.criteria.masked_model import Evaluation, Masks, Metric, check_metric, with_unit
from obc.criteria.protocol import About, CriterionError, GroupScores, MeasuredCriterion, Subject
from obc.structures.masking import unmaskable


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
        check_metric(metric)
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.metric, self.rounds = metric, rounds

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: the increase of the metric if the unit is masked; a pass per unit and round."""
        evaluation = Evaluation(subject, self.metric)
        refused = unmaskable(subject.model, subject.groups)
        groups = [group for group in subject.groups if group.name not in refused]
        masks: Masks = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        base = evaluation(masks)
        found = {group.name: torch.full((group.size,), float("nan"), dtype=torch.float64) for group in groups}
        total = sum(group.size for group in groups)
        highest = -float("inf")
        for turn in range(self.rounds):
            scores = [
                (evaluation(with_unit(masks, group.name, unit)) - base, group.name, unit)
                for group in groups
                for unit in range(group.size)
                if not masks[group.name][unit]
            ]
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
