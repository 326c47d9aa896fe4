"""Argument checks of the operators in :mod:`obc.ops`, shared by implementations and fakes.

Each function takes the arguments of its operator. With symbolic sizes its conditions become guards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _require(error: type[Exception], condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """``torch._check_with``, which takes microseconds, only if the condition is symbolic or false."""
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
    """Require one shape, dtype and device for the two tensors."""
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


def channel_dot(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool) -> int:
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


def channel_moments(x: Tensor, channel_dim: int, mask: Tensor | None) -> int:
    """Returns the channel dimension counted from 0."""
    _check_floating("channel_moments", "x", x)
    dims = x.dim()
    _require(
        IndexError,
        -dims <= channel_dim < dims,
        lambda: f"obc::channel_moments: channel_dim {channel_dim} is outside x of {dims} dimensions",
    )
    channel_dim = channel_dim % dims
    _require(
        ValueError,
        channel_dim != 0,
        lambda: "obc::channel_moments: samples are along dim 0, but channel_dim is 0 too; unsqueeze a batch of one",
    )
    if mask is None:
        return channel_dim
    _require(TypeError, mask.dtype == torch.bool, lambda: f"obc::channel_moments: mask must be bool, got {mask.dtype}")
    shape = x.shape[:channel_dim] + x.shape[channel_dim + 1 :]
    _require(
        ValueError,
        mask.shape == shape,
        lambda: (
            f"obc::channel_moments: mask has shape {tuple(mask.shape)}, expected {tuple(shape)}: that of x, "
            f"{tuple(x.shape)}, without its dim {channel_dim}"
        ),
    )
    _require(
        ValueError,
        mask.device == x.device,
        lambda: f"obc::channel_moments: mask is on {mask.device}, x on {x.device}; pass one device",
    )
    return channel_dim


def weight_dot(
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


def per_layer(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    bias_grads: Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    transposed: Sequence[bool] | None,
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]]:
    """The arguments of weight_dot_list as one tuple per layer, with defaults filled in and everything checked."""
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
        weight_dot(*layer, "weight_dot_list")
        if layer[0].device != weights[0].device:
            devices = f"{weights[0].device} and {layer[0].device}"
            raise ValueError(f"obc::weight_dot_list: weights on {devices}; pass weights of one device per call")
    return layers


def _check_factor(name: str, factor: Tensor, weight: Tensor, side: int, size: int, groups: int) -> int:
    """Require that dimension ``side`` (-1 of C, -2 of D) fits ``size`` channels; returns the number of kept ones."""
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


def fold(
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
        lambda: f"obc::end_row: {name} is expanded: its entries share memory; clone it first",
    )


def _addresses(vector: Tensor) -> range:
    """The addresses of a flat vector's entries; a single entry may have any stride, even 0."""
    step = max(1, vector.stride(0)) * vector.element_size()
    return range(vector.data_ptr(), vector.data_ptr() + len(vector) * step, step)


def apart(scores: Tensor, row: Tensor) -> None:
    """Require that the two vectors, which are both written, share no entry. Fakes have no memory to check."""
    first, second = _addresses(scores), _addresses(row)
    if first.start >= second.stop or second.start >= first.stop:
        return
    if any(address in first for address in second):  # otherwise they interlace
        raise ValueError("obc::end_row: scores and row share memory, and both are changed; clone one of them first")


def end_row(scores: Tensor, row: Tensor, loss_scale: float, groups: Tensor | None) -> None:
    """Checks everything except the values of groups, which would make a GPU wait."""
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
