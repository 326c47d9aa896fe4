"""The structure of any model: the groups that Torch-Pruning traces or running it shows, costs and removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from obc.model.arguments import instance, refuse_uncallable, several
from obc.model.batches import usable_in_autograd
from obc.model.costs import Costs
from obc.model.cutting import cut
from obc.model.depth import Depth, outer_lists, with_lists
from obc.model.errors import PruningError, explained
from obc.model.evaluation import ForwardFn, Run, call
from obc.model.functional_uses import calling_layers
from obc.model.groups import ChannelGroup, Side, producers
from obc.model.kept import Kept, with_columns
from obc.model.layouts import is_in_attention, layout_of
from obc.model.names import joined
from obc.model.plan import PruningPlan
from obc.model.quantized import refuse_quantised
from obc.model.refusals import refuse_unprunable
from obc.model.shared_copy import shared_copy, shared_parameters
from obc.structures.equal_widths import StreamWidths
from obc.structures.held_counts import counted, counts_read, with_counts
from obc.structures.masking import lost_channels
from obc.structures.measure import TracedCosts, Usage, layers_run, measure
from obc.structures.memory import MemoryUse
from obc.structures.norm_axis import other_vectors
from obc.structures.probed_groups import offer_proved, recover
from obc.structures.products import find_products
from obc.structures.proof import Proof, prove
from obc.structures.protocol import Limits, Unit
from obc.structures.reaching import runs_reaching, unchanged_buffers
from obc.structures.removal import refuse_untied, size_of, step_of
from obc.structures.traced_blocks import offer_blocks
from obc.structures.traced_graph import TracedGraph, trace
from obc.structures.traced_groups import Found, GroupFinder, Settings
from obc.structures.traced_plan import in_blocks
from obc.structures.transformers.block import Block, count_down
from obc.structures.units import checked_units, group_left, layer_name
from obc.structures.varied import varied_inputs

Layers = Sequence[nn.Module | str]
_FOUND_BY_RUNNING = "Groups were found by running the model instead; what that does not find keeps its width"
_COPIED = "removals are tried on copies: keep what can't be copied, such as locks and open files, outside the model"
_INPUTS = "pass what its forward takes: a tensor, a tuple of arguments, or a dict of keywords"


class TorchPruningStructure:
    """The prunable groups of a model, traced by Torch-Pruning (1.5.3 and later); see ``obc.pruning.Structure``.

    Groups that tracing loses, or of a model that can't be traced, are found by running it
    (:mod:`obc.structures.influence_groups`).

    Some widths are left out, with the reason in ``left_out``: those of layers in ``ignored_layers``, of the model's
    outputs, of channels that nothing reads, of layers that a plan can't describe, and of groups whose removal is wrong,
    that is, the model without half of the units, tried on a copy, differs from the model with these units masked.

    A unit is one channel with everything coupled to it; one channel of every group of a grouped convolution or
    GroupNorm; or one head: of an attention whose layers have the names of a known family
    (:mod:`obc.structures.traced_blocks`), or according to ``num_heads``. Counts of units that the model's own modules
    hold change with them (:mod:`obc.structures.held_counts`); without ``check``, those of heads according to
    ``num_heads`` do not: you must adapt them. Where attentions take the width of what they read for that of their
    heads, a unit is a channel of every head, or a head, with as many channels of the stream
    (:mod:`obc.structures.equal_widths`).

    Args:
        model: the model, pruned in place by :meth:`remove`. Training flags and ``requires_grad`` are kept.
        example_inputs: what ``model`` is called with: a tensor, a tuple or list of arguments, a dict of keywords.
        ignored_layers: layers, or names of layers, whose outputs keep their widths, including all layers inside them.
        num_heads: query, key and value projections (or the fused one), or their names -> number of heads; heads are
            removed whole.
        in_channel_groups: layer or name -> number of groups of its inputs that keep equal widths, in addition to those
            of grouped convolutions and norms.
        out_channel_groups: the same for outputs.
        forward_fn: ``forward_fn(model, example_inputs)``, if calling the model is not enough; returns tensors in any
            nesting.
        other_runs: ``run(model)`` -> outputs in any nesting, on other inputs. They are used if some layers do not run
            on the example inputs, after a call in train mode, until every layer has run.
        unwrapped_parameters: parameter name -> dimension to prune, for parameters outside any layer; by default the
            last dimension with more than one entry.
        check: try every group on a copy and leave out those whose removal is wrong (:mod:`obc.structures.proof`).

    Attributes:
        left_out: group -> why it can't be pruned.
        proof: the result for every group; None without ``check``.
        blocks: the groups that names tell (:mod:`obc.structures.traced_blocks`), with what counts their units.
        more_runs: runs that reach layers which the example inputs do not; traced and proved as well.
        unreached: layers that no run reaches; they keep their widths.

    Raises:
        PlanError: the model can't be pruned as it is (:mod:`obc.model.refusals`).
        PruningError: the model does not run on the example inputs, or Torch-Pruning can't trace it and no group is
            found by running it, which needs ``check``.
        ValueError: no layer has a given name, or heads don't divide a projection.
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
        other_runs: Iterable[Run] = (),
        unwrapped_parameters: Mapping[str, int] | None = None,
        check: bool = True,
    ) -> None:
        refuse_unprunable(model)
        refuse_quantised(model)
        refuse_uncallable(forward_fn=forward_fn)
        for name, counts in (
            ("num_heads", num_heads),
            ("in_channel_groups", in_channel_groups),
            ("out_channel_groups", out_channel_groups),
            ("unwrapped_parameters", unwrapped_parameters),
        ):
            instance(name, counts, (Mapping, type(None)), "a mapping")
        example_inputs = usable_in_autograd(example_inputs)
        self.model, self._example_inputs, self._forward_fn = model, example_inputs, calling_layers(forward_fn or call)
        self._modules = dict(model.named_modules(remove_duplicate=True))
        several("ignored_layers", ignored_layers)
        settings = Settings(
            frozenset(inner for layer in ignored_layers for inner in self._layer(layer, "ignored_layers").modules()),
            {self._layer(layer, "num_heads"): count for layer, count in (num_heads or {}).items()},
            {
                "in": {self._layer(layer, "in_channel_groups"): n for layer, n in (in_channel_groups or {}).items()},
                "out": {self._layer(layer, "out_channel_groups"): n for layer, n in (out_channel_groups or {}).items()},
            },
        )
        with explained(model, "copying it", _COPIED):
            shared_copy(model)
        with explained(model, "running it on example_inputs", _INPUTS):
            self._usage = measure(model, lambda: self._forward_fn(model, example_inputs))
        self.more_runs, self.unreached = runs_reaching(
            model, lambda one: self._forward_fn(one, example_inputs), self._usage, map(calling_layers, other_runs)
        )
        if self.more_runs:
            with unchanged_buffers(model):
                whole = measure(model, lambda: self._run(model, example_inputs))
            self._usage.order, self._usage.returned = whole.order, whole.returned
        self._sizes = {name: size_of(module, "out") for name, module in self._modules.items() if layout_of(module)}
        self._shared = shared_parameters(model)
        graph = self._traced(unwrapped_parameters or {}, check)
        vectors = other_vectors(model, lambda one: self._run(one, example_inputs))
        self._graph = TracedGraph(model, graph, vectors)
        self._finder = GroupFinder(self._graph, self._usage, settings)
        self._kept: dict[str, Kept] = {}
        self._counts: dict[str, dict[str, int | list[int]]] = {}
        self.left_out: dict[str, str] = {}
        self._groups: dict[str, ChannelGroup] = {}
        self.blocks: dict[str, Block] = {}
        found = self._finder.find()
        for one in found:
            if one.group is not None:
                self._groups[one.name] = one.group
        self.left_out |= {one.name: one.reason for one in found if one.group is None and one.name not in self._groups}
        self.proof = self._proved(found) if check else None
        self.left_out |= self._unnamed({name for one in found if one.name in self.left_out for name, _ in one.members})
        if isinstance(graph, PruningError) and not self._groups:
            raise graph
        layers = layers_run(model, self._usage)
        self._products = find_products(self, lambda one: self._forward_fn(one, example_inputs), layers)

    def _traced(self, unwrapped: Mapping[str, int], check: bool) -> Any | PruningError:
        """Torch-Pruning's graph, or why there is none, if groups may be found, and proved, by running the model."""
        try:
            return trace(self.model, self._run, self._example_inputs, unwrapped)
        except PruningError as error:
            if not check:
                raise
            return error

    def _proved(self, found: Sequence[Found]) -> Proof:
        """Prove the groups, and find the true order of channels of those that fail."""
        varied = varied_inputs(self._example_inputs)

        def run(copied: nn.Module) -> Any:
            return self._run(copied, varied)

        proof = prove(self, run)
        others = offer_blocks(self, run, proof, self._finder.kept, self._graph.dims)
        failed = [one for one in found if one.group is not None and one.name in self.left_out]
        held = counts_read(self.model, run) if self.left_out else {}
        blocks = {one.name: Block(one.group) for one in failed if one.group is not None}
        offer_proved(self, {name: counted(self, block, held, run) for name, block in blocks.items()}, run, proof)
        failed = [one for one in failed if one.name in self.left_out]
        widths = StreamWidths(self._finder, others, failed)
        streams = {one.name: widths.proposals(one.name, one.members, one.width) for one in failed}
        offer_proved(self, {name: with_counts(self, it, held, run) for name, it in streams.items()}, run, proof)
        produced = producers(self.groups)
        wrong = [one for one in found if one.name in self.left_out and one.name not in produced]
        recover(self, self._finder, wrong, held, run, proof, widths.proposals)
        return proof

    def _unnamed(self, members: Collection[str]) -> dict[str, str]:
        """What holds weights and is neither in a group nor left out by name -> why it keeps its width."""
        named = {*producers(self.groups), *self.left_out, *members, *self._usage.depthwise, *self.unreached}
        consumers = {part.module for group in self.groups for part in group.consumers}
        found: dict[str, str] = {}
        for name, module in self._modules.items():
            if name not in named and not is_in_attention(self._modules, name):
                ignored = "it is one of ignored_layers" if name in self._finder.ignored else None
                known = self._finder.reasons.get(name) if name in self._usage.positions else None
                why = ignored or known
                kept = kept_whole(name, module, self._usage, consumers)
                found |= {one: why or other for one, other in kept if one not in named}
        return found

    @property
    def plan(self) -> PruningPlan:
        """The channels that every layer kept so far, in terms of the unpruned model."""
        return PruningPlan(self._kept, with_lists(Depth(), outer_lists(self.model), self._kept), self._counts)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The present model's groups in the order of execution; a group without units is dropped."""
        return tuple(self._groups.values())

    @property
    def limits(self) -> Limits:
        """Rounding does not apply to heads; all units of a group may go if some of its channels always stay."""
        heads = [name for name, group in self._groups.items() if group.kind == "heads"]
        taken: dict[tuple[str, Side], int] = {}
        for group in self._groups.values():
            for part in group.slices:
                taken[part.module, part.side] = taken.get((part.module, part.side), 0) + part.channels.numel()
        outside = {key for key in taken if key[0] not in self._modules}  # parameters, which are cut along
        rest = outside | {(name, side) for (name, side), count in taken.items() if self._size(name, side) > count}
        spare = {
            name: 0
            for name, group in self._groups.items()
            if all((part.module, part.side) in rest for part in group.slices)
            and any(part.module in self._modules for part in group.slices)
        }
        return Limits(spare, whole=heads)

    @property
    def warnings(self) -> list[str]:
        """Warns of failed tracing, of products whose MACs can't be followed, and of layers that nothing ran.

        Of these only those that may read pruned ones.
        """
        failure = self._graph.failure
        untraced = [f"{failure}. {_FOUND_BY_RUNNING}"] if failure else []
        pruned = {
            self._sizes[name]
            for name, kept in self._kept.items()
            if kept.out_channels is not None and name in self._sizes
        }
        names = sorted(name for name in self.unreached if any(not self._size(name, "in") % size for size in pruned))
        return [*untraced, *_unfollowed_products(self._products.unfollowed), *_unreached_layers(names)]

    def costs(self, unit: Unit) -> Costs:
        """The cost as an exact polynomial in the groups' widths: see :class:`obc.structures.measure.TracedCosts`.

        Raises:
            ValueError: it is not known which parameters of a traced model are active.
        """
        if unit == "active_parameters":
            raise ValueError("active_params counts the experts of transformers models; pass params, or macs")
        return self._counting().costs(unit, self._products)

    def memory(self, use: MemoryUse) -> Costs:
        """Bytes of weights and buffers: see :class:`obc.structures.measure.TracedCosts`."""
        return self._counting().memory(use)

    def _counting(self) -> TracedCosts:
        return TracedCosts(self.model, self.groups, self._usage, self._graph.dims)

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove these units of each named group and record it in the plan; if this raises, nothing is removed.

        Raises:
            KeyError: no group has the name.
            IndexError: a group has no such unit.
            ValueError: nothing would be left of a group.
            PlanError: layers that share a parameter would lose different channels.
        """
        if not (chosen := checked_units(self.groups, units, self.limits.min_units)):
            return
        lost = lost_channels(self.groups, chosen)
        step = step_of(self._modules, lost, self._graph.dims, self._finder.in_dims)
        refuse_untied(self.model, self._shared, step)
        cut(self.model, step)
        for name, kept in step.items():
            repeats = [self._finder.repeats[group, name] for group in chosen if (group, name) in self._finder.repeats]
            repeat = math.gcd(*repeats) or 1
            if kept.in_channels is not None:
                kept = with_columns(kept, kept.in_channels, repeat)
            kept = kept.after(self._kept.get(name))
            blocks = self._finder.blocks.get(name)
            self._kept[name] = kept if blocks is None else in_blocks(kept, *blocks)
        for name in chosen.keys() & self.blocks.keys():
            for module, attribute, value in count_down(self._modules, self.blocks[name], len(chosen[name])):
                self._counts.setdefault(module, {})[attribute] = value
        for name, group in self._groups.items():
            self._groups[name] = group_left(group, chosen.get(name), lost)
        self._groups = {name: group for name, group in self._groups.items() if group.size}

    def _size(self, name: str, side: Side) -> int:
        return size_of(self._modules[name], side) if name in self._modules else 0

    def _run(self, model: nn.Module, inputs: Any) -> Any:
        outputs = self._forward_fn(model, inputs)
        return [outputs, *(run(model) for run in self.more_runs)] if self.more_runs else outputs

    def _layer(self, layer: nn.Module | str, argument: str) -> nn.Module:
        return self._modules[layer_name(self._modules, layer, argument)]

    # --- on a copy --------------------------------------------------------------------------------------------

    def twin(self, model: nn.Module) -> TorchPruningStructure:
        """The same groups on ``model``, a copy of this structure's present model."""
        twin = object.__new__(TorchPruningStructure)
        vars(twin).update(vars(self), model=model)
        twin._modules = dict(model.named_modules(remove_duplicate=True))
        twin._groups, twin.left_out, twin._kept, twin._counts = dict(self._groups), dict(self.left_out), {}, {}
        twin.blocks = dict(self.blocks)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchPruningStructure:
        copied = self.twin(copy.deepcopy(self.model, memo))
        copied._kept = dict(self._kept)
        copied._counts = {module: dict(values) for module, values in self._counts.items()}
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a TorchPruningStructure holds functions of this process and can't be saved; save its model and its plan "
            "(structure.plan.save), and make a structure of the loaded model"
        )

    def offer(self, group: ChannelGroup) -> None:
        """Take a group back that was left out."""
        self.left_out.pop(group.name, None)
        groups = [*self._groups.values(), group]
        self._groups = {one.name: one for one in sorted(groups, key=lambda one: self._finder.place(one.name))}

    def leave_out(self, name: str, reason: str) -> None:
        """Remove a group from ``groups``, and record the reason in ``left_out``."""
        self.left_out[name] = reason
        self.blocks.pop(name, None)
        del self._groups[name]


def _unfollowed_products(unfollowed: Mapping[str, str]) -> list[str]:
    if not unfollowed:
        return []
    name, reason = next(iter(unfollowed.items()))
    return [
        f"how the MACs of products outside layers depend on {', '.join(unfollowed)} is not known ({name} "
        f"without its last unit: {reason}); they are counted as if they did not depend on it"
    ]


def _unreached_layers(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"no run reached these layers (example inputs, train mode, other batches), so they keep their widths: "
        f"{', '.join(names)}; if one of them reads a pruned layer, it no longer fits: name that pruned layer in "
        "ignored_layers"
    ]


_KNOWN = (nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)


def kept_whole(name: str, module: nn.Module, usage: Usage, consumers: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name, reason) of a module with weights; or, for a module of unknown kind, of each matrix that it holds.

    Args:
        module: a module that no group has, and that is not left out for another reason.
        consumers: what reads the channels of groups.
    """
    if layout_of(module) is not None:
        called = "neither tracing nor running the model finds what reads its channels"
        yield name, called if name in usage.positions else "it is not called: what uses its weight is not a layer"
    elif isinstance(module, nn.RNNBase):
        called = "neither tracing nor running the model finds which of its hidden units can go"
        yield name, "a plan can't describe its projections (proj_size)" if module.proj_size else called
    elif isinstance(module, nn.RNNCellBase):
        yield name, f"each hidden channel of a {type(module).__name__} is read by all others in the next step"
    elif isinstance(module, _KNOWN):
        yield name, f"neither tracing nor running the model finds channels of this {type(module).__name__} that can go"
    else:
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and min(parameter.shape) > 1:
                full = joined(name, key)
                others = "its other dimensions" if full in consumers else "it"
                yield full, f"it is a weight outside layers, and no channels are found along {others}"
