"""The operator ``weight_dot``."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from obc.ops.checks import check_alike, check_same_kind, check_weight, require
from obc.ops.registration import call, register
from obc.reference import accumulation_dtype


def channels(weight: Tensor, groups: int, transposed: bool) -> tuple[int, int]:
    """(out, in) channels of a layer's weight."""
    rows, columns = weight.shape[0], weight.shape[1] * groups
    return (columns, rows) if transposed else (rows, columns)


def check_layer(
    op: str,
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]:
    """The arguments of one layer, for the operator ``op``."""
    check_weight(op, weight)
    check_alike(op, "weight", weight, "grad", grad)
    require(
        ValueError,
        groups >= 1 and weight.shape[0] % groups == 0,
        lambda: f"obc::{op}: dim 0 of the weight ({weight.shape[0]}) is not divisible into {groups} groups",
    )
    require(
        ValueError,
        (bias is None) == (bias_grad is None),
        lambda: f"obc::{op}: bias and bias_grad go together, got only {'bias' if bias_grad is None else 'bias_grad'}",
    )
    if bias is not None and bias_grad is not None:
        out_channels, _ = channels(weight, groups, transposed)
        _check_bias(op, weight, "bias", bias, out_channels)
        _check_bias(op, weight, "bias_grad", bias_grad, out_channels)
    return weight, grad, bias, bias_grad, groups, transposed


def _check_bias(op: str, weight: Tensor, name: str, bias: Tensor, out_channels: int) -> None:
    require(
        ValueError,
        bias.dim() == 1 and bias.shape[0] == out_channels,
        lambda: f"obc::{op}: {name} has shape {tuple(bias.shape)}, expected ({out_channels},)",
    )
    check_same_kind(op, "weight", weight, name, bias)


def empty(
    weight: Tensor, grad: Tensor, bias: Tensor | None, bias_grad: Tensor | None, groups: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """out_dot and in_dot of one layer, without values."""
    dtype = accumulation_dtype(weight.dtype)
    out_channels, in_channels = channels(weight, groups, transposed)
    return weight.new_empty(out_channels, dtype=dtype), weight.new_empty(in_channels, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, grad, bias, bias_grad, groups, transposed = inputs
    ctx.save_for_backward(weight, grad, bias, bias_grad)
    ctx.groups, ctx.transposed = groups, transposed


def _backward(ctx: Any, grad_out: Tensor, grad_in: Tensor) -> tuple[Tensor | None, ...]:
    weight, grad, bias, bias_grad = ctx.saved_tensors
    rows, columns = (grad_in, grad_out) if ctx.transposed else (grad_out, grad_in)
    spread = rows.reshape(ctx.groups, -1, 1) + columns.reshape(ctx.groups, 1, -1)
    spread = spread.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    needs = ctx.needs_input_grad
    return (
        (spread * grad).to(weight.dtype) if needs[0] else None,
        (spread * weight).to(grad.dtype) if needs[1] else None,
        (grad_out * bias_grad).to(bias.dtype) if bias is not None and needs[2] else None,
        (grad_out * bias).to(bias_grad.dtype) if bias is not None and needs[3] else None,
        None,
        None,
    )


register("weight_dot", functools.partial(check_layer, "weight_dot"), empty, (_backward, _setup))


def weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums of weight times gradient per out channel and per in channel, in one pass over the two tensors.

    out_dot[o] = sum w[o] * g[o] + b[o] * gb[o];   in_dot[i] = sum w[:, i] * g[:, i]

    Args:
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) with ``transposed``.
        grad: the weight's gradient; same shape, dtype and device.
        bias: (out,) or None.
        bias_grad: the bias's gradient; required exactly if ``bias`` is given.
        groups: conv groups; in_dot has every in channel of every conv group.
        transposed: the weight belongs to a transposed convolution.

    Returns:
        out_dot (out,) and in_dot (in,); float32, or float64 for float64 input. Differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit.
    """
    dots: tuple[Tensor, Tensor] = call("weight_dot", weight, grad, bias, bias_grad, groups, transposed)
    return dots
