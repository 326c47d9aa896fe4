"""Mixtures whose experts are one tensor: Mixtral, Qwen-MoE, DeepSeek, OLMoE, as the library holds them now."""

from collections.abc import Collection, Iterator

from torch import Tensor

from obc.model.experts import DOWN, GATE_UP, fused_experts
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.layouts import layout_of
from obc.structures.transformers.axes import Axis
from obc.structures.transformers.block import Block, Kind
from obc.structures.transformers.family import Family, attributes, config_keys, register
from obc.structures.transformers.layers import Layers, channels, joined
from obc.structures.units import NotPrunableError

# Routers that choose among groups of experts first need groups of equal size.
_ROUTED_GROUPS = ("n_group", "num_group")


def _experts(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    weights = fused_experts(module)
    if weights is None or not {"experts", "expert_ffn"} & set(kinds):
        return
    up, down = weights
    count, hidden, width = down.shape
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {GATE_UP, DOWN} or up.shape != (count, 2 * width, hidden):
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        raise NotPrunableError(f"experts stored as {shapes} are not understood")
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        raise NotPrunableError("experts whose gate and up projections are interleaved are not understood")
    if "expert_ffn" in kinds:
        yield _inner_channels(layers, name, width)
    if "experts" in kinds:
        yield _whole_experts(layers, name, count)


def _inner_channels(layers: Layers, name: str, width: int) -> Block:
    up, down = joined(name, GATE_UP), joined(name, DOWN)
    slices = (Slice(up, "out", channels(width, 1, 2)), Slice(name, "in", channels(width, 1)))
    return Block(
        ChannelGroup(up, slices, "expert_ffn"),
        axes={(up, "out"): (Axis(name, GATE_UP, 1, up, "out"),), (name, "in"): (Axis(name, DOWN, 2, down, "in"),)},
        counters=layers.counters([name], {attributes("inner_width"): (width, 1)}),
        config=layers.config_key((*config_keys("expert_width"), "intermediate_size"), 1),
    )


def _whole_experts(layers: Layers, name: str, count: int) -> Block:
    parent = name.rpartition(".")[0]
    router = _router(layers, parent, count)
    up, down = joined(name, GATE_UP), joined(name, DOWN)
    axes: dict[tuple[str, Side], tuple[Axis, ...]] = {
        (name, "out"): (Axis(name, GATE_UP, 0, up, "in"), Axis(name, DOWN, 0, down, "out"))
    }
    if layout_of(layers.modules[router]) is None:
        axes[router, "out"] = (Axis(router, "weight", 0, joined(router, "weight"), "out"),)
    one = channels(count, 1)
    top = (getattr(layers.modules[holder], "top_k", None) for holder in (router, parent))
    return Block(
        ChannelGroup(name, (Slice(router, "out", one), Slice(name, "out", one)), "experts"),
        axes=axes,
        counters=layers.counters([name, router, parent], {attributes("experts"): (count, 1)}),
        config=layers.config_key(config_keys("experts"), 1),
        min_units=next((routed for routed in top if isinstance(routed, int)), 1),
    )


def _router(layers: Layers, parent: str, count: int) -> str:
    """The router beside the experts: believed where one weight with a row for each of them is all that it has."""
    router = next((joined(parent, child) for child in ("gate", "router") if layers.has(parent, child)), None)
    weight = None if router is None else getattr(layers.modules[router], "weight", None)
    if router is None or not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) != count:
        raise NotPrunableError(f"no router with {count} rows was found beside it")
    holders = (layers.modules[router], layers.modules[parent])
    others = [key for key, _ in holders[0].named_parameters() if key != "weight"]
    others += [key for key, _ in holders[0].named_buffers()]
    # Some blocks keep a correction bias or the number of groups themselves, and hand it to the router.
    others += [key for key, _ in holders[1].named_parameters(recurse=False)]
    others += [key for key, _ in holders[1].named_buffers(recurse=False)]
    others += [key for key in _ROUTED_GROUPS if any(getattr(m, key, 1) not in (None, 1) for m in holders)]
    if others:
        raise NotPrunableError(f"the router {router} has more than a weight ({', '.join(others)})")
    return router


register(Family("mixtures", blocks=_experts, kinds=(Kind("experts", whole=True), Kind("expert_ffn"))))
