"""``fold`` by the platform's matrix products, in the order that needs fewer multiplications.

Index letters as in :mod:`obc.reference`: o out, i in, s repeat and kernel positions, k kept out, j kept in.
Multiplications: C first s*k*i*(o + j), D first s*o*j*(i + k), each divided by the number of diagonal blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obc.reference import _blocks, _wide


def _compress(weight: Tensor, compressor: Tensor) -> Tensor:
    """(o, i, s) -> (k, i, s) with C as (blocks, k / blocks, o / blocks)."""
    blocks = compressor.shape[0]
    mixed = compressor @ weight.reshape(blocks, weight.shape[0] // blocks, weight.shape[1] * weight.shape[2])
    return mixed.reshape(blocks * compressor.shape[1], *weight.shape[1:])


def _decompress(weight: Tensor, decompressor: Tensor, groups: int) -> Tensor:
    """(o, i, s) -> (o, j, s) with D as (blocks, i / blocks, j / blocks); with groups, block g serves the rows of g."""
    rows, columns, positions = weight.shape
    blocks, kept = decompressor.shape[0], decompressor.shape[2]
    last = weight.transpose(1, 2)  # (o, s, i)
    if groups > 1:
        mixed = last.reshape(groups, rows // groups * positions, columns) @ decompressor
        return mixed.reshape(rows, positions, kept).transpose(1, 2)
    split = last.reshape(rows * positions, blocks, columns // blocks).transpose(0, 1)
    mixed = (split @ decompressor).transpose(0, 1)  # (o s, blocks, j / blocks)
    return mixed.reshape(rows, positions, blocks * kept).transpose(1, 2)


def fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    """:func:`obc.ops.fold` in differentiable torch; half precision is folded in float32."""
    kernel = weight.shape[2:]
    folded = _wide(weight).reshape(weight.shape[0], weight.shape[1] // in_repeat, in_repeat * kernel.numel())
    c = None if compressor is None else _wide(_blocks(compressor, groups))
    d = None if decompressor is None else _wide(_blocks(decompressor, groups))
    compress_first = True
    if c is not None and d is not None:
        (out_channels, in_channels, _), kept_out, kept_in = folded.shape, c.shape[0] * c.shape[1], d.shape[2]
        if groups == 1:
            kept_in *= d.shape[0]
        compress_first = kept_out * in_channels * (c.shape[2] + d.shape[2]) <= out_channels * kept_in * (
            d.shape[1] + c.shape[1]
        )
    if c is not None and compress_first:
        folded = _compress(folded, c)
    if d is not None:
        folded = _decompress(folded, d, groups)
    if c is not None and not compress_first:
        folded = _compress(folded, c)
    return folded.reshape(folded.shape[0], folded.shape[1] * in_repeat, *kernel).to(weight.dtype, memory_format=torch.contiguous_format)
