"""The location of an attention's heads in its projections, separate or fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.structures.transformers.layers import channels


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Attributes:
        queries: number of query heads.
        shared: number of key/value heads that they share.
        size: channels per head.
        gated: in the query projection, each head's query is followed by a gate with as many channels.
    """

    queries: int
    shared: int
    size: int
    gated: bool = False


@dataclass(frozen=True)
class HeadChannels:
    """The channels of every unit.

    Attributes:
        projections: (units, k) rows of each projection: of queries, keys and values, or of the fused one. If keys and
            values keep all theirs, only of queries.
        output: (units, k) columns of the output projection.
        counters: attributes of the module, besides those of heads, that count units.
    """

    projections: Sequence[Tensor]
    output: Tensor
    counters: Sequence[str] = ()


def head_channels(heads: Heads, kind: str, fused: bool) -> HeadChannels:
    """The channels of an attention's units, if queries come before keys and keys before values.

    Args:
        kind: "heads": a key/value head with the query heads that share it. "query_heads": the j-th query head of every
            key/value head.
        fused: queries, keys and values are the outputs of one layer.
    """
    queries, shared, size = heads.queries, heads.shared, heads.size
    ratio = queries // shared
    rows = size * (2 if heads.gated else 1)
    if kind == "query_heads":
        return HeadChannels([channels(ratio, rows, shared)], channels(ratio, size, shared))
    queried, keyed = channels(shared, ratio * size), channels(shared, size)
    if not fused:
        return HeadChannels([channels(shared, ratio * rows), keyed, keyed], queried)
    inner, width = queries * size, shared * size
    return HeadChannels([torch.cat([queried, keyed + inner, keyed + inner + width], dim=1)], queried)
