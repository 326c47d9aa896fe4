"""``fold`` by the platform's matrix products, in the order that needs fewer multiplications.

It is plain differentiable torch: autograd keeps the first product, so that a backward needs twice the forward's
multiplications and no more, and no tensor larger than the weight arises.

Index letters as in :mod:`obc.reference`: o out, i in, s repeat and kernel positions, k kept out, j kept in.
Multiplications: C first s*k*i*(o + j), D first s*o*j*(i + k), each divided by the number of diagonal blocks.

Layouts: a weight whose in channels lie next to each other (``torch.channels_last`` for two kernel dimensions) is
multiplied in place on both sides. A contiguous one is copied once for D, unless its kernel has a single position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obc.reference import _blocks, _wide


def compress_first(weight: Tensor, compressor: Tensor, decompressor: Tensor, groups: int, in_repeat: int) -> bool:
    """Whether C W before (C W) D needs at most as many multiplications as W D before C (W D)."""
    blocks_out, blocks_in = (max(groups, f.shape[0] if f.dim() == 3 else 1) for f in (compressor, decompressor))
    out_channels, in_channels = weight.shape[0], weight.shape[1] // in_repeat
    scale_out = compressor.shape[0] if compressor.dim() == 3 else 1
    scale_in = decompressor.shape[0] if decompressor.dim() == 3 else 1
    kept_out = compressor.shape[-2] * scale_out
    kept_in = decompressor.shape[-1] * scale_in // groups  # columns of the folded weight
    # What one entry of a product sums over: the channels of its diagonal block.
    sum_out, sum_in = out_channels // blocks_out, in_channels * groups // blocks_in
    first = kept_out * in_channels * sum_out + kept_out * kept_in * sum_in
    return first <= out_channels * kept_in * sum_in + kept_out * kept_in * sum_out


def _compress(weight: Tensor, compressor: Tensor) -> Tensor:
    """(o, i, s) -> (k, i, s) with C as (k, o) or its diagonal blocks (blocks, k / blocks, o / blocks)."""
    if not weight.is_contiguous() and weight.transpose(1, 2).is_contiguous():
        return _compress(weight.transpose(1, 2), compressor).transpose(1, 2)
    if compressor.dim() == 2:
        return (compressor @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    blocks, kept, rows = compressor.shape
    mixed = compressor @ weight.reshape(blocks, rows, weight.shape[1] * weight.shape[2])
    return mixed.reshape(blocks * kept, *weight.shape[1:])


def _decompress(weight: Tensor, decompressor: Tensor, groups: int) -> Tensor:
    """(o, i, s) -> (o, j, s) with D as (i, j) or its diagonal blocks; with groups, block g serves the rows of g."""
    rows, columns, positions = weight.shape
    last = weight.transpose(1, 2)  # (o, s, i)
    if decompressor.dim() == 2:
        return (last.reshape(rows * positions, columns) @ decompressor).unflatten(0, (rows, positions)).transpose(1, 2)
    blocks, columns, kept = decompressor.shape
    if groups > 1:
        mixed = last.reshape(groups, rows // groups * positions, columns) @ decompressor
        return mixed.reshape(rows, positions, kept).transpose(1, 2)
    split = last.reshape(rows * positions, blocks, columns).transpose(0, 1)
    mixed = (split @ decompressor).transpose(0, 1)  # (o s, blocks, j / blocks)
    return mixed.reshape(rows, positions, blocks * kept).transpose(1, 2)


def _factor(factor: Tensor | None, groups: int) -> Tensor | None:
    if factor is None or (factor.dim() == 2 and groups == 1):
        return None if factor is None else _wide(factor)
    blocks = _wide(_blocks(factor, groups))
    return blocks[0] if blocks.shape[0] == 1 else blocks


def fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    """:func:`obc.ops.fold` in differentiable torch; half precision is folded in float32."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return fold(weight, compressor, decompressor, groups, in_repeat)
    if compressor is None and decompressor is None:
        return weight.clone(memory_format=torch.contiguous_format)  # never the caller's own memory
    kernel = weight.shape[2:]
    folded = _wide(weight).reshape(weight.shape[0], weight.shape[1] // in_repeat, in_repeat * kernel.numel())
    c, d = _factor(compressor, groups), _factor(decompressor, groups)
    first = True
    if compressor is not None and decompressor is not None:
        first = compress_first(weight, compressor, decompressor, groups, in_repeat)
    if c is not None and first:
        folded = _compress(folded, c)
    if d is not None:
        folded = _decompress(folded, d, groups)
    if c is not None and not first:
        folded = _compress(folded, c)
    folded = folded.reshape(folded.shape[0], folded.shape[1] * in_repeat, *kernel)
    return folded.to(weight.dtype).contiguous()
