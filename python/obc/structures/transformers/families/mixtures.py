"""Mixtures whose experts are one tensor: Mixtral, Qwen-MoE, DeepSeek, OLMoE, gpt-oss, Llama 4, Nemotron-H, Gemma 4.

The tensors may be transposed, have biases, have no gates (Nemotron-H), and interleave gates and up projections
(gpt-oss). Routers multiply by a weight of their own or contain a linear layer with an output for each expert, and may
have a bias, a correction bias for choosing experts, and a factor for each expert's weight (Gemma 4); a removed expert
takes its entries along, and rows behind the experts' stay. Of routers that first choose among groups of experts, a unit
is the k-th expert of every group, so that the groups stay of equal size.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from obc.model.experts import DOWN, fused_experts, is_correction, is_gated, is_transposed, up_name
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.layouts import layout_of
from obc.model.names import joined
from obc.structures.transformers.block import Axis, Block, Kind
from obc.structures.transformers.family import Family, attributes, config_keys, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.transformers.routing import ROUTERS, experts_per_token
from obc.structures.units import NotPrunableError

# How many groups of consecutive experts, of equal size, a router first chooses among.
_ROUTED_GROUPS = ("n_group", "num_group", "n_groups", "num_groups", "num_expert_group", "n_expert_groups")
# How many rows a router has if those behind the experts' are for tokens that skip all (LongCat, Zaya), or for shared
# experts (Inkling).
_ROWS = ("num_router_classes", "n_total_experts", "n_routed_experts", "total_experts")
# Factors of the experts' weights.
_FACTORS = ("per_expert_scale",)


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
        up_name: name of the tensor of the (gate and) up projections.
        count: number of experts.
        width: inner channels of each expert.
        up: (inner channels, 1 or 2) positions of the up projection of each, or of its gate and up projection.
        up_dim: dimension of these positions in the tensor.
        down_dim: dimension of the inner channels in the down projections.
        biases: names of the biases, (experts, outputs) each.
    """

    up_name: str
    count: int
    width: int
    up: Tensor
    up_dim: int
    down_dim: int
    biases: tuple[str, ...]


def _stored(module: nn.Module, up: Tensor, down: Tensor) -> _Stored:
    own, name, copies = dict(module.named_parameters(recurse=False)), up_name(module), 2 if is_gated(module) else 1
    assert name is not None
    transposed = is_transposed(up, down)
    up_dim, down_dim = (2, 1) if transposed else (1, 2)
    count, width, features = len(down), down.shape[down_dim], down.shape[3 - down_dim]
    ups = len(up) if len(up) == vars(module).get("total_experts") else count
    expected = {name: (ups, copies * width) if up_dim == 1 else (ups, features), DOWN: tuple(down.shape)}
    expected[name] = (*expected[name], features if up_dim == 1 else copies * width)
    with_biases = {f"{name}_bias": (count, copies * width), f"{DOWN}_bias": (count, features)}
    biases = tuple(key for key in with_biases if key in own)
    expected |= {key: with_biases[key] for key in biases}
    if {key: tuple(value.shape) for key, value in own.items()} != expected:
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        raise NotPrunableError(f"experts stored as {shapes} are not understood")
    if getattr(module, "is_transposed", transposed) != transposed:
        raise NotPrunableError("the experts' shapes and is_transposed contradict each other")
    concatenated = copies == 1 or getattr(module, "is_concatenated", True)
    up_channels = channels(width, 1, copies) if concatenated else channels(width, copies)
    return _Stored(name, count, width, up_channels, up_dim, down_dim, biases)


def _inner_channels(layers: Layers, name: str, stored: _Stored) -> Block:
    up = joined(name, stored.up_name)
    slices = (Slice(up, "out", stored.up), Slice(name, "in", channels(stored.width, 1)))
    up_axes = [Axis(name, stored.up_name, stored.up_dim)]
    if (bias := f"{stored.up_name}_bias") in stored.biases:
        up_axes.append(Axis(name, bias, 1))
    return Block(
        ChannelGroup(up, slices, "expert_ffn"),
        axes={(up, "out"): tuple(up_axes), (name, "in"): (Axis(name, DOWN, stored.down_dim, "in"),)},
        counters=layers.counters([name], {(*attributes("inner_width"), "expert_dim"): (stored.width, 1)}),
        config=layers.config_key((*config_keys("expert_width"), "intermediate_size"), 1),
    )


@dataclass(frozen=True)
class _Router:
    """The router of a mixture.

    Attributes:
        name: name of the module beside the experts.
        logits: name of the module with a weight that has a row for each expert: it, or a linear layer inside.
        others: (module, tensor, dimension of the experts) with an entry for each expert.
        rows: of that weight; those behind the experts' stay.
        groups: number of groups of consecutive experts that it first chooses among.
        chosen_groups: how many of these it chooses for a token.
        least: the number of experts that each group needs, so that its scores can be computed.
    """

    name: str
    logits: str
    others: tuple[tuple[str, str, int], ...]
    rows: int
    groups: int
    chosen_groups: int
    least: int


def _whole_experts(layers: Layers, name: str, stored: _Stored) -> Block:
    parent, count = name.rpartition(".")[0], stored.count
    router = _router(layers, parent, count)
    routed = experts_per_token(layers.modules, name)
    if routed is None:
        raise NotPrunableError(
            f"to how many experts {router.name} sends a token is not known, so neither is how many must stay"
        )
    inputs = [Axis(name, key, 0, "in") for key in (stored.up_name, *stored.biases)]
    axes: dict[tuple[str, Side], tuple[Axis, ...]] = {(name, "out"): (inputs[0], Axis(name, DOWN, 0), *inputs[1:])}
    module, one = layers.modules[router.logits], channels(count // router.groups, 1, router.groups)
    if layout_of(module) is None:
        keys = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        axes[router.logits, "out"] = tuple(Axis(router.logits, key, 0) for key in keys)
    slices = [Slice(router.logits, "out", one)]
    for owner, key, dim in router.others:
        full = joined(owner, key)
        axes[full, "out"] = (Axis(owner, key, dim),)
        slices.append(Slice(full, "out", one))
    holders = dict.fromkeys((name, router.name, router.logits, parent))
    counted = {attributes("experts"): (count, router.groups)}
    if router.rows > count:
        counted[_ROWS] = router.rows, router.groups
    return Block(
        ChannelGroup(name, (*slices, Slice(name, "out", one)), "experts"),
        axes=axes,
        counters=layers.counters([*holders], counted),
        config=layers.config_key(config_keys("experts"), router.groups),
        min_units=max(-(-routed // router.chosen_groups), router.least),
    )


def _router(layers: Layers, parent: str, count: int) -> _Router:
    """The router beside the experts.

    Accepted only if every tensor that it and the block around it have is known: the rows of the logits' weight, entries
    for each expert, and floating tensors without a dimension of this size, which have no entry for an expert.
    """
    router = next((joined(parent, child) for child in ROUTERS if layers.has(parent, child)), None)
    logits = None if router is None else _logits(layers, router, count)
    if router is None:
        raise NotPrunableError(f"no router was found beside it, by the names {' or '.join(ROUTERS)}")
    if logits is None:
        shapes = {key: tuple(one.shape) for key, one in layers.modules[router].named_parameters() if one.dim() == 2}
        raise NotPrunableError(
            f"of the router {router} no single weight has {count} rows, one for each expert; it has {shapes}"
        )
    rows = len(layers.modules[logits].weight)  # type: ignore[arg-type]
    own, others, refused = {f"{logits}.weight", f"{logits}.bias"}, [], []
    for holder in (router, parent):
        module = layers.modules[holder]
        inside = holder == router  # the block also contains the experts
        tensors = [*module.named_parameters(recurse=inside), *module.named_buffers(recurse=inside)]
        for key, tensor in tensors:
            owner, _, last = joined(holder, key).rpartition(".")
            if joined(owner, last) in own:
                continue
            one_each = tensor.shape in ((count,), (1, count), (rows,), (1, rows))
            if one_each and (is_correction(last) or last in _FACTORS):
                others.append((owner, last, tensor.dim() - 1))
            elif {count, rows} & set(tensor.shape) or not tensor.is_floating_point():
                refused.append(key)
    if refused:
        raise NotPrunableError(f"the router {router} has more than a weight ({', '.join(dict.fromkeys(refused))})")
    return _Router(router, logits, tuple(others), rows, *_routed_groups(layers, router, parent, count))


def _routed_groups(layers: Layers, router: str, parent: str, count: int) -> tuple[int, int, int]:
    """The number of groups of experts, how many of them a token is sent to, and how many experts each needs."""
    holders = [vars(layers.modules[name]) for name in (router, parent)]
    said = {key: holder[key] for holder in holders for key in _ROUTED_GROUPS if type(holder.get(key)) is int}
    groups = max(said.values(), default=1)
    chosen = next((holder["topk_group"] for holder in holders if holder.get("topk_group") is not None), None)
    # DeepSeek-V3's routers add the two best scores of each group, even of a single one; DeepSeek-V2's take the best.
    least = 1 if chosen is None or "topk_method" in holders[0] else 2
    if groups == 1:
        return 1, 1, least
    if count % groups or chosen is None:
        key, value = next((key, value) for key, value in said.items() if value == groups)
        raise NotPrunableError(
            f"the router {router} first chooses among {value} groups of experts ({key}), "
            + (f"which don't divide {count} experts" if chosen is not None else "how many of them, it does not say")
        )
    return groups, chosen, least


def _logits(layers: Layers, router: str, count: int) -> str | None:
    """The router, or the only module inside it, whose weight has a row for each expert; None if there are several."""
    said = vars(layers.modules[router])
    totals = {said[key] for key in _ROWS if type(said.get(key)) is int and said[key] > count}
    for counts in ({count}, totals):
        found = []
        for inner, module in layers.modules[router].named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) in counts:
                found.append(joined(router, inner) if inner else router)
        if found:
            return found[0] if len(found) == 1 else None
    return None


register(Family("mixtures", blocks=_experts, kinds=(Kind("experts", whole=True), Kind("expert_ffn"))))
