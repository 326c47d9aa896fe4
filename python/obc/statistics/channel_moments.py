"""Moments of a statistic's inputs, over the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor

from obc import ops


def moments_of(x: Tensor, channel_dim: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts and sums of one tensor (:func:`obc.ops.channel_moments`).

    Args:
        x: floating tensor with samples along dim 0.
        channel_dim: the dimension of the channels.
        valid: (B, T) bool, for x (B, T, C) or (B * T, C): the positions that count; None counts all.

    Returns:
        (2,) float64: the numbers of positions and samples that counted; (4, C): sum x, sum x^2, sum |x|, and the sum
        over samples of (mean over positions of |x|)^2.
    """
    if valid is None:
        counts = torch.tensor([x.numel() // x.shape[channel_dim], x.shape[0]], dtype=torch.float64, device=x.device)
        return counts, torch.stack(ops.channel_moments(x, channel_dim))
    x = x.reshape(*valid.shape, x.shape[-1])
    positions = valid.sum(1)
    counts = torch.stack([positions.sum(), (positions > 0).sum()]).double()
    return counts, torch.stack(ops.channel_moments(x, -1, valid))
