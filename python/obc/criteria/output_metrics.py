"""The metric of the loss at the outputs of layers, F = E over rows of the sum over positions of g g^T, g = dL/dy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.units import Consumer
from obc.model.autocast import without_autocast
from obc.model.layouts import layout_of
from obc.statistics.reader import flat_rows
from obc.statistics.routed import RoutedCalls
from obc.statistics.taps import tapped


def in_metric(consumer: Consumer, metric: Tensor) -> Consumer:
    """The consumer with the weight F^(1/2) W; of a grouped convolution each group with its own block of F."""
    layout = layout_of(consumer.module)
    groups = 1 if layout is None else layout.groups
    size = len(metric) // groups
    blocks = torch.stack([metric[start : start + size, start : start + size] for start in range(0, len(metric), size)])
    values, vectors = torch.linalg.eigh(blocks)
    roots = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    columns = consumer.columns.unflatten(0, (groups, -1)).unflatten(2, (size, -1))
    return replace(consumer, columns=torch.einsum("goq,giqt->giot", roots, columns).flatten(0, 1).flatten(1))


class OutputMetrics:
    """Reads F at the outputs of consumers, while the loss goes backward; of experts before the gates.

    Attributes:
        sums: layer -> (out, out) float64 on the CPU, over the rows so far; those that no gradient came back to have
            none.
    """

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self._layers = {one.name: one.module for one in consumers if not one.routed}
        self._experts: dict[nn.Module, dict[int, str]] = {}
        for one in consumers:
            if one.expert is not None:
                self._experts.setdefault(one.module, {})[one.expert] = one.name
        self.sums, self._rows = dict[str, Tensor](), 0
        self.now: dict[str, Tensor] = {}

    def attach(self) -> list[Any]:
        """Hook into the consumers, and into mixtures for their experts."""
        calls = RoutedCalls()
        return [
            *(module.register_forward_hook(self._hook(name, module)) for name, module in self._layers.items()),
            *(module.register_forward_hook(self._of_experts(calls), with_kwargs=True) for module in self._experts),
        ]

    def begin(self) -> None:
        """A batch begins."""
        self.now = {}

    def take(self, rows: int) -> None:
        """Add the batch's products to the sums, and ``rows`` to the number of rows."""
        self._rows += rows
        for name, product in self.now.items():
            self.sums[name] = self.sums[name] + product if name in self.sums else product

    def mean(self, name: str) -> Tensor:
        """(out, out) F."""
        return self.sums[name] / self._rows

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        layout = layout_of(module)

        def read(grad: Tensor) -> None:
            flat = flat_rows(grad.detach(), 1 if layout is not None and layout.convolution else grad.dim() - 1)
            self._add(name, flat)

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                # A tensor's hook gets the gradient at the values of now, also if they are changed in place later.
                output.register_hook(read)

        return hook

    def _of_experts(self, calls: RoutedCalls) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            inputs = calls.inputs(module, [*args, *kwargs.values()], output) if torch.is_grad_enabled() else ""
            if isinstance(inputs, str):
                return None

            def read(grad: Tensor) -> None:
                for expert, name in self._experts[module].items():
                    if len(inputs[expert].tokens):
                        self._add(name, inputs[expert].at_output(grad))

            return tapped(output, read, copy=True)

        return hook

    def _add(self, name: str, grad: Tensor) -> None:
        """Add the gradients (positions, out) of one call."""
        grad = grad if grad.dtype == torch.float64 else grad.float()
        with without_autocast():
            product = (grad.mT @ grad).double().cpu()
        self.now[name] = self.now[name] + product if name in self.now else product
