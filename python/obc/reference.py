"""The definition of every operator in plain PyTorch: slow, short, and the oracle for every backend.

Each function has the name and signature of the operator in :mod:`obc.ops`. Half-precision inputs are read as float32
and float64 stays float64, so every sum is at least float32.

Index letters: n sample, c channel, o out channel, i in channel, s position (spatial, kernel or repeat),
g group, b block, k kept out channel, j kept in channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator sums inputs of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def channel_dot(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    """r[c] = sum over everything but c of activation * grad; with per_sample, r[n, c] keeps dim 0 apart."""
    kept = {channel_dim % activation.dim()} | ({0} if per_sample else set())
    product = _wide(activation) * _wide(grad)
    summed = [d for d in range(product.dim()) if d not in kept]
    return product.sum(summed) if summed else product


def channel_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per channel: sum x, sum x^2, sum |x|, and over samples n the sum of (mean over n's positions of |x|)^2.

    ``mask`` has the shape of x without its channels; positions where it is False don't count.
    """
    values = _wide(x).movedim(channel_dim, -1)
    count = values.shape[1:-1].numel()
    values = values.reshape(x.shape[0], count, values.shape[-1])  # (n, s, c)
    counts = values.new_full((x.shape[0], 1), count)
    if mask is not None:
        mask = mask.reshape(x.shape[0], count, 1)
        values = torch.where(mask, values, torch.zeros_like(values))
        counts = mask.sum(1).to(values.dtype)
    absolute = values.abs().sum(1)  # (n, c)
    means = absolute / counts.clamp_min(1)
    return values.sum((0, 1)), values.square().sum((0, 1)), absolute.sum(0), means.square().sum(0)


def weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """out_dot[o] = w_o . g_o (+ b_o gb_o) and in_dot[i] = w_{:,i} . g_{:,i}.

    ``weight`` is (out, in / groups, *kernel); transposed convolutions store (in, out / groups, *kernel).
    """
    product = _wide(weight) * _wide(grad)
    rows, columns, kernel = weight.shape[0], weight.shape[1], weight.shape[2:].numel()
    row_dot = product.flatten(1).sum(1)
    column_dot = product.reshape(groups, rows // groups, columns, kernel).sum((1, 3)).flatten()
    out_dot, in_dot = (column_dot, row_dot) if transposed else (row_dot, column_dot)
    if bias is not None and bias_grad is not None:
        out_dot = out_dot + _wide(bias) * _wide(bias_grad)
    return out_dot, in_dot


def weight_dot_list(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`weight_dot` for every layer of a model: the list of out_dots and the list of in_dots."""
    count = len(weights)
    dots = [
        weight_dot(*layer)
        for layer in zip(
            weights,
            grads,
            biases or [None] * count,
            bias_grads or [None] * count,
            groups or [1] * count,
            transposed or [False] * count,
            strict=True,
        )
    ]
    return [out_dot for out_dot, _ in dots], [in_dot for _, in_dot in dots]


def weight_moments(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row of dim 0: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|."""
    w, wg = _wide(weight).flatten(1), (_wide(weight) * _wide(grad)).flatten(1)
    return wg.sum(1), wg.square().sum(1), wg.abs().sum(1), w.square().sum(1), w.abs().sum(1)


def _blocks(factor: Tensor, blocks: int) -> Tensor:
    """A (blocks, rows, columns) view of a factor; only the diagonal blocks of a 2-D block-diagonal one are read."""
    if factor.dim() == 3:
        return factor
    rows, columns = factor.shape
    grid = factor.reshape(blocks, rows // blocks, blocks, columns // blocks)
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    """W' = C W D over (out, in / groups, *kernel): out channels mixed by C, in channels by D.

    ``compressor`` is (kept_out, out), ``decompressor`` (in, kept_in), or the blocks of a block-diagonal one, (blocks,
    ...). ``in_repeat`` > 1 is for a Linear after flatten: each in channel has that many columns.
    """
    kernel = weight.shape[2:]
    # (o, i, s)
    folded = _wide(weight).reshape(weight.shape[0], weight.shape[1] // in_repeat, in_repeat * kernel.numel())
    if compressor is not None:
        c = _wide(_blocks(compressor, groups))
        folded = torch.einsum("bko,bois->bkis", c, folded.unflatten(0, (c.shape[0], -1))).flatten(0, 1)
    if decompressor is not None:
        d = _wide(_blocks(decompressor, groups))
        if groups > 1:
            folded = torch.einsum("gkis,gij->gkjs", folded.unflatten(0, (groups, -1)), d).flatten(0, 1)
        else:
            folded = torch.einsum("kbis,bij->kbjs", folded.unflatten(1, (d.shape[0], -1)), d).flatten(1, 2)
    return folded.reshape(folded.shape[0], folded.shape[1] * in_repeat, *kernel).to(weight.dtype).contiguous()


def end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    """scores[groups[c]] += (row[c] / loss_scale)^2 and row = 0, in place; a row with a non-finite square adds nothing.

    Returns a 0-d bool tensor: whether every square was finite. ``groups`` is sorted; without it, groups[c] = c.
    """
    squares = (row / loss_scale).square()
    finite = squares.isfinite().all()
    squares = torch.where(finite, squares, torch.zeros_like(squares))
    if groups is None:
        scores.add_(squares)
    else:
        scores.index_add_(0, groups, squares)
    row.zero_()
    return finite
