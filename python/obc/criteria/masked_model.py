"""The metric of a model with any units masked, relative to the model without: loss, KL or squared error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.criteria.subject import Subject
from obc.model.arguments import no_batches, one_of
from obc.model.evaluation import evaluating, main_output
from obc.model.usable_batches import UsableBatches, all_finite
from obc.structures.masking import masked_copy, unmaskable

Metric = Literal["loss", "kl", "mse"]
Masks = dict[str, Tensor]  # group -> (units,) bool: the units at zero


class Evaluation:
    """The metric of a model with masked units, relative to what the model computed at first.

    A batch on which the model is not finite while no unit is masked is left out, as in scoring by rows.
    """

    def __init__(self, subject: Subject, metric: Metric) -> None:
        one_of("metric", metric, get_args(Metric))
        self.subject, self.metric = subject, metric
        self._batches = UsableBatches.of(subject.batches)
        self._dense: dict[int, Tensor] = {}
        with evaluating(subject.model), torch.no_grad():
            for batch in self._batches:
                self._look_at(batch)
        self._batches.refuse_many()

    def __call__(self, masks: Mapping[str, Tensor]) -> float:
        """The mean over the batches with the units masked whose mask is True."""
        return self.of_removed({name: mask.nonzero().flatten() for name, mask in masks.items()})

    def of_removed(self, removed: Mapping[str, Tensor]) -> float:
        """The mean over the usable batches with these units masked; infinity if it is not finite."""
        total, count = 0.0, 0
        model = self.without(removed)
        with evaluating(model), torch.no_grad():
            for batch in self._batches:
                total += self._of(model, batch)
                count += 1
        if count == 0:
            raise ValueError(no_batches("evaluate"))
        return total / count if math.isfinite(total) else math.inf

    def without(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """The model to measure, with these units masked."""
        return masked_copy(self.subject.model, self.subject.groups, removed)

    def _look_at(self, batch: Any) -> None:
        """Leave out a batch on which the present model's loss or outputs are not finite; remember its outputs."""
        model = self.subject.model
        if self.metric == "loss":
            if not all_finite(self.subject.loss_fn(model, batch)):
                self._batches.leave_out("its loss is not finite")
            return
        output = self._output(model, batch)
        if all_finite(output):
            self._dense[self._batches.current] = output
        else:
            self._batches.leave_out("the model's outputs on it are not finite")

    def _of(self, model: nn.Module, batch: Any) -> float:
        if self.metric == "loss":
            return float(self.subject.loss_fn(model, batch).double().mean())
        output, dense = self._output(model, batch), self._dense[self._batches.current]
        if self.metric == "mse":
            return float((output.double() - dense.double()).square().mean())
        logs, targets = (F.log_softmax(values.double(), -1) for values in (output, dense))
        return float((targets.exp() * (targets - logs)).sum(-1).mean())

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        return output_tensor(self.subject.forward_fn(model, batch))


def output_tensor(output: Any) -> Tensor:
    """The logits of a forward pass's output, else its last hidden state, else its first tensor."""
    if (found := main_output(output)) is None:
        raise ValueError(f"the criterion compares tensors, forward_fn returned {type(output).__name__}")
    return found[1]


def nothing_masked(subject: Subject) -> Masks:
    """Masks of the groups whose units can be masked, with no unit at zero."""
    refused = unmaskable(subject.model, subject.groups)
    return {
        group.name: torch.zeros(group.size, dtype=torch.bool, device="cpu")
        for group in subject.groups
        if group.name not in refused
    }


def units_left(masks: Masks) -> list[tuple[str, int]]:
    """(group, unit) of the units that are not masked."""
    return [(name, unit) for name, mask in masks.items() for unit in (~mask).nonzero().flatten().tolist()]


def with_unit(masks: Masks, name: str, unit: int) -> Masks:
    """A copy of the masks with one more unit of the group ``name`` at zero."""
    mask = masks[name].clone()
    mask[unit] = True
    return {**masks, name: mask}
