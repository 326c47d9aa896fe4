"""Joins channels that go together into units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.model.groups import Side, Slice
from obc.structures.units import NotPrunableError

# (module, side) -> channel of that side -> root channel of the group that it belongs to.
Members = dict[tuple[str, Side], dict[int, int]]


class InnerMatterError(NotPrunableError):
    """Why a group can't be pruned in any order of its channels: its width is visible outside, or has no plan."""


class Units:
    """Disjoint sets of channels: a unit is what must be removed together (union-find)."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def find(self, channel: int) -> int:
        """The representative of the channel's unit."""
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel

    def join(self, one: int, other: int) -> None:
        """Make the units of two root channels one.

        Raises:
            NotPrunableError: there is no such channel.
        """
        size = len(self._parents)
        if max(one, other) >= size:
            raise NotPrunableError(f"Torch-Pruning couples a channel {max(one, other)} to its {size}")
        first, second = sorted((self.find(one), self.find(other)))
        self._parents[second] = first

    def join_blocks(self, count: int) -> None:
        """Make each of ``count`` equal blocks of consecutive channels one unit."""
        width = len(self._parents) // count
        for channel in range(len(self._parents)):
            self.join(channel, channel - channel % width)

    def table(self) -> Tensor:
        """(units, k) the channels of each unit, ordered by the first."""
        members: dict[int, list[int]] = {}
        for channel in range(len(self._parents)):
            members.setdefault(self.find(channel), []).append(channel)
        sizes = {len(channels) for channels in members.values()}
        if len(sizes) != 1:
            raise NotPrunableError(f"its units are of different sizes: {sorted(sizes)} channels")
        return torch.tensor(list(members.values()), dtype=torch.int64, device="cpu")


def divided(units: Tensor, divisions: Sequence[Tensor]) -> Tensor:
    """Join units so that parts of equal width, such as a convolution's groups, stay equally wide.

    Units that lie in the same parts of every division form a cell. A joined unit takes one unit from each cell, or as
    many as the cell's share of the whole. If cells have different sizes, some units are in no joined unit and always
    stay.

    Args:
        units: (units, k) root channels.
        divisions: for each division (root channels, parts): how many channels each root channel has in each part.

    Returns:
        (joined units, channels per unit).

    Raises:
        NotPrunableError: neither choice keeps all parts equally wide.
    """
    if not divisions:
        return units
    counts = [division[units].sum(1) for division in divisions]
    _, cell_of = torch.cat(counts, 1).unique(dim=0, return_inverse=True)
    cells = [(cell_of == cell).nonzero()[:, 0] for cell in range(int(cell_of.max()) + 1)]
    cells.sort(key=lambda cell: int(cell[0]))
    share = math.gcd(*(len(cell) for cell in cells))
    for taken in ([1] * len(cells), [len(cell) // share for cell in cells]):
        lost = [
            torch.stack([n * count[cell[0]] for n, cell in zip(taken, cells, strict=True)]).sum(0) for count in counts
        ]
        if all(bool((parts == parts[0]).all()) for parts in lost):
            number = min(len(cell) // n for n, cell in zip(taken, cells, strict=True))
            joined = [cell[: number * n].view(number, n) for n, cell in zip(taken, cells, strict=True)]
            return units[torch.cat(joined, 1)].flatten(1)
    raise NotPrunableError(f"no choice of its channels keeps the {counts[0].shape[1]} groups of a layer equally wide")


def parts_of(roots: Mapping[int, int], size: int, width: int, parts: int) -> Tensor:
    """(size, parts) how many channels of a layer each root channel has in each of its parts of ``width`` channels."""
    counts = torch.zeros(size, parts, dtype=torch.int64, device="cpu")
    for channel, root in roots.items():
        counts[root, channel // width] += 1
    return counts


def slice_of(module: str, side: Side, roots: Mapping[int, int], units: Tensor) -> Slice:
    """The channels of one layer that go with each unit, in the order of the layer."""
    unit_of = {int(root): unit for unit, members in enumerate(units.tolist()) for root in members}
    per_unit: list[list[int]] = [[] for _ in range(len(units))]
    for channel in sorted(roots):
        if (unit := unit_of.get(roots[channel])) is not None:
            per_unit[unit].append(channel)
    sizes = {len(channels) for channels in per_unit}
    if len(sizes) != 1 or 0 in sizes:
        raise NotPrunableError(f"its units take different numbers of channels of {module!r}: {sorted(sizes)}")
    return Slice(module, side, torch.tensor(per_unit, dtype=torch.int64, device="cpu"))
