"""The operators on NumPy arrays, run by the same CPU kernels, for programs without torch tensors.

Signatures and meaning are those of :mod:`obc.ops`. Arrays are float32, float64 or float16 (NumPy has no bfloat16), with
any strides. Results are NumPy arrays, bit for bit those of the torch operators on the CPU, and not differentiable.

The kernels release the interpreter's lock and use ``OBC_NUM_THREADS`` threads, by default one per processor. The
products of :func:`fold` are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from operator import index
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obc import ops
from obc.backends.cpu import describe_bad_group
from obc.distribution import NATIVE_REMEDY
from obc.ops.registration import check_arguments

try:
    import obc._native as _native
except ImportError as error:
    raise ImportError(
        f"obc.integrations.numpy needs obc's native module, which was not built or can't be loaded here ({error}); "
        f"{NATIVE_REMEDY}"
    ) from error

Array: TypeAlias = NDArray[np.floating[Any]]

_FLOATING = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))


_OPTIONAL = ("bias", "bias_grad", "mask", "groups", "compressor", "decompressor")


# --- checks: what only NumPy allows here; shapes and dtypes by the operators' own ---------------------------------


class _Like:
    """What the operators' checks ask of a tensor, answered for an array: a tensor would take microseconds to make."""

    __slots__ = ("dtype", "shape")
    device = torch.device("cpu")
    requires_grad = False

    def __init__(self, array: NDArray[Any]) -> None:
        self.shape = array.shape
        self.dtype = _torch_dtype(array.dtype)

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int) -> int:
        return 1  # _check_writable looks at the strides


@functools.cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _like(op: str, **arrays: Any) -> list[Any]:
    """For every array what the operators' checks take in its place; None stays None where the operator allows it."""
    found: list[Any] = []
    for name, array in arrays.items():
        if array is None and name in _OPTIONAL:
            found.append(None)
            continue
        if not isinstance(array, np.ndarray):
            raise TypeError(f"obc::{op}: {name} must be a NumPy array, got {type(array).__name__}")
        if array.dtype.kind == "f" and array.dtype not in _FLOATING:
            raise TypeError(
                f"obc::{op}: {name} must be float32, float64 or float16 in native byte order, got {array.dtype}; "
                "convert it first"
            )
        if any(stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
            raise ValueError(
                f"obc::{op}: {name} has strides {array.strides} that are not multiples of its {array.itemsize}-byte "
                "elements, or is not aligned (a field of a structured array?); copy it first"
            )
        found.append(_Like(array))
    return found


def _whole(op: str, name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"obc::{op}: {name} must be a whole number, got {value!r}") from None


def _check_writable(name: str, array: Array) -> None:
    if not array.flags.writeable:
        raise ValueError(f"obc::end_row: {name} is read-only, and changed in place; pass a copy")
    if array.size > 1 and array.strides[0] == 0:
        raise ValueError(f"obc::end_row: {name} is broadcast: its entries share memory; pass a copy")


def _tensor(array: Array) -> Tensor:
    """The array as a tensor: its own memory, or a copy where torch can't use that."""
    usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if usable else array.copy())


# --- operators ------------------------------------------------------------------------------------------------


def channel_dot(activation: Array, grad: Array, channel_dim: int, per_sample: bool = False) -> Array:
    """Sum of activation times gradient per channel, (C,), or (N, C) with ``per_sample``: :func:`obc.ops.channel_dot`.

    Raises:
        ValueError, TypeError, IndexError: shapes or dtypes differ, or ``channel_dim`` is out of range.
    """
    like, like_grad = _like("channel_dot", activation=activation, grad=grad)
    _, _, channel_dim, _ = check_arguments(
        "channel_dot", like, like_grad, _whole("channel_dot", "channel_dim", channel_dim), per_sample
    )
    return _native.channel_dot(activation, grad, channel_dim, per_sample)


def channel_moments(
    x: Array, channel_dim: int, mask: NDArray[np.bool_] | None = None
) -> tuple[Array, Array, Array, Array]:
    """Per channel sum x, sum x^2, sum |x|, sum of squared sample means of |x|. See :func:`obc.ops.channel_moments`.

    Raises:
        ValueError, TypeError, IndexError: ``channel_dim`` is 0 or out of range, or the mask does not fit.
    """
    like_x, like_mask = _like("channel_moments", x=x, mask=mask)
    channel_dim = _whole("channel_moments", "channel_dim", channel_dim)
    _, channel_dim, _ = check_arguments("channel_moments", like_x, channel_dim, like_mask)
    first, second, third, fourth = _native.channel_moments(x, channel_dim, mask)
    return first, second, third, fourth


def weight_dot(
    weight: Array,
    grad: Array,
    bias: Array | None = None,
    bias_grad: Array | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Sums of weight times gradient per out channel and per in channel. See :func:`obc.ops.weight_dot`.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    like, like_grad, b, b_grad = _like("weight_dot", weight=weight, grad=grad, bias=bias, bias_grad=bias_grad)
    check_arguments("weight_dot", like, like_grad, b, b_grad, _whole("weight_dot", "groups", groups), transposed)
    out_dots, in_dots = _native.weight_dot_list([weight], [grad], [bias], [bias_grad], [groups], [transposed])
    return out_dots[0], in_dots[0]


def weight_dot_list(
    weights: Sequence[Array],
    grads: Sequence[Array],
    biases: Sequence[Array | None] | None = None,
    bias_grads: Sequence[Array | None] | None = None,
    groups: Sequence[int] | None = None,
    transposed: Sequence[bool] | None = None,
) -> tuple[list[Array], list[Array]]:
    """:func:`weight_dot` for a whole model in one call: the list of out_dots and the list of in_dots.

    Raises:
        ValueError, TypeError: the lists differ in length, or a layer's arrays don't fit.
    """
    given = {"weights": weights, "grads": grads, "biases": biases, "bias_grads": bias_grads}
    for name, values in (given | {"groups": groups, "transposed": transposed}).items():
        if not isinstance(values, Collection) and not (values is None and name not in ("weights", "grads")):
            raise TypeError(f"obc::weight_dot_list: {name} must be a list with one entry per layer, got {values!r}")
    count = len(weights)
    biases = [None] * count if biases is None else biases
    bias_grads = [None] * count if bias_grads is None else bias_grads
    groups = [1] * count if groups is None else [_whole("weight_dot_list", "groups", number) for number in groups]
    transposed = [False] * count if transposed is None else transposed
    columns = {"weight": weights, "grad": grads, "bias": biases, "bias_grad": bias_grads}
    like_weights, like_grads, like_biases, like_bias_grads = (
        [_like("weight_dot_list", **{name: array})[0] for array in column] for name, column in columns.items()
    )
    check_arguments("weight_dot_list", like_weights, like_grads, like_biases, like_bias_grads, groups, transposed)
    return _native.weight_dot_list(weights, grads, biases, bias_grads, groups, transposed)


def weight_moments(weight: Array, grad: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Per row of dim 0: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|. See :func:`obc.ops.weight_moments`.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    check_arguments("weight_moments", *_like("weight_moments", weight=weight, grad=grad))
    first, second, third, fourth, fifth = _native.weight_moments(weight, grad)
    return first, second, third, fourth, fifth


def end_row(scores: Array, row: Array, loss_scale: float = 1.0, groups: NDArray[np.int64] | None = None) -> bool:
    """scores[groups[c]] += (row[c] / loss_scale)^2, then row = 0, both in place. See :func:`obc.ops.end_row`.

    Returns:
        Whether every square was finite; if not, nothing was added.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit, a vector is read-only, scores and row share memory, or the
            groups are not ascending or out of range.
    """
    like_scores, like_row, like_groups = _like("end_row", scores=scores, row=row, groups=groups)
    if isinstance(loss_scale, str) or not isinstance(loss_scale, SupportsFloat):
        raise TypeError(f"obc::end_row: loss_scale must be a number, got {loss_scale!r}")
    check_arguments("end_row", like_scores, like_row, float(loss_scale), like_groups)
    _check_writable("scores", scores)
    _check_writable("row", row)
    if np.shares_memory(scores, row):
        raise ValueError("obc::end_row: scores and row share memory, and both are changed; pass a copy of one of them")
    finite, bad_group = _native.end_row(scores, row, loss_scale, groups)
    if bad_group >= 0:
        assert groups is not None
        raise ValueError(describe_bad_group(bad_group, int(groups[bad_group]), scores.size))
    return finite


def fold(
    weight: Array,
    compressor: Array | None = None,
    decompressor: Array | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Array:
    """The folded weight C W D over (out, in / groups, *kernel). See :func:`obc.ops.fold`.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    _like("fold", weight=weight, compressor=compressor, decompressor=decompressor)
    c, d = (None if factor is None else _tensor(factor) for factor in (compressor, decompressor))
    groups, in_repeat = _whole("fold", "groups", groups), _whole("fold", "in_repeat", in_repeat)
    return ops.fold(_tensor(weight), c, d, groups, in_repeat).numpy()
