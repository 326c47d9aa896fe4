"""The change of a layer's weight that removes an error: ridge regression of the error on the layer's input.

Let z be the layer's input, e the error at the point that its output enters, and a the factors with which it enters:

    change = diag(1/a) E[e zT] (E[z zT] + lambda I)^-1,      lambda = ridge * mean diagonal of E[z zT]

so that a growing ridge leaves the weight unchanged. With an intercept the moments are centred, and the layer's bias
absorbs diag(1/a) E[e] - change E[z].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.model.autocast import without_autocast
from obc.model.processes import Processes

# If Cholesky fails, the ridge is multiplied by the first number, at most as often as the second; the report names it.
RIDGE_STEP, RIDGE_STEPS = 10.0, 6
# A variance this small beside the mean square is a rounding error.
_ROUNDING = 1e-12
# Rows are converted to float64 in pieces of this many, so that no float64 copy of a whole batch is made.
_PIECE = 4096
# A channel whose naive error is this much smaller than the average has nothing to lose by a change.
_SMALLEST_ERROR = 1e-6


class SingularError(ValueError):
    """A Gram matrix is singular even under the largest ridge."""


@dataclass(frozen=True)
class WeightChange:
    """A change of a layer's weight and bias.

    Attributes:
        weight: (blocks, out / blocks, columns) float64.
        bias: (blocks, out / blocks) float64; None without an intercept.
        ridge: relative to the mean diagonal.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float


class NormalEquations:
    """Running sums in float64 per diagonal block: sum w z zT, sum w e zT, sum w z, sum w e, sum w e^2; w weights rows.

    Args:
        blocks: number of conv groups; otherwise 1.
        columns: columns of z in a block.
        outputs: columns of e in a block.
    """

    def __init__(self, blocks: int, columns: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(blocks, *shape, dtype=torch.float64, device=device)

        self.gram, self.cross = zeros(columns, columns), zeros(outputs, columns)
        self.sum_z, self.sum_e, self.energy = zeros(columns), zeros(outputs), zeros(outputs)
        self.rows = 0
        self.total = 0.0  # sum of the weights

    @staticmethod
    def bytes_for(blocks: int, columns: int, outputs: int) -> int:
        """Bytes of the sums of one object."""
        return 8 * blocks * ((columns + outputs) * columns + columns + 2 * outputs)

    @property
    def bytes(self) -> int:
        """Bytes of the sums."""
        blocks, outputs, columns = self.cross.shape
        return self.bytes_for(blocks, columns, outputs)

    def add(self, z: Tensor, error: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: z (blocks, rows, columns), error (blocks, rows, outputs), weights (rows,), by default 1."""
        for start in range(0, z.shape[1], _PIECE):
            piece = slice(start, start + _PIECE)
            rows, errors = z[:, piece].double(), error[:, piece].double()
            weighted, weighted_errors = rows, errors
            if weights is not None:
                factor = weights[piece].to(rows)[:, None]
                weighted, weighted_errors = rows * factor, errors * factor
            with without_autocast():
                self.gram += (weighted.mT @ rows).to(self.gram)
                self.cross += (weighted_errors.mT @ rows).to(self.gram)
            self.sum_z += weighted.sum(1).to(self.gram)
            self.sum_e += weighted_errors.sum(1).to(self.gram)
            self.energy += (weighted_errors * errors).sum(1).to(self.gram)
        self.rows += z.shape[1]
        self.total += z.shape[1] if weights is None else float(weights.double().sum())

    def gather(self, processes: Processes) -> None:
        """Add the sums of all processes."""
        rows, total = torch.tensor(self.rows, device="cpu"), torch.tensor(self.total, dtype=torch.float64, device="cpu")
        processes.add([self.gram, self.cross, self.sum_z, self.sum_e, self.energy, rows, total])
        self.rows, self.total = int(rows), float(total)

    def solved(self, ridges: Sequence[float], intercept: bool) -> list[WeightChange]:
        """The solutions for every sufficient ridge; if none is, for the first larger one that is.

        Raises:
            SingularError: the largest ridge tried is not sufficient.
        """
        largest = max(ridges)
        for step in range(RIDGE_STEPS + 1):
            larger = largest * RIDGE_STEP**step
            if changes := self.changes(ridges if step == 0 else [larger], intercept):
                return changes
        raise SingularError(
            f"its Gram matrix is singular with a ridge of up to {larger:g}; it saw {self.rows} positions for "
            f"{self.gram.shape[-1]} columns: pass more batches or a larger ridge"
        )

    def changes(self, ridges: Sequence[float], intercept: bool) -> list[WeightChange]:
        """The solution for every ridge with which the Gram matrix can be factorised."""
        count = self.total or 1.0
        gram, cross = self.gram / count, self.cross / count
        mean_z, mean_e = self.sum_z / count, self.sum_e / count
        uncentred = gram
        if intercept:
            gram = gram - mean_z[..., None] * mean_z[:, None]
            cross = cross - mean_e[..., None] * mean_z[:, None]
        mean = _mean_diagonal(gram, uncentred)
        found = []
        for ridge in ridges:
            damped = gram.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(ridge * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if bool(failed.any()):
                continue
            weight = torch.cholesky_solve(cross.mT, factor).mT
            bias = mean_e - (weight @ mean_z[..., None])[..., 0] if intercept else None
            found.append(WeightChange(weight, bias, ridge))
        return found

    def error(self, change: WeightChange | None) -> Tensor:
        """(blocks, outputs): sum w (e - change z)^2 over the rows; without a change sum w e^2."""
        if change is None:
            return self.energy
        weight = change.weight
        error = self.energy - 2 * (weight * self.cross).sum(-1) + ((weight @ self.gram) * weight).sum(-1)
        if change.bias is not None:
            rest = self.sum_e - (weight @ self.sum_z[..., None])[..., 0]
            error = error - 2 * change.bias * rest + self.total * change.bias.square()
        return error.clamp_min(0.0)


def smallest(errors: Sequence[Tensor]) -> int:
    """Which of several errors, (blocks, channels), is the smallest; the first is the naive one.

    Every channel's error counts relative to its naive one. Summed as they are, a few channels of a large stream decide.
    """
    naive = errors[0]
    floor = naive.clamp_min(max(_SMALLEST_ERROR * float(naive.mean()), torch.finfo(naive.dtype).tiny))
    return min(range(len(errors)), key=lambda index: float((errors[index] / floor).mean()))


def _mean_diagonal(gram: Tensor, uncentred: Tensor) -> Tensor:
    """(blocks, 1): the mean diagonal of E[z zT], which ridges are relative to.

    If all channels of a block are constant, centring leaves only rounding errors. Then the mean diagonal of the
    uncentred matrix is used, so that the solution is zero; where that is zero as well, 1.
    """
    mean, raw = (each.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) for each in (gram, uncentred))
    mean = torch.where(mean > _ROUNDING * raw, mean, raw)
    return torch.where(mean > 0, mean, torch.ones_like(mean))
