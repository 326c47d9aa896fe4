"""The weights of a model's blocks: where the slices of a group lie, and their removal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from obc.model.cutting import sync_sizes
from obc.model.depth import put_stand_in
from obc.model.groups import Slice
from obc.model.kept import Kept
from obc.model.shared_copy import Uses, parameter_uses, replace_parameter
from obc.structures.transformers.block import Axis, Block, axis_key, count_down, layer_axes, narrow
from obc.structures.transformers.depth import DepthUnit
from obc.structures.units import renumbered_group, without, without_units


class BlockWeights:
    """The blocks of a model, and the tensors that hold their channels.

    Attributes:
        modules: the present model's modules by name.
        blocks: group -> its block, with the present model's channels.
        kept: layer -> the channels that it kept, in terms of the unpruned model.
    """

    def __init__(self, modules: dict[str, nn.Module], blocks: dict[str, Block], kept: Mapping[str, Kept]) -> None:
        self.modules, self.blocks, self.kept = modules, blocks, dict(kept)

    def on(self, model: nn.Module) -> BlockWeights:
        """The same blocks on a copy of the model."""
        modules = {name: model.get_submodule(name) for name in self.modules}
        return BlockWeights(modules, dict(self.blocks), {})

    def axes(self, block: Block, part: Slice) -> tuple[Axis, ...]:
        """The location of a block's slice in the present model."""
        found = block.axes.get((part.module, part.side))
        return layer_axes(part.module, self.modules[part.module], part.side) if found is None else found

    def tensor(self, axis: Axis) -> Tensor:
        """The tensor of an axis."""
        tensor: Tensor = getattr(self.modules[axis.module], axis.tensor)
        return tensor

    def slices_by_axis(self) -> dict[tuple[str, int], list[tuple[int, Slice]]]:
        """(parameter, dimension) -> the slices that lie there, each with its block's index."""
        axes: dict[tuple[str, int], list[tuple[int, Slice]]] = {}
        for index, block in enumerate(self.blocks.values()):
            for part in block.group.slices:
                for axis in self.axes(block, part):
                    axes.setdefault(axis_key(axis), []).append((index, part))
        return axes

    def remove(self, chosen: Mapping[str, Tensor]) -> None:
        """Remove these units of each named group, and renumber the channels of groups that share its dimensions."""
        names = list(self.blocks)
        sharing = {key: [names[index] for index, _ in found] for key, found in self.slices_by_axis().items()}
        uses = parameter_uses(self.modules.values())
        for name, units in chosen.items():
            lost = self._cut(self.blocks[name], units, uses)
            self.blocks[name] = replace(self.blocks[name], group=without_units(self.blocks[name].group, units))
            for other in dict.fromkeys(other for key in lost for other in sharing[key]):
                coupled = self.blocks[other]
                removed_from = [lost.get(axis_key(self.axes(coupled, part)[0])) for part in coupled.group.slices]
                self.blocks[other] = replace(coupled, group=renumbered_group(coupled.group, removed_from))

    def _cut(self, block: Block, units: Tensor, uses: Uses) -> dict[tuple[str, int], Tensor]:
        """Shorten all tensors that lose channels with these units; returns axis -> the positions that it lost."""
        removals = [
            (self.axes(block, part), part.channels[units].flatten().sort().values) for part in block.group.slices
        ]
        for axes, removed in removals:
            for axis in {(axis.key, axis.slot): axis for axis in axes}.values():
                self.kept[axis.key] = narrow(self.kept, axis, self.tensor(axis).shape[axis.dim], removed)
        shortened: dict[tuple[int, int], Tensor] = {}  # keeps the tensors too, so that their ids stay unique
        for axes, removed in removals:
            for axis in axes:
                self._shorten(axis, removed, shortened, uses)
        for layer in dict.fromkeys(axis.module for axes, _ in removals for axis in axes):
            sync_sizes(self.modules[layer])
        count_down(self.modules, block, len(units))
        return {axis_key(axis): removed for axes, removed in removals for axis in axes}

    def _shorten(self, axis: Axis, removed: Tensor, shortened: dict[tuple[int, int], Tensor], uses: Uses) -> None:
        """Give the axis's module a shorter parameter; modules that share one get the same new one, shortened once."""
        old = self.tensor(axis)
        if (id(old), axis.dim) in shortened:
            return
        if not isinstance(old, nn.Parameter):  # running statistics, which no other module has
            self.modules[axis.module]._buffers[axis.tensor] = without(old, removed, axis.dim)
            return
        new = replace_parameter(uses, old, without(old.detach(), removed, axis.dim))
        shortened[id(new), axis.dim] = new

    def remove_module(self, model: nn.Module, unit: DepthUnit) -> None:
        """Replace a whole block or branch by stand-ins; the groups inside it go too."""
        for name, stand_in in unit.stand_ins.items():
            put_stand_in(model, name, stand_in)
        self.modules = {name: module for name, module in self.modules.items() if not unit.holds(name)}
        self.modules |= {name: model.get_submodule(name) for name in unit.stand_ins}
        self.kept = {name: kept for name, kept in self.kept.items() if not unit.holds(name)}
        inside = [name for name, block in self.blocks.items() if lies_in([unit], block)]
        for name in inside:
            del self.blocks[name]


def lies_in(units: Collection[DepthUnit], block: Block) -> bool:
    """Whether one of the units takes all of the block along."""
    return any(all(unit.holds(part.module) for part in block.group.slices) for unit in units)
