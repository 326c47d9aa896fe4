"""weight_dot_list: :mod:`obc_kernels.weight_dot` of a whole model in a bounded number of launches.

Formula, shapes, accumulation and determinism as there. Every layer's pointers, sizes and strides form a record of a
worklist in device memory, and an item of it tells each program which record is its own. Layers are sorted by dtype
and by kind (read in 16-byte vectors, read element by element, grouped with few rows a group): at most three launches
of the first stage and one of the second per dtype, two for the usual model.
Bytes: all inputs once, the partial sums as in weight_dot, and the worklist: 8 bytes a program and 168 a layer.

The worklist is uploaded once and kept for as long as the same memory comes again (:data:`CACHED_WORKLISTS`).
Nothing reads back or waits. Inside a CUDA graph capture it is rebuilt, and its copy is part of the graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import weight_dot_records as fields
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import VECTOR_BYTES, accumulator, ceil_div, check_steps, run_elements, tile_elements
from obc_kernels.partials import separate
from obc_kernels.upload import uploaded
from obc_kernels.weight_dot import (
    ADDRESS_REGISTERS,
    WeightDotConfig,
    WeightWalk,
    bias_term,
    finished_sums,
    rows_outer,
    weight_dot_kernel,
)
from obc_kernels.weight_dot_records import FinishRecord, SumRecord

# Gradients of one model come in few sets of buffers; a worklist holds device memory of about a byte per 4096 weights.
CACHED_WORKLISTS = 8


@triton.jit
def _weight_dot_list_kernel(
    partial_ptr,
    table_ptr,
    like_ptr,
    first_item,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    pid = tl.program_id(0)
    record = table_ptr + tl.load(table_ptr + first_item + pid)
    w_ptr = tl.load(record + fields.SUM_WEIGHT).to(like_ptr.dtype)
    g_ptr = tl.load(record + fields.SUM_GRAD).to(like_ptr.dtype)
    if VECTORS:
        w_ptr = tl.multiple_of(w_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
    weight_dot_kernel(
        partial_ptr + tl.load(record + fields.SUM_ROW_SUMS),
        partial_ptr + tl.load(record + fields.SUM_COLUMN_SUMS),
        w_ptr,
        g_ptr,
        pid - tl.load(record + fields.SUM_FIRST_PROGRAM).to(tl.int32),
        tl.load(record + fields.SUM_GROUPS),
        tl.load(record + fields.SUM_ROWS_PER_GROUP).to(tl.int32),
        tl.load(record + fields.SUM_COLUMNS),
        tl.load(record + fields.SUM_SIZE_1),
        tl.load(record + fields.SUM_SIZE_2),
        tl.load(record + fields.SUM_COLUMN_BLOCKS).to(tl.int32),
        tl.load(record + fields.SUM_ROW_SPLITS).to(tl.int32),
        tl.load(record + fields.SUM_TILES_PER_SPLIT).to(tl.int32),
        tl.load(record + fields.SUM_STRIDE_WR),
        tl.load(record + fields.SUM_STRIDE_W0),
        tl.load(record + fields.SUM_STRIDE_W1),
        tl.load(record + fields.SUM_STRIDE_W2),
        tl.load(record + fields.SUM_STRIDE_GR),
        tl.load(record + fields.SUM_STRIDE_G0),
        tl.load(record + fields.SUM_STRIDE_G1),
        tl.load(record + fields.SUM_STRIDE_G2),
        BLOCK_G,
        BLOCK_R,
        BLOCK_M,
        VECTORS,
        ALIGN,
    )


@triton.jit
def _weight_dot_list_finish_kernel(
    out_dot_ptr,
    in_dot_ptr,
    partial_ptr,
    table_ptr,
    like_ptr,
    first_item,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    record = table_ptr + tl.load(table_ptr + first_item + pid)
    is_out = tl.load(record + fields.FINISH_IS_OUT) != 0
    count = tl.load(record + fields.FINISH_RESULTS)
    i = (pid - tl.load(record + fields.FINISH_FIRST_PROGRAM)) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    sums = finished_sums(
        partial_ptr + tl.load(record + fields.FINISH_PARTIAL),
        i,
        count,
        tl.load(record + fields.FINISH_INNER),
        tl.load(record + fields.FINISH_STRIDE_OUTER),
        tl.load(record + fields.FINISH_STRIDE_INNER),
        tl.load(record + fields.FINISH_SPLITS).to(tl.int32),
        tl.load(record + fields.FINISH_STRIDE_SPLIT),
        tl.load(record + fields.FINISH_POSITIONS).to(tl.int32),
        tl.load(record + fields.FINISH_STRIDE_POSITION),
        BLOCK_N,
        BLOCK_T,
    )
    bias_address = tl.load(record + fields.FINISH_BIAS)
    if bias_address != 0:
        bias_ptr = bias_address.to(like_ptr.dtype)
        bias_grad_ptr = tl.load(record + fields.FINISH_BIAS_GRAD).to(like_ptr.dtype)
        stride_b, stride_gb = tl.load(record + fields.FINISH_STRIDE_B), tl.load(record + fields.FINISH_STRIDE_GB)
        sums += bias_term(bias_ptr, bias_grad_ptr, i, i < count, stride_b, stride_gb, sums.dtype)
    offset = tl.load(record + fields.FINISH_OFFSET)
    tl.store(out_dot_ptr + offset + i, sums, mask=i < tl.where(is_out, count, 0))
    tl.store(in_dot_ptr + offset + i, sums, mask=i < tl.where(is_out, 0, count))


@dataclass
class _Layer:
    """One layer's tensors as the kernels read them."""

    weight: Tensor
    grad: Tensor
    bias: Tensor | None
    bias_grad: Tensor | None
    transposed: bool
    walk: WeightWalk

    @classmethod
    def of(
        cls,
        weight: Tensor,
        grad: Tensor,
        bias: Tensor | None,
        bias_grad: Tensor | None,
        groups: int,
        transposed: bool,
    ) -> _Layer:
        """A layout that a walk can't describe is copied to contiguous memory, as in weight_dot."""
        weight, grad, transposed = rows_outer(weight, grad, groups, transposed)
        walk = WeightWalk.over(weight, grad, groups)
        if walk is None:
            return cls.of(weight.contiguous(), grad.contiguous(), bias, bias_grad, groups, transposed)
        check_steps("weight_dot_list", walk.rows_per_group)  # the kernel takes it in 32 bits
        return cls(weight, grad, bias, bias_grad, transposed, walk)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The key of a worklist."""
        bias = (
            None
            if self.bias is None or self.bias_grad is None
            else (self.bias.data_ptr(), self.bias_grad.data_ptr(), self.bias.stride(0), self.bias_grad.stride(0))
        )
        return self.weight.data_ptr(), self.grad.data_ptr(), self.weight.dtype, bias, self.transposed, self.walk

    @property
    def kind(self) -> str:
        """``vector``, ``element`` or ``grouped``: layers of one kind share a launch."""
        if self.walk.groups > 1 and self.walk.rows_per_group < 8:
            return "grouped"
        whole = self.walk.align * self.weight.element_size() == VECTOR_BYTES
        aligned = self.weight.data_ptr() % VECTOR_BYTES == 0 and self.grad.data_ptr() % VECTOR_BYTES == 0
        return "vector" if self.walk.flat and whole and aligned else "element"


def _config(kind: str, itemsize: int, layers: list[_Layer]) -> WeightDotConfig:
    """One tile shape for all layers of a kind, and so many tiles a program that about 2048 programs share them."""
    align = VECTOR_BYTES // itemsize if kind == "vector" else 1
    tile = tile_elements(itemsize, align) // (1 if kind == "vector" else 2)
    if kind == "grouped":
        # Depthwise layers have one or two rows a group and 3 x 3 to 5 x 5 columns.
        block_g, block_r, block_m = tile // 64, 2, 32
    else:
        block_m = min(tile // 16, run_elements(itemsize))
        block_g, block_r = 1, tile // block_m
    single = WeightDotConfig(block_g, block_r, block_m, tiles_per_split=1)
    tiles = sum(single.programs(layer.walk) for layer in layers)
    return WeightDotConfig(block_g, block_r, block_m, WeightDotConfig.tiles_for(tiles, most_programs=2048))


@dataclass
class _Stage:
    """One launch: ``programs`` items of the table from ``first_item`` on."""

    like: int  # index of a layer with the dtype of this launch
    first_item: int
    programs: int
    constexprs: dict[str, Any]


@dataclass
class _Worklist:
    """The table of a list of layers and how to launch over it."""

    table: Tensor
    sums: list[_Stage]
    finishes: list[_Stage]
    partial_size: dict[torch.dtype, int]
    out_sizes: dict[torch.dtype, list[int]]
    in_sizes: dict[torch.dtype, list[int]]


@dataclass
class _Table:
    """The worklist while it is built: items (offsets of records, one a program) and records, all int64."""

    parts: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def append(self, part: np.ndarray) -> int:
        """Returns where ``part`` begins."""
        offset, self.size = self.size, self.size + part.size
        self.parts.append(part)
        return offset

    def stage(
        self,
        like: int,
        records: Sequence[SumRecord] | Sequence[FinishRecord],
        programs: list[int],
        constexprs: dict[str, Any],
    ) -> _Stage:
        """Append the records and the items of one launch; ``programs`` counts each record's."""
        check_steps("weight_dot_list", sum(programs))
        width = len(records[0])
        first_record = self.append(np.array(records, dtype=np.int64).reshape(-1))
        offsets = first_record + width * np.arange(len(records), dtype=np.int64)
        first_item = self.append(np.repeat(offsets, programs))
        return _Stage(like, first_item, sum(programs), constexprs)


@dataclass(frozen=True)
class _Place:
    """The location and numbers of one layer's partial sums of both kinds."""

    row: int
    column: int
    column_blocks: int
    row_splits: int


def _build(layers: list[_Layer], device: torch.device) -> _Worklist:
    table = _Table()
    partial_size = {torch.float32: 0, torch.float64: 0}
    sums, places = _first_stages(table, layers, partial_size)
    out_sizes: dict[torch.dtype, list[int]] = {torch.float32: [], torch.float64: []}
    in_sizes: dict[torch.dtype, list[int]] = {torch.float32: [], torch.float64: []}
    finishes = _second_stages(table, layers, places, out_sizes, in_sizes)
    return _Worklist(uploaded(np.concatenate(table.parts), device), sums, finishes, partial_size, out_sizes, in_sizes)


def _first_stages(
    table: _Table, layers: list[_Layer], partial_size: dict[torch.dtype, int]
) -> tuple[list[_Stage], list[_Place]]:
    """One launch per dtype and kind; counts the partial sums into ``partial_size``."""
    kinds: dict[tuple[torch.dtype, str], list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault((layer.weight.dtype, layer.kind), []).append(index)
    stages: list[_Stage] = []
    places: dict[int, _Place] = {}
    for (dtype, kind), members in kinds.items():
        acc = accumulator(layers[members[0]].weight)
        config = _config(kind, dtype.itemsize, [layers[index] for index in members])
        records: list[SumRecord] = []
        programs: list[int] = []
        for index in members:
            layer, walk = layers[index], layers[index].walk
            column_blocks, row_splits = config.column_blocks(walk), config.row_splits(walk)
            row = partial_size[acc]
            column = row + column_blocks * walk.rows
            partial_size[acc] = column + walk.groups * row_splits * walk.columns
            places[index] = _Place(row, column, column_blocks, row_splits)
            records.append(_sum_record(layer, places[index], config.tiles_per_split, sum(programs)))
            programs.append(config.programs(walk))
        vectors = kind == "vector"
        constexprs = {
            "BLOCK_G": config.block_g,
            "BLOCK_R": config.block_r,
            "BLOCK_M": config.block_m,
            "VECTORS": vectors,
            "ALIGN": VECTOR_BYTES // dtype.itemsize if vectors else 1,
        }
        stages.append(table.stage(members[0], records, programs, constexprs))
    return stages, [places[index] for index in range(len(layers))]


def _sum_record(layer: _Layer, place: _Place, tiles_per_split: int, first_program: int) -> SumRecord:
    """The first stage of one layer."""
    walk = layer.walk
    (stride_wr, stride_w0, stride_w1, stride_w2), (stride_gr, stride_g0, stride_g1, stride_g2) = walk.strides
    return SumRecord(
        weight=layer.weight.data_ptr(),
        grad=layer.grad.data_ptr(),
        row_sums=place.row,
        column_sums=place.column,
        first_program=first_program,
        groups=walk.groups,
        rows_per_group=walk.rows_per_group,
        columns=walk.columns,
        size_1=walk.sizes[1],
        size_2=walk.sizes[2],
        column_blocks=place.column_blocks,
        row_splits=place.row_splits,
        tiles_per_split=tiles_per_split,
        stride_wr=stride_wr,
        stride_w0=stride_w0,
        stride_w1=stride_w1,
        stride_w2=stride_w2,
        stride_gr=stride_gr,
        stride_g0=stride_g0,
        stride_g1=stride_g1,
        stride_g2=stride_g2,
    )


def _second_stages(
    table: _Table,
    layers: list[_Layer],
    places: list[_Place],
    out_sizes: dict[torch.dtype, list[int]],
    in_sizes: dict[torch.dtype, list[int]],
) -> list[_Stage]:
    """One launch per dtype; appends the lengths of every layer's results to ``out_sizes`` and ``in_sizes``."""
    jobs: dict[torch.dtype, tuple[list[FinishRecord], list[int]]] = {}
    likes: dict[torch.dtype, int] = {}
    for index, (layer, place) in enumerate(zip(layers, places, strict=True)):
        likes.setdefault(layer.weight.dtype, index)
        records, programs = jobs.setdefault(layer.weight.dtype, ([], []))
        for is_rows in (True, False):
            is_out = is_rows != layer.transposed
            sizes = (out_sizes if is_out else in_sizes)[accumulator(layer.weight)]
            record = _finish_record(layer, place, is_rows, is_out, sum(sizes), sum(programs))
            sizes.append(record.results)
            records.append(record)
            programs.append(ceil_div(record.results, WeightDotConfig.BLOCK_N))
    blocks = {"BLOCK_N": WeightDotConfig.BLOCK_N, "BLOCK_T": WeightDotConfig.BLOCK_T}
    return [table.stage(likes[dtype], records, programs, blocks) for dtype, (records, programs) in jobs.items()]


def _finish_record(
    layer: _Layer, place: _Place, is_rows: bool, is_out: bool, offset: int, first_program: int
) -> FinishRecord:
    """The second stage of one layer's rows or columns."""
    walk = layer.walk
    biased = is_out and layer.bias is not None and layer.bias_grad is not None
    bias, bias_grad = (layer.bias, layer.bias_grad) if biased else (None, None)
    return FinishRecord(
        is_out=int(is_out),
        offset=offset,
        partial=place.row if is_rows else place.column,
        first_program=first_program,
        bias=0 if bias is None else bias.data_ptr(),
        bias_grad=0 if bias_grad is None else bias_grad.data_ptr(),
        stride_b=0 if bias is None else bias.stride(0),
        stride_gb=0 if bias_grad is None else bias_grad.stride(0),
        results=walk.rows if is_rows else walk.groups * walk.channels,
        inner=max(1, walk.rows if is_rows else walk.channels),
        stride_outer=0 if is_rows else place.row_splits * walk.columns,
        stride_inner=1 if is_rows else walk.stride_channel,
        splits=place.column_blocks if is_rows else place.row_splits,
        stride_split=walk.rows if is_rows else walk.columns,
        positions=1 if is_rows else walk.positions,
        stride_position=0 if is_rows else walk.stride_position,
    )


_cache: OrderedDict[tuple[Any, ...], _Worklist] = OrderedDict()


def _worklist(layers: list[_Layer], device: torch.device) -> _Worklist:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _build(layers, device)  # its copy happens at replay: no other call may rely on it
    # Ordered after its upload, a worklist may be read on the stream that uploaded it only.
    stream = torch.accelerator.current_stream(device).stream_id if device.index is not None else 0
    key = (device, stream, *(layer.identity for layer in layers))
    worklist = _cache.pop(key, None) or _build(layers, device)
    _cache[key] = worklist
    if len(_cache) > CACHED_WORKLISTS:
        _cache.popitem(last=False)
    return worklist


def weight_dot_list_triton(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bias_grads: Sequence[Tensor | None],
    groups: Sequence[int],
    transposed: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch :func:`obc.ops.weight_dot_list` for checked arguments on one device.

    Layouts that weight_dot copies are copied here too.
    """
    columns = (weights, grads, biases, bias_grads, groups, transposed)
    layers = [_Layer.of(*layer) for layer in zip(*columns, strict=True)]
    device = weights[0].device
    worklist = _worklist(layers, device)

    def flat(sizes: dict[torch.dtype, int]) -> dict[torch.dtype, Tensor]:
        return {acc: torch.empty(size, dtype=acc, device=device) for acc, size in sizes.items()}

    partials = flat(worklist.partial_size)
    out_dots = flat({acc: sum(sizes) for acc, sizes in worklist.out_sizes.items()})
    in_dots = flat({acc: sum(sizes) for acc, sizes in worklist.in_sizes.items()})
    for stage in worklist.sums:
        like = layers[stage.like].weight
        partial = partials[accumulator(like)]
        launch(
            _weight_dot_list_kernel,
            stage.programs,
            partial,
            worklist.table,
            like,
            stage.first_item,
            **stage.constexprs,
            num_warps=WeightDotConfig.num_warps,
            max_registers=128 if stage.constexprs.get("VECTORS") else ADDRESS_REGISTERS,
        )
    for stage in worklist.finishes:
        like = layers[stage.like].weight
        acc = accumulator(like)
        launch(
            _weight_dot_list_finish_kernel,
            stage.programs,
            out_dots[acc],
            in_dots[acc],
            partials[acc],
            worklist.table,
            like,
            stage.first_item,
            **stage.constexprs,
            num_warps=WeightDotConfig.num_warps,
            max_registers=128 if stage.constexprs.get("VECTORS") else ADDRESS_REGISTERS,
        )
    out_parts = {acc: iter(separate(flat.split(worklist.out_sizes[acc]))) for acc, flat in out_dots.items()}
    in_parts = {acc: iter(separate(flat.split(worklist.in_sizes[acc]))) for acc, flat in in_dots.items()}
    order = [accumulator(layer.weight) for layer in layers]
    return [next(out_parts[acc]) for acc in order], [next(in_parts[acc]) for acc in order]


def _case(dtype: torch.dtype) -> Any:
    weights = [empty(dtype, 512, 256, 3, 3), empty(dtype, 33, 17), empty(dtype, 64, 1, 3, 3)]
    biases = [empty(dtype, weight.shape[0]) for weight in weights]
    return weight_dot_list_triton(weights, weights, biases, biases, [1, 1, 64], [False] * 3)


CASES = (Case("weight_dot_list", "model", _case),)
