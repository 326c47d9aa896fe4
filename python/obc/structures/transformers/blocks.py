"""Finds the prunable blocks of a transformers model, from the names and shapes of its layers and its config.

Nothing is traced, and the transformers library is not imported. Anything that looks like a block but is not understood
is named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

import obc.structures.transformers.families  # noqa: F401 - the families register themselves
from obc.structures.transformers.attention import attentions
from obc.structures.transformers.axes import layer_axes
from obc.structures.transformers.block import Block
from obc.structures.transformers.embedding import embedding, embedding_name
from obc.structures.transformers.family import FAMILIES, kinds
from obc.structures.transformers.feed_forward import feed_forwards
from obc.structures.transformers.inverted_residuals import inverted_residuals
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError

DEFAULT_KINDS = tuple(name for name, kind in kinds().items() if kind.by_default)


class Finder:
    """Finds the blocks of one model.

    Attributes:
        layers: layers of the model.
        blocks: by group name, in the order of the model.
        left_out: module that looks like a block -> why it can't be pruned.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[str]) -> None:
        self.layers = Layers(model)
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
