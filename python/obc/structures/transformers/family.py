"""Families of transformers models: names of their layers and of their counts. Each family registers itself.

A block is recognised by the names of its layers, and accepted only if all their shapes agree. So the names of all
families are tried on every model: a model built like a known one needs no entry, and an accidental match does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from obc.model.groups import Side
from obc.structures.transformers.block import Block, Kind
from obc.structures.transformers.heads import HeadChannels, Heads
from obc.structures.transformers.layers import Layers

# (attention, its heads, "heads" or "query_heads") -> the channels of every unit; None if the order is another.
HeadOrder = Callable[[nn.Module, Heads, str], "HeadChannels | None"]
# (layers, name of a module, kinds) -> the module's blocks of these kinds.
FindBlocks = Callable[[Layers, str, Collection[str]], Iterator[Block]]
# (layers, name of a module) -> sides of its layers that don't belong to the residual stream.
InnerSides = Callable[[Layers, str], "set[tuple[str, Side]]"]
# Whose heads: those of queries, or the key/value heads that queries share.
HeadsOf = Literal["queries", "keys"]
Role = Literal[
    "hidden_size",
    "inner_width",
    "expert_width",
    "shared_width",
    "heads",
    "key_value_heads",
    "attention_width",
    "key_value_width",
    "head_size",
    "experts",
]


@dataclass(frozen=True)
class Family:
    """A family of models: names of its layers, and its special features.

    Attributes:
        name: of the family.
        feed_forwards: names of the layers of a feed-forward block within its module: the producers, then the consumer.
        fused_feed_forwards: (producer, consumer), if the producer's outputs are [gate | up].
        inverted_residuals: names of the modules of an inverted residual, each with one convolution: the widening one,
            those between, the narrowing one (:mod:`obc.structures.transformers.feed_forward`).
        projections: names of the projections of queries, keys and values, and of the output where they need it to be
            told from others; two names: of queries, and of [keys | values], or of [queries | keys], and of values.
        fused_projections: name of a projection of all three -> the order of its outputs. None means [all queries | all
            keys | all values], unless another family's order fits the module.
        outputs: names of the output projection, in the same module as the others.
        outputs_around: names of the output projection in the module around that one.
        further_outputs: names of output projections, beside the first, of other tokens that take part.
        gated_queries: classes of attention whose query projection gives each head its query and then a gate.
        head_parameters: parameters with an entry, or one head's channels, for every query head -> the dimension of the
            heads. A name with a dot is one of a module inside the attention.
        head_layers: layers of an attention whose outputs are such entries: gates, projections of positions.
        head_norms: norms over the channels of all heads of an attention -> whose heads.
        input_norms: classes of attention where these are norms of what it reads, as wide as all heads by chance.
        headless: parameters of an attention, or modules in it, that don't depend on the number of heads.
        attributes: role -> attributes of modules that count it.
        config_keys: role -> config keys that count it.
        forward_reads_config: layers of an attention that reads its counts from the config when it runs.
        kinds: kinds of groups that only this family has.
        blocks: finds blocks other than ordinary feed-forward blocks or attention, or raises
            :class:`~obc.structures.units.NotPrunableError`. If it finds or refuses something in a module, the module is
            not examined as an ordinary block.
        inner_sides: if ``blocks`` finds attention, the sides that don't belong to the residual stream.
    """

    name: str
    feed_forwards: tuple[tuple[str, ...], ...] = ()
    fused_feed_forwards: tuple[tuple[str, str], ...] = ()
    inverted_residuals: tuple[tuple[str, ...], ...] = ()
    projections: tuple[tuple[str, ...], ...] = ()
    fused_projections: Mapping[str, HeadOrder | None] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    outputs_around: tuple[str, ...] = ()
    further_outputs: tuple[str, ...] = ()
    gated_queries: tuple[str, ...] = ()
    head_parameters: Mapping[str, int] = field(default_factory=dict)
    head_layers: tuple[str, ...] = ()
    head_norms: Mapping[str, HeadsOf] = field(default_factory=dict)
    input_norms: tuple[str, ...] = ()
    headless: tuple[str, ...] = ()
    attributes: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    config_keys: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    forward_reads_config: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    blocks: FindBlocks | None = None
    inner_sides: InnerSides | None = None


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to every structure created from now on.

    Raises:
        ValueError: the name is taken.
    """
    if FAMILIES.get(family.name, family) is not family:
        raise ValueError(f"a family {family.name!r} is registered already; choose another name")
    FAMILIES[family.name] = family


def attributes(role: Role) -> tuple[str, ...]:
    """All families' names of the attributes that count ``role``."""
    return tuple(dict.fromkeys(key for family in FAMILIES.values() for key in family.attributes.get(role, ())))


def config_keys(role: Role) -> tuple[str, ...]:
    """All families' names of the config keys that count ``role``, most common first."""
    return tuple(dict.fromkeys(key for family in FAMILIES.values() for key in family.config_keys.get(role, ())))


def kinds() -> dict[str, Kind]:
    """All kinds of groups that the families register, by name."""
    return {kind.name: kind for family in FAMILIES.values() for kind in family.kinds}
