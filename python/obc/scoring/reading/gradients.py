"""Rows read from parameters' gradients: norms' gradients, kept in one flat vector, and transient weight gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

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


class ComputedWeight:
    """A weight that a module computes from parameters whenever it is read or called, such as a weight norm's.

    While it is attached every computed tensor is a leaf, so that its gradient has all that reads it. A compiler's graph
    has no such leaves.

    Args:
        module: the module, whose weight is not a parameter.
        name: the weight's attribute.

    Attributes:
        seen: whether the module has computed a leaf.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.seen = module, name, False

    @classmethod
    def of(cls, module: nn.Module, name: str) -> ComputedWeight | None:
        """The weight if it is computed by a parametrisation, or by a hook before the forward; otherwise None."""
        hooked = name in vars(module) and bool(module._forward_pre_hooks)
        return cls(module, name) if hooked or parametrize.is_parametrized(module, name) else None

    def attach(self, contract: Callable[[Tensor], None]) -> list[Callable[[], None]]:
        """Call ``contract`` with each leaf that has its gradient; returns what undoes this."""

        def leaf(computed: Tensor) -> Tensor:
            found = computed.detach().requires_grad_(True)
            found.register_post_accumulate_grad_hook(contract)
            return found

        def parametrised(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            self.seen = self.seen or not is_compiling()
            return None if is_compiling() else leaf(output)

        def called(module: nn.Module, args: object) -> None:
            if not is_compiling():
                self.seen = True
                setattr(module, self.name, leaf(getattr(module, self.name)))

        if parametrize.is_parametrized(self.module, self.name):
            return [self.module.parametrizations[self.name].register_forward_hook(parametrised).remove]  # type: ignore[union-attr, index]
        before: Tensor = getattr(self.module, self.name)
        setattr(self.module, self.name, leaf(before))  # a function may read it before the first call
        return [self.module.register_forward_pre_hook(called).remove, lambda: setattr(self.module, self.name, before)]


class WeightGradient:
    """r read from a weight's own gradient, which is contracted and dropped as soon as autograd has it.

    Serves the checking row and the modules that gates can't. ``rows`` and ``columns`` stand for dimensions 0 and
    ``column_dim`` of the weight; which of them are out or in channels depends on the modules that use the weight.

    Args:
        weight: a leaf parameter, or a weight that the module computes.
        rows: the slot of dimension 0, or None.
        columns: the slot of dimension ``column_dim`` (times groups), or None.
        groups: conv groups.
        fold: the number of conv groups whose columns share one slot entry.
        biases: (bias, its slot) of every module that uses the weight.
        elementwise: the weight multiplies channels along its last dimension (norms); ``rows`` is their slot.
        column_dim: 2 for experts stored as one tensor, otherwise 1.

    Attributes:
        misfit: a row showed that no layer with the normalised weight computes what its module does.
    """

    def __init__(
        self,
        weight: nn.Parameter | ComputedWeight,
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
        self.fired = self.misfit = False
        self.forget()
        self._undo: list[Callable[[], None]] = []

    def forget(self) -> None:
        """Forget what an earlier row measured: the sum of |w| |g|, and each slot's row without biases."""
        self.magnitude, self.unbiased = 0.0, dict[Slot, Tensor]()

    @property
    def slots(self) -> list[Slot]:
        """The slots that it is contracted into."""
        return [slot for slot in (self.rows, self.columns) if slot is not None]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are read."""
        weight = [] if isinstance(self.weight, ComputedWeight) else [self.weight]
        return [*weight, *(bias for bias, _ in self.biases)]

    @property
    def seen(self) -> bool:
        """Whether there is a gradient to see: a compiled model computes its computed weights unseen."""
        return self.fired or not isinstance(self.weight, ComputedWeight) or self.weight.seen

    def attach(self, target: Callable[[FlatRow], Tensor], measure: bool = False) -> None:
        """Contract every gradient into the vector ``target(flat)``; ``measure`` also fills what ``forget`` names."""
        self.detach()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        contract = self._weight_hook(target, measure)
        if isinstance(self.weight, ComputedWeight):
            self._undo += self.weight.attach(contract)
        else:
            self._undo.append(self.weight.register_post_accumulate_grad_hook(contract).remove)
        for bias, slot in self.biases:
            self._undo.append(bias.register_post_accumulate_grad_hook(self._bias_hook(slot, target)).remove)

    def detach(self) -> None:
        """Remove the hooks and freeze the parameters."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for parameter in self.parameters:
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
                self._add(self.rows, _last_dim_dot(weight, grad), target, measure)
                return
            if self.column_dim != 1:
                weight, grad = weight.transpose(1, self.column_dim), grad.transpose(1, self.column_dim)
            row_dot, column_dot = ops.weight_dot(weight, grad, groups=self.groups)
            if self.rows is not None:
                self._add(self.rows, row_dot, target, measure)
            if self.columns is not None:
                folded = column_dot if self.fold == 1 else column_dot.unflatten(0, (self.fold, -1)).sum(0)
                self._add(self.columns, folded, target, measure)

        return contract

    def _add(self, slot: Slot, row: Tensor, target: Callable[[FlatRow], Tensor], measure: bool) -> None:
        slot.of(target(slot.flat)).add_(row)
        if measure:
            self.unbiased[slot] = self.unbiased[slot] + row if slot in self.unbiased else row

    def _bias_hook(self, slot: Slot, target: Callable[[FlatRow], Tensor]) -> Callable[[Tensor], None]:
        def contract(bias: Tensor) -> None:
            grad, bias.grad = bias.grad, None
            assert grad is not None
            self.fired = True
            slot.of(target(slot.flat)).add_(_last_dim_dot(bias.detach(), grad))

        return contract


def _last_dim_dot(weight: Tensor, grad: Tensor) -> Tensor:
    return ops.channel_dot(weight, grad, -1)
