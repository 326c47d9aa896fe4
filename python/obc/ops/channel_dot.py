"""The operator ``channel_dot``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc.backends import native_gates
from obc.ops.checks import check_alike, check_floating, counted_from_0, require
from obc.ops.registration import call, register, run
from obc.reference import accumulation_dtype


def _check(
    activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False
) -> tuple[Tensor, Tensor, int, bool]:
    check_floating("channel_dot", "activation", activation)
    check_alike("channel_dot", "activation", activation, "grad", grad)
    channel_dim = counted_from_0("channel_dot", "an activation", activation, channel_dim)
    require(
        ValueError,
        not per_sample or channel_dim != 0,
        lambda: "obc::channel_dot: per_sample needs samples along dim 0, but channel_dim is 0 too",
    )
    return activation, grad, channel_dim, per_sample


def channel_dot_undispatched(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    """:func:`channel_dot` on plain tensors without torch's dispatcher, which dominates the time of a small call.

    Use it only in a backward that is not recorded, traced or compiled. Arguments, result and errors: as for
    :func:`channel_dot`.
    """
    result: Tensor = run("channel_dot", activation, *_check(activation, grad, channel_dim, per_sample))
    return result


def _empty(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    channels = activation.shape[channel_dim]
    shape = (activation.shape[0], channels) if per_sample else (channels,)
    return activation.new_empty(shape, dtype=accumulation_dtype(activation.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activation, grad, channel_dim, per_sample = inputs
    ctx.save_for_backward(activation, grad)
    ctx.channel_dim, ctx.per_sample = channel_dim % activation.dim(), per_sample


def _backward(ctx: Any, grad_dot: Tensor) -> tuple[Tensor | None, ...]:
    activation, grad = ctx.saved_tensors
    shape = [1] * activation.dim()
    shape[ctx.channel_dim] = activation.shape[ctx.channel_dim]
    if ctx.per_sample:
        shape[0] = activation.shape[0]
    spread = grad_dot.reshape(shape)
    grad_activation = (spread * grad).to(activation.dtype) if ctx.needs_input_grad[0] else None
    grad_grad = (spread * activation).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return grad_activation, grad_grad, None, None


register("channel_dot", _check, _empty, (_backward, _setup), channel_dot_undispatched)


def channel_dot(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    """Sum of activation times gradient per channel: one layer's part of a row.

    r[c] = sum over all other positions of activation[.., c, ..] * grad[.., c, ..]

    Args:
        activation: floating tensor of any layout, for example (N, C, *S), channels-last or (..., C).
        grad: gradient of a loss with respect to ``activation``; same shape, dtype and device.
        channel_dim: the dimension of the channels; negative counts from the end.
        per_sample: keep the samples along dim 0 apart.

    Returns:
        (C,), or (N, C) with ``per_sample``; float32, or float64 for float64 input. Differentiable.

    Raises:
        ValueError, TypeError, IndexError: shapes, dtypes or devices differ, or ``channel_dim`` is out of range.
    """
    if not torch.compiler.is_compiling() and (native := native_gates.library()) is not None:
        dot = native.channel_dot(activation, grad, channel_dim, per_sample)
        if dot is not NotImplemented:
            return dot  # type: ignore[no-any-return]
    return call("channel_dot", activation, grad, channel_dim, per_sample)  # type: ignore[no-any-return]
