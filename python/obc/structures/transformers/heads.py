"""Where an attention's heads lie in its projections: beside each other, or fused into one, in the orders in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.structures.transformers.layers import NotPrunableError, channels


@dataclass(frozen=True)
class Heads:
    """Query heads, heads of keys and values that they share, channels of a head."""

    queries: int
    shared: int
    size: int


@dataclass(frozen=True)
class HeadChannels:
    """The channels of every unit.

    Attributes:
        projections: (units, k) rows of each projection: of queries, keys, values, or of the fused one. Where keys and
            values keep all theirs, of queries alone.
        output: (units, k) columns of the output projection.
        counters: attributes of the module, besides those of heads, that count units.
    """

    projections: Sequence[Tensor]
    output: Tensor
    counters: Sequence[str] = ()


def head_channels(module: nn.Module, heads: Heads, kind: str, fused: bool) -> HeadChannels:
    """The channels of the units of an attention.

    Args:
        module: the attention.
        heads: its heads.
        kind: "heads": a head of keys and values with the query heads that share it. "query_heads": the j-th query head
            of every head of keys and values.
        fused: queries, keys and values are the outputs of one layer.
    """
    queries, shared, size = heads.queries, heads.shared, heads.size
    ratio = queries // shared
    if fused and shared == queries and (found := _fused_by_head(module, heads)) is not None:
        return found
    if kind == "query_heads":
        queried = channels(ratio, size, shared)
        return HeadChannels([queried], queried)
    queried, keyed = channels(shared, ratio * size), channels(shared, size)
    if not fused:
        return HeadChannels([queried, keyed, keyed], queried)
    inner, width = queries * size, shared * size
    return HeadChannels([torch.cat([queried, keyed + inner, keyed + inner + width], dim=1)], queried)


def _fused_by_head(module: nn.Module, heads: Heads) -> HeadChannels | None:
    """Fused projections that are not [all queries | all keys | all values].

    GPT-BigCode without multi-query attention has [query | key | value] of every head. CodeGen has ``mp_num`` blocks of
    [queries | values | keys]: where a block is one head, blocks go; else a unit is one head of every block.
    """
    count, size = heads.queries, heads.size
    if getattr(module, "multi_query", None) is False:
        return HeadChannels([channels(count, 3 * size)], channels(count, size))
    blocks = getattr(module, "mp_num", None)
    if not isinstance(blocks, int):
        return None
    if blocks == count:
        return HeadChannels([channels(count, 3 * size)], channels(count, size), ("mp_num",))
    if count % blocks:
        raise NotPrunableError(f"its {count} heads lie in {blocks} blocks")
    inside = count // blocks
    return HeadChannels([channels(inside, size, 3 * blocks)], channels(inside, size, blocks))
