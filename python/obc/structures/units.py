"""Units of groups: which may be removed, and how channels are renumbered afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from obc.model.arguments import listed, meant
from obc.model.groups import ChannelGroup
from obc.model.kept import staying


class NotPrunableError(ValueError):
    """Why a group that was found can't be pruned; ``left_out`` keeps the reason."""


def checked_units(groups: Mapping[str, ChannelGroup], name: str, units: Tensor, least: int = 1) -> Tensor:
    """The units to remove from the group ``name``: ascending int64 indices on the CPU, each once.

    Args:
        units: indices of its units.
        least: the number of units that must stay.

    Raises:
        KeyError: no group has the name.
        IndexError: the group has no such unit.
        ValueError: too little would be left of the group.
    """
    if name not in groups:
        raise KeyError(f"no group is named {name!r}: there are {listed([*map(repr, groups)])}")
    units = torch.as_tensor(units, dtype=torch.int64, device="cpu").unique()
    size = groups[name].size
    if len(units) and not 0 <= int(units[0]) <= int(units[-1]) < size:
        raise IndexError(f"{name!r} has units 0 to {size - 1}, got {int(units[0])} to {int(units[-1])}")
    if len(units) and size - len(units) < least:
        raise ValueError(f"{len(units)} of the {size} units of {name!r} were to be removed; at least {least} must stay")
    return units


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


def without_units(group: ChannelGroup, removed: Tensor) -> ChannelGroup:
    """The group without the units ``removed``; the other units' channels keep their numbers."""
    slices = (replace(part, channels=without(part.channels, removed)) for part in group.slices)
    return replace(group, slices=tuple(slices))


def renumbered_group(group: ChannelGroup, lost: Sequence[Tensor | None]) -> ChannelGroup:
    """The group after channels of other groups were removed.

    Args:
        group: the group, with channels numbered as before.
        lost: for each slice, the channels that its side of the layer lost, ascending; None if none.
    """
    parts = zip(group.slices, lost, strict=True)
    slices = (replace(part, channels=renumbered(part.channels, removed)) for part, removed in parts)
    return replace(group, slices=tuple(slices))


def renumbered(channels: Tensor, removed: Tensor | None) -> Tensor:
    """The same channels, numbered without the ``removed`` ones (ascending, none of them among ``channels``)."""
    return channels if removed is None else channels - torch.searchsorted(removed, channels)
