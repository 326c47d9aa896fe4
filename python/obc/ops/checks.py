"""Argument checks that several operators share. With symbolic sizes their conditions become guards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require(error: type[Exception], condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """``torch._check_with``, which takes microseconds, only if the condition is symbolic or false."""
    if condition is not True:
        torch._check_with(error, condition, message)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the dtype is float32, float64, bfloat16 or float16."""
    require(
        TypeError,
        tensor.dtype in _FLOATING,
        lambda: (
            f"obc::{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; convert it first"
        ),
    )


def check_alike(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """Require one shape, dtype and device for the two tensors."""
    require(
        ValueError,
        first.shape == tensor.shape,
        lambda: (
            f"obc::{op}: {name} has shape {tuple(tensor.shape)}, {first_name} has {tuple(first.shape)}; "
            "pass equal shapes"
        ),
    )
    check_same_kind(op, first_name, first, name, tensor)


def check_same_kind(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError unless both tensors have one dtype and one device."""
    require(
        TypeError,
        first.dtype == tensor.dtype,
        lambda: f"obc::{op}: {name} is {tensor.dtype}, {first_name} is {first.dtype}; pass one dtype",
    )
    require(
        ValueError,
        first.device == tensor.device,
        lambda: f"obc::{op}: {name} is on {tensor.device}, {first_name} on {first.device}; pass one device",
    )


def check_weight(op: str, weight: Tensor) -> None:
    """Raises TypeError or ValueError unless ``weight`` is floating and has at least two dimensions."""
    check_floating(op, "weight", weight)
    require(
        ValueError,
        weight.dim() >= 2,
        lambda: f"obc::{op}: weight must be (out, in / groups, *kernel), got shape {tuple(weight.shape)}",
    )


def counted_from_0(op: str, what: str, tensor: Tensor, channel_dim: int) -> int:
    """The channel dimension of ``tensor``, which messages call ``what``."""
    dims = tensor.dim()
    require(
        IndexError,
        -dims <= channel_dim < dims,
        lambda: f"obc::{op}: channel_dim {channel_dim} is outside {what} of {dims} dimensions",
    )
    return channel_dim % dims
