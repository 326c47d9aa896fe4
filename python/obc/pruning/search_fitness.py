"""What a search over widths measures with ``compensated=True``: the output after compensation.

With G the centred Gram matrix of a consumer's input, k the channels that stay and r those that go, its weight becomes

    W_k' = W_k + W_r G_rk (G_kk + lambda I)^-1

and its bias takes the rest of the mean: plain least squares with a fixed ridge. The Gram matrices are collected once.
Widths lie on few levels, so that most consumers of a candidate were solved for an earlier one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.masked import Evaluation, Metric
from obc.criteria.protocol import Subject
from obc.criteria.scoring import collected
from obc.model.kept import staying
from obc.model.rules import Rule, rule_for
from obc.statistics.names import chosen_statistics
from obc.statistics.results import Statistics
from obc.structures.masking import lost_channels

# Relative to the mean diagonal of G_kk.
_RIDGE = 1e-2
# Weights that were solved for are kept up to so many bytes; those that were not used for longest go first.
_MAX_BYTES = 2**30

Solution = tuple[Tensor, Tensor | None]


class CompensatedEvaluation(Evaluation):
    """The metric of the model with units masked and their consumers compensated by least squares.

    Consumers that have no Gram matrix (fused experts) and convolutions with groups are masked alone.

    Args:
        subject: its batches are those that the metric is measured on.
        metric: "loss", "kl" or "mse".
        calibration: the subject whose batches the Gram matrices are collected on.
    """

    def __init__(self, subject: Subject, metric: Metric, calibration: Subject) -> None:
        super().__init__(subject, metric)
        self._gram: Statistics = collected(chosen_statistics(["gram"]), (), calibration)
        self._solved: OrderedDict[tuple[str, bytes], Solution] = OrderedDict()
        self._bytes = 0

    def without(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """The model that is measured: with these units masked, and their consumers compensated."""
        masked = super().without(removed)
        with torch.no_grad():
            for (name, side), channels in lost_channels(self.subject.groups, removed).items():
                if side == "in" and name in self._gram.gram:
                    self._compensate(name, masked.get_submodule(name), channels)
        return masked

    def _compensate(self, name: str, module: Any, channels: Tensor) -> None:
        """Give a masked module its compensated weight and bias; its weight is its own, its bias the model's."""
        rule = rule_for(module)
        if not isinstance(rule, Rule) or rule.groups > 1 or (rule.convolution and rule.transposed):
            return
        weight, bias = self._solution(name, rule, channels)
        getattr(module, rule.weight).copy_(weight)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)

    def _solution(self, name: str, rule: Rule, channels: Tensor) -> Solution:
        key = name, channels.numpy().tobytes()
        if key not in self._solved:
            self._solved[key] = found = self._solve(self.subject.model.get_submodule(name), rule, name, channels)
            self._bytes += _size(found)
            while self._bytes > _MAX_BYTES and len(self._solved) > 1:
                self._bytes -= _size(self._solved.popitem(last=False)[1])
        self._solved.move_to_end(key)
        return self._solved[key]

    def _solve(self, module: Any, rule: Rule, name: str, gone: Tensor) -> Solution:
        sums, weight = self._gram.gram[name], getattr(module, rule.weight).detach()
        assert rule.in_axis is not None
        stays = staying(len(sums.sum), gone)
        centred = module.bias is not None and not _pads_with_zeros(module)
        gram = (sums.centred() if centred else sums.total) / sums.count
        kept = gram[stays][:, stays]
        kept.diagonal().add_(_RIDGE * float(kept.diagonal().mean()) or 1.0)
        weights = weight.movedim(rule.in_axis, 0).flatten(1).double()  # (in, the rest)
        dropped = weights[gone.to(weights.device)]
        change = torch.linalg.solve(kept, gram[stays][:, gone]).to(dropped) @ dropped
        new = torch.zeros_like(weights)
        new[stays.to(new.device)] = weights[stays.to(new.device)] + change
        shape = weight.movedim(rule.in_axis, 0).shape
        solved = new.reshape(shape).movedim(0, rule.in_axis).to(weight.dtype)
        if not centred:
            return solved, None
        mean = (sums.sum / sums.count).to(new.device)
        shift = (mean[:, None] * (weights - new)).sum(0).reshape(shape[1:])
        shift = shift if shift.dim() == 1 else shift.flatten(1).sum(1)
        return solved, (module.bias.detach().double() + shift).to(module.bias.dtype)


def fitness_of(subject: Subject, metric: Metric, batches: int | None, compensated: bool) -> Evaluation:
    """What a search measures, on the first ``batches``; of others the Gram matrices, where there are any."""
    measured = rest = subject
    if batches is not None:
        numbered = subject.batches.numbered()
        measured = replace(subject, batches=subject.batches.part(numbered[:batches]))
        rest = replace(subject, batches=subject.batches.part(numbered[batches:] or numbered))
    return CompensatedEvaluation(measured, metric, rest) if compensated else Evaluation(measured, metric)


def _size(solution: Solution) -> int:
    return sum(tensor.nbytes for tensor in solution if tensor is not None)


def _pads_with_zeros(module: Any) -> bool:
    padding: Any = getattr(module, "padding", 0)
    if getattr(module, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    return isinstance(padding, str) or (any(padding) if isinstance(padding, tuple) else bool(padding))
