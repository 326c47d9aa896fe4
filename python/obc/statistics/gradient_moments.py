"""Moments of the gradients with respect to layers' inputs, per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from obc import ops
from obc.statistics.part import Part
from obc.statistics.reader import Groups, InputReader, Reader, flat_rows, input_dim
from obc.statistics.sums import Sums
from obc.statistics.taps import tapped


@dataclass(frozen=True, eq=False)
class ChannelGradients:
    """Sums of g = dL/dx over the positions of one layer's input, through this layer alone; tensors are (C,) float64.

    L is the loss of the batch, or with ``rows="sample"`` of the sample. The positions of a fused expert are the tokens
    routed to it, and x is the input of its down projection.

    Attributes:
        count: positions that received a gradient.
        absolute: sum |g|.
        square: sum g^2.
    """

    count: int
    absolute: Tensor
    square: Tensor


@dataclass(frozen=True)
class GradientMoments:
    """Gradient moments at consumers' inputs: sum |g|, sum g^2. Needs a loss."""

    name: ClassVar[str] = "gradient_moments"
    backward: ClassVar[bool] = True

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of gradients at the inputs of the groups' consumers."""
        return _Reader(Sums(self.name), part, model, groups)


class _Reader(InputReader):
    """If a part's backward runs more than once (to test whether samples are independent), the last one counts."""

    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups) -> None:
        super().__init__(sums, part, model, groups)
        self._of_part = Sums(sums.name)

    def begin(self) -> None:
        super().begin()
        self._of_part.begin()

    def backward_begins(self) -> None:
        self._of_part.begin()

    def part_ends(self) -> None:
        self._of_part.hand_over(self.sums)

    def read_gradient(self, name: str, grad: Tensor, channel_dim: int, valid: Tensor | None) -> None:
        """Add the gradient of the input of one call."""
        values = flat_rows(grad, channel_dim).to(ops.accumulation_dtype(grad.dtype))
        if valid is not None:
            values = values.masked_fill(~valid.reshape(-1, 1), 0)
        count = values.new_full((), len(values), dtype=torch.float64) if valid is None else valid.sum()
        self._of_part.add(name, "count", count.to(values.device, torch.float64))
        self._of_part.add(name, "sums", torch.stack([values.abs().sum(0), values.square().sum(0)]))

    def result(self, fields: Mapping[str, Tensor]) -> ChannelGradients:
        return ChannelGradients(int(fields["count"]), *fields["sums"].unbind())

    def bytes(self) -> int:
        return sum(2 * (8 + 2 * 4) * width for width in self.widths.values())

    def _read_input(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if not self.part.reading:
            return None
        x = self.checked_input(name, module, args, kwargs)
        dim = input_dim(module, x)
        valid = self.part.valid_positions(x, dim)
        self.note_call(name, x, dim)
        read = tapped(x, lambda grad: self.read_gradient(name, grad, dim, valid), copy=False)
        swapped = {key: read if value is x else value for key, value in kwargs.items()}
        return tuple(read if value is x else value for value in args), swapped

    def _read_mixture(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if not self.part.reading:
            return None
        with torch.no_grad():
            routed = self.routed(name, module, [*args, *kwargs.values()], output)

        def read(grad: Tensor) -> None:
            for one, inputs in routed:
                self.read_gradient(one, inputs.at_input(module, grad), 1, None)

        return tapped(output, read, copy=True) if isinstance(output, Tensor) else None
