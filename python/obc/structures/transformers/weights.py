"""The weights of a model's blocks: where the slices of a group lie, and their removal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from obc.model.cutting import cut
from obc.model.depth import put_stand_in
from obc.model.groups import Slice
from obc.model.kept import Kept
from obc.structures.masking import lost_channels
from obc.structures.transformers.block import Axis, Block, count_down, cut_along, layer_axes
from obc.structures.transformers.depth import DepthUnit
from obc.structures.units import group_left


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
                    axes.setdefault((axis.name, axis.dim), []).append((index, part))
        return axes

    def remove(self, chosen: Mapping[str, Tensor]) -> None:
        """Remove these units of each named group, and renumber the channels that are left.

        Raises:
            PlanError: a tensor can't be cut; nothing was removed.
        """
        lost = lost_channels([block.group for block in self.blocks.values()], chosen)
        step: dict[str, Kept] = {}
        for block in self.blocks.values():
            for part in block.group.slices:
                if (gone := lost.get((part.module, part.side))) is None:
                    continue
                for axis in self.axes(block, part):
                    step[axis.key] = cut_along(axis, self.tensor(axis).shape[axis.dim], gone, step.get(axis.key))
        cut(self.modules[""], step)
        self.kept |= {key: one.after(self.kept.get(key)) for key, one in step.items()}
        for name, block in self.blocks.items():
            self.blocks[name] = replace(block, group=group_left(block.group, chosen.get(name), lost))
        for name, units in chosen.items():
            count_down(self.modules, self.blocks[name], len(units))

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
