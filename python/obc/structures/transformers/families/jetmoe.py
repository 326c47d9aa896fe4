"""JetMoE: mixtures of feed-forward blocks, and of the query and output projections of attention.

Both hold their experts in two modules, each with one tensor (experts, outputs, inputs):

=================== ==================================================== =============================================
unit                in ``input_linear`` and ``output_linear``            elsewhere
=================== ==================================================== =============================================
an inner channel    its two outputs [gate | up], its input
a head              its outputs (queries), its inputs, in every expert   its rows of ``kv_proj``, [keys | values]
an expert           itself in both                                       its row of the router
=================== ==================================================== =============================================
"""

from collections.abc import Collection, Iterator

from torch import Tensor

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.names import joined
from obc.structures.transformers.block import Axis, Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Counter, Layers, channels, value_of
from obc.structures.units import NotPrunableError

_INPUT, _OUTPUT = "input_linear", "output_linear"


def _blocks(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if _experts(layers, joined(name, "experts")) is not None and layers.layer(name, "kv_proj") is not None:
        if "heads" in kinds:
            yield _heads(layers, name)
        return
    found = _experts(layers, name)
    if found is None:
        return
    up, down = found
    # Attention's experts have as many outputs as inputs; their heads are found with the attention around them.
    if "expert_ffn" in kinds and up.shape[1] == 2 * down.shape[2]:
        yield _inner_channels(layers, name, down.shape[2])
    if "experts" in kinds:
        yield _whole_experts(layers, name, len(down))


def _experts(layers: Layers, name: str) -> tuple[Tensor, Tensor] | None:
    """The weights of all experts of the module ``name``, (experts, outputs, inputs) each; None if it has none."""
    tensors = []
    for child in (_INPUT, _OUTPUT):
        weight = getattr(layers.modules.get(joined(name, child)), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return None
        tensors.append(weight)
    up, down = tensors
    return (up, down) if len(up) == len(down) and layers.layer(name, "router.layer") is not None else None


def _axes(up: str, down: str) -> dict[tuple[str, Side], tuple[Axis, ...]]:
    """The inner channels of all experts: outputs of one weight, inputs of the other."""
    return {(f"{up}.weight", "out"): (Axis(up, "weight", 1),), (down, "in"): (Axis(down, "weight", 2, "in"),)}


def _heads(layers: Layers, name: str) -> Block:
    module, experts, kv_proj = layers.modules[name], joined(name, "experts"), joined(name, "kv_proj")
    found = _experts(layers, experts)
    assert found is not None
    up, down = found
    size = getattr(module, "head_dim", None)
    width = down.shape[2]
    if not isinstance(size, int) or width % size or up.shape[1] != width or layers.size(kv_proj, "out") != 2 * width:
        raise NotPrunableError(f"{kv_proj} and the experts of {name} do not agree on heads of {size} channels")
    count, routed = width // size, getattr(module, "top_k", 1)
    queries, output = joined(experts, _INPUT), joined(experts, _OUTPUT)
    wide = channels(count, size)
    slices = (
        Slice(kv_proj, "out", channels(count, size, 2)),
        Slice(f"{queries}.weight", "out", wide),
        Slice(output, "in", wide),
    )
    counted: dict[tuple[str, ...], tuple[int, int]] = {
        ("num_key_value_heads",): (count, 1),
        ("num_heads",): (count * routed, routed),
        ("kv_projection_size", "hidden_size"): (width, size),
    }
    counters = [*layers.counters([name, experts], counted), Counter(queries, "output_size", size)]
    config = {"num_key_value_heads": 1, "num_attention_heads": routed}
    return Block(
        ChannelGroup(kv_proj, slices, "heads"),
        axes=_axes(queries, output),
        counters=(*counters, Counter(output, "input_size", size)),
        config={key: each for key, each in config.items() if value_of(layers.config, key) == count * each},
        attended=size * routed,
    )


def _inner_channels(layers: Layers, name: str, width: int) -> Block:
    up, down = joined(name, _INPUT), joined(name, _OUTPUT)
    slices = (Slice(f"{up}.weight", "out", channels(width, 1, 2)), Slice(down, "in", channels(width, 1)))
    return Block(
        ChannelGroup(f"{up}.weight", slices, "expert_ffn"),
        axes=_axes(up, down),
        counters=(
            *layers.counters([name], {("hidden_size",): (width, 1)}),
            Counter(up, "output_size", 2),
            Counter(down, "input_size", 1),
        ),
        config=layers.config_key(("intermediate_size",), 1),
    )


def _whole_experts(layers: Layers, name: str, count: int) -> Block:
    up, down, router = (joined(name, child) for child in (_INPUT, _OUTPUT, "router.layer"))
    if layers.size(router, "out") != count:
        raise NotPrunableError(f"{router} has no row for each of {count} experts")
    one = channels(count, 1)
    places = (Axis(up, "weight", 0, "in"), Axis(down, "weight", 0))
    holders = [name, joined(name, "router"), up, down]
    top = getattr(layers.modules[joined(name, "router")], "top_k", 1)
    return Block(
        ChannelGroup(name, (Slice(router, "out", one), Slice(down, "out", one)), "experts"),
        axes={(down, "out"): places},
        counters=layers.counters(holders, {("num_experts",): (count, 1)}),
        config=layers.config_key(("num_local_experts",), 1),
        min_units=top,
    )


register(Family("jetmoe", blocks=_blocks))
