"""Inverted residuals: the channels between a convolution that widens, depthwise ones, and one that narrows again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.model.names import is_within, joined
from obc.structures.transformers.block import Block
from obc.structures.transformers.family import FAMILIES
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError


def inverted_residuals(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    """The inverted residual of the module ``name``, if it is one.

    Its parts, ``Family.inverted_residuals``, are modules with one convolution each, possibly followed by a BatchNorm:
    widening, depthwise ones, narrowing. Between them there may be a gate, which squeezes all channels through a
    convolution and widens them again. Without anything between, the two are a feed-forward block.
    """
    for parts in (parts for family in FAMILIES.values() for parts in family.inverted_residuals):
        kind = "inverted_residual" if len(parts) > 2 else "ffn"
        if kind in kinds and all(
            layers.has(name, part) and _wraps_convolutions(layers, joined(name, part)) for part in parts
        ):
            yield _block(layers, [joined(name, part) for part in parts], kind)
            return


def _wraps_convolutions(layers: Layers, name: str) -> bool:
    """Whether a module contains convolutions. A bare one is not accepted: its norm would be a sibling, not a part."""
    return not isinstance(layers.modules[name], _ConvNd) and bool(_convolutions(layers, name))


def _convolutions(layers: Layers, name: str) -> list[str]:
    return [inner for inner in _inside(layers, name) if isinstance(layers.modules[inner], _ConvNd)]


def _inside(layers: Layers, name: str) -> list[str]:
    return [inner for inner in layers.modules if is_within(inner, name)]


def _block(layers: Layers, parts: Sequence[str], kind: str) -> Block:
    widening, narrowing = (_convolutions(layers, part) for part in (parts[0], parts[-1]))
    if len(widening) != 1 or len(narrowing) != 1:
        raise NotPrunableError(f"{parts[0]} and {parts[-1]} have {len(widening)} and {len(narrowing)} convolutions")
    producer, consumer = widening[0], narrowing[0]
    width = layers.size(consumer, "in")
    if layers.size(producer, "out") != width:
        raise NotPrunableError(f"{producer} has {layers.size(producer, 'out')} outputs, {consumer} {width} inputs")
    for layer in (producer, consumer):
        if layers.modules[layer].groups != 1:
            raise NotPrunableError(f"{layer} is a grouped convolution")
    inners = [inner for part in parts[:-1] for inner in _inside(layers, part) if inner != producer]
    slices = [Slice(producer, "out", channels(width, 1))]
    for inner in inners:
        slices += _slices(layers, inner, width)
    slices.append(Slice(consumer, "in", channels(width, 1)))
    return Block(ChannelGroup(producer, tuple(slices), kind))


def _slices(layers: Layers, name: str, width: int) -> list[Slice]:
    """The slices that a module between the two convolutions loses with each channel."""
    module, one = layers.modules[name], channels(width, 1)
    if layout_of(module) is not None:
        sizes = layers.size(name, "in"), layers.size(name, "out")
        if isinstance(module, _ConvNd) and module.groups == sizes[0] == sizes[1] == width:
            return [Slice(name, "out", one)]
        sides = [side for side, size in zip(("in", "out"), sizes, strict=True) if size == width]
        if isinstance(module, _ConvNd) and module.groups == 1 and len(sides) == 1:
            return [Slice(name, "in" if sides == ["in"] else "out", one)]
    elif isinstance(module, _BatchNorm):
        if module.num_features == width:
            return [Slice(name, "out", one)]
    elif not list(module.parameters(recurse=False)) and not isinstance(module, nn.modules.batchnorm._NormBase):
        return []
    raise NotPrunableError(f"how {name} uses the {width} channels is not known")
