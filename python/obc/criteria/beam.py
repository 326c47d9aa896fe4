"""Masked evaluation with a beam of sets (Skrr)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from obc.criteria.masked_model import Evaluation, Masks, Metric, check_metric, with_unit
from obc.criteria.protocol import About, GroupScores, MeasuredCriterion, Subject
from obc.model.usable_batches import UsableBatches
from obc.structures.masking import unmaskable


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
        check_metric(metric)
        self.removals, self.width, self.metric, self.null = removals, width, metric, null

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: the metric when a unit was removed, or if it were removed next."""
        evaluations = [Evaluation(subject, self.metric)]
        if self.null is not None:
            evaluations.append(Evaluation(replace(subject, batches=UsableBatches(list(self.null))), self.metric))
        refused = unmaskable(subject.model, subject.groups)
        groups = [group for group in subject.groups if group.name not in refused]
        empty: Masks = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        beam: list[tuple[list[tuple[float, str, int]], Masks]] = [([], empty)]
        removals = min(self.removals, sum(group.size for group in groups) - 1)
        for _ in range(removals):
            found: dict[frozenset[tuple[str, int]], tuple[list[tuple[float, str, int]], Masks]] = {}
            for path, masks in beam:
                for name, unit in _left(masks):
                    key = frozenset([*((n, u) for _, n, u in path), (name, unit)])
                    if key not in found:
                        masked = with_unit(masks, name, unit)
                        value = sum(evaluation(masked) for evaluation in evaluations)
                        found[key] = ([*path, (value, name, unit)], masked)
            beam = sorted(found.values(), key=lambda entry: entry[0][-1])[: self.width]
        path, masks = beam[0]
        scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        highest = -float("inf")
        for value, name, unit in path:
            highest = max(highest, value)
            scores[name][unit] = highest
        for name, unit in _left(masks):
            value = sum(evaluation(with_unit(masks, name, unit)) for evaluation in evaluations)
            scores[name][unit] = max(highest, value)
        return scores


def _left(masks: Masks) -> list[tuple[str, int]]:
    return [(name, unit) for name, mask in masks.items() for unit in (~mask).nonzero().flatten().tolist()]
