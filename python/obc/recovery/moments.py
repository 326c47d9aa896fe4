"""The least-squares decompressor of a consumer's input, from sums over batches.

x is the consumer's input in the unpruned model, z its input in the pruned one (in mode "ls" the kept channels of x).
With S the selection of the kept channels, e = x - S z is what the naive model loses, and the decompressor is

    D = S + E[e zT] (E[z zT] + lambda I)^-1,      lambda = ridge * mean diagonal of E[z zT]

so that a growing ridge shrinks it towards the naive S (:mod:`obc.recovery.normal_equations`). If z is the kept part of
x, e is zero in the kept channels, and only the others are regressed. With an intercept all moments are centred, and the
consumer's bias absorbs W (E[x] - D E[z]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obc.recovery.normal_equations import NormalEquations, WeightChange


@dataclass(frozen=True)
class Solution:
    """A decompressor, and how well it reconstructs the consumer's input.

    Attributes:
        decompressor: D, (in, kept in), or its diagonal blocks for a grouped convolution; float64.
        intercept: (in,), the part of the mean that D does not explain; None if the regression goes through zero.
        error_before: E |x - S z|^2 / E |x|^2, the naive model's.
        error_after: E |x - D z - intercept|^2 / E |x|^2.
        ridge: the relative ridge that was used.
    """

    decompressor: Tensor
    intercept: Tensor | None
    error_before: float
    error_after: float
    ridge: float


class RegressionMoments(NormalEquations):
    """Running sums of one consumer, in host memory: the regression of e = x - S z on z.

    Args:
        kept: (blocks, kept in / blocks) positions of the kept channels inside their block.
        size: channels of a block before pruning.
        paired: whether z comes from the pruned model; otherwise z is the kept part of x, and e its dropped part.

    Attributes:
        regressed: (blocks, n) the positions of the channels whose e is regressed.
    """

    def __init__(self, kept: Tensor, size: int, paired: bool) -> None:
        blocks, count = kept.shape
        stays = torch.zeros(blocks, size, dtype=torch.bool, device="cpu")
        if not paired:
            stays.scatter_(1, kept, True)
        self.kept, self.size, self.paired = kept, size, paired
        self.regressed = (~stays).nonzero()[:, 1].reshape(blocks, -1)
        super().__init__(blocks, count, self.regressed.shape[1], torch.device("cpu"))

    def add_inputs(self, x: Tensor, z: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add rows: x (rows, in), z (rows, kept in), weights (rows,), by default 1."""
        x = self._blocked(x)
        kept = self._columns(self.kept, x)
        if z is None:
            self.add(x.gather(2, kept), x.gather(2, self._columns(self.regressed, x)), weights)
        else:
            z = self._blocked(z)
            self.add(z, x.scatter_add(2, kept, -z), weights)

    def solve(self, ridge: float, intercept: bool) -> Solution:
        """The decompressor for these moments.

        Raises:
            SingularError: the Gram matrix can't be factorised.
        """
        (change,) = self.solved([ridge], intercept)
        decompressor = self._selection.scatter_add_(1, self._rows_like(change.weight), change.weight)
        constant = None
        if change.bias is not None:
            constant = change.bias.new_zeros(len(self.kept), self.size).scatter_(1, self.regressed, change.bias)
        naive, scale = float(self.energy.sum()), self._input_energy() or 1.0
        after = float(self.error(change).sum()) / scale
        factor = decompressor[0] if len(decompressor) == 1 else decompressor
        return Solution(factor, None if constant is None else constant.flatten(), naive / scale, after, change.ridge)

    def relative_error(self, solution: Solution) -> float:
        """sum |x - D z - intercept|^2 over these rows, relative to the naive sum |x - S z|^2; 1 if that is 0."""
        weight = solution.decompressor.reshape(self._selection.shape) - self._selection
        bias = solution.intercept
        if bias is not None:
            bias = bias.reshape(len(self.kept), self.size).gather(1, self.regressed)
        change = WeightChange(weight.gather(1, self._rows_like(weight)), bias, solution.ridge)
        naive = float(self.energy.sum())
        return float(self.error(change).sum()) / naive if naive > 0 else 1.0

    def _blocked(self, rows: Tensor) -> Tensor:
        """(rows, channels) to (blocks, rows, channels / blocks) in float64: the ridge amplifies rounding errors."""
        return rows.double().unflatten(1, (len(self.kept), -1)).transpose(0, 1)

    @staticmethod
    def _columns(positions: Tensor, x: Tensor) -> Tensor:
        return positions.to(x.device)[:, None].expand(-1, x.shape[1], -1)

    def _rows_like(self, matrix: Tensor) -> Tensor:
        return self.regressed[..., None].expand(-1, -1, matrix.shape[2])

    @property
    def _selection(self) -> Tensor:
        """S, (blocks, size, kept)."""
        blocks, count = self.kept.shape
        return torch.zeros(blocks, self.size, count, dtype=torch.float64, device="cpu").scatter_(
            1, self.kept[:, None], 1.0
        )

    def _input_energy(self) -> float:
        """sum w |x|^2, where x = e + S z."""
        both = self.cross.gather(1, self.kept[:, None]).sum() if self.paired else torch.zeros((), device="cpu")
        return float(self.energy.sum() + 2 * both + self.gram.diagonal(dim1=-2, dim2=-1).sum())
