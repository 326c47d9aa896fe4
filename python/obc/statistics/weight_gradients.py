"""Sums of weight gradients and of their squares: the statistic of Taylor and Fisher criteria."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from obc.model.experts import DOWN, GATE_UP, UP, expert_weights
from obc.model.groups import Slice
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.rules import Rule, rule_for
from obc.scoring.coverage import Coverage
from obc.statistics.part import Part
from obc.statistics.reader import Groups, Handle, Reader
from obc.statistics.sums import Sums


@dataclass(frozen=True, eq=False)
class WeightGradientSums:
    """Sums over the rows n of a weight's gradient; tensors are shaped like the weight, float32.

    Attributes:
        count: number of rows, that is, batches.
        total: sum dL_n/dw.
        square: sum (dL_n/dw)^2, or None if it was not requested.
    """

    count: int
    total: Tensor
    square: Tensor | None


@dataclass(frozen=True)
class WeightGradients:
    """Sums of the weight gradients of every layer that the groups slice, one row per batch. Needs a loss.

    Fused experts have one entry for each of their two tensors, under a name such as "mlp.experts.down_proj".

    Takes two float32 weights per layer (three with ``square``), in addition to the gradient. Unlike all other
    statistics it needs memory of the model's size, so its sums are not float64. It can't be collected together with
    rows, which freeze the weights.

    Args:
        square: also collect the sum of squares.
    """

    square: bool = False

    name: ClassVar[str] = "weight_gradients"
    backward: ClassVar[bool] = True

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of the gradients of the weights that the groups slice."""
        return _Reader(Sums(self.name, dtype=torch.float32), part, model, groups, self.square)


class _Reader(Reader):
    """Adds the parts of a batch in the weight's gradient before squaring."""

    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups, square: bool) -> None:
        super().__init__(sums, part)
        self._square = square
        parts = [part for group in groups or () for part in group.slices]
        wanted = {name for part in parts for name in _names(part)}
        self.weights = {name: weight for name, weight in _weights(model) if groups is None or name in wanted}
        self.coverage = dict.fromkeys(self.weights, Coverage("weight gradient"))
        self._of_batch: dict[str, Tensor] = {}

    def attach(self) -> list[Handle]:
        handles: list[Handle] = [_Restoration(weight) for weight in self.weights.values()]
        for name, weight in self.weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(self._take, name)))
        return handles

    def begin(self) -> None:
        super().begin()
        self._of_batch.clear()

    def batch_ends(self) -> None:
        for name, gradient in self._of_batch.items():
            self.sums.add(name, "total", gradient)
            if self._square:
                self.sums.add(name, "square", gradient.square())
            self.sums.add(name, "count", torch.ones((), device=gradient.device))
        self._of_batch.clear()

    @torch.no_grad()
    def _take(self, name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None or not self.part.reading:
            return
        self.called.add(name)
        gradient = gradient.to_dense().float() if gradient.is_sparse else gradient.float()
        before = self._of_batch.get(name)
        self._of_batch[name] = gradient if before is None else before.add_(gradient)

    def result(self, fields: Mapping[str, Tensor]) -> WeightGradientSums:
        return WeightGradientSums(int(fields["count"]), fields["total"], fields.get("square"))

    def bytes(self) -> int:
        copies = 4 * (3 + 2 * self._square)
        return sum(copies * weight.numel() for weight in self.weights.values())


def _names(part: Slice) -> list[str]:
    """The names under which a slice's weights may be read."""
    owner, _, key = part.module.rpartition(".")
    own = [part.module, f"{part.module}.{DOWN}", *([owner] if key == "weight" else [])]
    return [*own, f"{part.module}.{GATE_UP}", f"{part.module}.{UP}"] if part.side == "out" else own


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name of the layer, router or tensor of all experts; weight) of all floating-point weights with two sides."""
    for name, module in named_modules(model):
        if (weight := floating_weight(module)) is not None:
            yield name, weight
        elif keys := expert_weights(module):
            for key in keys:
                tensor = module._parameters[key]
                if tensor is not None and tensor.is_floating_point():
                    yield f"{name}.{key}", tensor
        elif (weight := _own_matrix(module)) is not None:
            yield name, weight


def _own_matrix(module: nn.Module) -> nn.Parameter | None:
    """The weight of a router that multiplies by a weight of its own, or of JetMoE's experts."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() not in (2, 3) or not weight.is_floating_point():
        return None
    rule = rule_for(module)
    elementwise = isinstance(rule, Rule) and rule.elementwise
    return None if elementwise or isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else weight


class _Restoration:
    """Restores a weight's own gradient and flag."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight, self._before = weight, (weight.requires_grad, weight.grad)
        weight.grad = None

    def remove(self) -> None:
        requires_grad, grad = self._before
        self._weight.requires_grad_(requires_grad)
        self._weight.grad = grad


def floating_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight of a layer with slices on both sides, if it is a floating-point parameter."""
    weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else None
    if weight is None and layout_of(module) is not None:
        weight = module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) and weight.is_floating_point() else None
