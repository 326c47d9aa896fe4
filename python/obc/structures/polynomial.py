"""The cost of a model as a polynomial in its groups' widths, summed weight by weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from obc.model.costs import Costs
from obc.model.groups import ChannelGroup


class Size(NamedTuple):
    """The size of one dimension of a weight: ``fixed + per_unit . widths``.

    Attributes:
        fixed: the part that no group changes.
        per_unit: (groups,) what one unit of each group contributes; None if no group lies there.
    """

    fixed: float
    per_unit: Tensor | None = None


class Polynomial:
    """A sum of products of sizes, at most two of which depend on the widths."""

    def __init__(self, groups: Sequence[ChannelGroup], unit: str) -> None:
        self._unit, self._names = unit, [group.name for group in groups]
        self._widths = torch.tensor([float(group.size) for group in groups], dtype=torch.float64, device="cpu")
        self._per_unit: dict[tuple[str, int], Tensor] = {}
        self.constant = 0.0
        self.linear = torch.zeros_like(self._widths)
        self.quadratic = torch.zeros(len(groups), len(groups), dtype=torch.float64, device="cpu")

    def place(self, axis: tuple[str, int], group: int, entries: float) -> None:
        """Declare that each unit of the ``group``-th group has so many entries in an axis: a tensor's dimension."""
        per_unit = self._per_unit.setdefault(axis, torch.zeros_like(self._widths))
        per_unit[group] += entries

    def add_tensor(
        self, factor: float, name: str, tensor: Tensor, skipped: Collection[int] = (), goes_with: int | None = None
    ) -> None:
        """Add ``factor`` times the product of a tensor's sizes, but for those of the ``skipped`` dimensions."""
        sizes = [self._size((name, dim), size) for dim, size in enumerate(tensor.shape) if dim not in skipped]
        self.add(factor, *sizes, goes_with=goes_with)

    def _size(self, axis: tuple[str, int], now: int) -> Size:
        per_unit = self._per_unit.get(axis)
        return Size(float(now)) if per_unit is None else Size(now - float(per_unit @ self._widths), per_unit)

    def present(self, size: Size) -> float:
        """The present length of a dimension."""
        return size.fixed if size.per_unit is None else size.fixed + float(size.per_unit @ self._widths)

    def add(self, factor: float, *sizes: Size, goes_with: int | None = None) -> None:
        """Add ``factor`` times the product of the sizes; ``goes_with``: the group that takes the constant part."""
        varying = [(size.fixed, size.per_unit) for size in sizes if size.per_unit is not None]
        factor *= math.prod(size.fixed for size in sizes if size.per_unit is None)
        constant = factor * math.prod(fixed for fixed, _ in varying)
        if goes_with is None:
            self.constant += constant
        else:
            self.linear[goes_with] += constant
        if len(varying) == 1:
            self.linear += factor * varying[0][1]
        elif varying:
            (fixed, per_unit), (other_fixed, other_per_unit) = varying
            self.linear += factor * (fixed * other_per_unit + other_fixed * per_unit)
            self.quadratic += factor * torch.outer(per_unit, other_per_unit)

    def add_per_unit(self, factors: Sequence[float]) -> None:
        """Add a constant for each unit of every group."""
        self.linear += torch.tensor(factors, dtype=torch.float64, device="cpu")

    def costs(self, inside: Mapping[str, Sequence[str]] | None = None) -> Costs:
        """The sum of everything added; ``inside`` is that of :class:`obc.model.costs.Costs`."""
        return Costs(
            self._names,
            self._widths,
            constant=self.constant,
            linear=self.linear,
            quadratic=self.quadratic,
            unit=self._unit,
            inside=inside,
        )
