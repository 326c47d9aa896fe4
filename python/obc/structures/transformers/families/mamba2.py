"""Mamba-2: the heads of its mixer, in Mamba-2, Bamba, Zamba2, Nemotron-H and the hybrid Granite models.

in_proj returns [gate | x | B | C | dt] of widths [H P | H P | G S | G S | H], for H heads of P channels in G groups,
where each group has one B and one C of S states; the convolution runs over [x | B | C]. A unit is the j-th head of
every group, so that groups stay equal; B and C stay. The gated norm takes its statistics from the remaining heads,
group by group, as a model with that many heads does.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers.block import Axis, Block, Kind
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels, value_of
from obc.structures.units import NotPrunableError

_SIZES = ("num_heads", "n_groups", "head_dim", "ssm_state_size")
_OF_HEADS = ("A_log", "D", "dt_bias")
_HEAD_KEYS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
_EXPANSIONS = ("mamba_expand", "expand")


def _mixer(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    if "mixer_heads" not in kinds or not set(_OF_HEADS) <= set(own) or layers.layer(name, "in_proj") is None:
        return
    sizes = [value for key in _SIZES if isinstance(value := getattr(module, key, None), int)]
    if len(sizes) != len(_SIZES):
        raise NotPrunableError(f"{type(module).__name__} does not say its heads, groups and sizes")
    heads, groups, size, states = sizes
    width, shared = heads * size, groups * states
    in_proj, conv1d, out_proj = (joined(name, child) for child in ("in_proj", "conv1d", "out_proj"))
    widths = {in_proj: 2 * width + 2 * shared + heads, conv1d: width + 2 * shared}
    if any(layers.size(layer, "out") != expected for layer, expected in widths.items()):
        raise NotPrunableError(f"its widths are not those of {heads} heads of {size} channels in {groups} groups")
    if set(own) != set(_OF_HEADS) or any(len(parameter) != heads for parameter in own.values()) or heads % groups:
        raise NotPrunableError(f"{type(module).__name__} has other parameters than one number a head")
    if buffers := [key for key, _ in module.named_buffers(recurse=False)]:
        raise NotPrunableError(f"its buffer {buffers[0]} scales what in_proj returns, channel by channel")
    each = heads // groups
    one, wide = channels(each, 1, groups), channels(each, size, groups)
    gate_x_dt = torch.cat([wide, width + wide, 2 * (width + shared) + one], 1)
    slices = [Slice(in_proj, "out", gate_x_dt), Slice(conv1d, "out", wide)]
    slices += [Slice(joined(name, key), "out", one) for key in _OF_HEADS]
    slices += _norm(layers, name, width, wide)
    per_unit = groups * size
    counted: dict[tuple[str, ...], tuple[int, int]] = {
        ("num_heads",): (heads, groups),
        ("intermediate_size",): (width, per_unit),
        ("conv_dim",): (width + 2 * shared, per_unit),
    }
    counters = layers.counters([name], counted)
    if layers.has(name, "norm"):
        counters += layers.counters([joined(name, "norm")], {("group_size",): (width // groups, size)})
    yield Block(
        ChannelGroup(in_proj, (*slices, Slice(out_proj, "in", wide)), "mixer_heads"),
        axes={(joined(name, key), "out"): (Axis(name, key, 0, joined(name, key), "out"),) for key in _OF_HEADS},
        counters=counters,
        config=_config(layers, heads, groups, size),
    )


def _norm(layers: Layers, name: str, width: int, wide: Tensor) -> list[Slice]:
    weight = getattr(layers.modules.get(joined(name, "norm")), "weight", None)
    if weight is None:
        return []
    if tuple(weight.shape) != (width,):
        raise NotPrunableError(f"{joined(name, 'norm')} is not over the {width} channels of its heads")
    return [Slice(joined(name, "norm"), "out", wide)]


def _config(layers: Layers, heads: int, groups: int, size: int) -> dict[str, float]:
    """Keys that count heads, and the width that the config expresses as a multiple of the hidden size."""
    found: dict[str, float] = {key: groups for key in _HEAD_KEYS if value_of(layers.config, key) == heads}
    hidden, width = getattr(layers.config, "hidden_size", None), groups * size
    for key in _EXPANSIONS:
        expanded = value_of(layers.config, key)
        if hidden and expanded and int(expanded * hidden) == heads * size and found:
            found[key] = width / hidden
    return found


register(Family("mamba2", blocks=_mixer, kinds=(Kind("mixer_heads", whole=True),)))
