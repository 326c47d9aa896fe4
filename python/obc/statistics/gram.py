"""The Gram matrix of what a layer reads: the statistic of Optimal Brain Surgeon's family and of least squares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from obc import ops
from obc.statistics.errors import StatisticsError
from obc.statistics.part import Part
from obc.statistics.reader import Groups, InputReader, Reader, flat_rows
from obc.statistics.routed import RoutedInput
from obc.statistics.sums import Sums

Weight = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class GramSum:
    """Sums over the positions of one layer's input, weighted by omega; tensors are float64.

    Attributes:
        count: sum omega; the number of positions where omega is 1.
        total: (d, d) sum omega x x^T.
        sum: (d,) sum omega x.
    """

    count: float
    total: Tensor
    sum: Tensor

    def centred(self) -> Tensor:
        """(d, d) sum omega (x - E x)(x - E x)^T."""
        return self.total - torch.outer(self.sum, self.sum) / self.count


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of consumers' inputs, sum omega x x^T. Forward only.

    Each batch's product is a float32 GEMM (float64 for float64 inputs) without TF32, added into float64. It takes
    12 d^2 bytes for an input of d channels. For convolutions x is one pixel's channels. Of fused experts x is what the
    down projection of one expert reads of a token routed to it; each has a matrix of its own, under a name such as
    "mlp.experts[3]".

    Args:
        weight: ``weight(batch)`` gives omega >= 0 as (B,), one a sample, or (B, T), one a token; for a key of a mapping
            write ``lambda batch: batch["weight"]``. None: 1.
        to: "device" keeps the sums where the layer is, "host" in the host's memory: then 4 d^2 bytes a layer are needed
            on the device, and each batch's product is copied.
    """

    weight: Weight | None = None
    to: Literal["device", "host"] = "device"

    name: ClassVar[str] = "gram"
    backward: ClassVar[bool] = False

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        if self.to not in ("device", "host"):
            raise StatisticsError(f"Gram(to=...) must be 'device' or 'host', got {self.to!r}")
        to = torch.device("cpu") if self.to == "host" else None
        sums = Sums(self.name, checked=_diagonal, to=to)
        return GramReader(sums, part, model, groups, self.weight)

    def identity(self) -> dict[str, Any]:
        return {"weight": None if self.weight is None else getattr(self.weight, "__qualname__", "an object")}


def _diagonal(values: Tensor) -> Tensor:
    """What shows whether a product is finite: |sum x_i x_j| is at most the larger of sum x_i^2 and sum x_j^2."""
    return values.diagonal() if values.dim() == 2 else values


class GramReader(InputReader):
    """Reads Gram matrices, and knows beforehand what they take."""

    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups, weight: Weight | None) -> None:
        super().__init__(sums, part, model, groups)
        self._weight = weight

    def read(self, name: str, x: Tensor, channel_dim: int, valid: Tensor | None, routed: RoutedInput | None) -> None:
        rows = flat_rows(x, channel_dim).to(ops.accumulation_dtype(x.dtype))
        if valid is not None:
            rows = rows.masked_fill(~valid.reshape(-1, 1), 0)
        weighted = rows
        if self._weight is not None:
            omega = self._omega(name, x, channel_dim, routed).to(rows)
            count = omega.sum() if valid is None else omega[valid.reshape(-1)].sum()
            weighted = rows * omega.unsqueeze(1)
        else:
            count = torch.tensor(len(rows)) if valid is None else valid.sum()
        with _full_precision():
            self.sums.add_product(name, "total", weighted, rows)
        self.sums.add(name, "sum", weighted.sum(0))
        self.sums.add(name, "count", count.to(rows.device, torch.float64))

    def _omega(self, name: str, x: Tensor, channel_dim: int, routed: RoutedInput | None) -> Tensor:
        """(positions,) the weight of each."""
        assert self._weight is not None
        omega = self._weight(self.part.batch).detach().to(x.device)
        positions = x.movedim(channel_dim, -1).shape[:-1].numel() if routed is None else routed.total
        if omega.numel() == positions:
            omega = omega.reshape(-1)
        elif omega.dim() == 1 and len(omega) and positions % len(omega) == 0 and (routed or len(omega) == len(x)):
            omega = omega.repeat_interleave(positions // len(omega))
        else:
            raise StatisticsError(
                f"Gram(weight=...) gave shape {tuple(omega.shape)} for the input {tuple(x.shape)} of {name!r}; give "
                "(B,) or (B, T), or leave the layer out with groups="
            )
        return omega if routed is None else omega[routed.tokens]

    def result(self, fields: Mapping[str, Tensor]) -> GramSum:
        return GramSum(float(fields["count"]), fields["total"], fields["sum"])

    def bytes(self) -> int:
        return sum(width**2 * (8 + 4) for width in self.widths.values())

    def largest(self) -> tuple[str, int]:
        """The layer with the most in channels, and how many."""
        return max(self.widths.items(), key=lambda entry: entry[1])

    def bytes_by_device(self) -> dict[torch.device, int]:
        """What the sums and a batch's summands take on each device."""
        found: dict[torch.device, int] = {}
        for name, width in self.widths.items():
            size, device = width**2, self.device_of(name)
            to = self.sums.to or device
            found[device] = found.get(device, 0) + 4 * size
            found[to] = found.get(to, 0) + 8 * size
        return found


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32: TF32 keeps ten bits, which a matrix that is to be inverted can't spare."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
