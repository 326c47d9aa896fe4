"""Units of groups: which channels form one, which units may be removed, how channels are renumbered afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from obc.model.arguments import instance, listed, meant
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.kept import staying


class NotPrunableError(ValueError):
    """Why a group that was found can't be pruned; ``left_out`` keeps the reason."""


def checked_units(
    groups: Iterable[ChannelGroup], units: Mapping[str, Tensor], least: Mapping[str, int]
) -> dict[str, Tensor]:
    """The units to remove from each named group: ascending int64 indices on the CPU, each once; no group without any.

    Args:
        units: group -> indices of its units.
        least: group -> the number of units that must stay, 1 by default.

    Raises:
        TypeError: ``units`` is no mapping.
        KeyError: no group has the name.
        IndexError: the group has no such unit.
        ValueError: too little would be left of the group.
    """
    instance("units", units, Mapping, "a mapping of groups' names to indices")
    sizes, chosen = {group.name: group.size for group in groups}, dict[str, Tensor]()
    for name, indices in units.items():
        if name not in sizes:
            raise KeyError(f"no group is named {name!r}: there are {listed([*map(repr, sizes)])}")
        gone = torch.as_tensor(indices, dtype=torch.int64, device="cpu").unique()
        size, stays = sizes[name], least.get(name, 1)
        if not len(gone):
            continue
        if not 0 <= int(gone[0]) <= int(gone[-1]) < size:
            raise IndexError(f"{name!r} has units 0 to {size - 1}, got {int(gone[0])} to {int(gone[-1])}")
        if size - len(gone) < stays:
            raise ValueError(
                f"{len(gone)} of the {size} units of {name!r} were to be removed; at least {stays} must stay"
            )
        chosen[name] = gone
    return chosen


def layer_name(modules: Mapping[str, nn.Module], layer: nn.Module | str, argument: str) -> str:
    """The name of a layer that the caller passed as an object or by name.

    Args:
        layer: one of them, or its name.
        argument: name of the caller's argument, for the message.

    Raises:
        ValueError: the model has no such layer.
    """
    if isinstance(layer, str):
        if layer not in modules:
            last = layer.rpartition(".")[2]
            names = [name for name in modules if name.rpartition(".")[2] == last] or list(modules)[1:]
            raise ValueError(
                f"{argument}: no layer is named {layer!r}; there are {', '.join(map(repr, names[:3]))} ..."
                f"{meant(layer, modules)}"
            )
        return layer
    found = next((name for name, module in modules.items() if module is layer), None)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"{argument}: got {layer!r}; pass layers of the model, or their names")
    if found is None:
        raise ValueError(f"{argument}: the model has no such {type(layer).__name__}; pass its own layers")
    return found


def without(tensor: Tensor, removed: Tensor, dim: int = 0) -> Tensor:
    """``tensor`` without the positions ``removed`` of ``dim``."""
    return tensor.index_select(dim, staying(tensor.shape[dim], removed).to(tensor.device))


def group_left(group: ChannelGroup, units: Tensor | None, lost: Mapping[tuple[str, Side], Tensor]) -> ChannelGroup:
    """The group after some of its units, and channels of other groups, were removed.

    Args:
        group: the group, with channels numbered as before.
        units: its removed units; None if it keeps all.
        lost: (module, side) -> the channels that it lost, ascending.
    """

    def left(part: Slice) -> Slice:
        gone = lost.get((part.module, part.side))
        channels = part.channels if units is None else without(part.channels, units)
        channels = channels if gone is None else channels - torch.searchsorted(gone, channels.contiguous())
        return replace(part, channels=channels)

    return replace(group, slices=tuple(map(left, group.slices)), read_at=tuple(map(left, group.read_at)))


# --- joining channels ------------------------------------------------------------------------------------------------


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
