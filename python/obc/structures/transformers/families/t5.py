"""T5 and similar models, MPNet, CPM-Ant, Pix2Struct's text: attention with its own bias for relative positions.

The bias has a column for every head. If the attentions of a stack share one table, or reuse what the first of them
computed, their h-th heads are one unit, which is removed from all of them at once.
"""

import re
from collections.abc import Collection, Iterator

from torch import Tensor, nn

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.names import joined
from obc.structures.transformers.attention import refuse_other_parameters
from obc.structures.transformers.block import Axis, Block
from obc.structures.transformers.family import Family, attributes, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_NAMES = (
    ("q", "k", "v", "o"),
    ("project_q", "project_k", "project_v", "attention_out"),
    ("query", "key", "value", "output"),  # Pix2Struct; other attention with these names says nothing of a bias
)
_SAYS_BIAS = "has_relative_attention_bias"
_TABLE = "relative_attention_bias"
_HEAD_SIZE = ("key_value_proj_dim", "dim_head", "attention_head_size")


def _layers_of(layers: Layers, name: str) -> list[str]:
    """The projections of queries, keys, values and the output of the attention ``name``."""
    for names in _NAMES if hasattr(layers.modules[name], _SAYS_BIAS) else _NAMES[:2]:
        if all(layers.layer(name, child) is not None for child in names):
            return [joined(name, child) for child in names]
    return []


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if "heads" not in kinds or not _layers_of(layers, name):
        return
    stack = [other for other in layers.modules if _place(other) == _place(name) and _layers_of(layers, other)]
    if all(layers.has(member, _TABLE) for member in stack):
        stack = [name]  # each has its own table
    if name == stack[0]:
        yield _in_all(layers, stack)


def _in_all(layers: Layers, stack: list[str]) -> Block:
    """The heads that a stack of attentions has in common."""
    first = layers.modules[stack[0]]
    size = next((value for key in _HEAD_SIZE if isinstance(value := getattr(first, key, None), int)), 0)
    width = layers.size(_layers_of(layers, stack[0])[-1], "in")
    if not size or width % size:
        raise NotPrunableError(f"{type(first).__name__} does not say how many heads it has")
    count = width // size
    tables = _tables(layers, stack, count)
    slices: list[Slice] = []
    for member in stack:
        projections = _layers_of(layers, member)
        widths = [layers.size(layer, "in" if layer == projections[-1] else "out") for layer in projections]
        if set(widths) != {width}:
            raise NotPrunableError(f"queries, keys, values and output of {member} have {widths} channels, not {width}")
        refuse_other_parameters(layers, member, {*projections, *(part.module for part, _ in tables)}, size)
        sides: tuple[Side, ...] = ("out", "out", "out", "in")
        slices += [Slice(layer, side, channels(count, size)) for layer, side in zip(projections, sides, strict=True)]
    counted = {attributes("heads"): (count, 1), (*attributes("attention_width"), "inner_dim"): (width, size)}
    return Block(
        ChannelGroup(slices[0].module, (*slices, *(part for part, _ in tables)), "heads"),
        axes={(part.module, part.side): axes for part, axes in tables if axes},
        counters=layers.counters([*stack, *_outside(layers)], counted),
        config=layers.config_key(("num_attention_heads", "num_heads"), 1),
        attended=len(stack) * size,
    )


def _tables(layers: Layers, stack: list[str], count: int) -> list[tuple[Slice, tuple[Axis, ...]]]:
    """(slice, axes of a parameter) for the tables inside these attentions, or else outside all attentions."""
    inside = [owner for owner in stack if _table(layers, owner) is not None]
    outside = _outside(layers)
    found: list[tuple[Slice, tuple[Axis, ...]]] = []
    for owner in inside or outside:
        table = _table(layers, owner)
        if table is None or table.shape[-1] != count:
            continue
        name = joined(owner, _TABLE)
        axes = () if layers.has(owner, _TABLE) else (Axis(owner, _TABLE, table.dim() - 1),)
        found.append((Slice(name, "out", channels(count, 1)), axes))
    return found


def _outside(layers: Layers) -> list[str]:
    return [name for name in layers.modules if _table(layers, name) is not None and not _layers_of(layers, name)]


def _table(layers: Layers, owner: str) -> Tensor | None:
    """The biases of a module: an embedding or a parameter whose last dimension holds the heads."""
    embedding = layers.modules.get(joined(owner, _TABLE))
    if isinstance(embedding, nn.Embedding):
        return embedding.weight
    return layers.modules[owner]._parameters.get(_TABLE)


def _place(name: str) -> str:
    """A name without the layer's number, equal for all attentions of a stack."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name, count=1)


def _inner_sides(layers: Layers, name: str) -> set[tuple[str, Side]]:
    projections = _layers_of(layers, name)
    if not projections:
        return set()
    table = {(joined(name, _TABLE), "out")} if layers.has(name, _TABLE) else set()
    return {*((layer, "out") for layer in projections[:-1]), (projections[-1], "in"), *table}  # type: ignore[arg-type]


register(
    Family(
        "t5",
        feed_forwards=(("wi_0", "wi_1", "wo"), ("wi", "wo"), ("w_in.w_0", "w_in.w_1", "w_out")),
        config_keys={"inner_width": ("dim_ff",)},
        blocks=_heads,
        inner_sides=_inner_sides,
    )
)
