"""end_row: add a row's squares to the scores and clear the row.

    scores[groups[c]] += (row[c] / loss_scale)^2 for all c, if every square is finite; row = 0; returns that finiteness

Groups that descend or leave the range of scores can't be reported without a host read; they make the row count as not
finite, so nothing is added, and nothing is written outside of scores.

Shapes: row (C,), groups (C,) ascending, or absent: groups[c] = c; scores (G,). Any strides.
Bytes: row read twice (the second time from cache), written once; scores of the groups that occur read and written
once; groups once.
Accumulation: the dtype of row. Deterministic without atomics: a tile adds its members of a group by a segmented scan;
a group that began in an earlier tile is ended by the tile that holds its last member, which adds the earlier tiles'
shares in order. One launch where the row fits one tile; else two, the first for finiteness and shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import ceil_div, power_of_two


@triton.jit
def _squares(row_ptr, c, channels, stride, loss_scale):
    """(row / loss_scale)^2 of the channels ``c``, 0 beyond the last."""
    row = tl.load(row_ptr + c * stride, mask=c < channels, other=0.0)
    scale = tl.full(row.shape, loss_scale, row.dtype)
    # Plain division is approximate in float32 and exactly rounded in float64, for which div_rn does not exist.
    ratio = row / scale if row.dtype == tl.float64 else tl.div_rn(row, scale)
    return ratio * ratio


@triton.jit
def _all_finite(squares):
    return tl.min((tl.abs(squares) < float("inf")).to(tl.int32), axis=0)


@triton.jit
def _all_fit(groups_ptr, group, c, channels, stride, scores_size):
    """Whether the groups of the channels ``c`` are below ``scores_size`` and none is below the one before it, or 0."""
    before = tl.load(groups_ptr + (c - 1) * stride, mask=(c > 0) & (c < channels), other=0)
    fits = ((group >= before) & (group < scores_size)) | (c >= channels)
    return tl.min(fits.to(tl.int32), axis=0)


@triton.jit
def _add_segments(sum_a, last_a, sum_b, last_b):
    """Running sums that restart with every group; ``last`` is the group of the right end."""
    return tl.where(last_a == last_b, sum_a + sum_b, sum_b), last_b


@triton.jit
def _end_row_shares_kernel(
    finite_ptr,  # (tiles,) int32
    share_ptr,  # (tiles,): the part of a tile's last group that lies in it
    row_ptr,
    groups_ptr,
    channels,
    scores_size,
    stride_r,
    stride_g,
    loss_scale: tl.float64,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    squares = _squares(row_ptr, c, channels, stride_r, loss_scale)
    finite = _all_finite(squares)
    if groups_ptr is not None:
        last = tl.load(groups_ptr + (tl.minimum((tile + 1) * BLOCK_C, channels) - 1) * stride_g)
        group = tl.load(groups_ptr + c * stride_g, mask=c < channels, other=0)
        finite = tl.minimum(finite, _all_fit(groups_ptr, group, c, channels, stride_g, scores_size))
        tl.store(share_ptr + tile, tl.sum(tl.where((group == last) & (c < channels), squares, 0.0), axis=0))
    tl.store(finite_ptr + tile, finite)


@triton.jit
def _end_row_kernel(
    flag_ptr,  # () int8
    scores_ptr,
    row_ptr,
    groups_ptr,
    finite_ptr,
    share_ptr,
    channels,
    scores_size,
    tiles,
    stride_s,
    stride_r,
    stride_g,
    loss_scale: tl.float64,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    squares = _squares(row_ptr, c, channels, stride_r, loss_scale)
    target = c
    if groups_ptr is not None:
        target = tl.load(groups_ptr + c * stride_g, mask=c < channels, other=0)
    if finite_ptr is None:
        finite = _all_finite(squares)
        if groups_ptr is not None:
            finite = tl.minimum(finite, _all_fit(groups_ptr, target, c, channels, stride_g, scores_size))
    else:
        flags = tl.full((BLOCK_T,), 1, dtype=tl.int32)
        for first in range(0, tiles, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            flags = tl.minimum(flags, tl.load(finite_ptr + t, mask=t < tiles, other=1))
        finite = tl.min(flags, axis=0)
    if tile == 0:
        tl.store(flag_ptr, finite.to(tl.int8))

    ends = c < tl.where(finite != 0, channels, 0)  # nothing is added where the row is not finite
    if groups_ptr is not None:
        following = tl.load(groups_ptr + (c + 1) * stride_g, mask=c + 1 < channels, other=-1)
        ends &= (target != following) | (c + 1 == channels)
        squares, _ = tl.associative_scan((squares, target), 0, _add_segments)
        if share_ptr is not None:
            squares += _earlier_shares(share_ptr, groups_ptr, tile, target, stride_g, squares.dtype, BLOCK_C)
    scores = tl.load(scores_ptr + target * stride_s, mask=ends, other=0.0)
    tl.store(scores_ptr + target * stride_s, scores + squares, mask=ends)
    tl.store(row_ptr + c * stride_r, tl.zeros((BLOCK_C,), dtype=squares.dtype), mask=c < channels)


@triton.jit
def _earlier_shares(share_ptr, groups_ptr, tile, target, stride_g, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """The earlier tiles' parts of the group with which this tile begins, on that group's channels."""
    group = tl.load(groups_ptr + tile * BLOCK_C * stride_g)
    # The last earlier tile that ends with another group; the tiles after it contain only this group.
    earlier = tl.zeros((), dtype=ACC)
    first = tile
    more = tile > 0
    while more:
        first -= 1
        same = tl.load(groups_ptr + ((first + 1) * BLOCK_C - 1) * stride_g) == group
        earlier += tl.where(same, tl.load(share_ptr + first), 0.0)
        more = same & (first > 0)
    return tl.where(target == group, earlier, 0.0)


@dataclass(frozen=True)
class EndRowConfig:
    """Launch parameters of one length."""

    block_c: int
    num_warps: int = 4

    # Flags of the first stage that one step of the second reads: most rows need one step.
    BLOCK_T = 1024

    @classmethod
    def from_heuristic(cls, channels: int, itemsize: int) -> EndRowConfig:
        # Up to 16 KiB one program of 16 warps holds the row in 8 registers a thread (16 would spill in the segmented
        # scan) and the second launch is saved; longer rows are spread over the chip in tiles of 1024.
        single = 16384 // itemsize
        if channels <= 1024:
            return cls(power_of_two(channels, 1024))
        return cls(power_of_two(channels, single), num_warps=16) if channels <= single else cls(block_c=1024)

    @classmethod
    def variations(cls, channels: int, itemsize: int) -> dict[str, EndRowConfig]:
        """The heuristic, and tiles of 512 and 2048 channels over two launches."""
        heuristic = {autotune.HEURISTIC: cls.from_heuristic(channels, itemsize)}
        return heuristic | {"short tiles": cls(block_c=512), "long tiles": cls(block_c=2048, num_warps=8)}


def end_row_triton(
    scores: Tensor,
    row: Tensor,
    loss_scale: float = 1.0,
    groups: Tensor | None = None,
    config: EndRowConfig | None = None,
) -> Tensor:
    """Launch :func:`obc.ops.end_row` for checked arguments; nothing waits for the flag, a 0-d bool tensor."""
    channels = row.shape[0]
    if channels == 0:
        return torch.ones((), dtype=torch.bool, device=row.device)
    config = config or autotune.choose(
        "end_row",
        EndRowConfig,
        (channels, row.element_size()),
        (*autotune.size_class(channels), groups is not None),
        row,
        lambda config: end_row_triton(scores.clone(), row.clone(), loss_scale, groups, config),
    )
    tiles = ceil_div(channels, config.block_c)
    flag = torch.empty((), dtype=torch.bool, device=row.device)
    strides = row.stride(0), 0 if groups is None else groups.stride(0)
    finite = shares = None
    if tiles > 1:
        finite = torch.empty(tiles, dtype=torch.int32, device=row.device)
        shares = None if groups is None else row.new_empty(tiles)
        launch(
            _end_row_shares_kernel,
            tiles,
            finite,
            shares,
            row,
            groups,
            channels,
            scores.shape[0],
            *strides,
            float(loss_scale),
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    launch(
        _end_row_kernel,
        tiles,
        flag.view(torch.int8),
        scores,
        row,
        groups,
        finite,
        shares,
        channels,
        scores.shape[0],
        tiles,
        scores.stride(0),
        *strides,
        float(loss_scale),
        BLOCK_C=config.block_c,
        BLOCK_T=power_of_two(tiles, config.BLOCK_T),
        num_warps=config.num_warps,
    )
    return flag


def _case(channels: int, grouped: bool) -> Callable[[torch.dtype], Tensor]:
    def run(dtype: torch.dtype) -> Tensor:
        row = empty(dtype, channels)
        return end_row_triton(row, row, 1.0, empty(torch.int64, channels) if grouped else None)

    return run


CASES = tuple(
    Case("end_row", f"{channels} channels{', grouped' * grouped}", _case(channels, grouped), dtypes=("f32", "f64"))
    for channels in (1024, 2048, 2**20)
    for grouped in (False, True)
)
