"""The moments of every channel of one tensor, in float32 (float64 for float64), by plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from obc import ops


def channel_moments(x: Tensor, channel_dim: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """n, sum x, sum x^2, sum |x| over all n positions, and sum over samples b of (mean over positions of |x_b|)^2.

    Args:
        x: floating, samples along dim 0; positions are the samples and every dim but the channels'.
        channel_dim: of the channels.

    Returns:
        n, and four tensors (C,).
    """
    dtype = ops.accumulation_dtype(x.dtype)
    values = x.detach().movedim(channel_dim, -1)
    values = values.reshape(values.shape[0], -1, values.shape[-1]).to(dtype)
    absolute = values.abs()
    per_sample = absolute.sum(1)
    count = values.shape[0] * values.shape[1]
    mean = per_sample / max(values.shape[1], 1)
    return count, values.sum((0, 1)), values.square().sum((0, 1)), per_sample.sum(0), mean.square().sum(0)


def masked_channel_moments(x: Tensor, channel_dim: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The moments over the positions that count.

    Args:
        x: as for :func:`channel_moments`.
        channel_dim: of the channels.
        valid: (B, T) bool, of x (B, T, C) or (B * T, C): the positions that count; None: all.

    Returns:
        (2,) float64: how many positions and how many samples counted; (4, C): the sums.
    """
    if valid is None:
        count, *sums = channel_moments(x, channel_dim)
        return torch.tensor([count, x.shape[0]], dtype=torch.float64, device=x.device), torch.stack(sums)
    x = x.detach().reshape(*valid.shape, x.shape[-1]).masked_fill(~valid.unsqueeze(-1), 0)
    _, total, square, absolute, _ = channel_moments(x, -1)
    positions = valid.sum(1)
    mean = x.abs().sum(1, dtype=ops.accumulation_dtype(x.dtype)) / positions.clamp_min(1).unsqueeze(-1)
    counts = torch.stack([positions.sum(), (positions > 0).sum()]).double()
    return counts, torch.stack([total, square, absolute, mean.square().sum(0)])
