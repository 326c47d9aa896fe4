"""sum_partials: the second stage of a two-stage sum.

    out[i] = sum over splits s of partial[s, i], in the order of s

Shapes: partial (splits, ...), contiguous; out (...). Bytes: partial once, out once. Accumulation: the dtype of partial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels.launch import launch
from obc_kernels.layout import ceil_div, power_of_two


@triton.jit
def _sum_partials_kernel(out_ptr, partial_ptr, count, splits, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros((BLOCK_S, BLOCK_N), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S).to(tl.int64)  # [BLOCK_S]
        mask = (s < splits)[:, None] & (i < count)[None, :]
        acc += tl.load(partial_ptr + s[:, None] * count + i[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + i, tl.sum(acc, axis=0), mask=i < count)


@dataclass(frozen=True)
class PartialsConfig:
    """Launch parameters of one shape."""

    block_n: int
    block_s: int
    num_warps: int = 4

    # 32 outputs are one 128-byte line of float32; a narrow block leaves the chip more programs.
    BLOCK_N = 32
    # 2048 accumulators are 16 registers a thread: 64 splits are one round trip to the cache.
    TILE = 2048

    @classmethod
    def from_heuristic(cls, count: int, splits: int) -> PartialsConfig:
        block_n = power_of_two(count, cls.BLOCK_N)
        return cls(block_n, power_of_two(splits, cls.TILE // block_n))


def sum_partials(partial: Tensor) -> Tensor:
    """Add the partial sums along dim 0; a single one is returned unchanged."""
    splits = partial.shape[0]
    if splits == 1:
        return partial.squeeze(0)
    out = partial.new_empty(partial.shape[1:])
    config = PartialsConfig.from_heuristic(out.numel(), splits)
    launch(
        _sum_partials_kernel,
        ceil_div(out.numel(), config.block_n),
        out,
        partial,
        out.numel(),
        splits,
        BLOCK_N=config.block_n,
        BLOCK_S=config.block_s,
        num_warps=config.num_warps,
    )
    return out


def separate(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts of one tensor in memory of their own: the results of an operator must not share any.

    Torch copies lists of tensors in one launch for about a hundred of them, but only as arithmetic: times one is exact.
    """
    return list(torch._foreach_mul(list(parts), 1)) if parts else []
