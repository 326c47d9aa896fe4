"""Gated delta rule: the heads of linear attention in Qwen3-Next, Qwen3.5, OLMo hybrid, Kimi Linear and Bailing.

A unit is a head of keys with the heads of values that share it. The following norm treats each head separately, so
heads don't affect each other. What a unit takes:

========================= ==========================================================================================
module                    in the projections
========================= ==========================================================================================
``in_proj_qkvz``          of each key head [query | key | values | gates]; ``in_proj_ba`` the same of b and a
``in_proj_qkv``           [all queries | all keys | all values]; ``in_proj_z``, ``in_proj_b``, ``in_proj_a``
``q_proj`` ... ``g_proj`` one projection each
``forget_gate`` inside    as many values as keys; its last projection, A_log and dt_bias (Kimi's delta attention)
========================= ==========================================================================================

The convolution runs over [all queries | all keys | all values].
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels, says
from obc.structures.units import NotPrunableError

_SIZES = ("num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim")
_FORGET = ("f_b_proj", "f_proj")


def _delta_net(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    if "mixer_heads" not in kinds or layers.layer(name, "conv1d") is None:
        return
    if layers.has(name, "forget_gate"):
        yield _forgetting(layers, name)
        return
    sizes = [value for key in _SIZES if isinstance(value := getattr(module, key, None), int)]
    if len(sizes) != len(_SIZES):
        return
    values, keys, key_size, value_size = sizes
    each = values // keys
    keyed, valued, one = channels(keys, key_size), channels(keys, each * value_size), channels(keys, each)
    mixed = _mixed(keyed, valued)
    if layers.layer(name, "in_proj_qkvz") is not None:
        projected = {
            "in_proj_qkvz": channels(keys, 2 * key_size + 2 * each * value_size),
            "in_proj_ba": channels(keys, 2 * each),
        }
    elif layers.layer(name, "in_proj_qkv") is not None:
        projected = {"in_proj_qkv": mixed, "in_proj_z": valued, "in_proj_b": one, "in_proj_a": one}
    else:
        projected = {"q_proj": keyed, "k_proj": keyed, "v_proj": valued, "g_proj": valued, "b_proj": one, "a_proj": one}
    projected["conv1d"] = mixed
    counted: dict[tuple[str, ...], tuple[int, int]] = {
        ("num_v_heads",): (values, each),
        ("num_k_heads",): (keys, 1),
        ("key_dim",): (keys * key_size, key_size),
        ("value_dim",): (values * value_size, each * value_size),
        ("conv_dim",): (mixed.numel(), mixed.shape[1]),
    }
    yield _block(
        layers,
        name,
        projected,
        valued,
        {joined(name, "A_log"): (0, one), joined(name, "dt_bias"): (0, one)},
        counted,
        {"linear_num_value_heads": each, "linear_num_key_heads": 1},
    )


def _forgetting(layers: Layers, name: str) -> Block:
    """Kimi's variant: every head has a query, a key and a value of one size."""
    gate = joined(name, "forget_gate")
    heads, size = layers.counts(name, "num_heads", "head_dim")
    wide, one = channels(heads, size), channels(heads, 1)
    projected = {"q_proj": wide, "k_proj": wide, "v_proj": wide, "b_proj": one, "conv1d": channels(heads, size, 3)}
    projected |= {child: wide for child in ("g_b_proj",) if layers.has(name, child)}
    if "g_b_proj" not in projected:
        projected["g_proj"] = wide
    projected |= {f"forget_gate.{child}": wide for child in _FORGET if layers.has(gate, child)}
    shape = list(layers.modules[gate].A_log.shape)  # type: ignore[union-attr, arg-type]
    if shape.count(heads) != 1:
        raise NotPrunableError(f"{gate}.A_log of shape {tuple(shape)} has no dimension for its {heads} heads")
    return _block(
        layers,
        name,
        projected,
        wide,
        {joined(gate, "A_log"): (shape.index(heads), one), joined(gate, "dt_bias"): (0, wide)},
        {("num_heads",): (heads, 1), ("qkv_dim",): (heads * size, size), ("conv_dim",): (3 * heads * size, 3 * size)},
        {"linear_num_heads": 1},
        (gate,),
    )


def _mixed(keyed: Tensor, valued: Tensor) -> Tensor:
    """(heads, channels) of [all queries | all keys | all values]."""
    return torch.cat([keyed, keyed.numel() + keyed, 2 * keyed.numel() + valued], 1)


def _block(
    layers: Layers,
    name: str,
    projected: Mapping[str, Tensor],
    consumed: Tensor,
    parameters: Mapping[str, tuple[int, Tensor]],
    counted: Mapping[tuple[str, ...], tuple[int, int]],
    config: Mapping[str, int],
    also: tuple[str, ...] = (),
) -> Block:
    """The heads, if all shapes agree and no other module inside has channels of heads.

    Args:
        projected: layer -> the out channels of every head.
        consumed: in channels of the output projection.
        parameters: parameter -> the dimension of heads, and its entries.
        counted: attributes of the mixer, and of the modules ``also``, that count heads.
        config: key -> how much a head counts.
        also: further modules with such attributes.
    """
    output = next((child for child in ("out_proj", "o_proj") if layers.layer(name, child) is not None), None)
    if output is None:
        raise NotPrunableError("no output projection was found")
    produced = {joined(name, child): found for child, found in projected.items()}
    known = {*produced, joined(name, output)}
    for child, module in layers.modules[name].named_modules():
        own = joined(name, child)
        weight = getattr(module, "weight", None)
        if not child or own in known or not isinstance(weight, Tensor) or consumed.numel() not in weight.shape:
            continue
        if weight.dim() > 1 or len(weight) != consumed.shape[1]:
            raise NotPrunableError(f"{own} has {consumed.numel()} channels too, and how they are used is not known")
    return block_of(
        layers,
        "mixer_heads",
        produced,
        {joined(name, output): consumed},
        parameters,
        counters=layers.counters([name, *also], dict(counted)),
        config={key: per_unit for key, per_unit in config.items() if says(layers.config, key)},
    )


register(Family("delta_net", blocks=_delta_net))
