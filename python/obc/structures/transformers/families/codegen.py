"""CodeGen and GPT-J; CodeGen's fused projection holds queries, values and keys in ``mp_num`` blocks."""

from torch import nn

from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads
from obc.structures.transformers.layers import channels
from obc.structures.units import NotPrunableError


def _in_blocks(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    """[queries | values | keys] of every block. If a block is one head, it is a unit; else one head of each block."""
    blocks = getattr(module, "mp_num", None)
    if not isinstance(blocks, int):
        return None
    count, size = heads.queries, heads.size
    if blocks == count:
        return HeadChannels([channels(count, 3 * size)], channels(count, size), ("mp_num",))
    if count % blocks:
        raise NotPrunableError(f"its {count} heads are stored in {blocks} blocks")
    inside = count // blocks
    return HeadChannels([channels(inside, size, 3 * blocks)], channels(inside, size, blocks))


register(Family("codegen", feed_forwards=(("fc_in", "fc_out"),), fused_projections={"qkv_proj": _in_blocks}))
