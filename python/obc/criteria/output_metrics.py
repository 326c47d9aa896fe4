"""The metric of the loss at the outputs of layers, F = E over rows of the sum over positions of g g^T, g = dL/dy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.units import Consumer
from obc.model.layouts import layout_of
from obc.statistics.reader import flat_rows


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
    """Reads F at the outputs of layers, while the loss goes backward.

    Attributes:
        sums: layer -> (out, out) float64 on the CPU, over the rows so far; those that no gradient came back to have
            none.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers, self.sums, self._rows = layers, dict[str, Tensor](), 0
        self.now: dict[str, Tensor] = {}

    def attach(self) -> list[Any]:
        return [module.register_forward_hook(self._hook(name, module)) for name, module in self._layers.items()]

    def begin(self) -> None:
        """A batch begins."""
        self.now = {}

    def take(self, rows: int) -> None:
        """The batch counts: so many rows."""
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
            flat = flat if flat.dtype == torch.float64 else flat.float()
            product = (flat.mT @ flat).double().cpu()
            self.now[name] = self.now[name] + product if name in self.now else product

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                # A tensor's hook gets the gradient at the values of now, also if they are changed in place later.
                output.register_hook(read)

        return hook
