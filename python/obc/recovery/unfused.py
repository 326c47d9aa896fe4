"""Fused experts as one linear layer per expert, while a model is compensated.

A mixture's experts are stored as one tensor, so their down projections are not layers. Inside :func:`unfused` each is
a layer, a view of the tensor (and of that of the biases) that compensation changes in place, and the module computes
expert by expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from obc.model.evaluation import ForwardFn
from obc.model.experts import DOWN, experts_of, fused_experts, is_transposed, projection
from obc.model.hooks import hooked
from obc.model.kept import Kept
from obc.model.names import named_modules
from obc.model.plan import PruningPlan
from obc.model.processes import Processes
from obc.model.rules import Rule, rule_for
from obc.recovery.stream_points import Routing
from obc.statistics.routed import RoutedCalls, expert_count, expert_name, mixed, routed_input


class DownProjection(nn.Linear):
    """One expert's down projection.

    Attributes:
        routing: the tokens of its last call.
        reads: the hidden states that all experts read in that call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.routing: Routing | None = None
        self.reads: Tensor | None = None


@contextlib.contextmanager
def unfused(
    pruned: nn.Module, original: nn.Module, plan: PruningPlan, batch: Any, forward: ForwardFn, processes: Processes
) -> Iterator[tuple[PruningPlan, list[str]]]:
    """Give both models a layer for every fused expert whose inner channels were pruned, until the block ends.

    Its name is that of the tensor with the expert's number in the pruned model:
    ``"model.layers.0.mlp.experts.down_proj[3]"``.

    Args:
        pruned: with the unpruned model's names.
        original: the unpruned model; run once, on ``batch``, if it has such experts.
        batch: on which the experts' modules are tried.
        processes: must agree on the experts.

    Yields:
        The plan with entries for these layers; and the experts that stay fused, because they compute something other
        than a gated product and a down projection, or because the batch did not reach them.
    """
    sliced = sliced_experts(pruned, original)
    readable = _readable(original, sliced, batch, forward) if sliced else set()
    chosen = processes.in_all(sliced, readable)
    entries: dict[str, Kept] = {}
    changed: list[nn.Module] = []
    try:
        for name in chosen:
            kept = plan[f"{name}.{DOWN}"]
            indices = {kept.dim: kept.out_channels, kept.in_dim: kept.in_channels}
            module, whole = pruned.get_submodule(name), original.get_submodule(name)
            everyone = range(expert_count(module))
            numbers = everyone if indices.get(0) is None else indices[0].tolist()  # type: ignore[union-attr]
            changed += [module, whole]
            _unfuse(module, everyone)
            _unfuse(whole, numbers)
            features, inner = (2, 1) if is_transposed(*experts_of(module)) else (1, 2)
            layer = Kept(out_channels=indices.get(features), in_channels=indices.get(inner))
            entries |= {expert_name(f"{name}.{DOWN}", place): layer for place in range(len(numbers))}
        yield PruningPlan({**plan, **entries}, plan.depth, plan.counts), [name for name in sliced if name not in chosen]
    finally:
        for module in changed:
            vars(module).pop("forward", None)
            for name in [name for name, child in module._modules.items() if isinstance(child, DownProjection)]:
                del module._modules[name]


def sliced_experts(pruned_model: nn.Module, original_model: nn.Module) -> list[str]:
    """Modules that hold the down projections of all experts in one tensor, which lost inputs."""
    found = []
    for name, module in named_modules(pruned_model):
        width = _inner_width(module)
        if width is not None and width != _inner_width(original_model.get_submodule(name)):
            found.append(name)
    return found


def _inner_width(module: nn.Module) -> int | None:
    """Inputs of the down projections of fused experts; of all experts' projections in JetMoE's modules."""
    rule = rule_for(module)
    if not isinstance(rule, Rule) or rule.kind != "weight" or rule.in_axis is None:
        return None
    weight: Tensor = getattr(module, rule.weight)
    return weight.shape[rule.in_axis] if weight.dim() == 3 else None


def _readable(original: nn.Module, names: Sequence[str], batch: Any, forward: ForwardFn) -> set[str]:
    """The modules whose output equals that of their experts' parts, computed one by one."""
    found: set[str] = set()
    calls = RoutedCalls()

    def compare(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(calls.inputs(module, args, output), str):
            found.add(name)

    handles = []
    for name in names:
        module = original.get_submodule(name)
        if fused_experts(module) is not None and "forward" not in vars(module):  # another library's wrapper stays
            handles.append(module.register_forward_hook(partial(compare, name)))
    with hooked(handles):
        forward(original, batch)
    return found


def _unfuse(module: nn.Module, numbers: Sequence[int]) -> None:
    """Give the module a layer for each of these experts, and a forward pass that calls them."""
    layers = {}
    for place, expert in enumerate(numbers):
        layer = DownProjection(*projection(module, DOWN, expert))
        layers[expert] = module._modules[expert_name(DOWN, place)] = layer
    module.forward = partial(_forward, module, layers)


def _forward(
    module: Any, layers: dict[int, DownProjection], hidden: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """sum over experts e of g_e down_e h_e. Each layer is called once, without rows if no token was routed to it."""
    inputs = [routed_input(module, expert, hidden, indices, weights) for expert in range(expert_count(module))]
    for routed in inputs:
        if (layer := layers.get(routed.expert)) is not None:
            layer.routing, layer.reads = Routing(routed.tokens, routed.total, routed.gates), hidden
    return mixed(module, inputs, hidden, layers)
