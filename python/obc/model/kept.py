"""The entry of a pruning plan for one layer, and how a further step narrows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from obc.model.errors import PruningError
from obc.model.layouts import expand


class PlanError(PruningError):
    """A plan does not describe how the pruned model came from the original; the message names layer and shapes."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The channels that one layer, or one parameter outside any layer, kept.

    Attributes:
        out_channels: int64 indices of the kept out channels, ascending; None if all are kept. Norms, embeddings (their
            features) and parameters outside layers use this side.
        in_channels: the same for the in channels.
        in_repeat: for a Linear after flatten, the number of consecutive columns of each in channel.
        out_blocks: the number of diagonal blocks of an output compressor (attention heads).
        dim: for a parameter outside any layer, the dimension that ``out_channels`` indexes.
        in_dim: the same for ``in_channels``, if such a parameter was pruned in two dimensions (fused experts).
        out_size: the number of out channels before pruning; None if it is not known, and is not checked then.
        in_size: the same for the in channels; of a Linear after flatten, the number of columns.

    Raises:
        PlanError: ``out_channels`` or ``in_channels`` are not int64 indices (kept,), each once, or a size is none of
            a layer with these channels.
    """

    out_channels: Tensor | None = None
    in_channels: Tensor | None = None
    in_repeat: int = 1
    out_blocks: int = 1
    dim: int | None = None
    in_dim: int | None = None
    out_size: int | None = None
    in_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("out_channels", "in_channels"):
            if (indices := getattr(self, name)) is not None:
                _check(name, indices)
        _check_size("out_size", self.out_size, self.out_channels)
        _check_size("in_size", self.in_size, self.in_channels, self.in_repeat)

    @property
    def in_columns(self) -> Tensor | None:
        """The kept columns: ``in_channels`` expanded by ``in_repeat``."""
        return None if self.in_channels is None else expand(self.in_channels, self.in_repeat)

    def on(self, side: Literal["out", "in"]) -> Tensor | None:
        """The kept rows or columns of the weight, by ``side``, as a group's slices number them; None if all are."""
        return self.out_channels if side == "out" else self.in_columns

    def after(self, earlier: Kept | None) -> Kept:
        """This entry, of a layer that ``earlier`` had pruned before, in terms of the unpruned layer.

        Raises:
            PlanError: ``earlier`` left another number of channels than this entry is made for.
        """
        if earlier is None:
            return self
        out_size = _size_before("out", earlier.out_channels, earlier.out_size, self.out_channels, self.out_size)
        in_size = _size_before("in", earlier.in_columns, earlier.in_size, self.in_columns, self.in_size)
        both = replace(
            self,
            out_channels=_picked(earlier.out_channels, self.out_channels),
            out_size=out_size,
            in_size=in_size,
            dim=earlier.dim if self.dim is None else self.dim,
            in_dim=earlier.in_dim if self.in_dim is None else self.in_dim,
        )
        if earlier.in_channels is None:
            return both
        columns = _picked(earlier.in_columns, self.in_columns)
        assert columns is not None
        return with_columns(both, columns, earlier.in_repeat)


def _check(name: str, indices: Any) -> None:
    expected = f"{name} must be a tensor of the kept channels' int64 indices, (kept,), each once"
    if not isinstance(indices, Tensor):
        raise PlanError(f"{expected}, got {type(indices).__name__}")
    if indices.dtype != torch.int64 or indices.dim() != 1:
        mask = "; of a mask pass mask.nonzero()[:, 0]" if indices.dtype == torch.bool else ""
        raise PlanError(f"{expected}, got {indices.dtype} {tuple(indices.shape)}{mask}")
    ordered = indices.sort().values  # a fold orders channels in another way than a plan does
    if len(twice := ordered[1:][ordered.diff() == 0]):
        raise PlanError(f"{expected}, got {int(twice[0])} twice")


def _check_size(name: str, size: Any, indices: Tensor | None, repeat: int = 1) -> None:
    least = 1 if indices is None or not len(indices) else (int(indices.max()) + 1) * repeat
    if size is not None and (type(size) is not int or size < least):
        raise PlanError(f"{name} must be the number of channels before pruning, at least {least} here, got {size!r}")


def _size_before(
    side: str, before: Tensor | None, whole: int | None, kept: Tensor | None, size: int | None
) -> int | None:
    """The channels before both steps: before a first step that kept ``before`` of ``whole``, and the next of ``size``.

    Raises:
        PlanError: the next step can't have had so many.
    """
    left = whole if before is None else len(before)
    least = 0 if kept is None or not len(kept) else int(kept.max()) + 1
    if left is not None and (left < least or (size is not None and size != left)):
        made = f"at least {least}" if size is None else size
        raise PlanError(
            f"this plan was made for {made} {side} channels, but the earlier plan leaves {left}; pass the plan of the "
            "step before it"
        )
    return (size if whole is None else whole) if before is None else whole


def _picked(before: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """``before`` at these positions; None stands for all."""
    if before is None or positions is None:
        return positions if before is None else before
    return before[positions]


def kept_of(plan: Mapping[str, Kept], module_name: str, key: str) -> Kept | None:
    """The plan's entry for the tensor ``key`` of a module; None if it is unpruned."""
    # torch's attention shares one entry with its output projection.
    return plan.get(key) or plan.get(module_name) or plan.get(module_name.removesuffix(".out_proj"))


def staying(size: int, removed: Tensor) -> Tensor:
    """The indices below ``size`` that are not in ``removed``, ascending."""
    stays = torch.ones(size, dtype=torch.bool, device="cpu")
    stays[removed] = False
    return stays.nonzero()[:, 0]


def with_columns(kept: Kept, columns: Tensor, repeat: int) -> Kept:
    """``kept`` with in_channels from kept columns: blocks of ``repeat`` if they are complete, else single columns."""
    channels = columns[::repeat] // repeat
    if repeat > 1 and len(columns) % repeat == 0 and torch.equal(expand(channels, repeat), columns):
        return replace(kept, in_channels=channels, in_repeat=repeat)
    return replace(kept, in_channels=columns, in_repeat=1)
