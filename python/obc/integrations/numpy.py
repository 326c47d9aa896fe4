"""The operators on NumPy arrays, run by the same CPU kernels, for programs without torch tensors.

Signatures and meaning are those of :mod:`obc.ops`. Arrays are float32, float64 or float16 (NumPy has no bfloat16), with
any strides. Results are NumPy arrays, bit for bit those of the torch operators on the CPU, except for :func:`fold`,
whose matrix products are NumPy's and agree up to rounding. Nothing here is differentiable.

The kernels release the interpreter's lock and use ``OBC_NUM_THREADS`` threads, by default one per processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from obc.backends.cpu import describe_bad_group

try:
    import obc._native as _native
except ImportError as error:
    raise ImportError(
        f"obc.integrations.numpy needs obc's native module, which was not built or can't be loaded here ({error}); "
        "install a C++17 compiler and reinstall obc"
    ) from error

Array: TypeAlias = NDArray[np.floating[Any]]

_FLOATING = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))


# --- checks ---------------------------------------------------------------------------------------------------


def _check_array(op: str, name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"obc.{op}: {name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype not in _FLOATING:
        raise TypeError(
            f"obc.{op}: {name} must be float32, float64 or float16 in native byte order, got {array.dtype}; "
            "convert it first"
        )
    _check_strides(op, name, array)


def _check_strides(op: str, name: str, array: NDArray[Any]) -> None:
    if any(stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
        raise ValueError(
            f"obc.{op}: {name} has strides {array.strides} that are not multiples of its {array.itemsize}-byte "
            "elements, or is not aligned (a field of a structured array?); copy it first"
        )


def _check_alike(op: str, first_name: str, first: Array, name: str, array: Array) -> None:
    _check_array(op, first_name, first)
    _check_array(op, name, array)
    if first.shape != array.shape:
        raise ValueError(f"obc.{op}: {name} has shape {array.shape}, {first_name} has {first.shape}; pass equal shapes")
    _check_dtype(op, first_name, first, name, array)


def _check_dtype(op: str, first_name: str, first: Array, name: str, array: Array) -> None:
    if first.dtype != array.dtype:
        raise TypeError(f"obc.{op}: {name} is {array.dtype}, {first_name} is {first.dtype}; pass one dtype")


def _check_weight_dot(
    op: str, weight: Array, grad: Array, bias: Array | None, bias_grad: Array | None, groups: int, transposed: bool
) -> None:
    _check_alike(op, "weight", weight, "grad", grad)
    if weight.ndim < 2:
        raise ValueError(f"obc.{op}: weight must be (out, in / groups, *kernel), got shape {weight.shape}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"obc.{op}: dim 0 of the weight ({weight.shape[0]}) is not divisible into {groups} groups")
    if (bias is None) != (bias_grad is None):
        raise ValueError(
            f"obc.{op}: bias and bias_grad go together, got only {'bias' if bias_grad is None else 'bias_grad'}"
        )
    if bias is None or bias_grad is None:
        return
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    for name, array in (("bias", bias), ("bias_grad", bias_grad)):
        _check_array(op, name, array)
        if array.shape != (out_channels,):
            raise ValueError(f"obc.{op}: {name} has shape {array.shape}, expected ({out_channels},)")
        _check_dtype(op, "weight", weight, name, array)


def _check_flat(op: str, name: str, array: NDArray[Any]) -> None:
    if array.ndim != 1:
        raise ValueError(f"obc.{op}: {name} must be a flat vector, got shape {array.shape}")
    if not array.flags.writeable:
        raise ValueError(f"obc.{op}: {name} is read-only, and changed in place; pass a copy")
    if array.size > 1 and array.strides[0] == 0:
        raise ValueError(f"obc.{op}: {name} is broadcast: its entries share memory; pass a copy")


# --- operators ------------------------------------------------------------------------------------------------


def channel_dot(activation: Array, grad: Array, channel_dim: int, per_sample: bool = False) -> Array:
    """Sum of activation times gradient per channel, (C,), or (N, C) with ``per_sample``: :func:`obc.ops.channel_dot`.

    Raises:
        ValueError, TypeError, IndexError: shapes or dtypes differ, or ``channel_dim`` is out of range.
    """
    _check_alike("channel_dot", "activation", activation, "grad", grad)
    dims = activation.ndim
    if not -dims <= channel_dim < dims:
        raise IndexError(f"obc.channel_dot: channel_dim {channel_dim} is outside an activation of {dims} dimensions")
    channel_dim %= dims
    if per_sample and channel_dim == 0:
        raise ValueError("obc.channel_dot: per_sample needs samples along dim 0, but channel_dim is 0 too")
    return _native.channel_dot(activation, grad, channel_dim, per_sample)


def channel_moments(
    x: Array, channel_dim: int, mask: NDArray[np.bool_] | None = None
) -> tuple[Array, Array, Array, Array]:
    """Per channel sum x, sum x^2, sum |x|, sum of squared sample means of |x|. See :func:`obc.ops.channel_moments`.

    Raises:
        ValueError, TypeError, IndexError: ``channel_dim`` is 0 or out of range, or the mask does not fit.
    """
    _check_array("channel_moments", "x", x)
    dims = x.ndim
    if not -dims <= channel_dim < dims:
        raise IndexError(f"obc.channel_moments: channel_dim {channel_dim} is outside x of {dims} dimensions")
    channel_dim %= dims
    if channel_dim == 0:
        raise ValueError("obc.channel_moments: samples are along dim 0, but channel_dim is 0 too; add a batch of one")
    if mask is not None:
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            kind = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
            raise TypeError(f"obc.channel_moments: mask must be a bool array, got {kind}")
        shape = x.shape[:channel_dim] + x.shape[channel_dim + 1 :]
        if mask.shape != shape:
            raise ValueError(
                f"obc.channel_moments: mask has shape {mask.shape}, expected {shape}: that of x, {x.shape}, without "
                f"its dim {channel_dim}"
            )
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
    _check_weight_dot("weight_dot", weight, grad, bias, bias_grad, groups, transposed)
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
    count = len(weights)
    biases = [None] * count if biases is None else biases
    bias_grads = [None] * count if bias_grads is None else bias_grads
    groups = [1] * count if groups is None else groups
    transposed = [False] * count if transposed is None else transposed
    columns: dict[str, Sequence[Any]] = {
        "grads": grads,
        "biases": biases,
        "bias_grads": bias_grads,
        "groups": groups,
        "transposed": transposed,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"obc.weight_dot_list: {len(column)} {name} for {count} weights")
    for layer in zip(weights, grads, biases, bias_grads, groups, transposed, strict=True):
        _check_weight_dot("weight_dot_list", *layer)
    return _native.weight_dot_list(weights, grads, biases, bias_grads, groups, transposed)


def weight_moments(weight: Array, grad: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Per row of dim 0: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|. See :func:`obc.ops.weight_moments`.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    _check_weight_dot("weight_moments", weight, grad, None, None, 1, False)
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
    for name, array in (("scores", scores), ("row", row)):
        _check_array("end_row", name, array)
        _check_flat("end_row", name, array)
    if scores.dtype == np.float16:
        raise TypeError("obc.end_row: scores must be float32 or float64, got float16")
    _check_dtype("end_row", "scores", scores, "row", row)
    if loss_scale == 0:
        raise ValueError("obc.end_row: loss_scale must not be 0")
    if groups is None:
        if scores.shape != row.shape:
            raise ValueError(
                f"obc.end_row: scores has {scores.size} entries, row {row.size}; pass groups or equal lengths"
            )
    else:
        if groups.dtype != np.int64:
            raise TypeError(f"obc.end_row: groups must be int64, got {groups.dtype}")
        if groups.shape != row.shape:
            raise ValueError(f"obc.end_row: groups has shape {groups.shape}, row {row.shape}")
        _check_strides("end_row", "groups", groups)
    if np.shares_memory(scores, row):
        raise ValueError("obc.end_row: scores and row share memory, and both are changed; pass a copy of one of them")
    finite, bad_group = _native.end_row(scores, row, loss_scale, groups)
    if bad_group >= 0:
        assert groups is not None
        raise ValueError(describe_bad_group(bad_group, int(groups[bad_group]), scores.size))
    return finite


# --- fold -----------------------------------------------------------------------------------------------------


def _wide(array: Array) -> Array:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def _diagonal_blocks(factor: Array, blocks: int) -> Array:
    """(blocks, rows, columns) of a factor; of a 2-D block-diagonal one only its diagonal blocks are read."""
    if factor.ndim == 3:
        return factor
    rows, columns = factor.shape
    grid = factor.reshape(blocks, rows // blocks, blocks, columns // blocks)
    return grid[np.arange(blocks), :, np.arange(blocks), :]


def _check_factor(name: str, factor: Array, weight: Array, side: int, size: int, groups: int) -> None:
    """Raise unless dimension ``side`` (-1 of C, -2 of D) of ``factor`` fits ``size`` channels of the weight."""
    _check_array("fold", name, factor)
    _check_dtype("fold", "weight", weight, name, factor)
    if factor.ndim not in (2, 3):
        raise ValueError(f"obc.fold: {name} must be a matrix or (blocks, rows, columns), got shape {factor.shape}")
    blocks = factor.shape[0] if factor.ndim == 3 else 1
    if factor.shape[side] * blocks != size:
        raise ValueError(
            f"obc.fold: {name} of shape {factor.shape} does not fit {size} channels of a weight {weight.shape} with "
            f"groups={groups}"
        )
    kept = factor.shape[-1 if side == -2 else -2]
    divisible = blocks == groups if factor.ndim == 3 else kept % groups == 0 and size % groups == 0
    if groups > 1 and not divisible:
        raise ValueError(f"obc.fold: {name} of shape {factor.shape} can't be split into {groups} diagonal blocks")


def fold(
    weight: Array,
    compressor: Array | None = None,
    decompressor: Array | None = None,
    groups: int = 1,
    in_repeat: int = 1,
) -> Array:
    """The folded weight C W D over (out, in / groups, *kernel). See :func:`obc.ops.fold`.

    Its products are NumPy's, so it agrees with the torch operator up to rounding, not bit for bit.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    _check_array("fold", "weight", weight)
    if weight.ndim < 2:
        raise ValueError(f"obc.fold: weight must be (out, in / groups, *kernel), got shape {weight.shape}")
    out_channels, columns, *kernel = weight.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"obc.fold: {out_channels} out channels are not divisible into {groups} groups")
    if in_repeat < 1 or columns % in_repeat:
        raise ValueError(f"obc.fold: {columns} columns are not divisible by in_repeat={in_repeat}")
    if in_repeat > 1 and (groups > 1 or kernel):
        raise ValueError(
            f"obc.fold: in_repeat={in_repeat} is for a Linear after flatten, got a weight of shape {weight.shape} "
            f"with groups={groups}"
        )
    in_channels, positions = columns // in_repeat, in_repeat * int(np.prod(kernel, dtype=np.int64))
    folded = _wide(weight).reshape(out_channels, in_channels, positions)
    if compressor is not None:
        _check_factor("compressor", compressor, weight, -1, out_channels, groups)
        c = _wide(_diagonal_blocks(compressor, groups))
        blocks, kept, rows = c.shape
        folded = (c @ folded.reshape(blocks, rows, in_channels * positions)).reshape(
            blocks * kept, in_channels, positions
        )
    if decompressor is not None:
        _check_factor("decompressor", decompressor, weight, -2, in_channels * groups, groups)
        d = _wide(_diagonal_blocks(decompressor, groups))
        blocks, rows, kept = d.shape
        out = folded.shape[0]
        transposed = d.transpose(0, 2, 1)  # (blocks, j, i) @ (i, s) for each out channel
        if groups > 1:
            folded = transposed[:, None] @ folded.reshape(groups, out // groups, in_channels, positions)
            folded = folded.reshape(out, kept, positions)
        else:
            folded = transposed @ folded.reshape(out, blocks, rows, positions)
            folded = folded.reshape(out, blocks * kept, positions)
    result = folded.reshape(folded.shape[0], folded.shape[1] * in_repeat, *kernel).astype(weight.dtype, copy=False)
    return result.copy() if np.shares_memory(result, weight) else result
