"""Heads of attention, and other blocks that names and shapes tell, in models whose groups are traced.

Tracing follows single channels, and it does not know that modules count heads. So the blocks of
:mod:`obc.structures.transformers` are looked for in every model, where no traced group has their channels. Like all
groups they are kept only if the proof passes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from obc.model.evaluation import Run
from obc.model.groups import Side
from obc.model.names import is_within
from obc.structures.extensible import Extensible
from obc.structures.proof import Proof
from obc.structures.transformers.block import Block
from obc.structures.transformers.blocks import Finder

_KINDS = ("heads", "ffn")


def offer_blocks(
    structure: Extensible, run: Run, proof: Proof, kept: Collection[str], dims: dict[str, int]
) -> list[Block]:
    """Let the structure have the blocks that are proved, and return the others.

    Args:
        structure: receives groups and their blocks.
        run: see :func:`obc.structures.proof.prove`.
        proof: of the groups so far; the results for all groups together replace its own.
        kept: names of modules whose outputs are not for blocks.
        dims: parameter outside layers -> its dimension of channels; those of blocks are added.
    """
    taken = {(part.module, part.side) for group in structure.groups for part in group.slices}
    offered: dict[str, Block] = {}
    for name, found in Finder(structure.model, _KINDS, proved=True).blocks.items():
        block = _without_mixed(found, taken)
        if _is_free(block, taken, kept) and (own := _dims_of(block)) is not None:
            structure.blocks[name] = offered[name] = block
            dims.update(own)
            structure.offer(block.group)
    if not offered:
        return []
    proof.left_out |= proof.again(structure, run)
    return [block for name, block in offered.items() if name in structure.left_out]


def _without_mixed(block: Block, taken: Collection[tuple[str, Side]]) -> Block:
    """The block without the sides of layers from heads to heads that another group has.

    Between two such layers, before and after a softmax, lie mixed heads, which are channels of their own.
    """
    sides = [(part.module, part.side) for part in block.group.slices]
    mixing = {name for name, side in sides if side == "in" and (name, "out") in sides}
    slices = [p for p in block.group.slices if p.module not in mixing or (p.module, p.side) not in taken]
    return replace(block, group=replace(block.group, slices=tuple(slices)))


def _is_free(block: Block, taken: Collection[tuple[str, Side]], kept: Collection[str]) -> bool:
    """Whether no other group has the block's channels, and no module reads their number from a config of the model."""
    parts = block.group.slices
    produced = [part.module for part in parts if part.side == "out"]
    return (
        block.reads_config is None
        and not any((part.module, part.side) in taken for part in parts)
        and not any(is_within(name, module) for name in produced for module in kept)
    )


def _dims_of(block: Block) -> dict[str, int] | None:
    """Parameter outside layers -> its dimension of channels; None if a slice lies in several tensors."""
    dims = {}
    for (name, _), axes in block.axes.items():
        if len(axes) != 1 or axes[0].key != name or axes[0].side != "out":
            return None
        dims[name] = axes[0].dim
    return dims
