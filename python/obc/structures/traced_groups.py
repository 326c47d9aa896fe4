"""Groups of coupled channels according to Torch-Pruning's dependency graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import ChannelGroup, Side
from obc.model.layouts import has_several_weights, is_in_attention, layout_of
from obc.model.linear_like import is_linear
from obc.model.names import joined
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.structures.measure import Usage
from obc.structures.probing import reads_channels
from obc.structures.removal import size_of
from obc.structures.traced_graph import INSIDE_TORCH_PRUNING, TracedGraph, unfollowed
from obc.structures.traced_items import items_of
from obc.structures.traced_plan import repeat_of
from obc.structures.units import InnerMatterError, Members, NotPrunableError, Units, divided, parts_of, slice_of


@dataclass(eq=False)
class Found:
    """A group that was found, or the reason why there is none.

    Attributes:
        name: name of its first producer.
        members: everything with parameters that loses channels with it; without channels if they are not known.
        group: the group; None if ``reason`` says why there is none.
        inner: whether another order of its channels might make it a group.
    """

    name: str
    members: Members
    group: ChannelGroup | None = None
    reason: str = ""
    inner: bool = True

    @property
    def width(self) -> int:
        """The number of channels of its first producer; 0 if they are not known."""
        return len(self.members.get((self.name, "out"), {}))


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

    Attributes:
        dims: parameter outside any layer -> the pruned dimension.
        in_dims: parameter outside any layer -> the dimension along which it reads channels.
        depthwise: the depthwise convolutions.
        other_vectors: see :func:`obc.structures.norm_axis.other_vectors`.
        ignored: the layers whose outputs keep their widths by the caller's settings.
        kept: layers whose outputs the caller has said something about: they keep their widths, or have so many heads.
        repeats: (group, linear layer) -> number of consecutive columns per channel.
        reasons: layer -> why running the model finds no group with its channels.
        blocks: projection -> (number of blocks that heads or their thirds form in its outputs, number of outputs).
    """

    def __init__(self, graph: TracedGraph, usage: Usage, settings: Settings) -> None:
        self._graph, self._usage, self._settings = graph, usage, settings
        self._modules, self._names = graph.modules, graph.names
        self._order = {name: place for place, name in enumerate(usage.order)}
        self.dims, self.in_dims, self.depthwise = graph.dims, dict[str, int](), usage.depthwise
        self.other_vectors = graph.other_vectors
        self.ignored, with_heads = (
            {self._names[module] for module in modules if module in self._names}
            for modules in (settings.ignored, settings.heads)
        )
        self.kept = self.ignored | with_heads
        self.repeats: dict[tuple[str, str], int] = {}
        self.blocks: dict[str, tuple[int, int]] = {}
        self.reasons: dict[str, str] = {}

    def layers_outside(self, producers: Collection[str]) -> list[str]:
        """The layers that ran and whose outputs are not those of ``producers``; depthwise convolutions don't count."""
        return [
            name
            for name in self._usage.order
            if name not in producers
            and name not in self.depthwise
            and name not in self._usage.several
            and reads_channels(self._modules[name])
            and not is_in_attention(self._modules, name)
        ]

    def weights_outside_calls(self, taken: Collection[str]) -> bool:
        """Whether parameters with several dimensions are no called layer's, and none of ``taken``."""
        return any(
            parameter.dim() > 1 and min(parameter.shape) > 1 and joined(name, key) not in taken and name not in taken
            for name, module in self._modules.items()
            if (name not in self._order and layout_of(module) is not None) or not isinstance(rule_for(module), Rule)
            if not has_several_weights(module)
            for key, parameter in module.named_parameters(recurse=False)
        )

    @property
    def called(self) -> Collection[str]:
        """The modules that ran."""
        return self._order.keys()

    def place(self, name: str) -> int:
        """When a layer, or the layer of a parameter, is first called."""
        return self._order.get(name, self._order.get(name.rpartition(".")[0], len(self._order)))

    def find(self) -> list[Found]:
        """All groups, in the order of the model's modules."""
        found = []
        for module, raw in self._graph.raw_groups(self._settings.ignored):
            name = self._names[module]
            found.append(Found(name, {(name, "out"): {}}, reason=raw) if isinstance(raw, str) else self._found(raw))
        known = self.ignored | {name for one in found for name, side in one.members if side == "out"}
        found += [
            self._untraced(name)
            for name in self.layers_outside(known)
            if is_recurrent(self._modules[name]) or not self._graph.contains(name)
        ]
        return sorted(found, key=lambda one: self.place(one.name))

    def _untraced(self, name: str) -> Found:
        heads = self._modules[name] in self._settings.heads
        reason = self._graph.failure or (
            "tracing does not come upon it (an operation without a gradient lies between it and the output)"
        )
        if is_recurrent(self._modules[name]):
            reason = "tracing does not follow its hidden units"
        if heads:
            reason = "its heads, set by num_heads, are joined in tracing, which does not come upon it"
        return Found(name, {(name, "out"): {}}, reason=reason, inner=not heads)

    def _found(self, raw: Any) -> Found:
        name = min(self._graph.producers(raw), key=self.place)
        found = Found(name, {(name, "out"): {}})
        try:
            self._fill(found, raw)
        except NotPrunableError as reason:
            found.reason, found.inner = str(reason), not isinstance(reason, InnerMatterError)
        except INSIDE_TORCH_PRUNING as error:
            found.reason = unfollowed(error)
        return found

    def _fill(self, found: Found, raw: Any) -> None:
        heads = set(self._graph.pruned_outputs(raw)) & set(self._settings.heads)
        if heads:
            found.inner = False  # queries and keys of one head meet in products
            raw = self._graph.rerooted(raw)
        size, members = len(next(items_of(raw)).channels), self._graph.members(raw)
        found.members = members or found.members
        self._refuse_several(members)
        self._refuse_outer(members, raw)
        self._refuse_beyond(members)
        units = Units(size)
        self._join_heads(units, heads, size)
        self._join_self_coupled(units, raw, size)
        kind = "heads" if heads else "channels"
        group = self.assemble(found.name, members, units.table(), size, kind=kind)
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
        gates: Members | None = None,
    ) -> ChannelGroup:
        """The group with these members.

        Args:
            members: what each root channel takes with it.
            units: (units, k) root channels that must be removed together; channels in no unit stay.
            hidden: (root channels, parts): parts that an operation between layers keeps equal, though no layer shows
                it.
            gates: channels of a group that products of activations read, where all that reads them is seen.

        Raises:
            NotPrunableError: the members don't make units.
        """
        self._refuse_several(members)
        divisions = self._divisions(members, size)
        channels = divided(units, divisions if hidden is None else [*divisions, hidden])
        slices = [
            replace(
                slice_of(module, side, roots, channels), dim=(self.dims if side == "out" else self.in_dims).get(module)
            )
            for (module, side), roots in members.items()
        ]
        for (module, side), roots in members.items():
            if side == "in" and module in self._modules and is_linear(self._modules[module]):
                repeat = repeat_of(list(roots), list(roots.values()), size_of(self._modules[module], "in"))
                self.repeats[name, module] = repeat
        slices.sort(key=lambda part: self.place(part.module))
        if not gates:
            return ChannelGroup(name, tuple(slices), kind)
        read_at = tuple(slice_of(module, side, roots, channels) for (module, side), roots in gates.items() if roots)
        multiplied = tuple(part.module for part in slices if part.side == "out")
        return ChannelGroup(name, tuple(slices), kind, multiplied, read_at)

    def _refuse_outer(self, members: Mapping[tuple[str, Side], Any], raw: Any) -> None:
        if any(side == "out" and name in self._usage.returned for name, side in members):
            raise InnerMatterError("the model returns its output")
        if self._graph.reaches_output(raw):
            raise NotPrunableError("Torch-Pruning follows its channels to the model's output")
        if not any(side == "in" for _, side in members):
            raise NotPrunableError("tracing finds no layer that reads it")

    def _refuse_several(self, members: Members) -> None:
        if name := next((name for name, _ in members if name in self._usage.several), None):
            raise InnerMatterError(
                f"{name!r} ({type(self._modules[name]).__name__}) returns several tensors: which of them holds which "
                "of its channels is not known"
            )

    def _refuse_beyond(self, members: Members) -> None:
        """Refuse groups with channels that a layer lacks: Torch-Pruning lost track of them."""
        for (name, side), roots in members.items():
            if isinstance(self._modules.get(name), nn.MultiheadAttention) or is_in_attention(self._modules, name):
                continue
            size = size_of(self._modules[name], side) if name in self._modules else self._graph.dim_size(name)
            if max(roots) >= size:
                sides = {"in": " in channels", "out": " out channels"}
                kind = sides[side] if layout_of(self._modules.get(name, nn.Identity())) is not None else ""
                raise NotPrunableError(
                    f"Torch-Pruning follows its channels to number {max(roots)} of {name!r}, which has {size}{kind}, "
                    "past an operation that it does not know, or a weight that no linear layer or convolution holds"
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
            blocks = self._settings.heads[module] * (3 if fused and is_linear(module) else 1)
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
        if isinstance(module, _ConvNd) and name not in self.depthwise:
            own = module.groups
        elif isinstance(module, nn.GroupNorm):
            own = module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            own = module.num_heads * (3 if side == "out" else 1)
        return math.lcm(own, self._settings.divisions.get(side, {}).get(module, 1))

    def _join_self_coupled(self, units: Units, raw: Any, size: int) -> None:
        """Join channels of the root that must go together, such as the two halves before a gated unit.

        A group of all channels does not show this, but a group of a single channel does; three are examined first.
        """
        root = next(items_of(raw))
        if all(self._graph.coupled(root, channel) == [channel] for channel in {0, size // 2, size - 1}):
            return
        for channel in range(size):
            for other in self._graph.coupled(root, channel):
                units.join(channel, other)
