"""The records of weight_dot_list's worklist: their fields, written by the host and read by the kernels.

A record is a stretch of the worklist, int64 a field. The host makes it as a named tuple; a kernel reads a field at the
place that the constant of the same name holds. The constants are computed from the tuples, so that both agree.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class SumRecord(NamedTuple):
    """The record of one layer for the first stage: the arguments of :func:`obc_kernels.weight_dot.weight_dot_kernel`.

    Attributes:
        weight, grad: addresses.
        row_sums, column_sums: where its partial sums of either kind begin.
        first_program: the first of its programs, counted from the first of the launch.
        groups, rows_per_group, columns, size_1, size_2: of the layer's walk; the sizes of its two inner column axes.
        column_blocks, row_splits, tiles_per_split: how its tiles are shared by programs.
        stride_wr, stride_w0, stride_w1, stride_w2: of the weight: rows and the three axes of columns.
        stride_gr, stride_g0, stride_g1, stride_g2: of the gradient.
    """

    weight: int
    grad: int
    row_sums: int
    column_sums: int
    first_program: int
    groups: int
    rows_per_group: int
    columns: int
    size_1: int
    size_2: int
    column_blocks: int
    row_splits: int
    tiles_per_split: int
    stride_wr: int
    stride_w0: int
    stride_w1: int
    stride_w2: int
    stride_gr: int
    stride_g0: int
    stride_g1: int
    stride_g2: int


class FinishRecord(NamedTuple):
    """The record of the rows, or of the columns, of one layer for the second stage.

    Attributes:
        is_out: whether these are out channels.
        offset: where the results begin.
        partial: where the partial sums begin.
        first_program: the first of its programs, counted from the first of the launch.
        bias, bias_grad: addresses; 0 where there is no bias.
        stride_b, stride_gb: of the bias and its gradient.
        results: how many there are.
        inner, stride_outer, stride_inner, splits, stride_split, positions, stride_position: which partial sums add up
            to a result: the arguments of :func:`obc_kernels.weight_dot.finished_sums`.
    """

    is_out: int
    offset: int
    partial: int
    first_program: int
    bias: int
    bias_grad: int
    stride_b: int
    stride_gb: int
    results: int
    inner: int
    stride_outer: int
    stride_inner: int
    splits: int
    stride_split: int
    positions: int
    stride_position: int


def _places(record: type[SumRecord] | type[FinishRecord]) -> list[tl.constexpr]:
    return [tl.constexpr(place) for place in range(len(record._fields))]


# Triton reads a global name in a kernel only where it is a constant: one a field, in the order of the fields.
(
    SUM_WEIGHT,
    SUM_GRAD,
    SUM_ROW_SUMS,
    SUM_COLUMN_SUMS,
    SUM_FIRST_PROGRAM,
    SUM_GROUPS,
    SUM_ROWS_PER_GROUP,
    SUM_COLUMNS,
    SUM_SIZE_1,
    SUM_SIZE_2,
    SUM_COLUMN_BLOCKS,
    SUM_ROW_SPLITS,
    SUM_TILES_PER_SPLIT,
    SUM_STRIDE_WR,
    SUM_STRIDE_W0,
    SUM_STRIDE_W1,
    SUM_STRIDE_W2,
    SUM_STRIDE_GR,
    SUM_STRIDE_G0,
    SUM_STRIDE_G1,
    SUM_STRIDE_G2,
) = _places(SumRecord)
(
    FINISH_IS_OUT,
    FINISH_OFFSET,
    FINISH_PARTIAL,
    FINISH_FIRST_PROGRAM,
    FINISH_BIAS,
    FINISH_BIAS_GRAD,
    FINISH_STRIDE_B,
    FINISH_STRIDE_GB,
    FINISH_RESULTS,
    FINISH_INNER,
    FINISH_STRIDE_OUTER,
    FINISH_STRIDE_INNER,
    FINISH_SPLITS,
    FINISH_STRIDE_SPLIT,
    FINISH_POSITIONS,
    FINISH_STRIDE_POSITION,
) = _places(FinishRecord)
