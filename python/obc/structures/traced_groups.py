"""Groups of coupled channels according to Torch-Pruning's dependency graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import ChannelGroup, Side
from obc.model.layouts import layout_of
from obc.model.rules import Rule, rule_for
from obc.structures.measure import Usage
from obc.structures.removal import size_of
from obc.structures.traced_plan import holds_channels, repeat_of
from obc.structures.traced_units import InnerMatterError, Members, Units, divided, parts_of, slice_of
from obc.structures.units import NotPrunableError

try:
    import torch_pruning as tp
except ImportError as error:
    raise ImportError("obc.prune finds groups by Torch-Pruning: pip install torch-pruning") from error

_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)
# What Torch-Pruning raises when its own arithmetic on channels fails.
_INSIDE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
_UNFOLLOWED = "Torch-Pruning can't follow its channels"


@dataclass(eq=False)
class Found:
    """A group that was found, or the reason why there is none.

    Attributes:
        name: name of its first producer.
        members: everything with parameters that loses channels with it.
        size: number of root channels.
        group: the group; None if ``reason`` says why there is none.
        inner: whether another order of its channels might make it a group.
    """

    name: str
    members: Members
    size: int
    group: ChannelGroup | None = None
    reason: str = ""
    inner: bool = True


@dataclass(frozen=True)
class Settings:
    """The caller's settings for layers.

    Attributes:
        ignored: layers whose outputs keep their widths.
        heads: projections -> number of heads.
        divisions: side -> layer -> number of groups of its channels that keep equal widths.
    """

    ignored: frozenset[nn.Module] = frozenset()
    heads: Mapping[nn.Module, int] = field(default_factory=dict)
    divisions: Mapping[Side, Mapping[nn.Module, int]] = field(default_factory=dict)


class GroupFinder:
    """Finds the groups of a model in Torch-Pruning's graph.

    Args:
        model: the traced model.
        graph: Torch-Pruning's graph.
        usage: usage measured on the model.
        settings: the caller's settings.

    Attributes:
        dims: parameter outside any layer -> the pruned dimension.
        repeats: (group, linear layer) -> number of consecutive columns per channel.
        blocks: projection -> (number of blocks that heads or their thirds form in its outputs, number of outputs).
    """

    def __init__(self, model: nn.Module, graph: Any, usage: Usage, settings: Settings) -> None:
        self._model, self._graph, self._usage, self._settings = model, graph, usage, settings
        self._modules = dict(model.named_modules(remove_duplicate=True))
        self._names = {module: name for name, module in self._modules.items()}
        self._order = {name: place for place, name in enumerate(usage.order)}
        self.dims: dict[str, int] = {}
        self.repeats: dict[tuple[str, str], int] = {}
        self.blocks: dict[str, tuple[int, int]] = {}

    def place(self, name: str) -> int:
        """When a layer, or the layer of a parameter, is first called."""
        return self._order.get(name, self._order.get(name.rpartition(".")[0], len(self._order)))

    def find(self) -> list[Found]:
        """All groups, in the order of the model's modules."""
        found = []
        for raw in self._raw_groups():
            found.append(raw if isinstance(raw, Found) else self._found(raw))
        return sorted(found, key=lambda one: self.place(one.name))

    def _found(self, raw: Any) -> Found:
        name = min(self._producers(raw), key=self.place)
        found = Found(name, {}, len(raw[0][1]))
        try:
            self._fill(found, raw)
        except NotPrunableError as reason:
            found.reason, found.inner = str(reason), not isinstance(reason, InnerMatterError)
        except _INSIDE as error:
            found.reason = f"{_UNFOLLOWED}: {type(error).__name__}: {error}"
        if not found.members:
            found.members = {(name, "out"): _each(size_of(self._modules[name], "out"))}
            found.size = len(found.members[name, "out"])
        return found

    def _raw_groups(self) -> Iterator[Any]:
        """Torch-Pruning's groups, each from its first layer; where it fails, the reason instead of a group."""
        graph, ignored = self._graph, self._settings.ignored
        seen = set(graph.IGNORED_LAYERS_IN_TRACING) | ignored
        for module in list(graph.module2node):
            if not isinstance(module, _ROOTS) or module in seen:
                continue
            pruner = graph.get_pruner_of_module(module)
            if pruner is None or (width := pruner.get_out_channels(module)) is None:
                continue
            try:
                raw = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
            except _INSIDE as error:
                reason = f"{_UNFOLLOWED}: {type(error).__name__}: {error}"
                name = self._names[module]
                yield Found(name, {(name, "out"): _each(width)}, width, None, reason)
                continue
            pruned = {item[0].target.module for item in raw if graph.is_out_channel_pruning_fn(item[0].handler)}
            seen |= pruned
            if not pruned & ignored:
                yield raw

    def _producers(self, raw: Any) -> list[str]:
        return [
            self._names[item[0].target.module]
            for item in raw
            if self._graph.is_out_channel_pruning_fn(item[0].handler) and layout_of(item[0].target.module) is not None
        ]

    def _fill(self, found: Found, raw: Any) -> None:
        pruned_out = {item[0].target.module for item in raw if self._graph.is_out_channel_pruning_fn(item[0].handler)}
        heads = pruned_out & set(self._settings.heads)
        if heads:
            found.inner = False  # queries and keys of one head meet in products
            raw = self._rerooted(raw)
        found.size = len(raw[0][1])
        found.members = self._members(raw)
        self._refuse_outer(found.members, raw)
        units = Units(found.size)
        self._join_heads(units, heads, found.size)
        self._join_self_coupled(units, raw[0][0].target.module, raw[0][0].handler, found.size)
        kind = "heads" if heads else "channels"
        group = self.assemble(found.name, found.members, units.table(), found.size, kind=kind)
        width = size_of(self._modules[found.name], "out")
        if group.size == 1 and width > 1:
            raise NotPrunableError(
                f"Torch-Pruning finds one unit among its {width} channels, and a group keeps at least one unit"
            )
        found.group = group
        self._note_blocks(heads)

    def assemble(
        self,
        name: str,
        members: Members,
        units: Tensor,
        size: int,
        hidden: Tensor | None = None,
        kind: str = "channels",
    ) -> ChannelGroup:
        """The group with these members.

        Args:
            name: name of the group.
            members: what each root channel takes with it.
            units: (units, k) root channels that must be removed together; channels in no unit stay.
            size: number of root channels.
            hidden: (root channels, parts): parts that an operation between layers keeps equal, though no layer shows
                it.
            kind: what a unit is.

        Raises:
            NotPrunableError: the members don't make units.
        """
        divisions = self._divisions(members, size)
        channels = divided(units, divisions if hidden is None else [*divisions, hidden])
        slices = [slice_of(module, side, roots, channels) for (module, side), roots in members.items()]
        for (module, side), roots in members.items():
            if side == "in" and isinstance(self._modules.get(module), nn.Linear):
                repeat = repeat_of(list(roots), list(roots.values()), size_of(self._modules[module], "in"))
                self.repeats[name, module] = repeat
        return ChannelGroup(name, tuple(sorted(slices, key=lambda part: self.place(part.module))), kind)

    def _rerooted(self, raw: Any) -> Any:
        """The group of an attention from the inputs of its output projection, which are in the order of the heads."""
        for item in raw:
            dep = item[0]
            layer = dep.target.module
            if layout_of(layer) is not None and self._graph.is_in_channel_pruning_fn(dep.handler):
                size = self._graph.get_in_channels(layer)
                return self._graph.get_pruning_group(layer, dep.handler, list(range(size)))
        raise InnerMatterError("no layer reads the attention's output")

    def _members(self, raw: Any) -> Members:
        """(module, side) -> channel -> root channel, for everything with parameters that the group prunes."""
        members: Members = {}
        for item in raw:
            dep, channels, roots = item[0], list(item[1]), getattr(item, "root_idxs", None)
            target = dep.target.module
            parts = self._parts(target, dep)
            if not parts or not channels:
                continue
            if roots is None or any(root is None for root in roots):
                raise NotPrunableError("Torch-Pruning does not say which channels go together (grouped queries)")
            for name, side, copies in parts:
                members_of_part = members.setdefault((name, side), {})
                for offset in copies:
                    members_of_part.update({c + offset: r for c, r in zip(channels, roots, strict=True)})
        return members

    def _parts(self, target: Any, dep: Any) -> list[tuple[str, Side, list[int]]]:
        """(name, side, offsets of the copies of its channels) for what one item of a group prunes."""
        if isinstance(target, nn.Parameter):
            return self._parts_of_parameter(target, dep.target.pruning_dim % target.dim())
        if target not in self._names or not (holds_channels(target) or isinstance(target, _NormBase)):
            return []  # an operation, an activation
        name = self._names[target]
        if isinstance(target, nn.RNNBase):
            raise InnerMatterError(f"a plan can't describe a pruned {type(target).__name__} ({name!r})")
        _refuse_scaled_rows(name, target)
        if isinstance(target, nn.LayerNorm) and len(target.normalized_shape) > 1:
            raise InnerMatterError(f"a plan can't describe {name!r}, a LayerNorm over several dimensions")
        if isinstance(target, nn.MultiheadAttention):
            thirds = [part * target.embed_dim for part in range(3)]
            projection = f"{name}.out_proj" if name else "out_proj"
            return [
                (name, "out", thirds),
                (name, "in", [0]),
                (projection, "out", [0]),
                (projection, "in", [0]),
            ]
        if layout_of(target) is None or self._graph.is_out_channel_pruning_fn(dep.handler):
            return [(name, "out", [0])]
        return [(name, "in", [0])]

    def _parts_of_parameter(self, parameter: nn.Parameter, dim: int) -> list[tuple[str, Side, list[int]]]:
        name = self._graph._param_to_name[parameter]
        owner_name, _, attribute = name.rpartition(".")
        _refuse_scaled_rows(owner_name, self._model.get_submodule(owner_name))
        rule = rule_for(self._model.get_submodule(owner_name))
        if isinstance(rule, Rule) and rule.elementwise and attribute in (rule.weight, rule.bias):
            return [(owner_name, "out", [0])]  # a norm that Torch-Pruning does not know
        self.dims[name] = dim
        return [(name, "out", [0])]

    def _refuse_outer(self, members: Mapping[tuple[str, Side], Any], raw: Any) -> None:
        returned = [name for name, side in members if side == "out" and name in self._usage.returned]
        if returned or any(type(item[0].target.module).__name__ == "_OutputOp" for item in raw):
            raise InnerMatterError(self._why_returned(returned, members))
        if not any(side == "in" for _, side in members):
            raise InnerMatterError("no layer reads it")

    def _why_returned(self, returned: Sequence[str], members: Mapping[tuple[str, Side], Any]) -> str:
        """Why channels that reach the model's output can't be removed."""
        widths = {len(roots) for (_, side), roots in members.items() if side == "out"}
        if returned or any(widths & set(shape) for shape in self._usage.shapes):
            return "its width is that of the model's output"
        return (
            f"Torch-Pruning follows it to the model's output, which has no dimension of {sorted(widths)}: between them "
            "is a layer or a weight that it does not know"
        )

    # --- units ------------------------------------------------------------------------------------------------

    def _join_heads(self, units: Units, layers: set[nn.Module], size: int) -> None:
        counts = {self._settings.heads[layer] for layer in layers}
        if len(counts) > 1:
            raise InnerMatterError(f"its projections have different numbers of heads: {sorted(counts)}")
        for count in counts:
            if size % count:
                names = ", ".join(repr(self._names[layer]) for layer in layers)
                raise ValueError(f"num_heads: {count} heads don't divide the {size} channels of {names}")
            units.join_blocks(count)

    def _note_blocks(self, projections: set[nn.Module]) -> None:
        """Record the number of diagonal blocks of a compressor of a projection's output."""
        fused = len(projections) == 1
        for module in projections:
            blocks = self._settings.heads[module] * (3 if fused and isinstance(module, nn.Linear) else 1)
            self.blocks[self._names[module]] = (blocks, size_of(module, "out"))

    def _divisions(self, members: Members, size: int) -> list[Tensor]:
        """The divisions by layers whose channels form groups of equal width, for :func:`divided`."""
        found = []
        for (name, side), roots in members.items():
            module = self._modules.get(name)
            if module is None:
                continue  # a parameter outside any layer
            divisions = self._division(name, module, side)
            if divisions > 1:
                found.append(parts_of(roots, size, size_of(module, side) // divisions, divisions))
        return found

    def _division(self, name: str, module: nn.Module, side: Side) -> int:
        own = 1
        if isinstance(module, _ConvNd) and name not in self._usage.depthwise:
            own = module.groups
        elif isinstance(module, nn.GroupNorm):
            own = module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            own = module.num_heads * (3 if side == "out" else 1)
        return math.lcm(own, self._settings.divisions.get(side, {}).get(module, 1))

    def _join_self_coupled(self, units: Units, root: nn.Module, handler: Any, size: int) -> None:
        """Join channels of the root that must go together, such as the two halves before a gated unit.

        A group of all channels does not show this, but a group of a single channel does; three are examined first.
        """

        def coupled(channel: int) -> list[int]:
            return list(self._graph.get_pruning_group(root, handler, [channel])[0][1])

        if all(coupled(channel) == [channel] for channel in {0, size // 2, size - 1}):
            return
        for channel in range(size):
            for other in coupled(channel):
                units.join(channel, other)


def _each(size: int) -> dict[int, int]:
    return {channel: channel for channel in range(size)}


def _refuse_scaled_rows(name: str, module: nn.Module) -> None:
    """Refuse embeddings that scale each row, when it is read, by the norm of all its channels."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise InnerMatterError(
            f"{name!r} scales rows down to max_norm={module.max_norm} when it reads them, by the norm of all their "
            "channels; scale them once (torch.renorm), then set max_norm to None"
        )
