"""Walks tensors of any strides: axes that are adjacent in memory are merged, the rest is decoded per tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune

VECTOR_BYTES = 16  # the widest load of one thread


@dataclass(frozen=True)
class Axis:
    """``size`` steps, each ``strides[t]`` elements in tensor t."""

    size: int
    strides: tuple[int, ...]


def merged_axes(dims: Sequence[int], *tensors: Tensor) -> list[Axis]:
    """The dimensions ``dims`` of equally shaped tensors as few axes, outermost in memory first.

    Dimensions of size 1 vanish, and two axes become one where every tensor steps over both evenly. The order of the
    dimensions is lost, which suits sums.
    """
    axes = [Axis(tensors[0].shape[d], tuple(t.stride(d) for t in tensors)) for d in dims if tensors[0].shape[d] != 1]
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: max(axis.strides), reverse=True):
        last = merged[-1] if merged else None
        if last is not None and all(
            outer == axis.size * inner for outer, inner in zip(last.strides, axis.strides, strict=True)
        ):
            merged[-1] = Axis(last.size * axis.size, axis.strides)
        else:
            merged.append(axis)
    return merged


OUTER_AXES = 3  # decoded once per tile; one more, the inner axis, lies inside the tile


@dataclass(frozen=True)
class Walk:
    """Equally shaped tensors as (rows, channels, outer positions, inner positions).

    Attributes:
        rows: number of samples that are kept separate, or 1.
        channels: size of the channel dimension.
        outer: sizes of the three outer axes of positions.
        inner: size of the inner axis of positions.
        strides: per tensor, the strides of the row, the channel, the outer axes and the inner axis.
        channels_inner: channels are adjacent in memory (tokens, channels-last), else positions are.
        align: elements that one load along memory may span: they divide its bound and every other stride.
    """

    rows: int
    channels: int
    outer: tuple[int, int, int]
    inner: int
    strides: tuple[tuple[int, ...], ...]
    channels_inner: bool
    align: int

    @classmethod
    def over(cls, channel_dim: int, per_sample: bool, *tensors: Tensor) -> Walk | None:
        """None where the positions form more than four separate axes in memory."""
        first = tensors[0]
        kept = {channel_dim, 0} if per_sample else {channel_dim}
        axes = merged_axes([d for d in range(first.dim()) if d not in kept], *tensors)
        missing = OUTER_AXES + 1 - len(axes)
        if missing < 0:
            return None
        axes = [Axis(1, (0,) * len(tensors))] * missing + axes
        strides = tuple(
            (tensor.stride(0) if per_sample else 0, tensor.stride(channel_dim), *(axis.strides[t] for axis in axes))
            for t, tensor in enumerate(tensors)
        )
        channels, inner = first.shape[channel_dim], axes[-1].size
        channels_inner = channels > 1 and max(s[1] for s in strides) <= max(s[-1] for s in strides)
        along = 1 if channels_inner else OUTER_AXES + 2
        align = 1
        if all(s[along] == 1 for s in strides):
            # Triton itself only detects divisibility by 16; planes of 14 x 14 are divisible by 4.
            others = [stride for row in strides for d, stride in enumerate(row) if d != along]
            align = math.gcd(VECTOR_BYTES // first.element_size(), channels if channels_inner else inner, *others)
        rows = first.shape[0] if per_sample else 1
        outer = axes[0].size, axes[1].size, axes[2].size
        return cls(rows, channels, outer, inner, strides, channels_inner, align)

    @property
    def outer_steps(self) -> int:
        return math.prod(self.outer)

    @property
    def size_class(self) -> tuple[int | bool, ...]:
        """The key of tuned launch parameters."""
        sizes = autotune.size_class(self.rows, self.channels, self.outer_steps, self.inner)
        return (*sizes, self.channels_inner, self.align)


def tile_elements(itemsize: int, align: int) -> int:
    """Elements of one input in one tile of 128 threads, when one load spans ``align`` elements.

    8 KiB are four 16-byte loads a thread and input: eight in flight with two inputs, and the accumulators (at most 32
    registers a thread) leave room for four programs on a multiprocessor. Narrower loads need an address each: sixteen
    of them a thread and input still fit in registers.
    """
    return min(8192 // itemsize, 16 * 128 * align)


def run_elements(itemsize: int) -> int:
    """Elements along memory that a tile should span at least: 512 bytes are one warp's 16-byte loads."""
    return 512 // itemsize


def power_of_two(value: int, most: int) -> int:
    """The smallest power of two that covers ``value``, at most ``most``."""
    return min(most, 1 << max(0, value - 1).bit_length())


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def accumulator(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """``value``, a multiple of ALIGN, in a form that shows this to the compiler."""
    return value // ALIGN * ALIGN


@triton.jit
def outer_offset(step, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of the step-th position of the three outer axes of sizes (any, size_1, size_2)."""
    first = (step // (size_1 * size_2)).to(tl.int64)
    second = (step // size_2 % size_1).to(tl.int64)
    third = (step % size_2).to(tl.int64)
    return first * stride_0 + second * stride_1 + third * stride_2


def check_steps(op: str, tiles: int) -> None:
    """Steps are counted in 32 bits (their offsets in 64): dividing 64-bit integers costs more than the loads.

    The last of up to 2^12 shares of them may end beyond the last step, and must not wrap around.
    """
    torch._check_value(
        tiles < 2**31 - 2**12,
        lambda: f"obc::{op}: {tiles} tiles are more than 2^31; pass the tensors in contiguous memory",
    )
