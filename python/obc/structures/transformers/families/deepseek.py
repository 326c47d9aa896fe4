"""DeepSeek and similar models (Kimi, GLM, LongCat): latent attention.

What the heads share stays; each head has its own rows in the second projections. A row of q_b_proj belongs to one
head's query, a row of kv_b_proj to its key or its value, whose sizes may differ. The rotary part of the keys comes from
the first projection, for all heads.
"""

from collections.abc import Collection, Iterator

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.names import joined
from obc.structures.transformers.attention import output_of, refuse_other_parameters
from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, attributes, config_keys, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.transformers.per_head import per_head
from obc.structures.units import NotPrunableError

_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_QUERIES = ("q_b_proj", "q_gate_proj", "q_proj")
_COMMON = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")


def _is_latent(layers: Layers, name: str) -> bool:
    return layers.layer(name, "kv_b_proj") is not None


def _latent_attention(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if "heads" not in kinds or not _is_latent(layers, name):
        return
    names = (child for child in _QUERIES if layers.layer(name, child) is not None)
    queries = joined(name, next(names, "q_proj"))
    keys_and_values, output = joined(name, "kv_b_proj"), output_of(layers, name)
    if output is None or queries not in layers.modules:
        raise NotPrunableError(f"latent attention without {'output' if output is None else 'query'} projection")
    plain, rotary, value = layers.counts(name, *_SIZES)
    gate = value if queries.endswith("q_gate_proj") else 0  # gates the output; beside each head's query
    rows = {queries: plain + rotary + gate, keys_and_values: plain + value, output: value}
    widths = [layers.size(layer, "in" if layer == output else "out") for layer in rows]
    count = widths[-1] // value
    if widths != [count * size for size in rows.values()]:
        raise NotPrunableError(f"its widths {widths} are not {count} heads of {[*rows.values()]} channels")
    common = {joined(name, child) for child in _COMMON}
    others = per_head(layers, name, {"queries": count}, value)
    refuse_other_parameters(layers, name, {*rows, *common, *(found.name for found in others)}, plain + rotary)
    slices = [Slice(layer, "in" if layer == output else "out", channels(count, size)) for layer, size in rows.items()]
    slices += [found.slice_of(channels(count, 1)) for found in others]
    counted = (*attributes("heads"), *attributes("key_value_heads"))
    yield Block(
        ChannelGroup(queries, tuple(slices), "heads"),
        axes={(found.name, "out"): found.axes for found in others if found.axes is not None},
        counters=layers.counters([name], {counted: (count, 1)}),
        config=layers.config_key(("num_attention_heads",), 1) | layers.config_key(config_keys("key_value_heads"), 1),
        attended=(plain + rotary + value) / 2,
    )


def _inner_sides(layers: Layers, name: str) -> set[tuple[str, Side]]:
    if not _is_latent(layers, name) or output_of(layers, name) is None:
        return set()
    return {(joined(name, child), "in") for child in ("q_b_proj", "q_gate_proj", "kv_b_proj")}


register(
    Family(
        "deepseek",
        headless=("indexer", "k_rope_only_layernorm"),  # chooses positions for all heads; norm of shared keys
        blocks=_latent_attention,
        inner_sides=_inner_sides,
    )
)
