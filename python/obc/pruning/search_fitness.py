"""Fitness of a search over widths with ``compensated=True``: the output after compensation.

Let G be the centred Gram matrix of a consumer's input, k the kept channels and r the removed ones. Its weight becomes

    W_k' = W_k + W_r G_rk (G_kk + lambda I)^-1

and its bias takes the rest of the mean: plain least squares with a fixed ridge. The Gram matrices are collected once.
Widths lie on few levels, so most consumers of a candidate were solved for an earlier one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.masked_model import Evaluation, Metric
from obc.criteria.scoring import collected
from obc.criteria.subject import Subject
from obc.model.kept import staying
from obc.model.layouts import pads_with_zeros
from obc.model.rules import Rule, rule_for
from obc.statistics.names import chosen_statistics
from obc.statistics.results import Statistics
from obc.structures.masking import lost_channels

# Relative to the mean diagonal of G_kk.
_RIDGE = 1e-2
# Solved weights are cached up to this many bytes; the least recently used are dropped first.
_MAX_BYTES = 2**30

Solution = tuple[Tensor, Tensor | None]


class CompensatedEvaluation(Evaluation):
    """The metric of the model with units masked and their consumers compensated by least squares.

    Consumers without a Gram matrix (fused experts) and convolutions with conv groups are only masked.

    Args:
        subject: provides the batches that the metric is measured on.
        metric: "loss", "kl" or "mse".
        calibration: provides the batches for the Gram matrices.
    """

    def __init__(self, subject: Subject, metric: Metric, calibration: Subject) -> None:
        super().__init__(subject, metric)
        self._gram: Statistics = collected(chosen_statistics(["gram"]), (), calibration)
        self._solved: OrderedDict[tuple[str, bytes], Solution] = OrderedDict()
        self._bytes = 0

    def without(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """The model to measure: these units masked and their consumers compensated."""
        masked = super().without(removed)
        with torch.no_grad():
            for (name, side), channels in lost_channels(self.subject.groups, removed).items():
                if side == "in" and name in self._gram.gram:
                    self._compensate(name, masked.get_submodule(name), channels)
        return masked

    def _compensate(self, name: str, module: Any, channels: Tensor) -> None:
        """Give a masked module its compensated weight and bias; it owns its weight, the model owns the bias."""
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
        centred = module.bias is not None and not pads_with_zeros(module)
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
    """The fitness for a search, on the first ``batches``; Gram matrices use the other batches if there are any."""
    measured = rest = subject
    if batches is not None:
        numbered = subject.batches.numbered()
        measured = replace(subject, batches=subject.batches.part(numbered[:batches]))
        rest = replace(subject, batches=subject.batches.part(numbered[batches:] or numbered))
    return CompensatedEvaluation(measured, metric, rest) if compensated else Evaluation(measured, metric)


def _size(solution: Solution) -> int:
    return sum(tensor.nbytes for tensor in solution if tensor is not None)
