"""The residual stream: every side of hidden size that is not an inner width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.layouts import is_depthwise
from obc.model.names import joined
from obc.structures.transformers import attention
from obc.structures.transformers.block import Axis, Block
from obc.structures.transformers.family import FAMILIES, attributes, config_keys
from obc.structures.transformers.layers import Counter, Layers, channels
from obc.structures.transformers.per_head import is_attention
from obc.structures.units import NotPrunableError


def embedding(layers: Layers, inner: Mapping[str, Block], left_out: Mapping[str, str]) -> Iterator[Block]:
    """The channels of the residual stream.

    Args:
        inner: its other blocks, of all default kinds.
        left_out: default blocks that were not understood.
    """
    hidden = getattr(layers.config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise NotPrunableError("the config has no hidden_size")
    if any(block.group.kind in ("experts", "expert_ffn") for block in inner.values()) or left_out:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise NotPrunableError(f"the residual stream passes through fused experts or what is unknown {reasons}")
    if hidden in (getattr(layers.config, "num_labels", None), getattr(layers.config, "vocab_size", None)):
        raise NotPrunableError(f"the hidden size {hidden} is also a number of labels or tokens")
    taken = {(part.module, part.side) for block in inner.values() for part in block.group.slices}
    attending = {name: sides for name in layers.modules if (sides := _attention_sides(layers, name)) is not None}
    taken |= {side for sides in attending.values() for side in sides}
    # Both sides of a depthwise convolution are the same channels.
    taken |= {(name, "in") for name, _ in taken if name in layers.modules and is_depthwise(layers.modules[name])}
    slices, axes = _stream(layers, hidden, taken)
    yield Block(
        ChannelGroup(embedding_name(layers), tuple(slices), "embedding"),
        axes=axes,
        counters=tuple(
            Counter(name, key, 1)
            for name, module in layers.modules.items()
            for key in attributes("hidden_size")
            if vars(module).get(key) == hidden and name not in attending
        ),
        config=layers.config_key(config_keys("hidden_size"), 1),
        config_fixed=_fixed_head_size(inner),
    )


def embedding_name(layers: Layers) -> str:
    """The name of the model's first embedding."""
    return next((name for name, module in layers.modules.items() if isinstance(module, nn.Embedding)), "embedding")


def _stream(
    layers: Layers, hidden: int, taken: set[tuple[str, Side]]
) -> tuple[list[Slice], dict[tuple[str, Side], tuple[Axis, ...]]]:
    """The slices of every side with ``hidden`` channels that isn't taken, and the axes of parameters outside layers."""
    head = getattr(layers.model, "get_output_embeddings", lambda: None)()
    one = channels(hidden, 1)
    slices: list[Slice] = []
    axes: dict[tuple[str, Side], tuple[Axis, ...]] = {}
    for name, module in layers.modules.items():
        sides: list[Side] = ["in"] if module is head else ["out", "in"]
        for side in sides:
            if (name, side) not in taken and layers.size_or_none(name, side) == hidden:
                slices.append(Slice(name, side, one))
        for key, parameter in module.named_parameters(recurse=False):
            full = joined(name, key)
            if key not in ("weight", "bias") and parameter.dim() > 1 and parameter.shape[-1] == hidden:
                axes[full, "out"] = (Axis(name, key, parameter.dim() - 1),)
                slices.append(Slice(full, "out", one))
    return slices, axes


def _attention_sides(layers: Layers, name: str) -> set[tuple[str, Side]] | None:
    """The inner sides of the attention ``name``; None if the module is not one."""
    found = [family.inner_sides(layers, name) for family in FAMILIES.values() if family.inner_sides is not None]
    own = set().union(*found)
    if own or is_attention(layers, name):
        return own | attention.inner_sides(layers, name)
    return None


def _fixed_head_size(blocks: Mapping[str, Block]) -> dict[str, int]:
    sizes = {block.config_fixed["head_dim"] for block in blocks.values() if "head_dim" in block.config_fixed}
    return {"head_dim": sizes.pop()} if len(sizes) == 1 else {}
