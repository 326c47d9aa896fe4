"""The operator ``fold``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc import backends
from obc.backends import gemm
from obc.ops.checks import check_same_kind, check_weight, require
from obc.ops.registration import call, register, run, typed


def _check_factor(name: str, factor: Tensor, weight: Tensor, side: int, size: int, groups: int) -> int:
    """Require that dimension ``side`` (-1 of C, -2 of D) fits ``size`` channels; returns the number of kept ones."""
    check_same_kind("fold", "weight", weight, name, factor)
    require(
        ValueError,
        factor.dim() in (2, 3),
        lambda: f"obc::fold: {name} must be a matrix or (blocks, rows, columns), got shape {tuple(factor.shape)}",
    )
    blocks = factor.shape[0] if factor.dim() == 3 else 1
    kept = factor.shape[-1 if side == -2 else -2]
    require(
        ValueError,
        factor.shape[side] * blocks == size,
        lambda: (
            f"obc::fold: {name} of shape {tuple(factor.shape)} does not fit {size} channels of a weight "
            f"{tuple(weight.shape)} with groups={groups}"
        ),
    )
    require(
        ValueError,
        groups == 1 or (blocks == groups if factor.dim() == 3 else kept % groups == 0 and size % groups == 0),
        lambda: f"obc::fold: {name} of shape {tuple(factor.shape)} can't be split into {groups} diagonal blocks",
    )
    return kept * blocks


def _folded_shape(
    weight: Tensor, compressor: Tensor | None, decompressor: Tensor | None, groups: int, in_repeat: int
) -> tuple[int, ...]:
    """The shape of the folded weight; raises if the arguments do not fit."""
    check_weight("fold", weight)
    require(
        ValueError,
        groups >= 1 and weight.shape[0] % groups == 0,
        lambda: f"obc::fold: {weight.shape[0]} out channels are not divisible into {groups} groups",
    )
    require(
        ValueError,
        in_repeat >= 1 and weight.shape[1] % in_repeat == 0,
        lambda: f"obc::fold: {weight.shape[1]} columns are not divisible by in_repeat={in_repeat}",
    )
    require(
        ValueError,
        in_repeat == 1 or (groups == 1 and weight.dim() == 2),
        lambda: (
            f"obc::fold: in_repeat={in_repeat} is for a Linear after flatten, got a weight of shape "
            f"{tuple(weight.shape)} with groups={groups}"
        ),
    )
    out_channels, in_channels = weight.shape[0], weight.shape[1] // in_repeat
    if compressor is not None:
        out_channels = _check_factor("compressor", compressor, weight, -1, out_channels, groups)
    if decompressor is not None:
        total = _check_factor("decompressor", decompressor, weight, -2, in_channels * groups, groups)
        in_channels = total // groups
    return (out_channels, in_channels * in_repeat, *weight.shape[2:])


def _check(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    _folded_shape(weight, compressor, decompressor, groups, in_repeat)
    return weight, compressor, decompressor, groups, in_repeat


def _empty(weight: Tensor, *factors_and_counts: Any) -> Tensor:
    return weight.new_empty(_folded_shape(weight, *factors_and_counts))


def _fold(*arguments: Any) -> Tensor:
    weight, compressor, decompressor, *counts = _check(*arguments)
    if compressor is None and decompressor is None:
        return weight.clone(memory_format=torch.contiguous_format)
    folded: Tensor = run("fold", weight, weight, compressor, decompressor, *counts)
    return folded


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, compressor, decompressor, groups, in_repeat = inputs
    ctx.save_for_backward(weight, compressor, decompressor)
    ctx.groups, ctx.in_repeat = groups, in_repeat


def _backward(ctx: Any, grad_folded: Tensor) -> tuple[Tensor | None, ...]:
    weight, compressor, decompressor = ctx.saved_tensors
    given = ctx.needs_input_grad  # trailing arguments left at their defaults have no entry
    needs = (given[0], len(given) > 1 and given[1], len(given) > 2 and given[2])
    grads = gemm.fold_backward(grad_folded, weight, compressor, decompressor, ctx.groups, ctx.in_repeat, needs=needs)
    return (*grads, None, None)[: len(given)]


register("fold", _check, _empty, (_backward, _setup), _fold)


def fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    """The folded weight of Equivalent Pruning, W' = C W D over (out, in / groups, *kernel).

    W'[k, j, s] = sum over o, i of C[k, o] * W[o, i, s] * D[i, j]

    Args:
        weight: (out, in / groups, *kernel).
        compressor: C, (kept_out, out), or the diagonal blocks (blocks, kept_out / blocks, out / blocks). None is
            the identity.
        decompressor: D, (in, kept_in), or the diagonal blocks (blocks, in / blocks, kept_in / blocks). None is the
            identity.
        groups: conv groups. With more than one, C and D must be block-diagonal: ``groups`` blocks, or matrices of which
            only the diagonal blocks are read.
        in_repeat: for a Linear after flatten, the number of columns of each in channel (D is then D x I).

    Returns:
        (kept_out, kept_in / groups, *kernel) in the dtype of ``weight``, products accumulated in float32 or better.
        Differentiable in all three tensors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit.
    """
    compiling = torch.compiler.is_compiling()  # Dynamo can't trace the checks' messages; the products check shapes too
    if not compiling:
        weight, compressor, decompressor, groups, in_repeat = typed(
            "fold", weight, compressor, decompressor, groups, in_repeat
        )
    if weight.device.type == "cpu" and backends.requested() in (None, "cpu"):
        # On the CPU fold is matrix products that autograd knows, not an operator of ours: its backward can reuse the
        # first product, and a small weight does not pay for the dispatcher.
        if not compiling:
            _folded_shape(weight, compressor, decompressor, groups, in_repeat)
        return gemm.fold(weight, compressor, decompressor, groups, in_repeat)
    folded: Tensor = call("fold", weight, compressor, decompressor, groups, in_repeat)
    return folded
