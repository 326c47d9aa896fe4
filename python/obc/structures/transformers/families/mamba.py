"""Mamba's mixers: the inner channels of the first, the heads of Mamba-2's and Zamba's.

In Mamba-2, Bamba, Zamba2, Nemotron-H and the hybrid Granite models in_proj returns [gate | x | B | C | dt] of widths
[H P | H P | G S | G S | H], for H heads of P channels in G groups, where each group has one B and one C of S states.
The convolution runs over [x | B | C]. A unit is the j-th head of every group, so that groups stay equal; B and C stay.
The gated norm takes its statistics from the remaining heads, group by group, as a model with that many heads does.

In Zamba in_proj returns, for one channel after another, its input and its gate; the projections to the state space are
parameters with an entry for every head.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers.block import Axis, Block, Kind, block_of
from obc.structures.transformers.family import Family, attributes, register
from obc.structures.transformers.layers import Layers, channels, value_of
from obc.structures.units import NotPrunableError

_LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_SIZES = ("num_heads", "n_groups", "head_dim", "ssm_state_size")
_OF_HEADS = ("A_log", "D", "dt_bias")
_HEAD_KEYS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
_EXPANSIONS = ("mamba_expand", "expand")
_OF_ZAMBAS_HEADS = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")


def _channels(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    # The mixers of Mamba-2 and Zamba have heads.
    if "mamba" not in kinds or "A_log" not in own or {"dt_bias", "x_proj_weight"} & set(own):
        return
    if set(own) != {"A_log", "D"} or not all(layers.has(name, child) for child in _LAYERS):
        raise NotPrunableError(f"{type(module).__name__} has other layers than Mamba's mixer")
    in_proj, conv1d, x_proj, dt_proj, out_proj = (joined(name, child) for child in _LAYERS)
    width = layers.size(out_proj, "in")
    one = channels(width, 1)
    yield block_of(
        layers,
        "mamba",
        {in_proj: channels(width, 1, 2), conv1d: one, dt_proj: one},
        {x_proj: one, out_proj: one},
        {joined(name, key): (0, one) for key in own},
        counters=layers.counters([name], {attributes("inner_width"): (width, 1)}),
        config=layers.config_key(("intermediate_size",), 1),
    )


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    if "mixer_heads" not in kinds or not set(_OF_HEADS) <= set(own) or layers.layer(name, "in_proj") is None:
        return
    heads, groups, size, states = layers.counts(name, *_SIZES)
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
        axes={(joined(name, key), "out"): (Axis(name, key, 0),) for key in _OF_HEADS},
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


def _heads_of_zamba(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    if "mixer_heads" not in kinds or "x_proj_weight" not in own:
        return
    if set(own) != set(_OF_ZAMBAS_HEADS):
        raise NotPrunableError(f"{type(module).__name__} has other parameters than {', '.join(_OF_ZAMBAS_HEADS)}")
    in_proj, conv1d, out_proj = (joined(name, child) for child in ("in_proj", "conv1d", "out_proj"))
    heads, width = len(own["x_proj_weight"]), layers.size(out_proj, "in")
    size, hidden = width // heads, value_of(layers.config, "hidden_size")
    wide = channels(heads, size)
    said = bool(hidden) and value_of(layers.config, "n_mamba_heads") == heads
    yield block_of(
        layers,
        "mixer_heads",
        {in_proj: channels(heads, 2 * size), conv1d: wide},
        {out_proj: wide},
        {joined(name, key): (0, channels(heads, 1)) for key in _OF_ZAMBAS_HEADS},
        counters=layers.counters([name], {("n_mamba_heads",): (heads, 1), ("intermediate_size",): (width, size)}),
        config={"n_mamba_heads": 1, "mamba_expand": size / hidden} if said else {},
    )


register(Family("mamba", blocks=_channels, kinds=(Kind("mamba"),)))
register(Family("mamba2", blocks=_heads, kinds=(Kind("mixer_heads", whole=True),)))
register(Family("zamba", blocks=_heads_of_zamba))
