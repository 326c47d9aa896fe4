"""``fold`` and its backward as matrix products, in the order that needs fewer multiplications.

Index letters as in :mod:`obc.reference`: o out, i in, s repeat and kernel positions, k kept out, j kept in.
Multiplications: C first s*k*i*(o + j), D first s*o*j*(i + k), each divided by the number of diagonal blocks. The
backward takes twice as many if the forward kept its first product, and forms nothing larger than the weight.

With ``reduced``, the factors hold only dropped channels: within each block the weight's kept channels come first, and C
stands for (I C), D for (I D) stacked. In sums, o and i then run over the dropped channels.

Memory layout: a weight whose in channels are adjacent (``torch.channels_last`` for two kernel dimensions) is multiplied
in place on both sides, and so is its gradient. A contiguous one is copied once for D, unless its kernel has a single
position.

Half precision: on CUDA, products of half-precision tensors run in the tensor cores and accumulate in float32. The
intermediate stays float32; as an operand of bfloat16 products it is split into three bfloat16 parts, which preserve all
of its bits. Everything else is widened to float32.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obc.backends.products import mm, mm_added, mm_into
from obc.reference import _blocks, accumulation_dtype

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def multiplications(
    weight: Tensor,
    compressor: Tensor | None,
    decompressor: Tensor | None,
    groups: int = 1,
    in_repeat: int = 1,
    reduced: bool = False,
) -> tuple[int, int]:
    """Multiplications that :func:`fold` needs with C first, and with D first; equal if there is only one factor."""
    positions = weight.shape[2:].numel() * in_repeat
    rows, columns = weight.shape[0], weight.shape[1] // in_repeat
    # Per factor: what remains of the rows or columns, and the number of channels summed for one entry of its product.
    kept_rows, summed_rows, kept_columns, summed_columns = rows, 0, columns, 0
    if compressor is not None:
        blocks = compressor.shape[0] if compressor.dim() == 3 else 1
        kept_rows = compressor.shape[-2] * blocks
        summed_rows = compressor.shape[-1] if reduced else rows // max(groups, blocks)
    if decompressor is not None:
        blocks = decompressor.shape[0] if decompressor.dim() == 3 else 1
        kept_columns = decompressor.shape[-1] * blocks // groups
        summed_columns = decompressor.shape[-2] if reduced else columns * groups // max(groups, blocks)
    compress_first = kept_rows * columns * summed_rows + kept_rows * kept_columns * summed_columns
    decompress_first = rows * kept_columns * summed_columns + kept_rows * kept_columns * summed_rows
    return positions * compress_first, positions * decompress_first


@dataclass(frozen=True)
class _Form:
    """The view of the weight: (o, s, i), or without D (o, 1, s*i) with s and i in any order."""

    kernel: torch.Size
    groups: int
    in_repeat: int
    reduced: bool
    in_place: bool  # a contiguous weight without D keeps its own order of positions and in channels

    def split(self, weight: Tensor) -> Tensor:
        """(o, i * in_repeat, *kernel) to (o, s, i)."""
        if self.in_place:
            return weight.reshape(weight.shape[0], 1, weight.shape[1:].numel())
        positions = self.in_repeat * self.kernel.numel()
        return weight.reshape(weight.shape[0], weight.shape[1] // self.in_repeat, positions).transpose(1, 2)

    def join(self, split: Tensor, columns: int) -> Tensor:
        """The inverse of :meth:`split`, for ``columns`` of them."""
        shape = (split.shape[0], columns, *self.kernel)
        return split.reshape(shape) if self.in_place else split.transpose(1, 2).reshape(shape)

    def rows(self, split: Tensor, blocks: int) -> Tensor:
        """(o, s, i) to (blocks, o / blocks, s * i): what C mixes along dim 1."""
        return split.reshape(blocks, split.shape[0] // blocks, split.shape[1] * split.shape[2])

    def columns(self, split: Tensor, blocks: int) -> Tensor:
        """(o, s, i) to (blocks, rows, i / blocks), each conv group with its own rows: what D mixes along dim 2."""
        if self.groups > 1:
            rows = split.shape[0] // self.groups * split.shape[1]
            return split.reshape(self.groups, rows, split.shape[2])
        return split.reshape(split.shape[0] * split.shape[1], blocks, split.shape[2] // blocks).transpose(0, 1)

    def uncolumns(self, columns: Tensor, rows: int) -> Tensor:
        """The inverse of :meth:`columns`: (rows, s, i)."""
        if self.groups == 1:
            columns = columns.transpose(0, 1)
        positions = 1 if self.in_place else self.in_repeat * self.kernel.numel()
        width = columns.shape[2] * (columns.shape[1] if self.groups == 1 else 1)
        return columns.reshape(rows, positions, width)


def _form(weight: Tensor, decompressor: Tensor | None, groups: int, in_repeat: int, reduced: bool) -> _Form:
    in_place = decompressor is None and weight.is_contiguous()
    return _Form(weight.shape[2:], groups, in_repeat, reduced, in_place)


# --- products of one factor -----------------------------------------------------------------------------------


def _compress(x: Tensor, c: Tensor, form: _Form) -> Tensor:
    """(o, s, i) to (k, s, i)."""
    blocks, kept, _ = c.shape
    rows = form.rows(x, blocks)
    mixed = mm_added(rows[:, :kept], c, rows[:, kept:]) if form.reduced else mm(c, rows)
    return mixed.reshape(blocks * kept, *x.shape[1:])


def _decompress(x: Tensor, d: Tensor, form: _Form) -> Tensor:
    """(o, s, i) to (o, s, j)."""
    blocks, _, kept = d.shape
    columns = form.columns(x, blocks)
    mixed = mm_added(columns[..., :kept], columns[..., kept:], d) if form.reduced else mm(columns, d)
    return form.uncolumns(mixed, x.shape[0])


# --- forward and backward -------------------------------------------------------------------------------------


def _compress_first(weight: Tensor, c: Tensor, d: Tensor, form: _Form) -> bool:
    first, second = multiplications(weight, c, d, form.groups, form.in_repeat, form.reduced)
    return first <= second


def _as_blocks(factor: Tensor | None, groups: int) -> Tensor | None:
    """(blocks, rows, columns); with conv groups only the diagonal blocks of a matrix."""
    if factor is None or factor.dim() == 3:
        return factor
    return factor[None] if groups == 1 else _blocks(factor, groups)


def _products(weight: Tensor, c: Tensor | None, d: Tensor | None, form: _Form) -> tuple[Tensor, Tensor | None]:
    """(the folded weight in the accumulation dtype and any memory layout; the product that its backward reuses)."""
    first: Tensor | None = None
    folded = form.split(weight)
    compress_before = c is None or d is None or _compress_first(weight, c, d, form)
    if c is not None and compress_before:
        first = folded = _compress(folded, c, form)
    if d is not None:
        folded = _decompress(folded, d, form)
    if c is not None and not compress_before:
        first, folded = folded, _compress(folded, c, form)
    columns = weight.shape[1] if d is None else folded.shape[2] * form.in_repeat
    return form.join(folded, columns), None if c is None or d is None else first


def fold_backward(
    grad: Tensor,
    weight: Tensor,
    compressor: Tensor | None,
    decompressor: Tensor | None,
    groups: int = 1,
    in_repeat: int = 1,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
    reduced: bool = False,
    first: Tensor | None = None,
) -> Grads:
    """The gradients of weight, compressor and decompressor, for those that ``needs`` asks for.

    Args:
        grad: gradient of the folded weight.
        first: the forward's first product (C W or W D) if it was kept; otherwise it is recomputed.
    """
    form = _form(weight, decompressor, groups, in_repeat, reduced)
    with _no_autocast(weight.device.type):
        c, d = _as_blocks(compressor, groups), _as_blocks(decompressor, groups)
        dx, dc, dd = _gradients(form.split(grad), weight, c, d, _Backward(form.split(weight), c, d, form, needs), first)
        return (
            None if dx is None or not needs[0] else form.join(dx, weight.shape[1]).to(weight.dtype),
            None if dc is None else _factor_grad(dc, compressor),
            None if dd is None else _factor_grad(dd, decompressor),
        )


def _gradients(
    g: Tensor, weight: Tensor, c: Tensor | None, d: Tensor | None, back: _Backward, first: Tensor | None
) -> Grads:
    """The gradients of the factors as blocks, and of the weight as (o, s, i)."""
    needs, form = back.needs, back.form
    dx: Tensor | None = g
    dc: Tensor | None = None
    dd: Tensor | None = None
    if c is not None and d is not None and _compress_first(weight, c, d, form):
        if first is None and needs[2]:
            first = _compress(back.x, c, form)
        whole = back.shared_gradient(c)
        into = None if whole is None else whole[: c.shape[1]]
        dx, dd = back.through_decompressor(g, first, inner=needs[0] or needs[1], into=into)
        if dx is not None:
            dx, dc = back.through_compressor(dx, back.x, inner=needs[0], into=whole)
    elif c is not None and d is not None:
        if first is None and needs[1]:
            first = _decompress(back.x, d, form)
        dx, dc = back.through_compressor(g, first, inner=needs[0] or needs[2])
        if dx is not None:
            dx, dd = back.through_decompressor(dx, back.x, inner=needs[0])
    elif c is not None:
        dx, dc = back.through_compressor(g, back.x, inner=needs[0])
    elif d is not None:
        dx, dd = back.through_decompressor(g, back.x, inner=needs[0])
    return dx, dc, dd


class _Backward:
    """Computes gradients through one factor at a time."""

    def __init__(
        self, x: Tensor, c: Tensor | None, d: Tensor | None, form: _Form, needs: tuple[bool, bool, bool]
    ) -> None:
        self.x, self.c, self.d, self.form, self.needs = x, c, d, form, needs

    def shared_gradient(self, c: Tensor) -> Tensor | None:
        """Memory for the weight's gradient whose first rows can hold the gradient of C X, a part of it; else None.

        A backward that is itself recorded must not overwrite what its own backward reads.
        """
        shared = self.form.reduced and self.needs[0] and c.shape[0] == 1 and not torch.is_grad_enabled()
        return self.x.new_empty(self.x.shape, dtype=accumulation_dtype(self.x.dtype)) if shared else None

    def through_compressor(
        self, grad: Tensor, x: Tensor | None, inner: bool, into: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dX = CT dY, dC = dY XT) for Y = C X of (rows, s, i). ``into`` is memory for dX, with ``grad`` first."""
        assert self.c is not None
        blocks, kept, summed = self.c.shape
        skip = kept if self.form.reduced else 0
        g = self.form.rows(grad, blocks)
        dc = None
        if self.needs[1]:
            assert x is not None
            dc = mm(g, self.form.rows(x, blocks)[:, skip:].mT)
        if not inner:
            return None, dc
        dx = into
        if dx is None:
            rows = blocks * (skip + summed)
            dx = grad.new_empty(rows, *grad.shape[1:], dtype=accumulation_dtype(grad.dtype))
            self.form.rows(dx, blocks)[:, :skip] = g[:, :skip]
        mm_into(self.form.rows(dx, blocks)[:, skip:], self.c.mT, g)
        return dx, dc

    def through_decompressor(
        self, grad: Tensor, x: Tensor | None, inner: bool, into: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dX = dY DT, dD = XT dY) for Y = X D of (o, s, columns). ``into`` is memory for dX."""
        assert self.d is not None
        blocks, kept = self.d.shape[0], self.d.shape[2]
        skip = kept if self.form.reduced else 0
        g = self.form.columns(grad, blocks)
        dd = None
        if self.needs[2]:
            assert x is not None
            dd = mm(self.form.columns(x, blocks)[..., skip:].mT, g)
        if not inner:
            return None, dd
        dx = into
        if dx is None:
            dx = grad.new_empty(*grad.shape[:2], self.x.shape[2], dtype=accumulation_dtype(grad.dtype))
        columns = self.form.columns(dx, blocks)
        columns[..., :skip] = g[..., :skip]
        mm_into(columns[..., skip:], g, self.d.mT)
        return dx, dd


def _factor_grad(grad: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient of a factor from that of its blocks; a matrix is not read off its diagonal blocks."""
    assert factor is not None
    grad = grad.to(factor.dtype)
    if factor.dim() == 3:
        return grad
    return grad[0] if grad.shape[0] == 1 else torch.block_diag(*grad)


class _Fold(torch.autograd.Function):
    """The products, with gradients that reuse the first product."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        compressor: Tensor | None,
        decompressor: Tensor | None,
        groups: int,
        in_repeat: int,
        reduced: bool,
    ) -> Tensor:
        folded, first = _folded(weight, compressor, decompressor, groups, in_repeat, reduced)
        ctx.save_for_backward(weight, compressor, decompressor, first)
        ctx.form = (groups, in_repeat, reduced)
        return folded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, compressor, decompressor, first = ctx.saved_tensors
        groups, in_repeat, reduced = ctx.form
        if torch.is_grad_enabled():
            first = None  # a second backward goes through the factors of the first product
        needs = ctx.needs_input_grad[:3]
        found = fold_backward(
            grads[0], weight, compressor, decompressor, groups, in_repeat, needs=needs, reduced=reduced, first=first
        )
        return (*found, None, None, None)


# Device types for which torch.is_autocast_enabled raises. A table, because torch 2.11's Dynamo can't trace
# is_autocast_available, and decorating with torch.compiler.assume_constant_result imports all of Dynamo.
_WITHOUT_AUTOCAST = frozenset(
    name
    for name in ("meta", "lazy", "vulkan", "fpga", "ve", "hip", "ideep", "opencl", "opengl")
    if not torch.amp.is_autocast_available(name)
)


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _folded(
    weight: Tensor, compressor: Tensor | None, decompressor: Tensor | None, groups: int, in_repeat: int, reduced: bool
) -> tuple[Tensor, Tensor | None]:
    form = _form(weight, decompressor, groups, in_repeat, reduced)
    folded, first = _products(weight, _as_blocks(compressor, groups), _as_blocks(decompressor, groups), form)
    # Flatten and restore: a kernel of one position could keep the strides of channels_last, which convolutions look at.
    return folded.to(weight.dtype).contiguous().flatten().view(folded.shape), first


def fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
    reduced: bool = False,
) -> Tensor:
    """:func:`obc.ops.fold`, differentiable; half precision is folded with float32 sums.

    With ``reduced``, C is (kept out, dropped out) and D (dropped in, kept in), or their blocks; within each block the
    weight's kept channels come before its dropped ones.
    """
    if compressor is None and decompressor is None:
        return weight.clone(memory_format=torch.contiguous_format)  # never the caller's own memory
    with _no_autocast(weight.device.type):
        return _Fold.apply(weight, compressor, decompressor, groups, in_repeat, reduced)
