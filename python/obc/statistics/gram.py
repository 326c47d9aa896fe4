"""The Gram matrix of a layer's input, for the Optimal Brain Surgeon family and least squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from obc import ops
from obc.model.arguments import one_of
from obc.statistics.errors import StatisticsError
from obc.statistics.part import Part
from obc.statistics.reader import Groups, InputReader, Reader, flat_rows
from obc.statistics.routed import RoutedInput
from obc.statistics.sums import Sums
from obc.statistics.triangle import Triangle, full_precision

Weight = Callable[[Any], Tensor]
Held = Literal["device", "host"]

_TOTAL = "total"
# Feature maps with fewer positions per sample are copied, and multiplied as one product over all samples.
_POSITIONS_OF_A_PRODUCT = 64


@dataclass(frozen=True, eq=False)
class GramSum:
    """Sums over the positions of one layer's input, weighted by omega; tensors are float64.

    Attributes:
        count: sum omega; the number of positions if omega is 1.
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

    Each batch's product is a float32 GEMM (float64 for float64 inputs) without TF32, added into float64. Only the
    blocks on and above the diagonal are kept, and on the CPU only those are computed. Layers that read the very same
    tensor, such as query, key and value, share product and matrix. A float32 input of d channels takes 8 d^2 bytes, or
    up to 12 d^2 if d is below 384. For convolutions x is one pixel's channels. For fused experts x is the input of one
    expert's down projection for a token routed to it; each expert has its own matrix, named like "mlp.experts[3]".

    Args:
        weight: ``weight(batch)`` gives omega >= 0 as (B,), one per sample, or (B, T), one per token; for a key of a
            mapping write ``lambda batch: batch["weight"]``. None: 1.
        to: "device" keeps the sums where the layer is, "host" in host memory; the device then needs 2 to 4 d^2 bytes
            per layer, and each batch's product is copied.
    """

    weight: Weight | None = None
    to: Held = "device"

    name: ClassVar[str] = "gram"
    backward: ClassVar[bool] = False

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of Gram matrices of the inputs of the groups' consumers."""
        one_of("Gram(to=...)", self.to, get_args(Held), StatisticsError)
        to = torch.device("cpu") if self.to == "host" else None
        return GramReader(to, part, model, groups, self.weight)


class GramReader(InputReader):
    """Reads Gram matrices, and knows their memory beforehand."""

    def __init__(
        self, to: torch.device | None, part: Part, model: nn.Module, groups: Groups, weight: Weight | None
    ) -> None:
        packed = frozenset({_TOTAL})
        sums = Sums(Gram.name, checked=self._checked, to=to, reused=packed, unpacked=self._unpacked)
        super().__init__(sums, part, model, groups)
        self._weight = weight
        self._triangles = {name: Triangle(width) for name, width in self.widths.items()}

    def read(
        self, name: str, x: Tensor, channel_dim: int, valid: Tensor | None, routed: RoutedInput | None
    ) -> dict[str, Tensor]:
        """One batch's sums: omega x x^T packed, omega x, and omega."""
        x = x.to(ops.accumulation_dtype(x.dtype))
        if valid is None and self._weight is None:
            pieces = _pieces(x, channel_dim)
            count = torch.full((), x.numel() // x.shape[channel_dim], dtype=torch.float64, device=x.device)
            total = self._product(name, [(piece, piece) for piece in pieces])
            dims = [dim for dim in range(x.dim()) if dim != channel_dim]
            return {_TOTAL: total, "sum": x.sum(dims), "count": count}
        rows = flat_rows(x, channel_dim)
        kept = None if valid is None else valid.reshape(-1)
        if kept is not None:
            rows = rows.masked_fill(~kept.unsqueeze(1), 0)
        if self._weight is None:
            assert kept is not None
            weighted, counted = rows, kept
        else:
            omega = self._omega(name, x, channel_dim, routed).to(rows)
            weighted, counted = rows * omega.unsqueeze(1), omega if kept is None else omega.masked_fill(~kept, 0)
        total = self._product(name, [(weighted, rows)])
        return {_TOTAL: total, "sum": weighted.sum(0), "count": counted.sum().double()}

    def _product(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the pairs (positions, C) of left^T right, packed."""
        triangle, (left, _) = self._triangles[name], pairs[0]
        packed = self.sums.memory(triangle.numbers, left.dtype, left.device)
        with full_precision():
            for place, (left, right) in enumerate(pairs):
                triangle.add_product(packed, left, right, beta=int(place > 0))
        return packed

    def _checked(self, name: str, field: str, values: Tensor) -> Tensor:
        """Values that show whether a product is finite: |sum x_i x_j| is at most the larger of sum x_i^2, sum x_j^2."""
        return self._triangles[name].diagonal(values) if field == _TOTAL else values

    def _unpacked(self, name: str, field: str, total: Tensor) -> Tensor:
        return self._triangles[name].unpacked(total) if field == _TOTAL else total

    def _omega(self, name: str, x: Tensor, channel_dim: int, routed: RoutedInput | None) -> Tensor:
        """(positions,) the weight of each position."""
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
        """The matrix, the sum and the count of one layer."""
        return GramSum(float(fields["count"]), fields[_TOTAL], fields["sum"])

    def bytes(self) -> int:
        """Bytes of all layers: :meth:`bytes_of`."""
        return sum(self.bytes_of(name) for name in self.widths)

    def bytes_of(self, name: str) -> int:
        """Bytes for one layer: packed, the sum and a batch's product; at the end, the matrix."""
        return max(12 * self._triangles[name].numbers, 8 * self.widths[name] ** 2)

    def product_bytes(self, name: str) -> int:
        """Bytes of one batch's packed product in float32."""
        return 4 * self._triangles[name].numbers

    def largest(self) -> str:
        """The layer with the widest input."""
        return max(self.widths, key=self.widths.__getitem__)

    def bytes_by_device(self) -> dict[torch.device, int]:
        """Bytes of the sums and a batch's summands on each device."""
        found: dict[torch.device, int] = {}
        for name, width in self.widths.items():
            device = self.device_of(name)
            to = self.sums.to or device
            if to == device:
                found[to] = found.get(to, 0) + self.bytes_of(name)
            else:
                found[device] = found.get(device, 0) + self.product_bytes(name)
                found[to] = found.get(to, 0) + 8 * width**2
        return found


def _pieces(x: Tensor, channel_dim: int) -> list[Tensor]:
    """Parts (positions, C) that together hold an input.

    Feature maps are split by sample if this saves their transposed copy and a sample has enough positions for a
    product.
    """
    positions = x[0].numel() // x.shape[channel_dim]
    if channel_dim == 1 and x.is_contiguous() and positions >= _POSITIONS_OF_A_PRODUCT:
        return [sample.flatten(1).mT for sample in x]
    return [flat_rows(x, channel_dim)]
