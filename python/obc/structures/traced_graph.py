"""Torch-Pruning's dependency graph of a model, and what it says of coupled channels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import checkpoint as checkpoints

from obc.model.channel_dims import channel_axis
from obc.model.errors import PruningError, explained
from obc.model.evaluation import differentiable, evaluating
from obc.model.groups import Side
from obc.model.layouts import attention_parts, layout_of, loose_buffers
from obc.model.linear_like import acts_as_linear
from obc.model.names import joined, tensor_named
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.model.settings import Setting
from obc.structures.reaching import unchanged_buffers
from obc.structures.traced_items import GroupItem, items_of
from obc.structures.traced_plan import holds_channels
from obc.structures.units import InnerMatterError, Members, NotPrunableError

try:
    import torch_pruning as tp
    from torch_pruning.dependency import index_mapping
except ImportError as error:
    raise ImportError("obc.prune finds groups by Torch-Pruning: pip install torch-pruning") from error

_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)
# What Torch-Pruning raises when its own arithmetic on channels fails.
INSIDE_TORCH_PRUNING = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
_UNTRACEABLE = (
    "write this operation another way, or pass structure=: one of your own, or for models that are built like those of "
    "the transformers library obc.structures.transformers.TransformersStructure(model)"
)


class _Called:
    """In place of torch's ``CheckpointFunction``: calls the function, so that its graph shows."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _mapped(graph: Any, concatenation: Any) -> None:
    """Torch-Pruning's own, which fails if it does not know how wide one part is, as of tokens without gradients."""
    with contextlib.suppress(TypeError):
        _map_concatenation(graph, concatenation)


_map_concatenation = index_mapping.update_concat_index_mapping
_MAPPING = Setting(
    lambda: index_mapping.update_concat_index_mapping,
    partial(setattr, index_mapping, "update_concat_index_mapping"),
    _mapped,
)
# Activation checkpoints with use_reentrant=True would hide what they run.
_CHECKPOINTS = Setting(
    lambda: checkpoints.CheckpointFunction, partial(setattr, checkpoints, "CheckpointFunction"), _Called
)


def unfollowed(error: Exception) -> str:
    """The reason why a group in which Torch-Pruning failed can't be pruned."""
    return f"Torch-Pruning can't follow its channels: {type(error).__name__}: {error}"


def trace(
    model: nn.Module, run: Callable[[nn.Module, Any], Any], example_inputs: Any, unwrapped: Mapping[str, int]
) -> Any:
    """Torch-Pruning's graph. It follows gradients, so parameters are unfrozen meanwhile.

    Args:
        model: the model; its buffers and training flags are kept.
        run: ``run(model, example_inputs)`` returns outputs in any nesting.
        example_inputs: the inputs.
        unwrapped: parameter outside any layer -> its dimension to prune.

    Raises:
        PruningError: Torch-Pruning can't trace the model.
        ValueError: no parameter has a given name.
    """
    named = dict(model.named_parameters())
    for name in unwrapped:
        if name not in named:
            raise ValueError(f"unwrapped_parameters: the model has no parameter {name!r}")

    def graph(buffers: bool = True) -> Any:
        as_parameters = _buffers_as_parameters(model) if buffers else contextlib.nullcontext()
        with _without_new_hooks(model), evaluating(model), torch.enable_grad(), unchanged_buffers(model), as_parameters:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=lambda model, inputs: differentiable(run(model, inputs)),
                customized_pruners=_pruners(model),
                unwrapped_parameters=[(named[name], dim) for name, dim in unwrapped.items()],
                verbose=False,
            )

    frozen = [one for one in named.values() if not one.requires_grad and one.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with (
            explained(model, "tracing it with Torch-Pruning", _UNTRACEABLE),
            _CHECKPOINTS.changed(),
            _MAPPING.changed(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", module=r"torch_pruning\.")  # every group is proved
            try:
                with _without_saved_tensors():
                    found = graph()
            except Exception:  # the model may differentiate something in its forward, or write into its buffers
                found = graph(buffers=False)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    bound_searches(found, model)
    return found


class _LinearPruner(tp.pruner.function.LinearPruner):  # type: ignore[misc]
    """Says how many channels a linear layer of any class has."""

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[0])

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[1])


def _pruners(model: nn.Module) -> dict[type[nn.Module], Any]:
    """For classes that Torch-Pruning does not know: other recurrent layers, and other libraries' linear layers."""
    pruners: dict[type[nn.Module], Any] = dict.fromkeys(_linear_like(model), _LinearPruner())
    return pruners | {kind: tp.pruner.function.LSTMPruner() for kind in (nn.GRU, nn.RNN)}


def _linear_like(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if acts_as_linear(module)}


@contextlib.contextmanager
def _without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Removes the hooks that Torch-Pruning leaves on a model that it can't trace: later calls would fail in them."""
    before = [(module._forward_hooks, set(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        for hooks, kept in before:
            for key in set(hooks) - kept:
                del hooks[key]


@contextlib.contextmanager
def _buffers_as_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block, buffers with several entries along one dimension only are parameters, which tracing follows.

    The parameters are copies, so that what a forward writes into them is gone afterwards.
    """
    changed = []
    for module in list(model.modules()):
        if chosen := {key: buffer for key, buffer in loose_buffers(module) if max(buffer.shape) == buffer.numel()}:
            changed.append((module, dict(module._parameters), dict(module._buffers)))
            for key, buffer in chosen.items():
                del module._buffers[key]
                module._parameters[key] = nn.Parameter(buffer.detach().clone())
    try:
        yield
    finally:
        for module, parameters, buffers in changed:
            module._parameters, module._buffers = parameters, buffers


def _without_saved_tensors() -> contextlib.AbstractContextManager[None]:
    """Autograd's graph without activations: it is followed, never run backward, and lives as long as the structure."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: torch.empty_like(tensor, device="meta"), lambda placeholder: placeholder
    )


class TracedGraph:
    """The groups of Torch-Pruning's graph, in terms of module names, sides and channels.

    A raw group is Torch-Pruning's own: items of a dependency and the channels that it prunes.

    Args:
        model: the model.
        graph: from :func:`trace`; an error if the model can't be traced.
        other_vectors: see :func:`obc.structures.norm_axis.other_vectors`.

    Attributes:
        modules: the model's modules by name.
        names: module -> name.
        failure: why groups can't be traced, or no more of them.
        dims: parameter outside any layer -> the pruned dimension; filled by :meth:`members`.
    """

    def __init__(self, model: nn.Module, graph: Any | PruningError, other_vectors: Collection[str] = ()) -> None:
        self._model, self.failure = model, str(graph) if isinstance(graph, PruningError) else ""
        self._graph: Any = None if self.failure else graph
        self.modules = dict(model.named_modules(remove_duplicate=True))
        self.names, self.other_vectors = {module: name for name, module in self.modules.items()}, other_vectors
        self._linear = _linear_like(model)
        self.dims: dict[str, int] = {}

    def raw_groups(self, ignored: Collection[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
        """(first layer, raw group), or the reason in place of a group in which Torch-Pruning fails.

        Groups that contain outputs of ``ignored`` layers are left out. No more groups follow once the searches that do
        not end have followed half a million channels, or compared a hundred million edges, or some share of both.
        """
        if self._graph is None:
            return
        share, seen = 0.0, {*self._graph.IGNORED_LAYERS_IN_TRACING, *ignored}
        for module in list(self._graph.module2node):
            if not (isinstance(module, _ROOTS) or type(module) in self._linear) or module in seen:
                continue
            pruner = self._graph.get_pruner_of_module(module)
            if pruner is None or (width := pruner.get_out_channels(module)) is None:
                continue
            try:
                raw = self._search(module, pruner.prune_out_channels, list(range(width)))
            except INSIDE_TORCH_PRUNING as error:
                share += error.share if isinstance(error, UnboundedSearchError) else 0
                if share > 1:
                    self._graph, self.failure = None, unfollowed(error)
                    return
                yield module, unfollowed(error)
                continue
            pruned = self.pruned_outputs(raw)
            seen.update(pruned)
            if not any(one in ignored for one in pruned):
                yield module, raw

    def _search(self, layer: Any, pruning: Any, channels: list[int]) -> Any:
        """Torch-Pruning's group of these channels; before every search it maps channels anew."""
        with _MAPPING.changed():
            return self._graph.get_pruning_group(layer, pruning, channels)

    def contains(self, name: str) -> bool:
        """Whether tracing came upon a module."""
        return self._graph is not None and self.modules[name] in self._graph.module2node

    def pruned_outputs(self, raw: Any) -> list[Any]:
        """The modules and parameters that lose out channels with a raw group, in its order."""
        return [item.target for item in items_of(raw) if item.writes]

    def producers(self, raw: Any) -> list[str]:
        """The layers that lose out channels with a raw group."""
        return [self.names[module] for module in self.pruned_outputs(raw) if layout_of(module) is not None]

    def rerooted(self, raw: Any) -> Any:
        """The group of an attention from the inputs of its output projection, which are in the order of the heads."""
        for item in items_of(raw):
            if layout_of(item.target) is not None and item.reads:
                size = self._graph.get_in_channels(item.target)
                return self._search(item.target, item.handler, list(range(size)))
        raise InnerMatterError("no layer reads the attention's output")

    def coupled(self, root: GroupItem, channel: int) -> list[int]:
        """The channels of a group's root that must go with one of them."""
        return next(items_of(self._search(root.target, root.handler, [channel]))).channels

    def reaches_output(self, raw: Any) -> bool:
        """Whether Torch-Pruning follows a raw group's channels to the model's output."""
        return any(type(item.target).__name__ == "_OutputOp" for item in items_of(raw))

    def members(self, raw: Any) -> Members:
        """(module, side) -> channel -> root channel, for everything with parameters that the group prunes."""
        members: Members = {}
        for item in items_of(raw):
            parts = self._parts(item)
            if not parts or not item.channels:
                continue
            if item.roots is None:
                raise NotPrunableError("Torch-Pruning does not say which channels go together (grouped queries)")
            for name, side, copies in parts:
                members_of_part = members.setdefault((name, side), {})
                for offset in copies:
                    members_of_part.update({c + offset: r for c, r in zip(item.channels, item.roots, strict=True)})
        self._take_along(members)
        return members

    def _take_along(self, members: Members) -> None:
        """Add the buffers of modules without children whose other tensors a group prunes, where it is clear how.

        They are integers, such as zero points, or only training reads them. They have one dimension as long as the
        others' channels.
        """
        for name, side in list(members):
            owner, _, _ = name.rpartition(".")
            module = self.modules.get(owner)
            if name not in self.dims or module is None or next(module.children(), None) is not None:
                continue
            for key, buffer in module.named_buffers(recurse=False):
                full, size = joined(owner, key), self.dim_size(name)
                if (full, side) in members or len(members[name, side]) != size:
                    continue
                try:
                    axis = channel_axis(buffer, size)
                except ValueError as reason:
                    raise InnerMatterError(f"of the buffer {full!r}: {reason}") from reason
                if axis is not None:
                    self.dims[full] = axis
                    members[full, side] = dict(members[name, side])

    def dim_size(self, name: str) -> int:
        """The length of the pruned dimension of a parameter outside any layer."""
        return tensor_named(self.modules, name).shape[self.dims[name]]

    def _parts(self, item: GroupItem) -> list[tuple[str, Side, list[int]]]:
        """(name, side, offsets of the copies of its channels) for what one item of a group prunes."""
        target = item.target
        if isinstance(target, nn.Parameter):
            return self._parts_of_parameter(target, item.dim)
        if target not in self.names or not (holds_channels(target) or isinstance(target, _NormBase)):
            return []  # an operation, an activation
        name = self.names[target]
        if isinstance(target, nn.RNNBase):
            if not is_recurrent(target):
                raise InnerMatterError(f"a plan can't describe the projections (proj_size) of the LSTM {name!r}")
            if item.writes:
                raise NotPrunableError(f"tracing does not follow the hidden units of {name!r}")
            return [(name, "in", [0])]
        _refuse_scaled_rows(name, target)
        if isinstance(target, nn.LayerNorm) and len(target.normalized_shape) > 1:
            raise InnerMatterError(f"a plan can't describe {name!r}, a LayerNorm over several dimensions")
        if isinstance(target, nn.MultiheadAttention):
            return attention_parts(name, target)
        return [(name, "out" if layout_of(target) is None else item.side, [0])]

    def _parts_of_parameter(self, parameter: nn.Parameter, dim: int) -> list[tuple[str, Side, list[int]]]:
        name = self._graph._param_to_name[parameter]
        owner_name, _, attribute = name.rpartition(".")
        owner = self._model.get_submodule(owner_name)
        _refuse_scaled_rows(owner_name, owner)
        rule = rule_for(owner)
        is_norm = isinstance(rule, Rule) and rule.elementwise and attribute in (rule.weight, rule.bias)
        if is_norm and owner_name not in self.other_vectors:
            return [(owner_name, "out", [0])]  # a norm that Torch-Pruning does not know
        self.dims[name] = dim
        return [(name, "out", [0])]


def _refuse_scaled_rows(name: str, module: nn.Module) -> None:
    """Refuse embeddings that scale each row, when it is read, by the norm of all its channels."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise InnerMatterError(
            f"{name!r} scales rows down to max_norm={module.max_norm} when it reads them, by the norm of all their "
            "channels; scale them once (torch.renorm), then set max_norm to None"
        )


# A search may follow an edge more than once, on several paths. Its time grows with the square of the steps.
_STEPS, _STEPS_PER_EDGE = 4000, 4
# When searches without an end (such as through grouped queries) have followed so many channels, or compared so many
# edges with others, some ten seconds, the graph is given up.
_MOST_FOLLOWED, _MOST_COMPARED = 500_000, 100_000_000
# Between layers a tensor may have more channels than any layer: concatenated, or including positions.
_ROOM = 16


class UnboundedSearchError(RuntimeError):
    """Torch-Pruning follows more channels, or takes more steps along edges, than a search that ends.

    Attributes:
        share: of what searches without an end may do before the graph is given up.
    """

    def __init__(self, steps: int, followed: int) -> None:
        super().__init__(f"its search does not end (after {steps} steps, which follow {followed} channels in all)")
        self.share = followed / _MOST_FOLLOWED + steps**2 / _MOST_COMPARED


@dataclass
class _Bounds:
    """What one search may do: the most channels, the most steps along edges, and what it has done so far."""

    channels: int
    most_steps: int
    steps: int = 0
    followed: int = 0

    def step(self, channels: int) -> None:
        """Count a step, which follows so many channels."""
        self.steps, self.followed = self.steps + 1, self.followed + channels
        if channels > self.channels or self.steps > self.most_steps:
            raise UnboundedSearchError(self.steps, self.followed)


class _Mappings(list[Any]):
    """The channel mappings along one edge of the graph, which Torch-Pruning refills before every search."""

    def __init__(self, mappings: list[Any], bounds: _Bounds) -> None:
        self._bounds = bounds
        super().__init__(self._bounded(mapping) for mapping in mappings)

    def __iter__(self) -> Iterator[Any]:
        """Once for every step along the edge, also of edges that map no channels."""
        self._bounds.step(0)
        return super().__iter__()

    def __setitem__(self, index: Any, mapping: Any) -> None:
        super().__setitem__(index, self._bounded(mapping))

    def _bounded(self, mapping: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        if mapping is None:
            return None

        def bounded(channels: Any) -> Any:
            found = mapping(channels)
            self._bounds.step(len(found))
            return found

        return bounded


def bound_searches(graph: Any, model: nn.Module) -> None:
    """Make searches in a dependency graph raise :class:`UnboundedSearchError` instead of growing without end."""
    most = _ROOM * max((max(parameter.shape) for parameter in model.parameters() if parameter.dim()), default=1)
    edges = [dependency for node in graph.module2node.values() for dependency in node.dependencies]
    bounds = _Bounds(most, max(_STEPS, _STEPS_PER_EDGE * len(edges)))
    for dependency in edges:
        dependency.index_mapping = _Mappings(list(dependency.index_mapping), bounds)
    search = graph.get_pruning_group

    def bounded(*args: Any, **kwargs: Any) -> Any:
        bounds.steps = bounds.followed = 0
        return search(*args, **kwargs)

    graph.get_pruning_group = bounded
