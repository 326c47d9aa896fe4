"""The operator ``end_row``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc.ops.checks import check_floating, check_same_kind, require
from obc.ops.registration import call, register, run


def _check_not_expanded(name: str, tensor: Tensor) -> None:
    require(
        ValueError,
        tensor.shape[0] < 2 or tensor.stride(0) != 0,
        lambda: f"obc::end_row: {name} is expanded: its entries share memory; clone it first",
    )


def _addresses(vector: Tensor) -> range:
    """The addresses of a flat vector's entries; a single entry may have any stride, even 0."""
    step = max(1, vector.stride(0)) * vector.element_size()
    return range(vector.data_ptr(), vector.data_ptr() + vector.numel() * step, step)


def _check_apart(scores: Tensor, row: Tensor) -> None:
    """Require that the two vectors, which are both written, share no entry. Fakes have no memory to check."""
    first, second = _addresses(scores), _addresses(row)
    if first.start >= second.stop or second.start >= first.stop:
        return
    if any(address in first for address in second):  # otherwise they interlace
        raise ValueError("obc::end_row: scores and row share memory, and both are changed; clone one of them first")


def _check(
    scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Checks everything except the values of groups, which would make a GPU wait."""
    check_floating("end_row", "scores", scores)
    require(
        ValueError,
        scores.dim() == 1 and row.dim() == 1,
        lambda: (
            f"obc::end_row: scores and row are flat vectors, got shapes {tuple(scores.shape)} and {tuple(row.shape)}"
        ),
    )
    require(
        TypeError,
        scores.dtype in (torch.float32, torch.float64),
        lambda: f"obc::end_row: scores must be float32 or float64, got {scores.dtype}",
    )
    check_same_kind("end_row", "scores", scores, "row", row)
    _check_not_expanded("scores", scores)
    _check_not_expanded("row", row)
    require(ValueError, loss_scale != 0, lambda: "obc::end_row: loss_scale must not be 0")
    require(
        RuntimeError,
        not (scores.requires_grad or row.requires_grad),
        lambda: "obc::end_row is not differentiable: it changes scores and row in place; detach them first",
    )
    if groups is None:
        require(
            ValueError,
            scores.shape == row.shape,
            lambda: (
                f"obc::end_row: scores has {scores.shape[0]} entries, row {row.shape[0]}; pass groups or equal lengths"
            ),
        )
        return scores, row, loss_scale, groups
    require(TypeError, groups.dtype == torch.int64, lambda: f"obc::end_row: groups must be int64, got {groups.dtype}")
    require(
        ValueError,
        groups.shape == row.shape,
        lambda: f"obc::end_row: groups has shape {tuple(groups.shape)}, row {tuple(row.shape)}",
    )
    require(
        ValueError,
        groups.device == row.device,
        lambda: f"obc::end_row: groups is on {groups.device}, row on {row.device}",
    )
    return scores, row, loss_scale, groups


def _empty(scores: Tensor, *others: Any) -> Tensor:
    return scores.new_empty((), dtype=torch.bool)


def _end_row(*arguments: Any) -> Tensor:
    scores, row, loss_scale, groups = _check(*arguments)
    _check_apart(scores, row)
    finite: Tensor = run("end_row", row, scores, row, loss_scale, groups)
    # The mutation in a raw schema does not bump autograd's version counters.
    torch.autograd.graph.increment_version((scores, row))
    return finite


register("end_row", _check, _empty, None, _end_row)  # refuses inputs that require grad: it changes them in place


def end_row(scores: Tensor, row: Tensor, loss_scale: float | Tensor = 1.0, groups: Tensor | None = None) -> Tensor:
    """End a row: scores[groups[c]] += (row[c] / loss_scale)^2, then row = 0, both in place and in one pass.

    If a square is not finite, nothing is added; the row is zeroed in any case.

    Args:
        scores: flat float32 or float64 vector, one entry per group, or per channel without ``groups``.
        row: flat vector of the same dtype and device, one entry per channel; shares no entry with ``scores``.
        loss_scale: the factor that the loss was multiplied by (a gradient scaler's scale); a tensor of one entry is
            read, for which a GPU is waited for.
        groups: int64 vector, the group of each channel: ascending, from 0 and below the length of ``scores``. Others
            are a ValueError on a CPU. A GPU can't be asked without waiting for it: there its kernels add nothing and
            return False, as for a square that is not finite.

    Returns:
        A 0-d bool tensor on the device: whether every square was finite. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices don't fit, or scores and row share memory.
        RuntimeError: an input requires grad.
    """
    if isinstance(loss_scale, Tensor) and loss_scale.numel() == 1:
        loss_scale = loss_scale.item()
    finite: Tensor = call("end_row", scores, row, loss_scale, groups)
    return finite
