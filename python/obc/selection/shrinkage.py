"""Estimates how far to trust interactions measured with few rows."""

from __future__ import annotations

import torch
from torch import Tensor


def estimated_shrinkage(units: Tensor) -> float:
    """The noise share of the off-diagonal of the Gram matrix of ``units`` (C, N): 0 is none, 1 is all.

    It minimises the expected squared distance of (1 - s) * off-diagonal to the truth, estimated from the rows
    themselves (Ledoit and Wolf; Schäfer and Strimmer's target "diagonal, unequal variance", about zero instead of the
    mean): with w_uvn = x_un x_vn,

        s = sum_{u != v} Var(sum_n w_uvn) / sum_{u != v} (sum_n w_uvn)^2,   clamped to [0, 1].

    Neither sum needs the C x C matrix: 2 C N^2 operations. A single row has no variance; the result is then 1.
    """
    rows = units.shape[1]
    if rows < 2:
        return 1.0
    squares = units.square()
    off_products = squares.sum(0).square().sum() - squares.square().sum()  # sum over u != v and n of w_uvn^2
    off_gram = (units.T @ units).square().sum() - squares.sum(1).square().sum()  # sum over u != v of (X X^T)_uv^2
    variance = (off_products - off_gram / rows) * rows / (rows - 1)
    return float(torch.where(off_gram > 0, variance / off_gram, 1.0).clamp(0.0, 1.0))
