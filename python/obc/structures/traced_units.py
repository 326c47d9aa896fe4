"""Root channels of a group of Torch-Pruning, joined into units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from obc.model.groups import Side, Slice
from obc.structures.units import NotPrunableError


class Units:
    """Root channels joined into units."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def _find(self, channel: int) -> int:
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel

    def join(self, one: int, other: int) -> None:
        size = len(self._parents)
        if max(one, other) >= size:
            raise NotPrunableError(f"Torch-Pruning couples a channel {max(one, other)} to its {size}")
        first, second = sorted((self._find(one), self._find(other)))
        self._parents[second] = first

    def join_blocks(self, count: int) -> None:
        """Make each of ``count`` equal blocks of consecutive channels one unit."""
        width = len(self._parents) // count
        for channel in range(len(self._parents)):
            self.join(channel, channel - channel % width)

    def table(self) -> Tensor:
        """(units, k) the channels of each, ordered by the first."""
        members: dict[int, list[int]] = {}
        for channel in range(len(self._parents)):
            members.setdefault(self._find(channel), []).append(channel)
        sizes = {len(channels) for channels in members.values()}
        if len(sizes) != 1:
            raise NotPrunableError(f"its units are of different sizes: {sorted(sizes)} channels")
        return torch.tensor(list(members.values()), dtype=torch.int64)


def slice_of(module: str, side: Side, roots: Mapping[int, int], units: Tensor) -> Slice:
    """The channels of one layer that go with each unit, in the order of the layer."""
    unit_of = {int(root): unit for unit, members in enumerate(units.tolist()) for root in members}
    per_unit: list[list[int]] = [[] for _ in range(len(units))]
    for channel in sorted(roots):
        per_unit[unit_of[roots[channel]]].append(channel)
    sizes = {len(channels) for channels in per_unit}
    if len(sizes) != 1 or 0 in sizes:
        raise NotPrunableError(f"its units take different numbers of channels of {module!r}: {sorted(sizes)}")
    return Slice(module, side, torch.tensor(per_unit, dtype=torch.int64))
