"""Rows read from parameters' gradients: norms' gradients, kept in one flat vector, and transient weight gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from obc import ops
from obc.scoring.reading.flat_row import FlatRow, Slot


class NormGradients:
    """r = gamma * dL/dgamma + beta * dL/dbeta of every norm, from gradients that live in one flat vector.

    Norms need no gate for batch rows: their outputs are not saved, so in-place changes after them do no harm.

    Args:
        flat: the row to add to.
        entries: (parameter, slot) pairs of one parameter dtype, each slot at most once.
    """

    def __init__(self, flat: FlatRow, entries: list[tuple[nn.Parameter, Slot]]) -> None:
        self.flat = flat
        self.parameters = [parameter for parameter, _ in entries]
        channels = [torch.arange(slot.start, slot.stop, device=flat.device) for _, slot in entries]
        self.channels = torch.cat(channels)
        total = sum(parameter.numel() for parameter in self.parameters)
        self.gradient = torch.zeros(total, dtype=self.parameters[0].dtype, device=flat.device)
        self.views = list(self.gradient.split([parameter.numel() for parameter in self.parameters]))

    def bind(self) -> None:
        """Give every parameter its slice as gradient, and clear it."""
        self.gradient.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    def unbound(self) -> nn.Parameter | None:
        """A parameter whose gradient is no longer its slice, or None."""
        pairs = zip(self.parameters, self.views, strict=True)
        return next((parameter for parameter, view in pairs if parameter.grad is not view), None)

    def add_to_row(self, row: Tensor) -> None:
        """Add gamma * dL/dgamma + beta * dL/dbeta to each norm's channels."""
        weights = torch.cat([parameter.detach() for parameter in self.parameters])
        # Each slot appears at most once, so no two entries add to one channel: exact on any device.
        row.index_add_(0, self.channels, weights.to(row.dtype) * self.gradient.to(row.dtype))


class WeightGradient:
    """r read from a weight's own gradient, which is contracted and dropped as soon as autograd has it.

    Serves the checking row and the modules that gates can't. ``rows`` and ``columns`` stand for dimensions 0 and
    ``column_dim`` of the weight; which of them are out or in channels depends on the modules that use the weight.

    Args:
        weight: a leaf parameter.
        rows: the slot of dimension 0, or None.
        columns: the slot of dimension ``column_dim`` (times groups), or None.
        groups: conv groups.
        fold: the number of conv groups whose columns share one slot entry.
        biases: (bias, its slot) of every module that uses the weight.
        elementwise: the weight multiplies channels along its last dimension (norms); ``rows`` is their slot.
        column_dim: 2 for experts stored as one tensor, otherwise 1.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        rows: Slot | None,
        columns: Slot | None,
        groups: int,
        fold: int,
        biases: list[tuple[nn.Parameter, Slot]],
        elementwise: bool = False,
        column_dim: int = 1,
    ) -> None:
        self.column_dim = column_dim
        self.weight, self.rows, self.columns, self.groups, self.fold = weight, rows, columns, groups, fold
        self.biases, self.elementwise = biases, elementwise
        self.fired = False
        self.magnitude = 0.0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, target: Callable[[FlatRow], Tensor], measure: bool = False) -> None:
        """Contract every gradient into the vector ``target(flat)``; ``measure`` also sums |w| |g|."""
        self.detach()
        self.weight.requires_grad_(True)
        self._handles.append(self.weight.register_post_accumulate_grad_hook(self._weight_hook(target, measure)))
        for bias, slot in self.biases:
            bias.requires_grad_(True)
            self._handles.append(bias.register_post_accumulate_grad_hook(self._bias_hook(slot, target)))

    def detach(self) -> None:
        """Remove the hooks and freeze the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in (self.weight, *(bias for bias, _ in self.biases)):
            parameter.requires_grad_(False)

    def _weight_hook(self, target: Callable[[FlatRow], Tensor], measure: bool) -> Callable[[Tensor], None]:
        def contract(weight: Tensor) -> None:
            grad, weight.grad = weight.grad, None
            assert grad is not None
            weight, grad = weight.detach(), grad.detach()
            if grad.is_sparse:  # from an embedding with sparse=True
                grad = grad.to_dense()
            self.fired = True
            if measure:
                self.magnitude += float(weight.norm() * grad.norm())
            if self.elementwise:
                assert self.rows is not None
                self.rows.of(target(self.rows.flat)).add_(_last_dim_dot(weight, grad))
                return
            if self.column_dim != 1:
                weight, grad = weight.transpose(1, self.column_dim), grad.transpose(1, self.column_dim)
            row_dot, column_dot = ops.weight_dot(weight, grad, groups=self.groups)
            if self.rows is not None:
                self.rows.of(target(self.rows.flat)).add_(row_dot)
            if self.columns is not None:
                folded = column_dot if self.fold == 1 else column_dot.unflatten(0, (self.fold, -1)).sum(0)
                self.columns.of(target(self.columns.flat)).add_(folded)

        return contract

    def _bias_hook(self, slot: Slot, target: Callable[[FlatRow], Tensor]) -> Callable[[Tensor], None]:
        def contract(bias: Tensor) -> None:
            grad, bias.grad = bias.grad, None
            assert grad is not None
            self.fired = True
            slot.of(target(slot.flat)).add_(_last_dim_dot(bias.detach(), grad))

        return contract


def _last_dim_dot(weight: Tensor, grad: Tensor) -> Tensor:
    return ops.channel_dot(weight, grad, -1)
