"""The operator ``weight_moments``."""

from __future__ import annotations

from torch import Tensor

from obc.ops.registration import call, not_differentiable, register
from obc.ops.weight_dot import check_layer
from obc.reference import accumulation_dtype


def _check(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    check_layer("weight_moments", weight, grad)
    return weight, grad


def _empty(weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(weight.dtype)
    return tuple(weight.new_empty(weight.shape[0], dtype=dtype) for _ in range(5))


register(
    "weight_moments",
    _check,
    _empty,
    not_differentiable("weight_moments", "write the moment that you need in plain torch"),
)


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
    moments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = call("weight_moments", weight, grad)
    return moments
