"""The operators: the only place for obc's fakes and autograd formulas. Their schemas are in a table,
:mod:`obc.backends.operators`.

``torch.ops.obc.<op>`` is a Python implementation that checks its arguments and passes them to the backend chosen by
:mod:`obc.backends`. :mod:`obc.reference` defines each operator. All of them accumulate in float32 (float64 for float64
input), read every element once and are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from obc import backends
from obc.backends import gemm
from obc.backends.operators import TABLE
from obc.ops import checks

_LIBRARY = torch.library.Library("obc", "DEF")
for _operator in TABLE:
    _LIBRARY.define(_operator.name + _operator.schema)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator sums inputs of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- implementations: check, then the backend ----------------------------------------------------------------


def channel_dot_undispatched(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    """:func:`channel_dot` on plain tensors without torch's dispatcher, which dominates the time of a small call.

    Use it only in a backward that is not recorded, traced or compiled.
    """
    channel_dim = checks.channel_dot(activation, grad, channel_dim, per_sample)
    call = backends.resolve("channel_dot", activation.device.type, activation.dtype, activation.numel())
    return call(activation, grad, channel_dim, per_sample)


def _channel_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channel_dim = checks.channel_moments(x, channel_dim, mask)
    call = backends.resolve("channel_moments", x.device.type, x.dtype, x.numel())
    return call(x, channel_dim, mask)


def _weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    checks.weight_dot(weight, grad, bias, bias_grad, groups, transposed)
    call = backends.resolve("weight_dot", weight.device.type, weight.dtype, weight.numel())
    return call(weight, grad, bias, bias_grad, groups, transposed)


def _weight_dot_list(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    layers = checks.per_layer(weights, grads, biases, bias_grads, groups, transposed)
    if not layers:
        return [], []
    columns = [list(column) for column in zip(*layers, strict=True)]
    elements = sum(weight.numel() for weight in weights)
    call = backends.resolve("weight_dot_list", weights[0].device.type, weights[0].dtype, elements)
    return call(*columns)


def _weight_moments(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.weight_dot(weight, grad, None, None, 1, False, "weight_moments")
    call = backends.resolve("weight_moments", weight.device.type, weight.dtype, weight.numel())
    return call(weight, grad)


def _fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    checks.fold(weight, compressor, decompressor, groups, in_repeat)
    if compressor is None and decompressor is None:
        return weight.clone(memory_format=torch.contiguous_format)
    call = backends.resolve("fold", weight.device.type, weight.dtype, weight.numel())
    return call(weight, compressor, decompressor, groups, in_repeat)


def _end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    checks.end_row(scores, row, loss_scale, groups)
    checks.apart(scores, row)
    call = backends.resolve("end_row", row.device.type, row.dtype, row.numel())
    finite = call(scores, row, loss_scale, groups)
    # The mutation in a raw schema does not bump autograd's version counters.
    torch.autograd.graph.increment_version((scores, row))
    return finite


# --- fakes: the same checks, then an empty result ------------------------------------------------------------


def _channel_dot_fake(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    channel_dim = checks.channel_dot(activation, grad, channel_dim, per_sample)
    channels = activation.shape[channel_dim]
    shape = (activation.shape[0], channels) if per_sample else (channels,)
    return activation.new_empty(shape, dtype=accumulation_dtype(activation.dtype))


def _channel_moments_fake(
    x: Tensor, channel_dim: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[checks.channel_moments(x, channel_dim, mask)]
    dtype = accumulation_dtype(x.dtype)
    first, second, third, fourth = (x.new_empty(channels, dtype=dtype) for _ in range(4))
    return first, second, third, fourth


def _weight_dot_fake(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    out_channels, in_channels = checks.weight_dot(weight, grad, bias, bias_grad, groups, transposed)
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_empty(out_channels, dtype=dtype), weight.new_empty(in_channels, dtype=dtype)


def _weight_dot_list_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    layers = checks.per_layer(weights, grads, biases, bias_grads, groups, transposed)
    dots = [_weight_dot_fake(*layer) for layer in layers]
    return [out_dot for out_dot, _ in dots], [in_dot for _, in_dot in dots]


def _weight_moments_fake(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.weight_dot(weight, grad, None, None, 1, False, "weight_moments")
    dtype = accumulation_dtype(weight.dtype)
    first, second, third, fourth, fifth = (weight.new_empty(weight.shape[0], dtype=dtype) for _ in range(5))
    return first, second, third, fourth, fifth


def _fold_fake(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    return weight.new_empty(checks.fold(weight, compressor, decompressor, groups, in_repeat))


def _end_row_fake(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    checks.end_row(scores, row, loss_scale, groups)
    return scores.new_empty((), dtype=torch.bool)


# --- autograd -------------------------------------------------------------------------------------------------


def _channel_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activation, grad, channel_dim, per_sample = inputs
    ctx.save_for_backward(activation, grad)
    ctx.channel_dim, ctx.per_sample = channel_dim % activation.dim(), per_sample


def _channel_dot_backward(ctx: Any, grad_dot: Tensor) -> tuple[Tensor | None, ...]:
    activation, grad = ctx.saved_tensors
    shape = [1] * activation.dim()
    shape[ctx.channel_dim] = activation.shape[ctx.channel_dim]
    if ctx.per_sample:
        shape[0] = activation.shape[0]
    spread = grad_dot.reshape(shape)
    grad_activation = (spread * grad).to(activation.dtype) if ctx.needs_input_grad[0] else None
    grad_grad = (spread * activation).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return grad_activation, grad_grad, None, None


def _weight_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, grad, bias, bias_grad, groups, transposed = inputs
    ctx.save_for_backward(weight, grad, bias, bias_grad)
    ctx.groups, ctx.transposed = groups, transposed


def _weight_dot_backward(ctx: Any, grad_out: Tensor, grad_in: Tensor) -> tuple[Tensor | None, ...]:
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


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, compressor, decompressor, groups, in_repeat = inputs
    ctx.save_for_backward(weight, compressor, decompressor)
    ctx.groups, ctx.in_repeat = groups, in_repeat


def _fold_backward(ctx: Any, grad_folded: Tensor) -> tuple[Tensor | None, ...]:
    weight, compressor, decompressor = ctx.saved_tensors
    given = ctx.needs_input_grad  # trailing arguments left at their defaults have no entry
    needs = (given[0], len(given) > 1 and given[1], len(given) > 2 and given[2])
    grads = gemm.fold_backward(grad_folded, weight, compressor, decompressor, ctx.groups, ctx.in_repeat, needs=needs)
    return (*grads, None, None)[: len(given)]


def _not_differentiable(op: str, remedy: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"obc::{op} is not differentiable; {remedy}")

    return backward, lambda ctx, inputs, output: None


def _register(
    op: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., Any], Callable[..., None]] | None,
) -> None:
    _LIBRARY.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"obc::{op}", fake, lib=_LIBRARY)
    if autograd is not None:
        backward, setup_context = autograd
        torch.library.register_autograd(f"obc::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


_register("channel_dot", channel_dot_undispatched, _channel_dot_fake, (_channel_dot_backward, _channel_dot_setup))
_register(
    "channel_moments",
    _channel_moments,
    _channel_moments_fake,
    _not_differentiable("channel_moments", "detach x, or write the moment that you need in plain torch"),
)
_register("weight_dot", _weight_dot, _weight_dot_fake, (_weight_dot_backward, _weight_dot_setup))
_register(
    "weight_dot_list",
    _weight_dot_list,
    _weight_dot_list_fake,
    _not_differentiable("weight_dot_list", "call weight_dot for each layer"),
)
_register(
    "weight_moments",
    _weight_moments,
    _weight_moments_fake,
    _not_differentiable("weight_moments", "write the moment that you need in plain torch"),
)
_register("fold", _fold, _fold_fake, (_fold_backward, _fold_setup))
_register("end_row", _end_row, _end_row_fake, None)  # refuses inputs that require grad: it changes them in place


# --- public functions -----------------------------------------------------------------------------------------


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
    return torch.ops.obc.channel_dot(activation, grad, channel_dim, per_sample)


def channel_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four sums per channel of a layer's input in one pass over ``x``; mean, variance and norms follow from them.

    Over all positions p of all samples b:  sum x,  sum x^2,  sum |x|,
    and over the samples:                   sum over b of (mean over p of |x[b, p]|)^2

    Args:
        x: floating tensor of any layout with samples along dim 0, for example (B, C, *S), channels-last or (B, T, C).
            A position is an index into all dimensions except samples and channels; (B, C) has one position per sample.
        channel_dim: the dimension of the channels, not the first; negative counts from the end.
        mask: bool, the shape of ``x`` without the channel dimension, on the same device. Positions where it is False
            (padding) don't count: a sample's mean is over the others, and a sample without any contributes nothing.

    Returns:
        Four tensors (C,), float32, or float64 for float64 input; not differentiable. The numbers of positions and
        samples follow from the shape or the mask.

    Raises:
        ValueError, TypeError, IndexError: ``channel_dim`` is 0 or out of range, x is not floating, or the mask does not
            fit.
    """
    return torch.ops.obc.channel_moments(x, channel_dim, mask)


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
    return torch.ops.obc.weight_dot(weight, grad, bias, bias_grad, groups, transposed)


def weight_dot_list(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`weight_dot` for a whole model in one call.

    Args:
        weights, grads, biases, bias_grads, groups, transposed: per layer, the arguments of :func:`weight_dot`.

    Returns:
        The list of out_dots and the list of in_dots, one entry per layer. Not differentiable.

    Raises:
        ValueError, TypeError: the lists differ in length, or a layer's tensors don't fit.
    """
    return torch.ops.obc.weight_dot_list(weights, grads, biases, bias_grads, groups, transposed)


def weight_moments(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row of dim 0: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|, in one pass over the two tensors.

    Args:
        weight: (out, in / groups, *kernel).
        grad: the weight's gradient; same shape, dtype and device.

    Returns:
        Five vectors (out,), float32, or float64 for float64 input. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit.
    """
    return torch.ops.obc.weight_moments(weight, grad)


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
    if weight.device.type == "cpu" and backends.requested() in (None, "cpu"):
        # On the CPU fold is matrix products that autograd knows, not an operator of ours: its backward can reuse the
        # first product, and a small weight does not pay for the dispatcher.
        if not torch.compiler.is_compiling():  # Dynamo can't trace the checks' messages; the products check shapes too
            checks.fold(weight, compressor, decompressor, groups, in_repeat)
        return gemm.fold(weight, compressor, decompressor, groups, in_repeat)
    return torch.ops.obc.fold(weight, compressor, decompressor, groups, in_repeat)


def end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    """End a row: scores[groups[c]] += (row[c] / loss_scale)^2, then row = 0, both in place and in one pass.

    If a square is not finite, nothing is added; the row is zeroed in any case.

    Args:
        scores: flat float32 or float64 vector, one entry per group, or per channel without ``groups``.
        row: flat vector of the same dtype and device, one entry per channel; shares no entry with ``scores``.
        loss_scale: the factor that the loss was multiplied by (a gradient scaler's scale).
        groups: int64 vector, the group of each channel, ascending.

    Returns:
        A 0-d bool tensor on the device: whether every square was finite. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit, or scores and row share memory.
        RuntimeError: an input requires grad.
    """
    return torch.ops.obc.end_row(scores, row, loss_scale, groups)
