"""The parts of an attention for every head besides its projections: sinks, output gates, norms over all heads.

Families name them. Where a proof follows, what no name covers has heads along a dimension whose length is their number,
or that of all their channels: tables of relative positions, scales, biases, layers that mix heads.

A norm over the channels of all heads takes its statistics from the remaining heads, as the model's class does with that
many heads. The remaining heads are thus scaled differently than before; a pruned model must compute what the model
computes if its norm sees only the remaining heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.model.groups import Side, Slice
from obc.model.layouts import is_depthwise
from obc.model.names import is_within, joined
from obc.structures.transformers.block import Axis
from obc.structures.transformers.family import FAMILIES, HeadsOf
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError


@dataclass(frozen=True)
class PerHead:
    """A layer, a norm or a parameter with one or several entries for every head.

    Attributes:
        name: name of the layer, norm or parameter.
        axes: where the heads lie, if it is not an ordinary layer.
        heads_of: whose heads.
        width: entries per head.
        side: of the layer.
    """

    name: str
    axes: tuple[Axis, ...] | None
    heads_of: HeadsOf
    width: int
    side: Side = "out"

    def slice_of(self, heads: Tensor) -> Slice:
        """The entries of ``heads`` (units, heads per unit)."""
        entries = heads[:, :, None] * self.width + torch.arange(self.width, device="cpu")
        return Slice(self.name, self.side, entries.flatten(1))


def per_head(layers: Layers, name: str, counts: Mapping[HeadsOf, int], size: int) -> list[PerHead]:
    """The parts of the attention ``name`` for every head.

    Args:
        counts: whose heads -> their number.
        size: channels per head in the input of the output projection.
    """
    found = [*_layers(layers, name, counts, size), *_norms(layers, name, counts, size)]
    return [*found, *_parameters(layers, name, counts["queries"], size)]


def headless(layers: Layers, name: str) -> set[str]:
    """What families know not to depend on the number of heads of the attention ``name``."""
    families = FAMILIES.values()
    found = {joined(name, child) for family in families for child in family.headless}
    if norms_inputs(layers, name):
        found |= {joined(name, child) for family in families for child in family.head_norms}
    return found


def by_length(layers: Layers, name: str, known: Collection[str], count: int, size: int) -> list[PerHead]:
    """What else in the attention ``name`` has heads: a dimension of ``count`` entries, or of ``size`` for every head.

    A layer from heads to heads loses them on both sides. Other layers read something else, and whatever has no such
    dimension belongs to no head. Buffers of one dimension may have any length by chance: they have heads if they have
    all channels of them.

    Args:
        known: layers, norms and parameters that are covered already, by full name.

    Raises:
        NotPrunableError: several dimensions of a parameter might be that of the heads.
    """
    without = headless(layers, name)
    found: dict[tuple[str, Side], PerHead] = {}
    for owner, module in layers.modules[name].named_modules(prefix=name):
        if owner not in layers.modules:
            continue  # it has the name of another module, which holds it as well
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = joined(owner, key)
            common = owner != name and tensor.shape == (size,)  # a norm of one head, which is the same for all
            if {owner, full} & {*known} or common or any(is_within(full, one) for one in without):
                continue
            if layers.size_or_none(owner, "out") is not None:
                for side, width in _sides(layers, owner, count, size):
                    found[owner, side] = PerHead(owner, None, "queries", width, side)
            elif (place := _dimension(full, tensor, count, size)) is not None:
                found[full, "out"] = PerHead(full, (Axis(owner, key, place[0]),), "queries", place[1])
    return list(found.values())


def _sides(layers: Layers, name: str, count: int, size: int) -> Iterator[tuple[Side, int]]:
    """(side of a layer or norm, entries per head)."""
    width, rest = divmod(layers.size_or_none(name, "out") or 0, count)
    if not rest and width in (1, size):
        yield "out", width
        module = layers.modules[name]
        if width == 1 and not is_depthwise(module) and layers.size_or_none(name, "in") == count:
            yield "in", 1


def _dimension(name: str, tensor: Tensor, count: int, size: int) -> tuple[int, int] | None:
    """(dimension of the heads, entries per head) of a tensor; None if it has none."""
    if not tensor.is_floating_point() or tensor.numel() == 1:
        return None
    buffer = not isinstance(tensor, nn.Parameter)
    for length, width in ((count, 1), (count * size, size)):
        dims = [dim for dim, entries in enumerate(tensor.shape) if entries == length]
        if dims and buffer and (len(dims) > 1 or (width == 1 and tensor.dim() == 1)):
            continue
        if len(dims) > 1:
            raise NotPrunableError(f"{name} of shape {tuple(tensor.shape)} has several dimensions of {length}")
        if dims:
            return dims[0], width
    return None


def _layers(layers: Layers, name: str, counts: Mapping[HeadsOf, int], size: int) -> Iterator[PerHead]:
    """Gates: one for every query head, or for every channel of it."""
    for child in dict.fromkeys(child for family in FAMILIES.values() for child in family.head_layers):
        if layers.layer(name, child) is None:
            continue
        width, rest = divmod(layers.size(joined(name, child), "out"), counts["queries"])
        if not rest and width in (1, size):
            yield PerHead(joined(name, child), None, "queries", width)


def _norms(layers: Layers, name: str, counts: Mapping[HeadsOf, int], size: int) -> Iterator[PerHead]:
    """Norms over the channels of all heads; those with weights of one head's size are the same for every head."""
    if norms_inputs(layers, name):
        return
    for child, heads_of in {
        key: heads for family in FAMILIES.values() for key, heads in family.head_norms.items()
    }.items():
        full, count = joined(name, child), counts.get(heads_of, 1)
        norm = layers.modules.get(full)
        if norm is None or count == 1:
            continue
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (count * size,):
            yield PerHead(full, None, heads_of, size)
            continue
        for key, parameter in norm._parameters.items():  # Chameleon, vit-pytorch: each head has its own weights
            shape = () if parameter is None else parameter.shape
            if len(shape) > 1 and shape[0] == count and math.prod(shape) == count * size:
                yield PerHead(joined(full, key), (Axis(full, key, 0),), heads_of, 1)


def is_attention(layers: Layers, name: str) -> bool:
    """Whether a module projects queries, or all of queries, keys and values."""
    first = {names[0] for family in FAMILIES.values() for names in family.projections}
    fused = {child for family in FAMILIES.values() for child in family.fused_projections}
    return any(layers.layer(name, child) is not None for child in (*first, *fused))


def norms_inputs(layers: Layers, name: str) -> bool:
    """Whether norms that elsewhere are over all heads are over what this attention reads."""
    return any(type(layers.modules[name]).__name__ in family.input_norms for family in FAMILIES.values())


def _parameters(layers: Layers, name: str, count: int, size: int) -> Iterator[PerHead]:
    """Parameters of the attention, and of modules inside it and next to it that are no attention themselves."""
    parent = name.rpartition(".")[0]
    inner = [joined(name, child) for child, _ in layers.modules[name].named_children()]
    siblings = layers.modules[parent].named_children() if parent else ()
    neighbours = [one for child, _ in siblings if not is_attention(layers, one := joined(parent, child))]
    dims = {key: dim for family in FAMILIES.values() for key, dim in family.head_parameters.items()}
    # A module that several hold has the name of its first place; in the others it is not known by its parts.
    for owner in dict.fromkeys(one for one in (name, *inner, *neighbours) if one in layers.modules):
        for full, dim in dims.items():
            module, _, key = full.rpartition(".")
            parameter = layers.modules[owner]._parameters.get(key)
            if parameter is None or parameter.dim() <= dim or (module and owner != joined(name, module)):
                continue
            width, rest = divmod(parameter.shape[dim], count)
            if not rest and width in (1, size):
                yield PerHead(joined(owner, key), (Axis(owner, key, dim),), "queries", width)
