"""Attention with a head's channels in rows of its projections: separate for queries, keys and values, or fused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.names import is_within, joined
from obc.structures.transformers.block import Block
from obc.structures.transformers.family import FAMILIES, HeadsOf, attributes, config_keys
from obc.structures.transformers.heads import HeadChannels, Heads, head_channels
from obc.structures.transformers.layers import Counter, Layers
from obc.structures.transformers.per_head import by_length, headless, per_head
from obc.structures.units import NotPrunableError

# Names of fused projections whose order differs between models; unless a family gives it, the module is refused.
_OF_MANY_ORDERS = ("query_key_value", "Wqkv", "in_proj_qkv")
_UNKNOWN_ORDER = "the order of queries, keys and values in {} is not known"


def attentions(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    """The heads of the module ``name``, if it is an attention."""
    projections = _projections(layers, name)
    if not projections:
        return
    output = output_of(layers, name)
    if output is None:
        raise NotPrunableError("no output projection was found")
    heads = _head_shapes(layers, name, projections, output)
    grouped = heads.queries // heads.shared > 1
    if "heads" in kinds and heads.shared > 1:
        yield _attention(layers, name, projections, output, heads, "heads")
    elif grouped and ("query_heads" in kinds or "heads" in kinds):
        yield _attention(layers, name, projections, output, heads, "query_heads")


def output_of(layers: Layers, name: str) -> str | None:
    """The output projection of the attention ``name``."""
    parent = name.rpartition(".")[0]
    inside = (joined(name, child) for family in FAMILIES.values() for child in family.outputs)
    outside = (joined(parent, child) for family in FAMILIES.values() for child in family.outputs_around)
    return next((layer for layer in (*inside, *outside) if layers.layer("", layer) is not None), None)


def inner_sides(layers: Layers, name: str) -> set[tuple[str, Side]]:
    """The sides of an attention's layers, and of norms inside it, that don't belong to the residual stream."""
    output = output_of(layers, name)
    if output is None:
        return set()
    further = _further_outputs(layers, name, layers.size(output, "in"))
    inner: set[tuple[str, Side]] = {(one, "in") for one in (output, *further)}
    for child_name, child in layers.modules[name].named_children():
        if joined(name, child_name) not in (output, *further) and next(child.parameters(), None) is not None:
            inner.add((joined(name, child_name), "out"))
    return inner


def refuse_other_parameters(layers: Layers, name: str, known: Collection[str], size: int) -> None:
    """Refuse an attention with parameters that are not ``known``: layers, norms and parameters, by full name.

    Norms of ``size``, and single values, are the same for every head.
    """
    for key, parameter in layers.modules[name].named_parameters():
        full = joined(name, key)
        owner = full.rpartition(".")[0]
        same = parameter.numel() == 1 or (owner != name and parameter.shape == (size,))
        if {owner, full} & {*known} or same:
            continue
        if not any(is_within(full, one) for one in headless(layers, name)):
            raise NotPrunableError(f"{full} of shape {tuple(parameter.shape)} is not understood")


def _projections(layers: Layers, name: str) -> list[str]:
    """The projections of queries, keys and values, or the single one for all three."""
    outputs = {child for family in FAMILIES.values() for child in family.outputs}
    for family in FAMILIES.values():
        for names in family.projections:
            if all(layers.layer(name, child) is not None for child in names):
                return [joined(name, child) for child in names if child not in outputs]
    fused = dict.fromkeys(child for family in FAMILIES.values() for child in family.fused_projections)
    for child in (*fused, *_OF_MANY_ORDERS):
        if layers.layer(name, child) is not None:
            if child not in fused:
                raise NotPrunableError(_UNKNOWN_ORDER.format(joined(name, child)))
            return [joined(name, child)]
    return []


def _head_shapes(layers: Layers, name: str, projections: Sequence[str], output: str) -> Heads:
    module, inner = layers.modules[name], layers.size(output, "in")
    sizes = (getattr(module, key, None) for key in attributes("head_size"))
    size = next((value for value in sizes if isinstance(value, int)), None)
    if size is None:
        holder = getattr(module, "config", None) if _reads_config(layers, name) else module
        counts = (getattr(holder, key, None) for key in attributes("heads"))
        count = next((value for value in counts if isinstance(value, int)), None)
        if not count or inner % count:
            raise NotPrunableError(f"{type(module).__name__} does not say how many heads it has")
        size = inner // count
    widths = [layers.size(projection, "out") for projection in projections]
    gated = any(type(module).__name__ in family.gated_queries for family in FAMILIES.values())
    if len(projections) == 1:
        shared, rest = divmod(widths[0] - inner, 2 * size)
    elif widths == [2 * inner, inner]:  # of [queries | keys], and of values
        shared, rest = divmod(inner, size)
    else:
        shared, rest = divmod(widths[1], size * (2 if len(projections) == 2 else 1))
        if widths[0] != inner * (2 if gated else 1) or widths[1] != widths[-1]:
            raise NotPrunableError(f"queries, keys, values and output have {[*widths, inner]} channels")
    if rest or shared < 1 or inner % (shared * size):
        raise NotPrunableError(f"its widths {[*widths, inner]} are not multiples of the head size {size}")
    return Heads(inner // size, shared, size, gated)


def _further_outputs(layers: Layers, name: str, inner: int) -> list[str]:
    """Output projections for other tokens that take part in the attention, which read all heads too."""
    children = dict.fromkeys(child for family in FAMILIES.values() for child in family.further_outputs)
    found = [joined(name, child) for child in children if layers.layer(name, child) is not None]
    return [one for one in found if layers.size(one, "in") == inner]


def _reads_config(layers: Layers, name: str) -> bool:
    """Whether the module ``name`` takes its counts from its config when it runs."""
    reading = {child for family in FAMILIES.values() for child in family.forward_reads_config}
    return any(layers.has(name, child) for child in reading) and hasattr(layers.modules[name], "config")


def _head_channels(layers: Layers, name: str, projections: Sequence[str], heads: Heads, kind: str) -> HeadChannels:
    if len(projections) > 1:
        rows = head_channels(heads, kind, fused=False)
        if len(projections) == 2 and kind == "heads":
            queried, keyed, _ = rows.projections
            inner = heads.queries * heads.size
            if layers.size(projections[0], "out") == 2 * inner:  # of [queries | keys], and of values
                return HeadChannels([torch.cat([queried, keyed + inner], 1), keyed], rows.output)
            keyed_and_valued = torch.cat([keyed, keyed + heads.shared * heads.size], 1)
            return HeadChannels([queried, keyed_and_valued], rows.output)
        return rows
    child = projections[0].removeprefix(f"{name}.")
    orders = [f.fused_projections[child] for f in FAMILIES.values() if child in f.fused_projections]
    for order in orders:
        if order is not None and (found := order(layers.modules[name], heads, kind)) is not None:
            return found
    if None not in orders:
        raise NotPrunableError(_UNKNOWN_ORDER.format(projections[0]))
    return head_channels(heads, kind, fused=True)


def _attention(layers: Layers, name: str, projections: Sequence[str], output: str, heads: Heads, kind: str) -> Block:
    size = heads.size
    rows = _head_channels(layers, name, projections, heads, kind)
    slices = [Slice(layer, "out", units) for layer, units in zip(projections, rows.projections, strict=False)]
    outputs = [output, *_further_outputs(layers, name, heads.queries * size)]
    slices += [Slice(layer, "in", rows.output) for layer in outputs]
    units = len(rows.output)
    per_unit = heads.queries // units
    counted: dict[tuple[str, ...], tuple[int, int]] = {
        attributes("heads"): (heads.queries, per_unit),
        attributes("attention_width"): (heads.queries * size, per_unit * size),
    }
    config, head_counts = {"num_attention_heads": per_unit}, {heads.queries: per_unit}
    if kind == "heads":
        shared = heads.shared // units
        head_counts[heads.shared] = shared
        counted[attributes("key_value_heads")] = (heads.shared, shared)
        counted[attributes("key_value_width")] = (heads.shared * size, shared * size)
        config |= layers.config_key(config_keys("key_value_heads"), shared)
    else:
        counted[("num_key_value_groups",)] = (heads.queries // heads.shared, 1)
    queried, ratio = rows.output[:, ::size] // size, heads.queries // heads.shared
    heads_of: dict[HeadsOf, Tensor] = {"queries": queried}
    if kind == "heads":  # otherwise all keys and values stay
        heads_of["keys"] = queried[:, ::ratio] // ratio
    others = per_head(layers, name, {"queries": heads.queries, "keys": heads.shared}, size)
    known = {*projections, *outputs, *(found.name for found in others)}
    inside: list[str] = []
    if layers.proved:
        others += by_length(layers, name, known, heads.queries, size)
        inside = [one for one in layers.modules if one != name and is_within(one, name)]
    else:
        refuse_other_parameters(layers, name, known, size)
    slices += [found.slice_of(heads_of[found.heads_of]) for found in others if found.heads_of in heads_of]
    return Block(
        ChannelGroup(projections[0], tuple(slices), kind),
        axes={(found.name, found.side): found.axes for found in others if found.axes is not None},
        counters=(
            *layers.counters([name], counted),
            *layers.counters(inside, {attributes("heads"): (heads.queries, per_unit)}),
            *layers.rearrangements(name, head_counts),
            *(Counter(name, key, 1) for key in rows.counters),
        ),
        config=config if layers.config is not None else {},
        config_fixed={"head_dim": size},
        reads_config=name if _reads_config(layers, name) else None,
        attended=rows.output.shape[1],
    )
