"""Groups of coupled channels from Torch-Pruning's dependency graph, with their costs and their removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.costs import Costs
from obc.model.errors import explained
from obc.model.evaluation import ForwardFn, call, differentiable, evaluating
from obc.model.groups import ChannelGroup, Side
from obc.model.kept import PlanError
from obc.model.layouts import layout_of
from obc.model.plan import PruningPlan
from obc.model.refusals import refuse_unprunable
from obc.model.rules import Rule, rule_for
from obc.model.shared_copy import share_again, shared_parameters
from obc.structures.measure import costs_of, measure
from obc.structures.proof import Proof, prove, varied_inputs
from obc.structures.protocol import Limits
from obc.structures.traced_bounds import bound_searches
from obc.structures.traced_plan import PlanRecorder, holds_channels
from obc.structures.traced_units import Units, slice_of
from obc.structures.units import (
    NotPrunableError,
    checked_units,
    layer_name,
    renumbered,
    renumbered_group,
    without,
    without_units,
)

try:
    import torch_pruning as tp
except ImportError as error:
    raise ImportError("obc.prune finds groups by Torch-Pruning: pip install torch-pruning") from error

Layers = Sequence[nn.Module | str]
_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)
# What Torch-Pruning raises where its own arithmetic on channels goes wrong.
_INSIDE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
_INPUTS = "pass what its forward takes: a tensor, a tuple of arguments, or a dict of keywords"
_UNTRACEABLE = (
    "write this operation another way, or pass structure=: one of your own, or for models that are built like those of "
    "the transformers library obc.structures.transformers.TransformersStructure(model)"
)
_UNFOLLOWED = "Torch-Pruning can't follow its channels"


@dataclass(eq=False)
class _Root:
    """Where Torch-Pruning starts a group, and which of the root's channels make up each unit.

    Attributes:
        module: the root layer.
        out: whether its outputs are pruned, or its inputs.
        channels: (units, k) int64, of the root as it is now.
    """

    module: nn.Module
    out: bool
    channels: Tensor


class TorchPruningStructure:
    """The prunable groups of any model that Torch-Pruning (1.5.3 and later) can trace; see ``obc.pruning.Structure``.

    Left out are widths that are no inner matter: of layers in ``ignored_layers``, of the model's outputs, of channels
    that nothing reads, of layers that a plan can't describe, and of groups whose removal is wrong: where the model
    without half of the units, tried on a copy, differs from the model with these units masked. ``left_out`` names them.

    A unit is one channel with everything coupled to it; one channel out of every group of a grouped convolution or a
    GroupNorm; one head where ``num_heads`` says so. The model's own count of heads, where it keeps one, is yours to
    adapt.

    Args:
        model: pruned in place by :meth:`remove`. Training flags and ``requires_grad`` are kept.
        example_inputs: what ``model`` is called with: a tensor, a tuple or list of arguments, a dict of keywords.
        ignored_layers: layers, or names of layers, whose outputs keep their widths; with all layers inside them.
        num_heads: query, key and value projections (or the fused one), or their names -> number of heads: heads are
            removed as wholes.
        in_channel_groups: layer or name -> groups of its inputs that keep equal widths, besides those that grouped
            convolutions and norms have by themselves.
        out_channel_groups: the same for outputs.
        forward_fn: ``forward_fn(model, example_inputs)``, where calling the model is not enough; returns tensors in
            any nesting.
        unwrapped_parameters: parameter name -> dimension to prune, of parameters outside any layer; the last dimension
            of more than one entry by default.
        check: try every group on a copy and leave out those whose removal is wrong (:mod:`obc.structures.proof`).

    Attributes:
        left_out: group -> why it can't be pruned.
        proof: what was found out about every group; None without ``check``.

    Raises:
        PlanError: the model can't be pruned as it is (:mod:`obc.model.refusals`).
        PruningError: the model does not run on the example inputs, or Torch-Pruning can't trace it.
        ValueError: a name that no layer has; heads that don't divide a projection; a model that Torch-Pruning is known
            not to trace.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ignored_layers: Layers = (),
        num_heads: Mapping[nn.Module | str, int] | None = None,
        in_channel_groups: Mapping[nn.Module | str, int] | None = None,
        out_channel_groups: Mapping[nn.Module | str, int] | None = None,
        forward_fn: ForwardFn | None = None,
        unwrapped_parameters: Mapping[str, int] | None = None,
        check: bool = True,
    ) -> None:
        refuse_unprunable(model)
        _refuse_untraceable(model)
        self.model, self._example_inputs, self._forward_fn = model, example_inputs, forward_fn or call
        self._modules = dict(model.named_modules(remove_duplicate=True))
        self._names = {module: name for name, module in self._modules.items()}
        self._ignored = {inner for layer in ignored_layers for inner in self._layer(layer, "ignored_layers").modules()}
        self._heads = {self._layer(layer, "num_heads"): count for layer, count in (num_heads or {}).items()}
        self._divisions = {
            "in": {self._layer(layer, "in_channel_groups"): n for layer, n in (in_channel_groups or {}).items()},
            "out": {self._layer(layer, "out_channel_groups"): n for layer, n in (out_channel_groups or {}).items()},
        }
        with explained(model, "running it on example_inputs", _INPUTS):
            self._usage = measure(model, lambda: self._forward_fn(model, example_inputs))
        self._order = {name: place for place, name in enumerate(self._usage.order)}
        self._shared = shared_parameters(model)
        self._dims: dict[str, int] = {}
        self._unwrapped = dict(unwrapped_parameters or {})
        self._graph = self._trace()
        self._recorder = self._new_recorder()
        self.left_out: dict[str, str] = {}
        self._roots: dict[str, _Root] = {}
        self._groups: dict[str, ChannelGroup] = {}
        self._find_groups()
        self.proof: Proof | None = None
        if check:
            varied = varied_inputs(example_inputs)
            self.proof = prove(self, lambda copied: self._forward_fn(copied, varied))

    @property
    def plan(self) -> PruningPlan:
        """What every layer kept so far, in terms of the unpruned model."""
        return PruningPlan(self._recorder.kept)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups of the model as it is now, in the order of execution."""
        return tuple(self._groups.values())

    @property
    def limits(self) -> Limits:
        """Rounding of widths spares heads."""
        return Limits(whole=[name for name, group in self._groups.items() if group.kind == "heads"])

    def costs(self, unit: Literal["macs", "parameters"]) -> Costs:
        """The cost as an exact polynomial in the groups' widths: see :func:`obc.structures.measure.costs_of`."""
        return costs_of(self.model, self.groups, self._usage, unit, self._dims)

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove these units of each named group, and record it in the plan.

        Raises:
            KeyError: no group has the name.
            IndexError: a group has no such unit.
            ValueError: nothing would be left of a group.
            PlanError: Torch-Pruning is about to remove other channels than the group's, or layers that share a
                parameter would lose different channels.
        """
        for name, indices in units.items():
            chosen = checked_units(self._groups, name, indices)
            if len(chosen):
                self._remove(name, chosen)
        share_again(self.model, self._shared)

    # --- finding groups ---------------------------------------------------------------------------------------

    def _layer(self, layer: nn.Module | str, argument: str) -> nn.Module:
        return self._modules[layer_name(self._modules, layer, argument)]

    def _trace(self) -> Any:
        """Torch-Pruning's graph. It follows gradients, so that frozen parameters must not be frozen meanwhile."""
        named = dict(self.model.named_parameters())
        for name in self._unwrapped:
            if name not in named:
                raise ValueError(f"unwrapped_parameters: the model has no parameter {name!r}")
        frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
        floating = [parameter for parameter in frozen if parameter.is_floating_point()]
        try:
            for parameter in floating:
                parameter.requires_grad_(True)
            explaining = explained(self.model, "tracing it with Torch-Pruning", _UNTRACEABLE)
            with explaining, evaluating(self.model), torch.enable_grad():
                graph = tp.DependencyGraph().build_dependency(
                    self.model,
                    self._example_inputs,
                    forward_fn=lambda model, inputs: differentiable(self._forward_fn(model, inputs)),
                    unwrapped_parameters=[(named[name], dim) for name, dim in self._unwrapped.items()],
                    verbose=False,
                )
        finally:
            for parameter in floating:
                parameter.requires_grad_(False)
        bound_searches(graph, self.model)
        return graph

    def _new_recorder(self) -> PlanRecorder:
        widths = {module: self._graph.get_out_channels(module) for module in self._heads}
        return PlanRecorder(self._graph, None, self._heads, widths)

    def _find_groups(self) -> None:
        found = []
        for raw in self._raw_groups():
            name = min(self._producers(raw), key=self._place)
            try:
                found.append((name, *self._group(name, raw)))
            except NotPrunableError as reason:
                self.left_out[name] = str(reason)
            except _INSIDE as error:
                self.left_out[name] = f"{_UNFOLLOWED}: {type(error).__name__}: {error}"
        for name, root, group in sorted(found, key=lambda entry: self._place(entry[0])):
            self._roots[name], self._groups[name] = root, group

    def _raw_groups(self) -> Iterator[Any]:
        """Torch-Pruning's groups, each from the first of its layers, but for those that it fails on."""
        graph, seen = self._graph, set(self._graph.IGNORED_LAYERS_IN_TRACING) | self._ignored
        for module in list(graph.module2node):
            if not isinstance(module, _ROOTS) or module in seen:
                continue
            pruner = graph.get_pruner_of_module(module)
            if pruner is None or (width := pruner.get_out_channels(module)) is None:
                continue
            try:
                raw = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
            except _INSIDE as error:
                self.left_out[self._names[module]] = f"{_UNFOLLOWED}: {type(error).__name__}: {error}"
                continue
            pruned = {item[0].target.module for item in raw if graph.is_out_channel_pruning_fn(item[0].handler)}
            seen |= pruned
            if not pruned & self._ignored:
                yield raw

    def _place(self, name: str) -> int:
        return self._order.get(name, self._order.get(name.rpartition(".")[0], len(self._order)))

    def _producers(self, raw: Any) -> list[str]:
        """The layers whose outputs a group of Torch-Pruning prunes."""
        return [
            self._names[item[0].target.module]
            for item in raw
            if self._graph.is_out_channel_pruning_fn(item[0].handler) and layout_of(item[0].target.module) is not None
        ]

    def _group(self, name: str, raw: Any) -> tuple[_Root, ChannelGroup]:
        pruned_out = {item[0].target.module for item in raw if self._graph.is_out_channel_pruning_fn(item[0].handler)}
        heads = pruned_out & set(self._heads)
        out = True
        if heads:
            raw, out = self._rerooted(raw)
        members = self._members(raw)
        root = raw[0][0].target.module
        self._refuse_outer(members, raw)
        size = len(raw[0][1])
        units = Units(size)
        self._join_heads(units, heads, size)
        self._join_divided(units, members)
        self._join_self_coupled(units, root, raw[0][0].handler, size)
        channels = units.table()
        slices = tuple(slice_of(module, side, roots, channels) for (module, side), roots in members.items())
        ordered = tuple(sorted(slices, key=lambda part: self._place(part.module)))
        kind = "heads" if heads else "channels"
        return _Root(root, out, channels), ChannelGroup(name, ordered, kind)

    def _rerooted(self, raw: Any) -> tuple[Any, bool]:
        """The group of an attention from the inputs of its output projection: their order is that of the heads."""
        for item in raw:
            dep = item[0]
            layer = dep.target.module
            if layout_of(layer) is not None and self._graph.is_in_channel_pruning_fn(dep.handler):
                size = self._graph.get_in_channels(layer)
                return self._graph.get_pruning_group(layer, dep.handler, list(range(size))), False
        raise NotPrunableError("no layer reads the attention's output")

    def _members(self, raw: Any) -> dict[tuple[str, Side], dict[int, int]]:
        """(module, side) -> channel -> root channel, of everything with parameters that the group prunes."""
        members: dict[tuple[str, Side], dict[int, int]] = {}
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
        """(name, side, offsets of the copies of its channels) of what one item of a group prunes."""
        if isinstance(target, nn.Parameter):
            return self._parts_of_parameter(target, dep.target.pruning_dim % target.dim())
        if target not in self._names or not holds_channels(target):
            return []  # an operation, an activation, a norm without values of its own
        name = self._names[target]
        if isinstance(target, nn.RNNBase):
            raise NotPrunableError(f"a plan can't describe a pruned {type(target).__name__} ({name!r})")
        if isinstance(target, nn.LayerNorm) and len(target.normalized_shape) > 1:
            raise NotPrunableError(f"a plan can't describe {name!r}, a LayerNorm over several dimensions")
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
        rule = rule_for(self.model.get_submodule(owner_name))
        if isinstance(rule, Rule) and rule.elementwise and attribute in (rule.weight, rule.bias):
            return [(owner_name, "out", [0])]  # a norm that Torch-Pruning does not know
        self._dims[name] = dim
        return [(name, "out", [0])]

    def _refuse_outer(self, members: Mapping[tuple[str, Side], Any], raw: Any) -> None:
        returned = [name for name, side in members if side == "out" and name in self._usage.returned]
        if returned or any(type(item[0].target.module).__name__ == "_OutputOp" for item in raw):
            raise NotPrunableError("its width is that of the model's output")
        if not any(side == "in" for _, side in members):
            raise NotPrunableError("no layer reads it")

    # --- units ------------------------------------------------------------------------------------------------

    def _join_heads(self, units: Units, layers: set[nn.Module], size: int) -> None:
        counts = {self._heads[layer] for layer in layers}
        if len(counts) > 1:
            raise NotPrunableError(f"its projections have different numbers of heads: {sorted(counts)}")
        for count in counts:
            if size % count:
                names = ", ".join(repr(self._names[layer]) for layer in layers)
                raise ValueError(f"num_heads: {count} heads don't divide the {size} channels of {names}")
            units.join_blocks(count)

    def _join_divided(self, units: Units, members: Mapping[tuple[str, Side], Mapping[int, int]]) -> None:
        """Groups of a layer's channels keep equal widths: the channels of one place in each of them go together."""
        for (name, side), roots in members.items():
            module = self._modules.get(name)
            if module is None:
                continue  # a parameter outside any layer
            divisions = self._division(name, module, side)
            if divisions == 1:
                continue
            size = self._size(module, side)
            if len(roots) < size:
                raise NotPrunableError(f"{name!r} reads other channels too and keeps {divisions} groups equally wide")
            width = size // divisions
            for channel, root in roots.items():
                units.join(root, roots[channel % width])

    def _division(self, name: str, module: nn.Module, side: Side) -> int:
        own = 1
        if isinstance(module, _ConvNd) and name not in self._usage.depthwise:
            own = module.groups
        elif isinstance(module, nn.GroupNorm):
            own = module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            own = module.num_heads * (3 if side == "out" else 1)
        return math.lcm(own, self._divisions[side].get(module, 1))

    def _size(self, module: nn.Module, side: Side) -> int:
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim * (3 if side == "out" else 1)
        size = self._graph.get_out_channels(module) if side == "out" else self._graph.get_in_channels(module)
        return int(size)

    def _join_self_coupled(self, units: Units, root: nn.Module, handler: Any, size: int) -> None:
        """Channels of the root that go together, as the two halves before a gated unit do.

        A group of all channels does not show it, one of a single channel does: three are looked at first.
        """

        def coupled(channel: int) -> list[int]:
            return list(self._graph.get_pruning_group(root, handler, [channel])[0][1])

        if all(coupled(channel) == [channel] for channel in {0, size // 2, size - 1}):
            return
        for channel in range(size):
            for other in coupled(channel):
                units.join(channel, other)

    # --- on a copy --------------------------------------------------------------------------------------------

    def twin(self, model: nn.Module) -> TorchPruningStructure:
        """The same groups on ``model``, a copy of this structure's own as it is now; it is traced for that."""
        twin = copy.copy(self)
        twin.model = model
        twin._modules = dict(model.named_modules(remove_duplicate=True))
        twin._names = {module: name for name, module in twin._modules.items()}
        modules = {self._modules[name]: module for name, module in twin._modules.items()}
        twin._heads = {modules[module]: count for module, count in self._heads.items()}
        twin._graph = twin._trace()
        twin._recorder = twin._new_recorder()
        twin._groups, twin.left_out = dict(self._groups), dict(self.left_out)
        twin._roots = {name: replace(root, module=modules[root.module]) for name, root in self._roots.items()}
        return twin

    def leave_out(self, name: str, reason: str) -> None:
        """Take a group out of ``groups``, and note the reason in ``left_out``."""
        self.left_out[name] = reason
        del self._groups[name], self._roots[name]

    # --- removing ---------------------------------------------------------------------------------------------

    def _remove(self, name: str, chosen: Tensor) -> None:
        root, group = self._roots[name], self._groups[name]
        removed = root.channels[chosen].flatten().sort().values
        expected = {(part.module, part.side): set(part.channels[chosen].flatten().tolist()) for part in group.slices}
        frozen = [key for key, parameter in self.model.named_parameters() if not parameter.requires_grad]
        raw = self._raw_group(name, removed, expected)
        self._recorder.record(raw)
        raw.prune()
        for key in frozen:
            self.model.get_parameter(key).requires_grad_(False)
        root.channels = renumbered(without(root.channels, chosen), removed)
        self._groups[name] = without_units(group, chosen)
        lost = {key: torch.tensor(sorted(channels), dtype=torch.int64) for key, channels in expected.items()}
        for other, coupled in self._groups.items():
            removed_from = [lost.get((part.module, part.side)) for part in coupled.slices]
            self._groups[other] = renumbered_group(coupled, removed_from)

    def _raw_group(self, name: str, removed: Tensor, expected: Mapping[tuple[str, Side], set[int]]) -> Any:
        """Torch-Pruning's group that removes exactly ``expected``.

        Its mapping through splits is wrong once a split tensor was pruned; tracing the model again puts it right.
        """
        root = self._roots[name]
        for traced_again in (False, True):
            if traced_again:
                self._graph = self._recorder.graph = self._trace()
            pruner = self._graph.get_pruner_of_module(root.module)
            handler = pruner.prune_out_channels if root.out else pruner.prune_in_channels
            raw = self._graph.get_pruning_group(root.module, handler, removed.tolist())
            about_to = {key: set(channels) for key, channels in self._members(raw).items()}
            if expected == about_to:
                return raw
        key = next(key for key in {**expected, **about_to} if expected.get(key) != about_to.get(key))
        raise PlanError(f"{name!r}: Torch-Pruning would remove other channels of {key[0]!r} than its group's")


def _refuse_untraceable(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    heads, shared = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and shared != heads:
        raise ValueError(
            f"{type(model).__name__} has {heads} query heads on {shared} of keys and values: Torch-Pruning does not "
            "finish tracing it; pass structure=, one of obc.structures.transformers"
        )
