"""Finding the prunable widths of a transformers model, from the names and shapes of its layers and its config.

Nothing is traced and transformers is not imported: a block is known by how its layers are called in the library, and
believed only where all their shapes agree. What looks like a block and is not understood is named with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.layouts import layout_of
from obc.structures.transformers.axes import Axis
from obc.structures.transformers.heads import Heads, head_channels
from obc.structures.transformers.layers import Counter, Layers, NotPrunableError, channels, joined

KINDS = ("ffn", "heads", "query_heads", "experts", "expert_ffn", "mamba", "embedding")
DEFAULT_KINDS = ("ffn", "heads", "experts", "expert_ffn", "mamba")

_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_PLAIN = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("lin1", "lin2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("intermediate.dense", "output.dense"),
)
_FUSED_GATED = (("gate_up_proj", "down_proj"),)
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_FUSED_PROJECTIONS = ("c_attn", "qkv_proj")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "out_lin", "dense")
_LATENT_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_LATENT_COMMON = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
_UNREADABLE = ("query_key_value", "Wqkv", "in_proj_qkv", "qkv")

# What modules call the counts that pruning changes.
_INNER_WIDTH = ("intermediate_size", "intermediate_dim", "ffn_dim", "inner_dim")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_ATTENTION_WIDTH = ("all_head_size", "split_size", "embed_dim", "dim")
_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ROUTED_GROUPS = ("n_group", "num_group")
_TABLE = "relative_position_bias_table"
_HIDDEN = ("hidden_size", "hidden_dim", "embed_dim")


@dataclass(frozen=True, eq=False)
class Block:
    """A group, and everything besides its weights that changes when units go.

    Attributes:
        group: as the model is now.
        axes: for slices of tensors outside any ordinary layer, where they lie.
        counters: attributes of modules that count units.
        config: config key -> how much a unit counts there.
        config_fixed: config key -> a value that must be written down once units are gone (it was derived before).
        reads_config: a module whose forward reads these counts from its config, as layers with one projection for
            queries, keys and values do.
        min_units: so many must stay for the model to run.
        attended: channels per unit in the products of queries with keys and of weights with values, the mean of both.
        family: groups of one family keep equal widths where widths are uniform: the config counts them as one.
    """

    group: ChannelGroup
    axes: Mapping[tuple[str, Side], tuple[Axis, ...]] = field(default_factory=dict)
    counters: tuple[Counter, ...] = ()
    config: Mapping[str, int] = field(default_factory=dict)
    config_fixed: Mapping[str, int] = field(default_factory=dict)
    reads_config: str | None = None
    min_units: int = 1
    attended: float = 0.0

    @property
    def family(self) -> tuple[str, ...]:
        return tuple(self.config) or (self.group.kind,)


class Finder(Layers):
    """Finds the blocks of one model.

    Attributes:
        blocks: by group name, in the order of the model.
        left_out: what looks like a block -> why it is none that can be pruned.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str]) -> None:
        super().__init__(model)
        self.blocks: dict[str, Block] = {}
        self.left_out: dict[str, str] = {}
        for name in self.modules:
            if "ffn" in kinds:
                self._add(name, self._feed_forwards(name))
            if {"heads", "query_heads"} & set(kinds):
                self._add(name, self._attentions(name, kinds))
            if {"experts", "expert_ffn"} & set(kinds):
                self._add(name, self._experts(name, kinds))
            if "mamba" in kinds:
                self._add(name, self._mambas(name))
        if "embedding" in kinds:
            self._add(_embedding_name(self.modules), self._embeddings())
        place = {name: index for index, name in enumerate(self.modules)}
        first = {name: block.group.slices[0].module for name, block in self.blocks.items()}
        order = sorted(
            self.blocks, key=lambda name: place.get(first[name], place.get(first[name].rpartition(".")[0], 0))
        )
        self.blocks = {name: self.blocks[name] for name in order}

    def _add(self, name: str, found: Iterator[Block]) -> None:
        try:
            for block in found:
                self.blocks[block.group.name] = block
        except NotPrunableError as reason:
            self.left_out[name] = str(reason)

    # --- feed-forward ----------------------------------------------------------------------------------------------

    def _feed_forwards(self, name: str) -> Iterator[Block]:
        shapes: Sequence[tuple[Sequence[tuple[str, ...]], int]] = ((_GATED, 1), (_FUSED_GATED, 2), (_PLAIN, 1))
        for candidates, copies in shapes:
            for names in candidates:
                layers = [self._layer(name, child) for child in names]
                if all(layer is not None for layer in layers):
                    yield self._feed_forward(name, [joined(name, child) for child in names], copies)
                    return

    def _feed_forward(self, name: str, layers: Sequence[str], copies: int) -> Block:
        *producers, consumer = layers
        width = self._size(consumer, "in")
        for producer in producers:
            if self._size(producer, "out") != copies * width:
                raise NotPrunableError(
                    f"{producer} has {self._size(producer, 'out')} outputs, {consumer} {width} inputs"
                )
        for child in self._inner_norms(name, width, self._size(consumer, "out")):
            raise NotPrunableError(f"{child} normalises over the {width} channels")
        slices = [Slice(layer, "out", channels(width, 1, copies)) for layer in producers]
        slices += [Slice(layer, "out", channels(width, 1)) for layer in self._between(name, layers, width)]
        slices.append(Slice(consumer, "in", channels(width, 1)))
        keys: tuple[str, ...] = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")
        if "shared_expert" in name:
            keys = ("shared_expert_intermediate_size",)
            if getattr(self.config, "n_shared_experts", None) == 1:  # of several, DeepSeek's config says a product
                keys = (*keys, "moe_intermediate_size")
        elif ".experts." in name:
            keys = ("moe_intermediate_size", *keys)
        return Block(
            ChannelGroup(producers[0], tuple(slices), "ffn"),
            counters=self._counters([name], {_INNER_WIDTH: (width, 1)}),
            config=self._config_key(keys, 1),
        )

    def _inner_norms(self, name: str, width: int, outer: int) -> Iterator[str]:
        for child_name, child in self.modules[name].named_children():
            weight = getattr(child, "weight", None)
            if width != outer and isinstance(weight, Tensor) and weight.dim() == 1 and len(weight) == width:
                yield joined(name, child_name)

    def _between(self, name: str, layers: Sequence[str], width: int) -> list[str]:
        """Depthwise convolutions over the inner channels; what else has so many is not understood."""
        outer = self._size(layers[-1], "out")
        between = []
        for inner, module in self.modules[name].named_modules():
            layer = joined(name, inner)
            if layer in layers or layout_of(module) is None or width == outer:
                continue
            if isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels == width:
                between.append(layer)
            elif width in (self._size(layer, "out"), self._size(layer, "in")):
                raise NotPrunableError(f"{layer} has {width} channels too, and how they are used is not known")
        return between

    # --- attention -------------------------------------------------------------------------------------------------

    def _attentions(self, name: str, kinds: Sequence[str]) -> Iterator[Block]:
        for child in _UNREADABLE:
            if self._layer(name, child) is not None:
                raise NotPrunableError(f"the order of queries, keys and values in {joined(name, child)} is not known")
        if all(self._layer(name, child) is not None for child in ("q", "k", "v", "o")):
            raise NotPrunableError("attention with a bias of its own for relative positions is not understood")
        if self._is_latent(name):
            if "heads" in kinds:
                yield self._latent_attention(name)
            return
        for names in _PROJECTIONS:
            if all(self._layer(name, child) is not None for child in names):
                projections = [joined(name, child) for child in names]
                break
        else:
            projections = [joined(name, child) for child in _FUSED_PROJECTIONS if self._layer(name, child) is not None]
        if not projections:
            return
        output = self._output(name)
        if output is None:
            raise NotPrunableError("no output projection was found")
        heads = self._head_shapes(name, projections, output)
        grouped = heads.queries // heads.shared > 1
        if "heads" in kinds and heads.shared > 1:
            yield self._attention(name, projections, output, heads, "heads")
        elif grouped and ("query_heads" in kinds or "heads" in kinds):
            yield self._attention(name, projections, output, heads, "query_heads")

    def _output(self, name: str) -> str | None:
        for child in _OUTPUTS:
            if self._layer(name, child) is not None:
                return joined(name, child)
        parent = name.rpartition(".")[0]  # BERT: the projections in attention.self, the output in attention.output
        return joined(parent, "output.dense") if self._layer(parent, "output.dense") is not None else None

    def _head_shapes(self, name: str, projections: Sequence[str], output: str) -> Heads:
        module, inner = self.modules[name], self._size(output, "in")
        size = next((int(value) for key in _HEAD_SIZE if isinstance(value := getattr(module, key, None), int)), None)
        if size is None:
            count = next((value for key in _HEADS if isinstance(value := getattr(module, key, None), int)), None)
            if not count or inner % count:
                raise NotPrunableError(f"{type(module).__name__} does not say how many heads it has")
            size = inner // count
        widths = [self._size(projection, "out") for projection in projections]
        if len(projections) == 1:
            shared, rest = divmod(widths[0] - inner, 2 * size)
        else:
            shared, rest = divmod(widths[1], size)
            if widths[0] != inner or widths[1] != widths[2]:
                raise NotPrunableError(f"queries, keys, values and output have {[*widths, inner]} channels")
        if rest or shared < 1 or inner % (shared * size):
            raise NotPrunableError(f"its widths {[*widths, inner]} are no whole heads of {size} channels")
        self._refuse_other_parameters(name, {*projections, output}, size)
        return Heads(inner // size, shared, size)

    def _refuse_other_parameters(self, name: str, known: Collection[str], size: int) -> None:
        for key, parameter in self.modules[name].named_parameters():
            owner = joined(name, key).rpartition(".")[0]
            if owner in known or key == _TABLE or (owner != name and parameter.shape == (size,)):  # a norm of all heads
                continue
            raise NotPrunableError(f"{joined(name, key)} of shape {tuple(parameter.shape)} is not understood")

    def _attention(self, name: str, projections: Sequence[str], output: str, heads: Heads, kind: str) -> Block:
        module, size = self.modules[name], heads.size
        rows = head_channels(module, heads, kind, fused=len(projections) == 1)
        slices = [Slice(layer, "out", channels) for layer, channels in zip(projections, rows.projections, strict=False)]
        slices.append(Slice(output, "in", rows.output))
        units = len(rows.output)
        per_unit = heads.queries // units
        counted: dict[tuple[str, ...], tuple[int, int]] = {
            _HEADS: (heads.queries, per_unit),
            _ATTENTION_WIDTH: (heads.queries * size, per_unit * size),
        }
        config = {"num_attention_heads": per_unit}
        if kind == "heads":
            counted[_KEY_VALUE_HEADS] = (heads.shared, heads.shared // units)
            config |= self._config_key(("num_key_value_heads",), heads.shared // units)
        else:
            counted[("num_key_value_groups",)] = (heads.queries // heads.shared, 1)
        axes: dict[tuple[str, Side], tuple[Axis, ...]] = {}
        for owner, key in self._tables(name, heads.queries):
            table = joined(owner, key)
            axes[table, "out"] = (Axis(owner, key, 1, table, "out"),)
            slices.append(Slice(table, "out", rows.output[:, ::size] // size))
        return Block(
            ChannelGroup(projections[0], tuple(slices), kind),
            axes=axes,
            counters=(*self._counters([name], counted), *(Counter(name, key, 1) for key in rows.counters)),
            config=config if self.config is not None else {},
            config_fixed={"head_dim": size},
            reads_config=name if projections[0].endswith("qkv_proj") and hasattr(module, "config") else None,
            attended=rows.output.shape[1],
        )

    def _tables(self, name: str, count: int) -> Iterator[tuple[str, str]]:
        """(module, parameter) of tables of relative positions, one column a head: in an attention or beside it."""
        parent = name.rpartition(".")[0]
        beside = [joined(parent, child) for child, _ in self.modules[parent].named_children()] if parent else []
        for owner in dict.fromkeys([name, *beside]):
            table = self.modules[owner]._parameters.get(_TABLE)
            if table is not None and table.dim() == 2 and table.shape[1] == count:
                yield owner, _TABLE

    def _is_latent(self, name: str) -> bool:
        return self._layer(name, "kv_b_proj") is not None

    def _latent_attention(self, name: str) -> Block:
        """DeepSeek's: what is common to the heads stays; each has rows of its own in the second projections.

        A row of q_b_proj belongs to one head's query, of kv_b_proj to its key or its value, whose sizes may differ.
        The rotary part of the keys comes from the first projection, for all heads.
        """
        module = self.modules[name]
        plain, rotary, value = (getattr(module, key, None) for key in _LATENT_SIZES)
        queries = joined(name, "q_b_proj" if self._layer(name, "q_b_proj") is not None else "q_proj")
        keys_and_values, output = joined(name, "kv_b_proj"), self._output(name)
        if output is None or queries not in self.modules:
            raise NotPrunableError(f"latent attention without {'output' if output is None else 'query'} projection")
        if not (isinstance(plain, int) and isinstance(rotary, int) and isinstance(value, int)):
            raise NotPrunableError(f"{type(module).__name__} does not say {', '.join(_LATENT_SIZES)}")
        per_head = {queries: plain + rotary, keys_and_values: plain + value, output: value}
        widths = [self._size(layer, "in" if layer == output else "out") for layer in per_head]
        count = widths[-1] // value
        if widths != [count * size for size in per_head.values()]:
            raise NotPrunableError(f"its widths {widths} are not {count} heads of {[*per_head.values()]} channels")
        common = {joined(name, child) for child in _LATENT_COMMON}
        self._refuse_other_parameters(name, {*per_head, *common}, plain + rotary)
        slices = [
            Slice(layer, "in" if layer == output else "out", channels(count, size)) for layer, size in per_head.items()
        ]
        return Block(
            ChannelGroup(queries, tuple(slices), "heads"),
            counters=self._counters([name], {(*_HEADS, *_KEY_VALUE_HEADS): (count, 1)}),
            config=self._config_key(("num_attention_heads",), 1) | self._config_key(("num_key_value_heads",), 1),
            attended=(plain + rotary + value) / 2,
        )

    # --- mixtures of experts ---------------------------------------------------------------------------------------

    def _experts(self, name: str, kinds: Sequence[str]) -> Iterator[Block]:
        module = self.modules[name]
        own = dict(module.named_parameters(recurse=False))
        fused = own.get("gate_up_proj"), own.get("down_proj")
        if not all(isinstance(tensor, Tensor) and tensor.dim() == 3 for tensor in fused):
            return
        up, down = fused
        assert up is not None
        assert down is not None
        count, hidden, width = down.shape
        if set(own) != {"gate_up_proj", "down_proj"} or up.shape != (count, 2 * width, hidden):
            shapes = {key: tuple(value.shape) for key, value in own.items()}
            raise NotPrunableError(f"experts stored as {shapes} are not understood")
        if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
            raise NotPrunableError("experts whose gate and up projections are interleaved are not understood")
        up_key, down_key = joined(name, "gate_up_proj"), joined(name, "down_proj")
        if "expert_ffn" in kinds:
            yield Block(
                ChannelGroup(
                    up_key,
                    (Slice(up_key, "out", channels(width, 1, 2)), Slice(name, "in", channels(width, 1))),
                    "expert_ffn",
                ),
                axes={
                    (up_key, "out"): (Axis(name, "gate_up_proj", 1, up_key, "out"),),
                    (name, "in"): (Axis(name, "down_proj", 2, down_key, "in"),),
                },
                counters=self._counters([name], {_INNER_WIDTH: (width, 1)}),
                config=self._config_key(("moe_intermediate_size", "intermediate_size"), 1),
            )
        if "experts" in kinds:
            yield self._whole_experts(name, count)

    def _whole_experts(self, name: str, count: int) -> Block:
        parent = name.rpartition(".")[0]
        router = next((joined(parent, child) for child in ("gate", "router") if self._has(parent, child)), None)
        weight = None if router is None else getattr(self.modules[router], "weight", None)
        if router is None or not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) != count:
            raise NotPrunableError(f"no router with {count} rows was found beside it")
        others = [key for key, _ in self.modules[router].named_parameters() if key != "weight"]
        others += [key for key, _ in self.modules[router].named_buffers()]
        # Some blocks keep a correction bias or the number of groups themselves, and hand it to the router.
        others += [key for key, _ in self.modules[parent].named_parameters(recurse=False)]
        others += [key for key, _ in self.modules[parent].named_buffers(recurse=False)]
        holders = (self.modules[router], self.modules[parent])
        others += [key for key in _ROUTED_GROUPS if any(getattr(m, key, 1) not in (None, 1) for m in holders)]
        if others:
            raise NotPrunableError(f"the router {router} has more than a weight ({', '.join(others)})")
        top = next((v for m in (router, parent) if isinstance(v := getattr(self.modules[m], "top_k", None), int)), 1)
        up_key, down_key = joined(name, "gate_up_proj"), joined(name, "down_proj")
        axes: dict[tuple[str, Side], tuple[Axis, ...]] = {
            (name, "out"): (
                Axis(name, "gate_up_proj", 0, up_key, "in"),
                Axis(name, "down_proj", 0, down_key, "out"),
            )
        }
        if layout_of(self.modules[router]) is None:
            key = joined(router, "weight")
            axes[router, "out"] = (Axis(router, "weight", 0, key, "out"),)
        one = channels(count, 1)
        return Block(
            ChannelGroup(name, (Slice(router, "out", one), Slice(name, "out", one)), "experts"),
            axes=axes,
            counters=self._counters([name, router, parent], {_EXPERTS: (count, 1)}),
            config=self._config_key(_EXPERTS, 1),
            min_units=top,
        )

    # --- Mamba -----------------------------------------------------------------------------------------------------

    def _mambas(self, name: str) -> Iterator[Block]:
        module = self.modules[name]
        own = dict(module.named_parameters(recurse=False))
        if "A_log" not in own:
            return
        children = {child: joined(name, child) for child, _ in module.named_children()}
        expected = {"in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
        if set(own) != {"A_log", "D"} or not expected <= set(children):
            raise NotPrunableError(f"{type(module).__name__} is not understood: only Mamba's mixer is, not Mamba-2's")
        width = self._size(children["out_proj"], "in")
        if own["A_log"].shape[0] != width or self._size(children["in_proj"], "out") != 2 * width:
            raise NotPrunableError(f"its widths do not agree on {width} inner channels")
        one = channels(width, 1)
        slices = (
            Slice(children["in_proj"], "out", channels(width, 1, 2)),
            Slice(children["conv1d"], "out", one),
            Slice(children["x_proj"], "in", one),
            Slice(children["dt_proj"], "out", one),
            Slice(joined(name, "A_log"), "out", one),
            Slice(joined(name, "D"), "out", one),
            Slice(children["out_proj"], "in", one),
        )
        axes: dict[tuple[str, Side], tuple[Axis, ...]] = {
            (joined(name, key), "out"): (Axis(name, key, 0, joined(name, key), "out"),) for key in ("A_log", "D")
        }
        yield Block(
            ChannelGroup(children["in_proj"], slices, "mamba"),
            axes=axes,
            counters=self._counters([name], {_INNER_WIDTH: (width, 1)}),
            config=self._config_key(("intermediate_size",), 1),
        )

    # --- embedding width -------------------------------------------------------------------------------------------

    def _embeddings(self) -> Iterator[Block]:
        """The residual stream: every side that has the config's hidden size and is no inner width."""
        hidden = getattr(self.config, "hidden_size", None)
        if not isinstance(hidden, int):
            raise NotPrunableError("the config has no hidden_size")
        inner = Finder(self.model, DEFAULT_KINDS)
        if any(block.group.kind in ("experts", "expert_ffn") for block in inner.blocks.values()) or inner.left_out:
            reasons = "; ".join(f"{name}: {why}" for name, why in inner.left_out.items())
            raise NotPrunableError(f"the residual stream passes through fused experts or what is unknown {reasons}")
        taken = {(part.module, part.side) for block in inner.blocks.values() for part in block.group.slices}
        taken |= self._attention_sides()
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        one = channels(hidden, 1)
        slices: list[Slice] = []
        axes: dict[tuple[str, Side], tuple[Axis, ...]] = {}
        for name, module in self.modules.items():
            sides: list[Side] = ["in"] if module is head else ["out", "in"]
            for side in sides:
                if (name, side) not in taken and self._size_or_none(name, side) == hidden:
                    slices.append(Slice(name, side, one))
            for key, parameter in module.named_parameters(recurse=False):
                full = joined(name, key)
                if key not in ("weight", "bias") and parameter.dim() > 1 and parameter.shape[-1] == hidden:
                    axes[full, "out"] = (Axis(name, key, parameter.dim() - 1, full, "out"),)
                    slices.append(Slice(full, "out", one))
        if getattr(self.config, "num_labels", None) == hidden or getattr(self.config, "vocab_size", None) == hidden:
            raise NotPrunableError(f"the hidden size {hidden} is also a number of labels or tokens")
        yield Block(
            ChannelGroup(_embedding_name(self.modules), tuple(slices), "embedding"),
            axes=axes,
            counters=tuple(
                Counter(name, key, 1)
                for name, module in self.modules.items()
                for key in _HIDDEN
                if vars(module).get(key) == hidden and not self._is_attention(name)
            ),
            config=self._config_key(("hidden_size",), 1) if self.config is not None else {},
            config_fixed=_fixed_head_size(inner.blocks.values()),
        )

    def _is_attention(self, name: str) -> bool:
        first = [*(names[0] for names in _PROJECTIONS), *_FUSED_PROJECTIONS]
        return self._is_latent(name) or any(self._layer(name, child) is not None for child in first)

    def _attention_sides(self) -> set[tuple[str, Side]]:
        """The inner sides of every attention, and the norms inside: of heads, whatever their size is."""
        sides: set[tuple[str, Side]] = set()
        for name in self.modules:
            if not self._is_attention(name) or (output := self._output(name)) is None:
                continue
            sides.add((output, "in"))
            if self._is_latent(name):
                sides |= {(joined(name, child), "in") for child in ("q_b_proj", "kv_b_proj")}
            for child_name, child in self.modules[name].named_children():
                if joined(name, child_name) != output and next(child.parameters(), None) is not None:
                    sides.add((joined(name, child_name), "out"))
        return sides


def _fixed_head_size(blocks: Any) -> dict[str, int]:
    sizes = {block.config_fixed["head_dim"] for block in blocks if "head_dim" in block.config_fixed}
    return {"head_dim": sizes.pop()} if len(sizes) == 1 else {}


def _embedding_name(modules: Mapping[str, nn.Module]) -> str:
    return next((name for name, module in modules.items() if isinstance(module, nn.Embedding)), "embedding")
