"""Finds the prunable blocks of a transformers model, from the names and shapes of its layers and its config.

Nothing is traced, and the transformers library is not imported. Anything that looks like a block but is not understood
is named with the reason, and so are modules of repeated blocks that no kind of group covers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

import obc.structures.transformers.families  # noqa: F401 - the families register themselves
from obc.model.arguments import listed
from obc.model.names import outwards
from obc.structures.transformers.attention import attentions
from obc.structures.transformers.block import Block, layer_axes
from obc.structures.transformers.embedding import embedding, embedding_name
from obc.structures.transformers.family import FAMILIES, attributes, kinds
from obc.structures.transformers.feed_forward import feed_forwards, inverted_residuals
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError

DEFAULT_KINDS = tuple(name for name, kind in kinds().items() if kind.by_default)


class Finder:
    """Finds the blocks of one model.

    Args:
        model: the model.
        wanted: kinds of groups.
        proved: see :class:`~obc.structures.transformers.layers.Layers`.

    Attributes:
        layers: layers of the model.
        blocks: by group name, in the order of the model.
        left_out: module that looks like a block -> why it can't be pruned.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[str], proved: bool = False) -> None:
        self.layers = Layers(model, proved)
        self.blocks: dict[str, Block] = {}
        self.left_out: dict[str, str] = {}
        self._joined: set[str] = set()  # attentions whose heads were found with those of another
        for name, module in self.layers.modules.items():
            if type(module).__module__.startswith("torch.nn.") and not module._modules:
                continue  # one layer: blocks are made of several
            self.layers.enter(name)
            found = [
                self._add(name, family.blocks(self.layers, name, wanted))
                for family in FAMILIES.values()
                if family.blocks is not None
            ]
            if any(found):
                continue
            if self._add(name, inverted_residuals(self.layers, name, wanted)):
                continue
            if "ffn" in wanted:
                self._add(name, feed_forwards(self.layers, name))
            if {"heads", "query_heads"} & set(wanted) and name not in self._joined:
                self._add(name, attentions(self.layers, name, wanted))
        self.layers.enter("")
        if "embedding" in wanted:
            inner = Finder(model, DEFAULT_KINDS)
            self._add(embedding_name(self.layers), embedding(self.layers, inner.blocks, inner.left_out))
        self.blocks = dict(sorted(self.blocks.items(), key=lambda item: self._place(item[1])))
        self._join_tied()

    def _join_tied(self) -> None:
        """Join blocks that lie in the same parameters, because modules share them: their units are removed together."""
        first: dict[tuple[tuple[int, int], ...], str] = {}
        for name, block in list(self.blocks.items()):
            holder = first.setdefault(self._lies_in(block), name)
            if holder != name:
                whole = self.blocks[holder]
                group = replace(whole.group, slices=(*whole.group.slices, *block.group.slices))
                counters, axes = (*whole.counters, *block.counters), {**whole.axes, **block.axes}
                self.blocks[holder] = replace(whole, group=group, axes=axes, counters=counters)
                del self.blocks[name]

    def _lies_in(self, block: Block) -> tuple[tuple[int, int], ...]:
        places = []
        for part in block.group.slices:
            axes = block.axes.get((part.module, part.side))
            for axis in axes or layer_axes(part.module, self.layers.modules[part.module], part.side):
                places.append((id(getattr(self.layers.modules[axis.module], axis.tensor)), axis.dim))
        return tuple(places)

    def _add(self, name: str, found: Iterator[Block]) -> bool:
        """Whether a block was found, or refused with a reason."""
        before = len(self.blocks)
        try:
            for block in found:
                self.blocks[block.group.name] = replace(block, config_part=self.layers.config_part)
                if block.group.kind == "heads":
                    self._joined |= {part.module.rpartition(".")[0] for part in block.group.consumers}
        except NotPrunableError as reason:
            self.left_out[name] = str(reason)
            return True
        return len(self.blocks) > before

    def _place(self, block: Block) -> int:
        """The position in the model of a block's first layer or parameter."""
        order = {name: index for index, name in enumerate(self.layers.modules)}
        first = block.group.slices[0].module
        return order.get(first, order.get(first.rpartition(".")[0], 0))


_SHOWN = 6  # number of weights that a reason names


def uncovered(layers: Layers, blocks: Mapping[str, Block], left_out: Collection[str]) -> dict[str, str]:
    """Module of a repeated block with no weight in any group -> a reason that names its weights.

    A module is covered if a group has any layer or parameter inside it, or if it, or a module around or inside it, was
    left out with a reason already. So a projection that no group uses is not named if others of its module are used.
    """
    covered = _with_those_around(part.module for block in blocks.values() for part in block.group.slices)
    covered |= _with_those_around(left_out)
    weights: dict[str, list[str]] = {}
    for name, module in layers.modules.items():
        matrices = [
            key for key, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 1
        ]
        if not matrices or isinstance(module, nn.Embedding):
            continue
        is_layer = matrices == ["weight"]
        holder = name.rpartition(".")[0] if is_layer else name
        repeated = any(part.isdigit() for part in holder.split("."))
        if repeated and holder not in covered and not _with_those_around([holder]) & {*left_out}:
            weights.setdefault(holder, []).extend([name.rpartition(".")[2]] if is_layer else matrices)
    parents = {name.rpartition(".")[0] for name in left_out}  # the output projection of an attention that is left out
    return {
        holder: _reason(layers.modules[holder], names)
        for holder, names in weights.items()
        if len(names) > 1 or holder.rpartition(".")[0] not in parents
    }


def _with_those_around(names: Iterable[str]) -> set[str]:
    return {one for name in names for one in outwards(name) if one}


def _reason(module: nn.Module, names: list[str]) -> str:
    if any(getattr(module, key, None) == 1 for key in attributes("heads")):
        return f"{type(module).__name__} has a single head"
    return f"{type(module).__name__} has no units of a kind that is known (its weights: {listed(names, _SHOWN)})"
