"""The operator ``weight_dot_list``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from obc import backends
from obc.ops.registration import call, not_differentiable, register
from obc.ops.weight_dot import check_layer, empty


def _check(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Any], ...]:
    count = len(weights)
    columns: dict[str, Sequence[Any]] = {
        "weights": weights,
        "grads": grads,
        "biases": [None] * count if biases is None else biases,
        "bias_grads": [None] * count if bias_grads is None else bias_grads,
        "groups": [1] * count if groups is None else groups,
        "transposed": [False] * count if transposed is None else transposed,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"obc::weight_dot_list: {len(column)} {name} for {count} weights")
    for layer in zip(*columns.values(), strict=True):
        check_layer("weight_dot_list", *layer)
        if layer[0].device != weights[0].device:
            devices = f"{weights[0].device} and {layer[0].device}"
            raise ValueError(f"obc::weight_dot_list: weights on {devices}; pass weights of one device per call")
    return tuple(map(list, columns.values()))


def _empty(*columns: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    dots = [empty(*layer) for layer in zip(*columns, strict=True)]
    return [out_dot for out_dot, _ in dots], [in_dot for _, in_dot in dots]


def _weight_dot_list(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    columns = _check(*arguments)
    weights = columns[0]
    if not weights:
        return [], []
    elements = sum(weight.numel() for weight in weights)
    call = backends.resolve("weight_dot_list", weights[0].device.type, weights[0].dtype, elements)
    result: tuple[list[Tensor], list[Tensor]] = call(*columns)
    return result


register(
    "weight_dot_list",
    _check,
    _empty,
    not_differentiable("weight_dot_list", "call weight_dot for each layer"),
    _weight_dot_list,
)


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
        ValueError, TypeError: the lists differ in length, are no lists, or a layer's tensors don't fit.
    """
    columns = (weights, grads, biases, bias_grads, groups, transposed)
    given = [list(column) if isinstance(column, Iterable) else column for column in columns]  # an iterator is read once
    dots: tuple[list[Tensor], list[Tensor]] = call("weight_dot_list", *given)
    return dots
