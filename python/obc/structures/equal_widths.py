"""Streams whose width the attentions that read and write them take for the width of all their heads.

An attention that splits its channels by ``C // heads``, where ``C`` is the width of what it reads, runs only while its
heads together are as wide as its stream. So channels of the stream go with as many channels of its attentions:

- one channel of every head, numbered alike in all heads, with the stream's channels of the same numbers. Products of
  queries and keys lose a channel; the number of heads stays.
- or whole heads, with the stream's channels of the same numbers. The attentions count their heads.

Layers inside an attention that keep the width (a convolution that shortens keys and values) go with the stream too. The
first choice whose removal is proved is a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obc.model.groups import ChannelGroup, Slice
from obc.structures.traced_groups import Found, GroupFinder
from obc.structures.transformers.block import Block
from obc.structures.units import Members, NotPrunableError


class StreamWidths:
    """What attentions that failed alone may lose together with a stream.

    Args:
        finder: assembles groups.
        heads: the blocks of their heads.
        failed: the traced groups that failed.
    """

    def __init__(self, finder: GroupFinder, heads: Sequence[Block], failed: Sequence[Found]) -> None:
        self._finder, self._failed = finder, failed
        self._heads = [block for block in heads if block.group.kind == "heads"]

    def proposals(self, name: str, stream: Members, width: int, others: Sequence[Block] = ()) -> Iterator[Block]:
        """Channels of the same numbers in all heads, then whole heads, with the channels of a stream.

        Args:
            name: of the group.
            stream: everything that loses channels with the stream's ``width`` channels.
            others: what may be further attentions, and what counts their heads is not known.
        """
        known = {part.module for block in self._heads for part in block.group.slices}
        others = [one for one in others if known.isdisjoint(part.module for part in one.group.slices)]
        attentions = [block for block in [*self._heads, *others] if _is_on(block, stream, width)]
        counts = [block.group.size for block in attentions]
        parts, shared = math.lcm(*counts), math.gcd(*counts)
        if not attentions or width % parts:
            return
        members, numbers = stream | self._inside(attentions, stream, width), torch.arange(width, device="cpu")
        own = [part for block in attentions for part in block.group.slices]
        inner = [_of_every_head(part, width, parts) for part in own]
        if width > parts and None not in inner:
            slices = [part for part in inner if part is not None and part.channels.numel()]
            if (group := self._assembled(name, members, numbers.view(parts, -1).T)) is not None:
                multiplied = tuple(part.module for part in slices if part.side == "out")
                yield Block(replace(group, slices=(*group.slices, *slices), multiplied=multiplied))
        if shared > 1 and (group := self._assembled(name, members, numbers.view(shared, -1))) is not None:
            slices = [replace(part, channels=part.channels.reshape(shared, -1)) for part in own]
            counters = tuple(
                replace(counter, per_unit=counter.per_unit * block.group.size // shared)
                for block in attentions
                for counter in block.counters
            )
            yield Block(replace(group, slices=(*group.slices, *slices), kind="heads"), counters=counters)

    def _inside(self, attentions: Sequence[Block], stream: Members, width: int) -> Members:
        """What failed groups of the same width take that lie between the stream and its attentions."""
        taken = {(part.module, part.side) for block in attentions for part in block.group.slices} | stream.keys()
        found: Members = {}
        for one in self._failed:
            written = [name for name, side in one.members if side == "out"]
            if taken.isdisjoint(one.members) and one.width == width and any((name, "in") in stream for name in written):
                found |= one.members
        return found

    def _assembled(self, name: str, members: Members, units: Tensor) -> ChannelGroup | None:
        """The group with these units, or None if a layer joins or refuses them."""
        try:
            group = self._finder.assemble(name, members, units, units.numel())
        except NotPrunableError:
            return None
        return group if group.size == len(units) else None


def _is_on(attention: Block, stream: Members, width: int) -> bool:
    """Whether an attention reads and writes the stream, has none of its channels, and its heads are as wide."""
    group = attention.group
    writes = any(part.channels.numel() == width and (part.module, "out") in stream for part in group.consumers)
    apart = all((part.module, part.side) not in stream for part in group.slices)
    return apart and writes and (group.slices[0].module, "in") in stream


def _of_every_head(part: Slice, width: int, parts: int) -> Slice | None:
    """The slice with one channel of each of ``parts`` heads as a unit, or without channels if it has one per head.

    None if its heads are not runs of as many channels as the stream has for each.
    """
    heads, taken = part.channels.shape
    each = width // heads
    if taken == 1:
        return replace(part, channels=part.channels[:0])
    if taken % each:
        return None
    runs = part.channels.view(heads, taken // each, parts // heads, width // parts)
    return replace(part, channels=runs.permute(3, 0, 1, 2).flatten(1))
