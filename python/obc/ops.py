"""The operators: every schema, fake and autograd formula of obc stands here and nowhere else.

``torch.ops.obc.<op>`` is a Python implementation that checks its arguments and hands them to the backend of
:mod:`obc.backends`. :mod:`obc.reference` is each operator's definition. All of them accumulate in float32
(float64 for float64 input), read every element once and are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from obc import backends
from obc.backends import gemm

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("obc", "DEF")
_LIBRARY.define("channel_dot(Tensor activation, Tensor grad, int channel_dim, bool per_sample=False) -> Tensor")
_LIBRARY.define(
    "weight_dot(Tensor weight, Tensor grad, Tensor? bias=None, Tensor? bias_grad=None, int groups=1, "
    "bool transposed=False) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "weight_dot_list(Tensor[] weights, Tensor[] grads, Tensor?[]? biases=None, Tensor?[]? bias_grads=None, "
    "int[]? groups=None, bool[]? transposed=None) -> (Tensor[], Tensor[])"
)
_LIBRARY.define("weight_moments(Tensor weight, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "fold(Tensor weight, Tensor? compressor=None, Tensor? decompressor=None, int groups=1, int in_repeat=1) -> Tensor"
)
_LIBRARY.define("end_row(Tensor(a!) scores, Tensor(b!) row, float loss_scale=1.0, Tensor? groups=None) -> Tensor")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator sums inputs of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- checks, shared by the fakes and the implementations -----------------------------------------------------


def _require(error: type[Exception], condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """``torch._check_with``, which costs microseconds, only where the condition is symbolic or does not hold."""
    if condition is not True:
        torch._check_with(error, condition, message)


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    _require(
        TypeError,
        tensor.dtype in _FLOATING,
        lambda: (
            f"obc::{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; convert it first"
        ),
    )


def _check_alike(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """The two tensors have one shape, dtype and device."""
    _require(
        ValueError,
        first.shape == tensor.shape,
        lambda: (
            f"obc::{op}: {name} has shape {tuple(tensor.shape)}, {first_name} has {tuple(first.shape)}; "
            "pass equal shapes"
        ),
    )
    _check_same_kind(op, first_name, first, name, tensor)


def _check_same_kind(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    _require(
        TypeError,
        first.dtype == tensor.dtype,
        lambda: f"obc::{op}: {name} is {tensor.dtype}, {first_name} is {first.dtype}; pass one dtype",
    )
    _require(
        ValueError,
        first.device == tensor.device,
        lambda: f"obc::{op}: {name} is on {tensor.device}, {first_name} on {first.device}; pass one device",
    )


def _check_channel_dot(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool) -> int:
    """Returns the channel dimension counted from 0."""
    _check_floating("channel_dot", "activation", activation)
    _check_alike("channel_dot", "activation", activation, "grad", grad)
    dims = activation.dim()
    _require(
        IndexError,
        -dims <= channel_dim < dims,
        lambda: f"obc::channel_dot: channel_dim {channel_dim} is outside an activation of {dims} dimensions",
    )
    channel_dim = channel_dim % dims
    _require(
        ValueError,
        not per_sample or channel_dim != 0,
        lambda: "obc::channel_dot: per_sample needs samples along dim 0, but channel_dim is 0 too",
    )
    return channel_dim


def _check_weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    bias_grad: Tensor | None,
    groups: int,
    transposed: bool,
    op: str = "weight_dot",
) -> tuple[int, int]:
    """Returns (out_channels, in_channels)."""
    _check_floating(op, "weight", weight)
    _check_alike(op, "weight", weight, "grad", grad)
    _require(
        ValueError,
        weight.dim() >= 2,
        lambda: f"obc::{op}: weight must be (out, in / groups, *kernel), got shape {tuple(weight.shape)}",
    )
    _require(
        ValueError,
        groups >= 1 and weight.shape[0] % groups == 0,
        lambda: f"obc::{op}: dim 0 of the weight ({weight.shape[0]}) is not divisible into {groups} groups",
    )
    rows, columns = weight.shape[0], weight.shape[1] * groups
    out_channels, in_channels = (columns, rows) if transposed else (rows, columns)
    _require(
        ValueError,
        (bias is None) == (bias_grad is None),
        lambda: f"obc::{op}: bias and bias_grad go together, got only {'bias' if bias_grad is None else 'bias_grad'}",
    )
    if bias is not None and bias_grad is not None:
        _check_bias(op, weight, "bias", bias, out_channels)
        _check_bias(op, weight, "bias_grad", bias_grad, out_channels)
    return out_channels, in_channels


def _check_bias(op: str, weight: Tensor, name: str, bias: Tensor, out_channels: int) -> None:
    _require(
        ValueError,
        bias.dim() == 1 and bias.shape[0] == out_channels,
        lambda: f"obc::{op}: {name} has shape {tuple(bias.shape)}, expected ({out_channels},)",
    )
    _check_same_kind(op, "weight", weight, name, bias)


def _per_layer(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    bias_grads: Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    transposed: Sequence[bool] | None,
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]]:
    """The arguments of weight_dot_list transposed into one tuple per layer; defaults filled in, everything checked."""
    count = len(weights)
    columns: dict[str, Sequence[Any]] = {
        "grads": grads,
        "biases": [None] * count if biases is None else biases,
        "bias_grads": [None] * count if bias_grads is None else bias_grads,
        "groups": [1] * count if groups is None else groups,
        "transposed": [False] * count if transposed is None else transposed,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"obc::weight_dot_list: {len(column)} {name} for {count} weights")
    layers: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]]
    layers = list(zip(weights, *columns.values(), strict=True))
    for layer in layers:
        _check_weight_dot(*layer, "weight_dot_list")
        if layer[0].device != weights[0].device:
            devices = f"{weights[0].device} and {layer[0].device}"
            raise ValueError(f"obc::weight_dot_list: weights on {devices}; pass one device a call")
    return layers


def _check_factor(name: str, factor: Tensor, weight: Tensor, side: int, size: int, groups: int) -> int:
    """``factor`` fits ``size`` channels of the weight with its dimension ``side`` (-1 C, -2 D); returns those kept."""
    _check_same_kind("fold", "weight", weight, name, factor)
    _require(
        ValueError,
        factor.dim() in (2, 3),
        lambda: f"obc::fold: {name} must be a matrix or (blocks, rows, columns), got shape {tuple(factor.shape)}",
    )
    blocks = factor.shape[0] if factor.dim() == 3 else 1
    kept = factor.shape[-1 if side == -2 else -2]
    _require(
        ValueError,
        factor.shape[side] * blocks == size,
        lambda: (
            f"obc::fold: {name} of shape {tuple(factor.shape)} does not fit {size} channels of a weight "
            f"{tuple(weight.shape)} with groups={groups}"
        ),
    )
    _require(
        ValueError,
        groups == 1 or (blocks == groups if factor.dim() == 3 else kept % groups == 0 and size % groups == 0),
        lambda: f"obc::fold: {name} of shape {tuple(factor.shape)} can't be split into {groups} diagonal blocks",
    )
    return kept * blocks


def _check_fold(
    weight: Tensor, compressor: Tensor | None, decompressor: Tensor | None, groups: int, in_repeat: int
) -> tuple[int, ...]:
    """Returns the shape of the folded weight."""
    _check_floating("fold", "weight", weight)
    _require(
        ValueError,
        weight.dim() >= 2,
        lambda: f"obc::fold: weight must be (out, in / groups, *kernel), got shape {tuple(weight.shape)}",
    )
    _require(
        ValueError,
        groups >= 1 and weight.shape[0] % groups == 0,
        lambda: f"obc::fold: {weight.shape[0]} out channels are not divisible into {groups} groups",
    )
    _require(
        ValueError,
        in_repeat >= 1 and weight.shape[1] % in_repeat == 0,
        lambda: f"obc::fold: {weight.shape[1]} columns are not divisible by in_repeat={in_repeat}",
    )
    _require(
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


def _check_not_expanded(name: str, tensor: Tensor) -> None:
    _require(
        ValueError,
        tensor.shape[0] < 2 or tensor.stride(0) != 0,
        lambda: f"obc::end_row: {name} is expanded, so that its entries share memory; clone it first",
    )


def _addresses(vector: Tensor) -> range:
    """Where the entries of a flat vector lie; the only entry of one may have any stride, also 0."""
    step = max(1, vector.stride(0)) * vector.element_size()
    return range(vector.data_ptr(), vector.data_ptr() + len(vector) * step, step)


def _check_apart(scores: Tensor, row: Tensor) -> None:
    """Both are written: no entry may be one of each. Fakes have no memory to ask this of."""
    first, second = _addresses(scores), _addresses(row)
    if first.start >= second.stop or second.start >= first.stop:
        return
    if any(address in first for address in second):  # else they interlace
        raise ValueError("obc::end_row: scores and row share memory, and both are changed; clone one of them first")


def _check_end_row(scores: Tensor, row: Tensor, loss_scale: float, groups: Tensor | None) -> None:
    _check_floating("end_row", "scores", scores)
    _require(
        ValueError,
        scores.dim() == 1 and row.dim() == 1,
        lambda: (
            f"obc::end_row: scores and row are flat vectors, got shapes {tuple(scores.shape)} and {tuple(row.shape)}"
        ),
    )
    _require(
        TypeError,
        scores.dtype in (torch.float32, torch.float64),
        lambda: f"obc::end_row: scores must be float32 or float64, got {scores.dtype}",
    )
    _check_same_kind("end_row", "scores", scores, "row", row)
    _check_not_expanded("scores", scores)
    _check_not_expanded("row", row)
    _require(ValueError, loss_scale != 0, lambda: "obc::end_row: loss_scale must not be 0")
    _require(
        RuntimeError,
        not (scores.requires_grad or row.requires_grad),
        lambda: "obc::end_row is not differentiable: it changes scores and row in place; detach them first",
    )
    if groups is None:
        _require(
            ValueError,
            scores.shape == row.shape,
            lambda: (
                f"obc::end_row: scores has {scores.shape[0]} entries, row {row.shape[0]}; pass groups or equal lengths"
            ),
        )
        return
    _require(TypeError, groups.dtype == torch.int64, lambda: f"obc::end_row: groups must be int64, got {groups.dtype}")
    _require(
        ValueError,
        groups.shape == row.shape,
        lambda: f"obc::end_row: groups has shape {tuple(groups.shape)}, row {tuple(row.shape)}",
    )
    _require(
        ValueError,
        groups.device == row.device,
        lambda: f"obc::end_row: groups is on {groups.device}, row on {row.device}",
    )


# --- implementations: check, then the backend ----------------------------------------------------------------


def channel_dot_undispatched(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    """:func:`channel_dot` on plain tensors without torch's dispatcher, whose share of a small call is the larger one.

    For a backward that nothing records, traces or compiles.
    """
    channel_dim = _check_channel_dot(activation, grad, channel_dim, per_sample)
    call = backends.resolve("channel_dot", activation.device.type, activation.dtype, activation.numel())
    return call(activation, grad, channel_dim, per_sample)


def _weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_weight_dot(weight, grad, bias, bias_grad, groups, transposed)
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
    layers = _per_layer(weights, grads, biases, bias_grads, groups, transposed)
    if not layers:
        return [], []
    columns = [list(column) for column in zip(*layers, strict=True)]
    elements = sum(weight.numel() for weight in weights)
    call = backends.resolve("weight_dot_list", weights[0].device.type, weights[0].dtype, elements)
    return call(*columns)


def _weight_moments(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_weight_dot(weight, grad, None, None, 1, False, "weight_moments")
    call = backends.resolve("weight_moments", weight.device.type, weight.dtype, weight.numel())
    return call(weight, grad)


def _fold(
    weight: Tensor,
    compressor: Tensor | None = None,
    decompressor: Tensor | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Tensor:
    _check_fold(weight, compressor, decompressor, groups, in_repeat)
    if compressor is None and decompressor is None:
        return weight.clone(memory_format=torch.contiguous_format)
    call = backends.resolve("fold", weight.device.type, weight.dtype, weight.numel())
    return call(weight, compressor, decompressor, groups, in_repeat)


def _end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    _check_end_row(scores, row, loss_scale, groups)
    _check_apart(scores, row)
    call = backends.resolve("end_row", row.device.type, row.dtype, row.numel())
    finite = call(scores, row, loss_scale, groups)
    # A raw schema's mutation does not reach autograd's version counters by itself.
    torch.autograd.graph.increment_version((scores, row))
    return finite


# --- fakes: the same checks, then an empty result ------------------------------------------------------------


def _channel_dot_fake(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> Tensor:
    channel_dim = _check_channel_dot(activation, grad, channel_dim, per_sample)
    channels = activation.shape[channel_dim]
    shape = (activation.shape[0], channels) if per_sample else (channels,)
    return activation.new_empty(shape, dtype=accumulation_dtype(activation.dtype))


def _weight_dot_fake(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    out_channels, in_channels = _check_weight_dot(weight, grad, bias, bias_grad, groups, transposed)
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
    layers = _per_layer(weights, grads, biases, bias_grads, groups, transposed)
    dots = [_weight_dot_fake(*layer) for layer in layers]
    return [out_dot for out_dot, _ in dots], [in_dot for _, in_dot in dots]


def _weight_moments_fake(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_weight_dot(weight, grad, None, None, 1, False, "weight_moments")
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
    return weight.new_empty(_check_fold(weight, compressor, decompressor, groups, in_repeat))


def _end_row_fake(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    _check_end_row(scores, row, loss_scale, groups)
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
    given = ctx.needs_input_grad  # arguments left at their defaults have no entry at its end
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
_register("weight_dot", _weight_dot, _weight_dot_fake, (_weight_dot_backward, _weight_dot_setup))
_register(
    "weight_dot_list",
    _weight_dot_list,
    _weight_dot_list_fake,
    _not_differentiable("weight_dot_list", "call weight_dot layer by layer"),
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
    """Sum of activation times gradient per channel: one row of scores of a layer.

    r[c] = sum over all other positions of activation[.., c, ..] * grad[.., c, ..]

    Args:
        activation: floating tensor of any layout, for example (N, C, *S), channels-last or (..., C).
        grad: gradient of a loss by ``activation``: the same shape, dtype and device.
        channel_dim: the dimension of the channels; negative counts from the end.
        per_sample: keep the samples along dim 0 apart.

    Returns:
        (C,), or (N, C) with ``per_sample``; float32, or float64 for float64 input. Differentiable.

    Raises:
        ValueError, TypeError, IndexError: shapes, dtypes or devices differ, or ``channel_dim`` is out of range.
    """
    return torch.ops.obc.channel_dot(activation, grad, channel_dim, per_sample)


def weight_dot(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both sums of weight times gradient, per out channel and per in channel, in one pass over the two tensors.

    out_dot[o] = sum w[o] * g[o] + b[o] * gb[o];   in_dot[i] = sum w[:, i] * g[:, i]

    Args:
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) with ``transposed``.
        grad: its gradient: the same shape, dtype and device.
        bias: (out,) or None.
        bias_grad: the bias's gradient; given exactly when ``bias`` is.
        groups: groups of the convolution; in_dot counts every in channel of every group.
        transposed: the weight is a transposed convolution's.

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
    """:func:`weight_dot` of a whole model in one call.

    Args:
        weights, grads, biases, bias_grads, groups, transposed: per layer, the arguments of :func:`weight_dot`.

    Returns:
        The list of out_dots and the list of in_dots, one of each a layer. Not differentiable.

    Raises:
        ValueError, TypeError: the lists differ in length, or a layer's tensors don't fit.
    """
    return torch.ops.obc.weight_dot_list(weights, grads, biases, bias_grads, groups, transposed)


def weight_moments(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row of dim 0: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|, all from one pass over the two tensors.

    Args:
        weight: (out, in / groups, *kernel).
        grad: its gradient: the same shape, dtype and device.

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
        groups: groups of the convolution. With more than one, C and D must be block-diagonal: ``groups`` blocks, or
            matrices of which only the diagonal blocks are read.
        in_repeat: for a Linear after flatten, how many columns each in channel owns (D is then D x I).

    Returns:
        (kept_out, kept_in / groups, *kernel) in the dtype of ``weight``, products accumulated in float32 or better.
        Differentiable in all three tensors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit.
    """
    if weight.device.type == "cpu" and backends.requested() in (None, "cpu"):
        # The CPU's fold is matrix products that autograd knows: no operator of ours, so that its backward finds the
        # first product kept, and a small weight does not pay for a call through the dispatcher.
        if not torch.compiler.is_compiling():  # Dynamo can't trace the checks' messages; the products check shapes too
            _check_fold(weight, compressor, decompressor, groups, in_repeat)
        return gemm.fold(weight, compressor, decompressor, groups, in_repeat)
    return torch.ops.obc.fold(weight, compressor, decompressor, groups, in_repeat)


def end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
    """End a row: scores[groups[c]] += (row[c] / loss_scale)^2, then row = 0, both in place and in one pass.

    Where a square is not finite, nothing is added, and the row is zeroed all the same.

    Args:
        scores: flat float32 or float64 vector, one entry per group, or per channel without ``groups``.
        row: flat vector of the same dtype and device, one entry per channel; shares no entry with ``scores``.
        loss_scale: what the loss was multiplied by (a gradient scaler's scale).
        groups: int64 vector, the group of each channel, ascending.

    Returns:
        A 0-d bool tensor on the device: whether every square was finite. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit, or scores and row share memory.
        RuntimeError: an input requires grad.
    """
    return torch.ops.obc.end_row(scores, row, loss_scale, groups)
