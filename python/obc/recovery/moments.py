"""Second moments of a consumer's input, accumulated batch by batch, and the least-squares decompressor from them.

x is the consumer's input in the unpruned model, z what reaches it in the pruned one (the kept channels of x itself in
mode "ls"). With S the selection of the kept channels, the decompressor is

    D = S + (E[x zT] - S E[z zT]) (E[z zT] + lambda I)^-1,      lambda = ridge * mean diagonal of E[z zT]

so that a growing ridge shrinks it towards the naive S, and where z is the kept part of x the kept rows stay exactly the
identity. With an intercept all moments are centred, and the consumer's bias takes W (E[x] - D E[z]).

A dropped channel whose energy sits at few positions (in a transformer, those of a special token) has no linear stand-in
but one that adds noise at all the others, where it carried nothing. Its kurtosis, E[x^4] / E[x^2]^2, is the inverse of
the share of positions that carry it; channels beyond a limit can be left naive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.recovery.processes import Processes

# A ridge that Cholesky can't use is multiplied by the first, at most as often as the second; the report names it.
_RIDGE_STEP = 10.0
_RIDGE_STEPS = 6


class SingularError(ValueError):
    """The Gram matrix of the kept channels is singular even under the largest ridge."""


@dataclass(frozen=True)
class Fit:
    """How well a decompressor reconstructs the consumer's input.

    Attributes:
        error_before: E |x - S z|^2 / E |x|^2, the naive model's.
        error_after: E |x - D z - intercept|^2 / E |x|^2.
        ridge: the relative ridge that was used.
        left_out: how many dropped channels were left naive because of their kurtosis.
    """

    error_before: float
    error_after: float
    ridge: float
    left_out: int


@dataclass(frozen=True)
class Solution:
    """A decompressor.

    Attributes:
        decompressor: D, (in, kept in), or its diagonal blocks for a grouped convolution; float64.
        intercept: (in,), what of the mean D leaves; None where the regression goes through zero.
        fit: how well they reconstruct.
    """

    decompressor: Tensor
    intercept: Tensor | None
    fit: Fit


class Moments:
    """Running sums of one consumer, float64: sum x zT, sum z zT per diagonal block, sum x, sum z, sum x^2, sum x^4.

    Args:
        kept: (blocks, kept in / blocks) positions of the kept channels inside their block.
        size: channels of a block before pruning.
        paired: whether z comes from the pruned model; otherwise z is the kept part of x, and E[z zT] a part of E[x zT].
    """

    def __init__(self, kept: Tensor, size: int, paired: bool) -> None:
        blocks, count = kept.shape
        self.kept, self.paired, self.samples = kept, paired, 0
        self.cross = torch.zeros(blocks, size, count, dtype=torch.float64)
        self.gram = torch.zeros(blocks, count, count, dtype=torch.float64) if paired else None
        self.sum_x, self.sum_z = (
            torch.zeros(blocks, size, dtype=torch.float64),
            torch.zeros_like(kept, dtype=torch.float64),
        )
        self.square, self.fourth = torch.zeros(2, blocks, size, dtype=torch.float64)

    @staticmethod
    def bytes_for(blocks: int, size: int, kept: int, paired: bool) -> int:
        """What one object holds: 8 (size * kept + kept^2 where paired + 3 size + kept) bytes per block."""
        return 8 * blocks * (size * kept + kept * kept * paired + 3 * size + kept)

    def add(self, x: Tensor, z: Tensor | None = None) -> None:
        """Add rows: x (rows, in), z (rows, kept in)."""
        blocks = self.kept.shape[0]
        x = _blocked(x, blocks)
        z = (
            x.gather(2, self.kept.to(x.device)[:, None].expand(-1, x.shape[1], -1))
            if z is None
            else _blocked(z, blocks)
        )
        self.cross += (x.mT @ z).to(self.cross)
        if self.gram is not None:
            self.gram += (z.mT @ z).to(self.gram)
        self.sum_x += x.sum(1).to(self.sum_x)
        self.sum_z += z.sum(1).to(self.sum_z)
        self.square += x.square().sum(1).to(self.square)
        self.fourth += x.pow(4).sum(1).to(self.fourth)
        self.samples += x.shape[1]

    def gather(self, processes: Processes) -> None:
        """Add up what the processes accumulated."""
        samples = torch.tensor(self.samples)
        sums = (self.cross, self.gram, self.sum_x, self.sum_z, self.square, self.fourth, samples)
        processes.add(tensor for tensor in sums if tensor is not None)
        self.samples = int(samples)

    def solve(self, ridge: float, intercept: bool, kurtosis_limit: float = math.inf) -> Solution:
        """The decompressor for these moments; dropped channels beyond the kurtosis limit stay naive.

        Raises:
            SingularError: the Gram matrix can't be factorised.
        """
        count = self.samples
        rows = self.kept[..., None].expand(-1, -1, self.kept.shape[1])
        cross, square = self.cross / count, self.square / count
        gram = cross.gather(1, rows) if self.gram is None else self.gram / count
        mean_x, mean_z = self.sum_x / count, self.sum_z / count
        selection = torch.zeros_like(cross).scatter_(1, self.kept[:, None], 1.0)
        energy = float(square.sum())
        before = _error(selection, cross, gram, square)
        if intercept:
            cross = cross - mean_x[..., None] * mean_z[:, None]
            gram = gram - mean_z[..., None] * mean_z[:, None]
            square = square - mean_x.square()
        change, used = _regress(cross - selection @ gram, gram, ridge)
        decompressor = selection + change
        left_out = self.fourth * count > kurtosis_limit * self.square.square()
        left_out = left_out.scatter(1, self.kept, False)
        decompressor[left_out] = 0.0
        after = _error(decompressor, cross, gram, square)
        constant = None
        if intercept:
            after += float(mean_x[left_out].square().sum())
            constant = (mean_x - (decompressor @ mean_z[..., None])[..., 0]).masked_fill(left_out, 0.0).flatten()
        factor = decompressor[0] if len(decompressor) == 1 else decompressor
        scale = energy or 1.0
        fit = Fit(max(before, 0.0) / scale, max(after, 0.0) / scale, used, int(left_out.sum()))
        return Solution(factor, constant, fit)


def _blocked(rows: Tensor, blocks: int) -> Tensor:
    """(rows, channels) to (blocks, rows, channels / blocks) in float64, because the ridge divides rounding errors."""
    return rows.double().unflatten(1, (blocks, -1)).transpose(0, 1)


def _error(decompressor: Tensor, cross: Tensor, gram: Tensor, square: Tensor) -> float:
    """E |x - D z|^2 from the moments."""
    return float(square.sum() - 2 * (decompressor * cross).sum() + ((decompressor @ gram) * decompressor).sum())


def _regress(target: Tensor, gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """target (gram + lambda I)^-1 and the relative ridge that made it solvable."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None]
    # A block whose kept channels are all constant has nothing to regress on: any positive number solves it to zero.
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    for attempt in range(_RIDGE_STEPS + 1):
        used = ridge * _RIDGE_STEP**attempt
        factor, failed = torch.linalg.cholesky_ex(gram + used * mean * identity)
        if not bool(failed.any()):
            return torch.cholesky_solve(target.mT, factor).mT, used
    raise SingularError(f"its Gram matrix is singular with a ridge of up to {used:g}")
