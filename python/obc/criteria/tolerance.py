"""Masked evaluation with a tolerance of the loss, group by group (PAGCP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from obc.criteria.magnitude import Magnitude
from obc.criteria.masked_model import Evaluation, Masks
from obc.criteria.protocol import About, CriterionError, GroupScores, MeasuredCriterion
from obc.criteria.scoring import group_scores
from obc.criteria.slices import slice_weights
from obc.criteria.subject import Subject
from obc.model.evaluation import LossFn
from obc.model.groups import ChannelGroup
from obc.structures.masking import unmaskable


class Tolerance(MeasuredCriterion):
    """PAGCP: groups lose units, least important first, as long as no task's loss grows by more than a tolerance.

    Groups are processed in the order of ``order``; what earlier ones lost stays masked. In each group, shares of 1/20,
    2/20, ... are masked until max over tasks of loss / base loss > 1 + tau; for the next group the tolerance is tau *
    decay. A unit's score is the largest ratio - 1 up to the share that includes it; units beyond the tolerance score
    higher than all units within it.

    Args:
        tau: tolerance of the first group.
        decay: factor of the tolerance from one group to the next.
        tasks: losses of several tasks; None: only the loss of ``obc.prune``.
        within: the criterion that ranks the units of a group; by default L2 magnitude.
        order: names of groups; by default those with most weights come first.

    Raises:
        ValueError: ``tau`` or ``decay`` is not positive.
    """

    name = "tolerance"
    about = About(
        "PAGCP",
        "arXiv 2303.11923; code HankYe/PAGCP",
        "largest loss / base loss - 1 over tasks when the share with u goes, group by group within a tolerance",
        "labels",
        kinds="channels, heads",
        differs="its code orders layers by FLOPs; here by weights, or by order=",
        missing="fine-tuning between rounds; choice of the layers with the least loss per FLOP",
    )
    per_cost = False
    steps = 20

    def __init__(
        self,
        tau: float = 0.1,
        decay: float = 0.9,
        tasks: Sequence[LossFn] | None = None,
        within: Any = None,
        order: Sequence[str] | None = None,
    ) -> None:
        if tau <= 0 or not decay > 0:
            raise ValueError(f"tau and decay must be positive, got {tau} and {decay}")
        self.tau, self.decay, self.tasks, self.order = tau, decay, tasks, order
        self.within = Magnitude(2) if within is None else within

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: lowest for the units that can go within every task's tolerance."""
        ranks = group_scores(self.within, subject)
        refused = unmaskable(subject.model, subject.groups)
        groups = [group for group in subject.groups if group.name in ranks and group.name not in refused]
        if not groups:
            return {}
        losses = [Evaluation(replace(subject, loss_fn=task), "loss") for task in self.tasks or [subject.loss_fn]]
        masks: Masks = {group.name: torch.zeros(group.size, dtype=torch.bool, device="cpu") for group in groups}
        base = [loss(masks) for loss in losses]
        if min(base) <= 0:
            raise CriterionError(
                f"tolerances are shares of positive losses, the model as it is has {min(base):g}; add a constant to "
                "loss_fn, or to the task's loss in Tolerance(tasks=...)"
            )
        tolerance, within, beyond = self.tau, {}, {}
        for group in self._ordered(groups, subject):
            units = ranks[group.name].argsort(stable=True).cpu()
            scores, highest, spent = torch.full((group.size,), float("nan"), dtype=torch.float64, device="cpu"), 0.0, 0
            for step in range(1, self.steps):
                count = group.size * step // self.steps
                if count == spent:
                    continue
                mask = torch.zeros(group.size, dtype=torch.bool, device="cpu")
                mask[units[:count]] = True
                tried = {**masks, group.name: mask}
                ratio = max(loss(tried) / b for loss, b in zip(losses, base, strict=True)) - 1
                if ratio > tolerance:
                    break
                highest, masks = max(highest, ratio), tried
                scores[units[spent:count]], spent = highest, count
            within[group.name], beyond[group.name] = scores, units[spent:]
            tolerance *= self.decay
        most = max(float(scores.nan_to_num(0.0).max()) for scores in within.values())
        for name, units in beyond.items():
            within[name][units] = (
                most + 1 + torch.arange(len(units), dtype=torch.float64, device="cpu") / max(len(units), 1)
            )
        return within

    def _ordered(self, groups: Sequence[ChannelGroup], subject: Subject) -> list[ChannelGroup]:
        if self.order is not None:
            places = {name: place for place, name in enumerate(self.order)}
            return sorted(groups, key=lambda group: places.get(group.name, len(places)))

        def weights(group: ChannelGroup) -> int:
            return sum(one.by_unit(one.weight).numel() for one in slice_weights(group, subject.model))

        return sorted(groups, key=weights, reverse=True)
