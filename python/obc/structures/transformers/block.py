"""A block of a transformers model: coupled channels, where they lie, and what else changes when units are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from obc.model.channel_dims import dims_of_side
from obc.model.counts import set_count
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.kept import Kept, staying
from obc.model.layouts import is_depthwise
from obc.model.names import joined
from obc.structures.transformers.layers import Counter, Layers
from obc.structures.units import NotPrunableError


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor.

    Attributes:
        module: name of the module that owns the tensor.
        tensor: name of the tensor in the module.
        dim: the dimension.
        side: the side of the plan's entry.
        raw: the tensor is not an ordinary layer's, so the plan's entry names the dimension.
    """

    module: str
    tensor: str
    dim: int
    side: Side = "out"
    raw: bool = True

    @property
    def name(self) -> str:
        """The tensor's name in the model."""
        return joined(self.module, self.tensor)

    @property
    def key(self) -> str:
        """The plan's key for it."""
        return self.name if self.raw else self.module


@dataclass(frozen=True)
class Kind:
    """A kind of group.

    Attributes:
        name: the name that callers use.
        whole: its units are not single channels, so rounding of widths does not apply.
        counted: other sizes may have to be multiples of the config's count of its units, so every width is tried.
        by_default: found if the caller names no kinds.
    """

    name: str
    whole: bool = False
    counted: bool = False
    by_default: bool = True


@dataclass(frozen=True, eq=False)
class Block:
    """A group, and everything besides its weights that changes when units are removed.

    Attributes:
        group: the group of the present model.
        axes: locations of slices of tensors outside ordinary layers.
        counters: attributes of modules that count units.
        config: config key -> how much a unit counts there; a fraction if the key is a multiple of another width.
        config_fixed: config key -> a value that must be written once units were removed, because it was derived before.
        config_part: dotted name, inside the model's config, of the one with ``config`` and ``config_fixed``; "" is the
            model's own. Models with several parts (vision and language) have one for each.
        reads_config: a module whose forward reads these counts from its config, as layers with one projection for
            queries, keys and values do.
        min_units: the number of units that the model needs to run.
        attended: channels per unit in the products of queries with keys and of weights with values; the mean of both.
        warning: what the caller should know once units were removed.
    """

    group: ChannelGroup
    axes: Mapping[tuple[str, Side], tuple[Axis, ...]] = field(default_factory=dict)
    counters: tuple[Counter, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    config_fixed: Mapping[str, int] = field(default_factory=dict)
    config_part: str = ""
    reads_config: str | None = None
    min_units: int = 1
    attended: float = 0.0
    warning: str = ""

    @property
    def counted_by(self) -> tuple[str, ...]:
        """The config's counts of the units; the config can only express equal widths of groups with equal counts."""
        return (self.config_part, *(self.config or (self.group.kind,)))


def block_of(
    layers: Layers,
    kind: str,
    produced: Mapping[str, Tensor],
    consumed: Mapping[str, Tensor],
    parameters: Mapping[str, tuple[int, Tensor]] | None = None,
    **further: Any,
) -> Block:
    """The block of a group named after the first layer, if what its units take is all that layers and parameters have.

    Args:
        produced: layer or norm -> (units, k) out channels of every unit.
        consumed: layer -> (units, k) in channels.
        parameters: parameter or buffer outside ordinary layers -> (its dimension, (units, k) entries there).
        **further: further fields of the block.

    Raises:
        NotPrunableError: a layer or parameter is missing, or has another width.
    """
    taken: list[tuple[str, Side, Tensor, int | None]] = []
    axes: dict[tuple[str, Side], tuple[Axis, ...]] = {}
    for name, found in produced.items():
        taken.append((name, "out", found, layers.size_or_none(name, "out")))
    for name, (dim, found) in (parameters or {}).items():
        owner, _, key = name.rpartition(".")
        tensor = (layers.modules[owner]._parameters | layers.modules[owner]._buffers).get(key)
        taken.append((name, "out", found, None if tensor is None else tensor.shape[dim]))
        axes[name, "out"] = (Axis(owner, key, dim),)
    for name, found in consumed.items():
        taken.append((name, "in", found, layers.size_or_none(name, "in")))
    for name, side, found, size in taken:
        if size != found.numel():
            has = "is missing" if size is None else f"has {size} {side} channels"
            raise NotPrunableError(f"{name} {has}, and the block's {len(found)} units take {found.numel()} of it")
    group = ChannelGroup(taken[0][0], tuple(Slice(name, side, found) for name, side, found, _ in taken), kind)
    return Block(group, axes=axes, **further)


def layer_axes(name: str, module: nn.Module, side: Side) -> tuple[Axis, ...]:
    """The axes of one side of an ordinary layer: linear, convolution, norm or embedding."""
    side = "out" if is_depthwise(module) else side
    return tuple(Axis(name, key, dim, side, raw=False) for key, dim, _ in dims_of_side(module, side))


def cut_along(axis: Axis, size: int, removed: Tensor, other: Kept | None = None) -> Kept:
    """The plan's entry that removes these positions of an axis of this size; ``other`` says the other side."""
    stays, dim = staying(size, removed), axis.dim if axis.raw else None
    if axis.side == "out":
        return replace(other or Kept(), out_channels=stays, out_size=size, dim=dim)
    return replace(other or Kept(), in_channels=stays, in_size=size, in_dim=dim)


def count_down(modules: Mapping[str, nn.Module], block: Block, units: int) -> list[tuple[str, str, int | list[int]]]:
    """Let the modules that count a block's units know that so many are gone.

    Returns:
        (module, attribute, new value) of those that are numbers, or lists or tuples of numbers.
    """
    numbers = list[tuple[str, str, int | list[int]]]()
    for counter in block.counters:
        module = modules[counter.module]
        for attribute, value in counter.without(module, units).items():
            set_count(module, attribute, value)
            if not counter.axis:
                numbers.append((counter.module, attribute, value if isinstance(value, int) else list(value)))
    return numbers
