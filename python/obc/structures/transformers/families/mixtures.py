"""Mixtures whose experts are one tensor: Mixtral, Qwen-MoE, DeepSeek, OLMoE, gpt-oss, Llama 4.

The tensors may be transposed, have biases, and interleave gates and up projections (gpt-oss). Routers may have a bias,
and a correction bias for choosing experts; a removed expert takes its entries along.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from obc.model.experts import CORRECTION, DOWN, GATE_UP, fused_experts, is_transposed
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.layouts import layout_of
from obc.model.names import joined
from obc.structures.transformers.axes import Axis
from obc.structures.transformers.block import Block, Kind
from obc.structures.transformers.family import Family, attributes, config_keys, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

# Routers that first choose among groups of experts need groups of equal size.
_ROUTED_GROUPS = ("n_group", "num_group")


def _experts(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    if not {"experts", "expert_ffn"} & set(kinds):
        return
    if layout_of(module) is None:  # the block that contains a layer refuses it
        layers.refuse_quantised(name)
    if (weights := fused_experts(module)) is None:
        return
    stored = _stored(module, *weights)
    if "expert_ffn" in kinds:
        yield _inner_channels(layers, name, stored)
    if "experts" in kinds:
        yield _whole_experts(layers, name, stored)


@dataclass(frozen=True)
class _Stored:
    """How a module's tensors store its experts.

    Attributes:
        count: number of experts.
        width: inner channels of each expert.
        gate_up: (inner channels, 2) positions of the gate and up projection of each.
        up_dim: dimension of these positions in the gate and up projections.
        down_dim: dimension of the inner channels in the down projections.
        biases: names of the biases, (experts, outputs) each.
    """

    count: int
    width: int
    gate_up: Tensor
    up_dim: int
    down_dim: int
    biases: tuple[str, ...]


def _stored(module: nn.Module, up: Tensor, down: Tensor) -> _Stored:
    own = dict(module.named_parameters(recurse=False))
    transposed = is_transposed(up, down)
    up_dim, down_dim = (2, 1) if transposed else (1, 2)
    count, width, features = len(down), down.shape[down_dim], down.shape[3 - down_dim]
    expected = {GATE_UP: (count, 2 * width) if up_dim == 1 else (count, features), DOWN: tuple(down.shape)}
    expected[GATE_UP] = (*expected[GATE_UP], features if up_dim == 1 else 2 * width)
    with_biases = {f"{GATE_UP}_bias": (count, 2 * width), f"{DOWN}_bias": (count, features)}
    biases = tuple(key for key in with_biases if key in own)
    expected |= {key: with_biases[key] for key in biases}
    if {key: tuple(value.shape) for key, value in own.items()} != expected:
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        raise NotPrunableError(f"experts stored as {shapes} are not understood")
    if getattr(module, "is_transposed", transposed) != transposed:
        raise NotPrunableError("the experts' shapes and is_transposed contradict each other")
    up_channels = channels(width, 1, 2) if getattr(module, "is_concatenated", True) else channels(width, 2)
    return _Stored(count, width, up_channels, up_dim, down_dim, biases)


def _inner_channels(layers: Layers, name: str, stored: _Stored) -> Block:
    up, down = joined(name, GATE_UP), joined(name, DOWN)
    slices = (Slice(up, "out", stored.gate_up), Slice(name, "in", channels(stored.width, 1)))
    up_axes = [Axis(name, GATE_UP, stored.up_dim, up, "out")]
    if (bias := f"{GATE_UP}_bias") in stored.biases:
        up_axes.append(Axis(name, bias, 1, joined(name, bias), "out"))
    return Block(
        ChannelGroup(up, slices, "expert_ffn"),
        axes={(up, "out"): tuple(up_axes), (name, "in"): (Axis(name, DOWN, stored.down_dim, down, "in"),)},
        counters=layers.counters([name], {(*attributes("inner_width"), "expert_dim"): (stored.width, 1)}),
        config=layers.config_key((*config_keys("expert_width"), "intermediate_size"), 1),
    )


def _whole_experts(layers: Layers, name: str, stored: _Stored) -> Block:
    parent, count = name.rpartition(".")[0], stored.count
    router, corrections = _router(layers, parent, count)
    up, down = joined(name, GATE_UP), joined(name, DOWN)
    biases = [Axis(name, key, 0, joined(name, key), "in") for key in stored.biases]
    axes: dict[tuple[str, Side], tuple[Axis, ...]] = {
        (name, "out"): (Axis(name, GATE_UP, 0, up, "in"), Axis(name, DOWN, 0, down, "out"), *biases)
    }
    module, one = layers.modules[router], channels(count, 1)
    if layout_of(module) is None:
        keys = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        axes[router, "out"] = tuple(Axis(router, key, 0, joined(router, key), "out") for key in keys)
    slices = [Slice(router, "out", one)]
    for owner, key in corrections:
        full = joined(owner, key)
        axes[full, "out"] = (Axis(owner, key, 0, full, "out"),)
        slices.append(Slice(full, "out", one))
    top = (getattr(layers.modules[holder], "top_k", None) for holder in (router, parent))
    return Block(
        ChannelGroup(name, (*slices, Slice(name, "out", one)), "experts"),
        axes=axes,
        counters=layers.counters([name, router, parent], {attributes("experts"): (count, 1)}),
        config=layers.config_key(config_keys("experts"), 1),
        min_units=next((routed for routed in top if isinstance(routed, int)), 1),
    )


def _router(layers: Layers, parent: str, count: int) -> tuple[str, list[tuple[str, str]]]:
    """The router next to the experts, and its correction biases: (module, tensor), in it or in the block around it.

    Accepted only if both have nothing but a row per expert, a bias, and correction biases.
    """
    router = next((joined(parent, child) for child in ("gate", "router") if layers.has(parent, child)), None)
    weight = None if router is None else getattr(layers.modules[router], "weight", None)
    if router is None or not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) != count:
        raise NotPrunableError(f"no router with {count} rows was found beside it")
    corrections, others = [], []
    for holder in (router, parent):
        module = layers.modules[holder]
        inside = holder == router  # the block also contains the experts
        tensors = [*module.named_parameters(recurse=inside), *module.named_buffers(recurse=inside)]
        for key, tensor in tensors:
            one_each = tuple(tensor.shape) == (count,)
            if CORRECTION in key and one_each and "." not in key:
                corrections.append((holder, key))
            elif not (inside and (key == "weight" or (key == "bias" and one_each))):
                others.append(key)
        others += [key for key in _ROUTED_GROUPS if getattr(module, key, 1) not in (None, 1)]
    if others:
        raise NotPrunableError(f"the router {router} has more than a weight ({', '.join(dict.fromkeys(others))})")
    return router, corrections


register(Family("mixtures", blocks=_experts, kinds=(Kind("experts", whole=True), Kind("expert_ffn"))))
