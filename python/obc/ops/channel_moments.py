"""The operator ``channel_moments``."""

from __future__ import annotations

import torch
from torch import Tensor

from obc.ops.checks import check_floating, counted_from_0, require
from obc.ops.registration import call, not_differentiable, register
from obc.reference import accumulation_dtype


def _check(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, int, Tensor | None]:
    check_floating("channel_moments", "x", x)
    channel_dim = counted_from_0("channel_moments", "x", x, channel_dim)
    require(
        ValueError,
        channel_dim != 0,
        lambda: "obc::channel_moments: samples are along dim 0, but channel_dim is 0 too; unsqueeze a batch of one",
    )
    if mask is None:
        return x, channel_dim, mask
    require(TypeError, mask.dtype == torch.bool, lambda: f"obc::channel_moments: mask must be bool, got {mask.dtype}")
    shape = x.shape[:channel_dim] + x.shape[channel_dim + 1 :]
    require(
        ValueError,
        mask.shape == shape,
        lambda: (
            f"obc::channel_moments: mask has shape {tuple(mask.shape)}, expected {tuple(shape)}: that of x, "
            f"{tuple(x.shape)}, without its dim {channel_dim}"
        ),
    )
    require(
        ValueError,
        mask.device == x.device,
        lambda: f"obc::channel_moments: mask is on {mask.device}, x on {x.device}; pass one device",
    )
    return x, channel_dim, mask


def _empty(x: Tensor, channel_dim: int, mask: Tensor | None) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(x.dtype)
    return tuple(x.new_empty(x.shape[channel_dim], dtype=dtype) for _ in range(4))


register(
    "channel_moments",
    _check,
    _empty,
    not_differentiable("channel_moments", "detach x, or write the moment that you need in plain torch"),
)


def channel_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four sums per channel of a layer's input in one pass over ``x``; mean, variance and norms follow from them.

    Over all positions p of all samples b:  sum x,  sum x^2,  sum |x|,
    and over the samples:                   sum over b of (mean over p of |x[b, p]|)^2

    Args:
        x: floating tensor of any layout with samples along dim 0, for example (B, C, *S), channels-last or (B, T, C).
            A position is an index into all dimensions except samples and channels; (B, C) has one position per sample.
        channel_dim: the dimension of the channels, not the first; negative counts from the end.
        mask: bool, the shape of ``x`` without the channel dimension, on the same device. Positions where it is False
            (padding) don't count: a sample's mean is over the others, and a sample without any contributes nothing.

    Returns:
        Four tensors (C,), float32, or float64 for float64 input; not differentiable. The numbers of positions and
        samples follow from the shape or the mask.

    Raises:
        ValueError, TypeError, IndexError: ``channel_dim`` is 0 or out of range, x is not floating, or the mask does not
            fit.
    """
    moments: tuple[Tensor, Tensor, Tensor, Tensor] = call("channel_moments", x, channel_dim, mask)
    return moments
