"""Second moments of a consumer's input, accumulated over batches, and the least-squares decompressor from them.

x is the consumer's input in the unpruned model, z its input in the pruned one (in mode "ls" the kept channels of x).
With S the selection of the kept channels, the decompressor is

    D = S + (E[x zT] - S E[z zT]) (E[z zT] + lambda I)^-1,      lambda = ridge * mean diagonal of E[z zT]

so that a growing ridge shrinks it towards the naive S. If z is the kept part of x, the kept rows are the identity and
only the others are computed. With an intercept all moments are centred, and the consumer's bias absorbs W (E[x] - D
E[z]).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from obc.model.autocast import without_autocast
from obc.model.processes import Processes

# If Cholesky fails, the ridge is multiplied by the first number, at most as often as the second; the report names it.
_RIDGE_STEP = 10.0
_RIDGE_STEPS = 6
# A variance this small beside the mean square is a rounding error.
_ROUNDING = 1e-12


class SingularError(ValueError):
    """The Gram matrix of the kept channels is singular even under the largest ridge."""


@dataclass(frozen=True)
class Fit:
    """How well a decompressor reconstructs the consumer's input.

    Attributes:
        error_before: E |x - S z|^2 / E |x|^2, the naive model's.
        error_after: E |x - D z - intercept|^2 / E |x|^2.
        ridge: the relative ridge that was used.
    """

    error_before: float
    error_after: float
    ridge: float


@dataclass(frozen=True)
class Solution:
    """A decompressor.

    Attributes:
        decompressor: D, (in, kept in), or its diagonal blocks for a grouped convolution; float64.
        intercept: (in,), the part of the mean that D does not explain; None if the regression goes through zero.
        fit: how well they reconstruct.
    """

    decompressor: Tensor
    intercept: Tensor | None
    fit: Fit


class Moments:
    """Running sums of one consumer, float64: sum x zT, sum z zT per diagonal block, sum x, sum z, sum x^2.

    Rows may be weighted; E is then the weighted mean.

    Args:
        kept: (blocks, kept in / blocks) positions of the kept channels inside their block.
        size: channels of a block before pruning.
        paired: whether z comes from the pruned model; otherwise z is the kept part of x, and E[z zT] a part of E[x zT].
    """

    def __init__(self, kept: Tensor, size: int, paired: bool) -> None:
        blocks, count = kept.shape
        self.kept, self.paired, self.samples = kept, paired, 0
        self.total = 0.0  # sum of the weights
        self.cross = torch.zeros(blocks, size, count, dtype=torch.float64)
        self.gram = torch.zeros(blocks, count, count, dtype=torch.float64) if paired else None
        self.sum_x, self.sum_z = (
            torch.zeros(blocks, size, dtype=torch.float64),
            torch.zeros_like(kept, dtype=torch.float64),
        )
        self.square = torch.zeros(blocks, size, dtype=torch.float64)

    @staticmethod
    def bytes_for(blocks: int, size: int, kept: int, paired: bool) -> int:
        """Bytes of one object: 8 (size * kept + 2 size + kept), plus 8 kept^2 if paired, per block."""
        return 8 * blocks * (size * kept + kept * kept * paired + 2 * size + kept)

    def add(self, x: Tensor, z: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add rows: x (rows, in), z (rows, kept in), weights (rows,), by default 1."""
        blocks = self.kept.shape[0]
        x = _blocked(x, blocks)
        z = (
            x.gather(2, self.kept.to(x.device)[:, None].expand(-1, x.shape[1], -1))
            if z is None
            else _blocked(z, blocks)
        )
        weighted_x, weighted_z = x, z
        if weights is not None:
            factors = weights.to(x)[:, None]
            weighted_x, weighted_z = x * factors, z * factors
        with without_autocast():
            self.cross += (x.mT @ weighted_z).to(self.cross)
            if self.gram is not None:
                self.gram += (z.mT @ weighted_z).to(self.gram)
        self.sum_x += weighted_x.sum(1).to(self.sum_x)
        self.sum_z += weighted_z.sum(1).to(self.sum_z)
        self.square += (weighted_x * x).sum(1).to(self.square)
        self.total += x.shape[1] if weights is None else float(weights.double().sum())
        self.samples += x.shape[1]

    def gather(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        samples, total = torch.tensor(self.samples), torch.tensor(self.total, dtype=torch.float64)
        sums = (self.cross, self.gram, self.sum_x, self.sum_z, self.square, samples, total)
        processes.add(tensor for tensor in sums if tensor is not None)
        self.samples, self.total = int(samples), float(total)

    def solve(self, ridge: float, intercept: bool) -> Solution:
        """The decompressor for these moments.

        Raises:
            SingularError: the Gram matrix can't be factorised.
        """
        count = self.total
        cross, square, gram = self.cross / count, self.square / count, self._gram / count
        mean_x, mean_z = self.sum_x / count, self.sum_z / count
        energy = float(square.sum())
        before = self._naive_error(count)
        uncentred = gram
        if intercept:
            cross = cross - mean_x[..., None] * mean_z[:, None]
            gram = gram - mean_z[..., None] * mean_z[:, None]
            square = square - mean_x.square()
        cross, square, start = self._taken(cross), self._taken(square), self._start
        target = cross if start is None else cross - start @ gram
        change, used, damping = _regress(target, gram, mean_diagonal(gram, uncentred), ridge)
        rows = change if start is None else start + change
        # E |x - D z|^2, in which D E[z zT] is cross - damping * change.
        after = float(square.sum() - (rows * cross).sum() - (damping * change * rows).sum())
        decompressor = rows
        if not self.paired:
            decompressor = self._selection.scatter_(1, self._dropped[..., None].expand_as(rows), rows)
        constant = None
        if intercept:
            constant = (mean_x - (decompressor @ mean_z[..., None])[..., 0]).flatten()
        factor = decompressor[0] if len(decompressor) == 1 else decompressor
        scale = energy or 1.0
        fit = Fit(max(before, 0.0) / scale, max(after, 0.0) / scale, used)
        return Solution(factor, constant, fit)

    def relative_error(self, solution: Solution) -> float:
        """sum |x - D z - intercept|^2 over these rows, relative to the naive sum |x - S z|^2; 1 if that is 0."""
        decompressor = solution.decompressor.reshape(self.cross.shape)
        error = _error(self._taken(decompressor), self._taken(self.cross), self._gram, self._taken(self.square))
        if solution.intercept is not None:
            constant = solution.intercept.reshape(self.sum_x.shape)
            rest = self.sum_x - (decompressor @ self.sum_z[..., None])[..., 0]
            error += float((self.total * constant.square() - 2 * constant * rest).sum())
        naive = self._naive_error(1.0)
        return max(error, 0.0) / naive if naive > 0 else 1.0

    @cached_property
    def _dropped(self) -> Tensor:
        """(blocks, dropped / blocks) positions of the dropped channels."""
        blocks, size = self.square.shape
        stays = torch.zeros(blocks, size, dtype=torch.bool).scatter_(1, self.kept, True)
        return (~stays).nonzero()[:, 1].reshape(blocks, -1)

    def _taken(self, values: Tensor) -> Tensor:
        """The regressed rows of (blocks, size, ...)."""
        if self.paired:
            return values
        index = self._dropped if values.dim() == 2 else self._dropped[..., None].expand(-1, -1, values.shape[2])
        return values.gather(1, index)

    @property
    def _start(self) -> Tensor | None:
        """S in the regressed rows; None if it is zero there."""
        return self._selection if self.paired else None

    def _naive_error(self, count: float) -> float:
        if not self.paired:
            return float(self._taken(self.square).sum()) / count
        return _error(self._selection, self.cross, self._gram, self.square) / count

    @property
    def _gram(self) -> Tensor:
        """sum z zT."""
        if self.gram is not None:
            return self.gram
        return self.cross.gather(1, self.kept[..., None].expand(-1, -1, self.kept.shape[1]))

    @property
    def _selection(self) -> Tensor:
        return torch.zeros_like(self.cross).scatter_(1, self.kept[:, None], 1.0)


def _blocked(rows: Tensor, blocks: int) -> Tensor:
    """(rows, channels) to (blocks, rows, channels / blocks) in float64, because the ridge amplifies rounding errors."""
    return rows.double().unflatten(1, (blocks, -1)).transpose(0, 1)


def _error(decompressor: Tensor, cross: Tensor, gram: Tensor, square: Tensor) -> float:
    return float(square.sum() - 2 * (decompressor * cross).sum() + ((decompressor @ gram) * decompressor).sum())


def larger_ridges(ridge: float) -> list[float]:
    """The ridge, and larger ones to try in turn if the matrix can't be factorised."""
    return [ridge * _RIDGE_STEP**step for step in range(_RIDGE_STEPS + 1)]


def mean_diagonal(gram: Tensor, uncentred: Tensor) -> Tensor:
    """(blocks, 1): the mean diagonal of E[z zT], which ridges are relative to.

    If all channels of a block are constant, centring leaves rounding errors: the mean is then that of the uncentred
    matrix, so that the solution is zero, and 1 where that is zero too.
    """
    mean, raw = (each.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) for each in (gram, uncentred))
    mean = torch.where(mean > _ROUNDING * raw, mean, raw)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _regress(target: Tensor, gram: Tensor, mean: Tensor, ridge: float) -> tuple[Tensor, float, Tensor]:
    """target (gram + lambda I)^-1, the relative ridge that made it solvable, and lambda, (blocks, 1, 1)."""
    mean = mean[..., None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    for used in larger_ridges(ridge):
        factor, failed = torch.linalg.cholesky_ex(gram + used * mean * identity)
        if not bool(failed.any()):
            return torch.cholesky_solve(target.mT, factor).mT, used, used * mean
    raise SingularError(f"its Gram matrix is singular with a ridge of up to {used:g}")
