"""Feed-forward blocks, plain or gated, and inverted residuals: the channels between the first and the last layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.model.names import is_within, joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import FAMILIES, attributes, config_keys
from obc.structures.transformers.layers import Layers, channels, is_row, says
from obc.structures.units import NotPrunableError

_ADJUSTED = "block_auto_adjust_ff_dim"  # LFM2 computes another width from the config's, unless this is False


def feed_forwards(layers: Layers, name: str) -> Iterator[Block]:
    """The feed-forward block of the module ``name``, if it is one. If several names fit, those of most layers win."""
    found = _names_of(layers, name)
    if found:  # names used both with and without a separate gate are told apart by their widths
        yield _feed_forward(layers, name, *next((one for one in found if _agrees(layers, *one)), found[0]))


def _names_of(layers: Layers, name: str) -> list[tuple[list[str], int]]:
    """(producers and consumer, how often a producer has each channel), for every set of names that fits the module."""
    plain = [(names, 1) for family in FAMILIES.values() for names in family.feed_forwards]
    fused = [(names, 2) for family in FAMILIES.values() for names in family.fused_feed_forwards]
    gated = [(names, 1) for names, _ in plain if len(names) > 2]
    return [
        ([joined(name, child) for child in names], copies)
        for names, copies in (*gated, *fused, *plain)
        if all(layers.layer(name, child) is not None for child in names)
    ]


def _agrees(layers: Layers, projections: Sequence[str], copies: int) -> bool:
    *producers, consumer = projections
    width = layers.size(consumer, "in")
    return all(layers.size(producer, "out") == copies * width for producer in producers)


def _feed_forward(layers: Layers, name: str, projections: Sequence[str], copies: int) -> Block:
    *producers, consumer = projections
    width = layers.size(consumer, "in")
    outer = layers.size(consumer, "out")
    for key, parameter in layers.modules[name].named_parameters(recurse=False):
        if width in parameter.shape and width != outer:
            raise NotPrunableError(f"{joined(name, key)} of shape {tuple(parameter.shape)} is not understood")
    # A norm over the inner channels takes its statistics from the remaining ones, as the class does at that width.
    inner = [*_between(layers, name, projections, width, outer), *_inner_norms(layers, name, projections)]
    return block_of(
        layers,
        "ffn",
        dict.fromkeys(producers, channels(width, 1, copies)) | dict.fromkeys(inner, channels(width, 1)),
        {consumer: channels(width, 1)},
        counters=layers.counters([name], {attributes("inner_width"): (width, 1)}),
        config=layers.config_key(_config_keys(layers, name), 1, width),
        config_fixed={_ADJUSTED: False} if says(layers.config, _ADJUSTED) else {},
    )


def _refuse_matrices(name: str, module: nn.Module, width: int) -> None:
    """Refuse parameters over the inner channels that belong to no layer and no norm."""
    for key, parameter in module.named_parameters(recurse=False):
        if not is_row(parameter) and width in parameter.shape:
            raise NotPrunableError(f"{joined(name, key)} of shape {tuple(parameter.shape)} is not understood")


def _config_keys(layers: Layers, name: str) -> tuple[str, ...]:
    """The config keys that may count the inner channels, by where the block is."""
    if "shared_expert" in name:
        # If several experts are shared, DeepSeek's config counts their product.
        one = getattr(layers.config, "n_shared_experts", None) == 1
        return (*config_keys("shared_width"), *(config_keys("expert_width") if one else ()))
    if "shared_mlp" in name:  # Hunyuan's config has one width for all
        return (*config_keys("shared_width"), *config_keys("inner_width"))
    if ".experts." in name:
        return (*config_keys("expert_width"), *config_keys("inner_width"))
    return config_keys("inner_width")


def _inner_norms(layers: Layers, name: str, projections: Sequence[str]) -> Iterator[str]:
    """Norms over the inner channels; before the producers of an input as wide they are the input's (Qwen3-VL)."""
    width, outer = layers.size(projections[-1], "in"), layers.size(projections[-1], "out")
    widened = layers.size(projections[0], "in") != width
    for child_name, child in layers.modules[name].named_children():
        widened = widened or joined(name, child_name) == projections[0]
        weight = getattr(child, "weight", None)
        if width != outer and widened and isinstance(weight, Tensor) and is_row(weight) and weight.numel() == width:
            yield joined(name, child_name)


def _between(layers: Layers, name: str, projections: Sequence[str], width: int, outer: int) -> list[str]:
    """Depthwise convolutions over the inner channels; other layers with as many channels are not understood.

    Nested feed-forward blocks, as in MobileBERT, have their own channels.
    """
    depthwise = []
    nested: list[str] = []
    for inner, module in layers.modules[name].named_modules():
        layer = joined(name, inner)
        if inner and _names_of(layers, layer):
            nested.append(f"{layer}.")
        if layout_of(module) is None and inner and width != outer:
            _refuse_matrices(layer, module, width)
        if layer in projections or layout_of(module) is None or width == outer or layer.startswith(tuple(nested)):
            continue
        if isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels == width:
            depthwise.append(layer)
        elif width in (layers.size(layer, "out"), layers.size(layer, "in")):
            raise NotPrunableError(f"{layer} has {width} channels too, and how they are used is not known")
    return depthwise


# --- inverted residuals ----------------------------------------------------------------------------------------------


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
