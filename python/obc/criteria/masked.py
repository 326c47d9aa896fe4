"""Masked evaluation: the model with units at zero, one forward pass over the batches for each unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.criteria.protocol import About, GroupScores, MeasuredCriterion, Subject
from obc.model.evaluation import evaluating
from obc.structures.masking import masked_copy, unmaskable

Metric = Literal["loss", "kl", "mse"]
Masks = dict[str, Tensor]  # group -> (units,) bool: the units at zero


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
            for value, name, unit in sorted(scores)[: len(scores) if last else gone]:
                highest = max(highest, value) if self.rounds > 1 else value
                found[name][unit] = highest
                masks[name][unit] = True
        return found


def check_metric(metric: str) -> None:
    """Raise for a metric that :class:`Evaluation` doesn't know."""
    if metric not in ("loss", "kl", "mse"):
        raise ValueError(f"metric must be 'loss', 'kl' or 'mse', got {metric!r}")


class Evaluation:
    """The metric of a model with masked units, relative to what the model computed at first.

    Args:
        subject: the model, its groups, batches and loss.
        metric: "loss", "kl" or "mse".
    """

    def __init__(self, subject: Subject, metric: Metric) -> None:
        check_metric(metric)
        self.subject, self.metric = subject, metric
        self._dense: list[Tensor] = []
        if metric != "loss":
            with evaluating(subject.model), torch.no_grad():
                self._dense = [self._output(subject.model, batch) for batch in subject.batches]

    def __call__(self, masks: Mapping[str, Tensor]) -> float:
        """The mean over the batches with the units masked whose mask is True."""
        return self.of_removed({name: mask.nonzero().flatten() for name, mask in masks.items()})

    def of_removed(self, removed: Mapping[str, Tensor]) -> float:
        """The mean over the batches with these units masked."""
        total, count = 0.0, 0
        model = self.without(removed)
        with evaluating(model), torch.no_grad():
            for index, batch in enumerate(self.subject.batches):
                total += self._of(model, index, batch)
                count += 1
        if count == 0:
            raise ValueError("batches is empty: there is nothing to evaluate")
        return total / count

    def without(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """The model to measure, with these units masked."""
        return masked_copy(self.subject.model, self.subject.groups, removed)

    def _of(self, model: nn.Module, index: int, batch: Any) -> float:
        if self.metric == "loss":
            return float(self.subject.loss_fn(model, batch).double().mean())
        output, dense = self._output(model, batch), self._dense[index]
        if self.metric == "mse":
            return float((output.double() - dense.double()).square().mean())
        logs, targets = (F.log_softmax(values.double(), -1) for values in (output, dense))
        return float((targets.exp() * (targets - logs)).sum(-1).mean())

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        return output_tensor(self.subject.forward_fn(model, batch))


def output_tensor(output: Any) -> Tensor:
    """The logits of a forward pass's output, else its last hidden state, else its first tensor."""
    while isinstance(output, (list, tuple)) and output:
        output = output[0]
    for name in ("logits", "last_hidden_state"):
        if not isinstance(output, Tensor) and getattr(output, name, None) is not None:
            output = getattr(output, name)
    if not isinstance(output, Tensor):
        raise ValueError(f"the criterion compares tensors, forward_fn returned {type(output).__name__}")
    return output


def with_unit(masks: Masks, name: str, unit: int) -> Masks:
    """A copy of the masks with one more unit of the group ``name`` at zero."""
    mask = masks[name].clone()
    mask[unit] = True
    return {**masks, name: mask}
