"""The share of its consumers' outputs that is lost with a unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from obc.criteria.protocol import About, GroupScores, MeasuredCriterion
from obc.criteria.subject import Subject
from obc.model.arguments import no_batches
from obc.model.evaluation import evaluating
from obc.model.experts import DOWN, fused_experts, projection
from obc.model.groups import ChannelGroup, Slice
from obc.model.hooks import hooked
from obc.model.layouts import layer_of, layout_of
from obc.model.usable_batches import all_finite
from obc.statistics.routed import RoutedCalls, RoutedInput, expert_name

# (consumer, its output's energy, (group, energies of its units)) of one call.
Energies = tuple[str, Tensor, list[tuple[str, Tensor]]]


class Reconstruction(MeasuredCriterion):
    """S_u = sum over consumers m of E|W_m x_u|^2 / E|y_m|^2: the error of their outputs if u is zero.

    x_u is the part of the consumer's input x that belongs to unit u, y_m its output, and E is the mean over all batches
    and positions. Every expert of a mixture is a consumer of the tokens routed to it. Needs no labels and no gradients.

    Cost: about two forward passes of the consumers.
    """

    name = "reconstruction"
    about = About("reconstruction error", "baseline", "sum over consumers of E|W x_u|^2 / E|y|^2", "forward")

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) float64 per group: relative errors, from one pass over the batches.

        Raises:
            ValueError: there are no batches.
        """
        model, batches = subject.model, subject.batches
        consumed, calls = _consumed(model, subject.groups), RoutedCalls()
        energies: dict[tuple[str, str], Tensor] = {}
        outputs: dict[str, Tensor] = {}
        in_batch: list[Energies] = []  # added only if all of it is finite

        def hook(name: str) -> Callable[..., None]:
            def collect(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
                if fused_experts(module) is not None:
                    inputs = calls.inputs(module, [*args, *kwargs.values()], output)
                    if not isinstance(inputs, str):
                        in_batch.extend(_of_experts(name, module, inputs, consumed[name]))
                    return
                x = args[0] if args else next(iter(kwargs.values()))
                parts = [(group_name, _energies(module, x, part)) for group_name, part in consumed[name]]
                in_batch.append((name, output.double().square().sum(), parts))

            return collect

        handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in consumed]
        count = 0
        with hooked(handles), evaluating(model), torch.no_grad():
            for count, batch in enumerate(batches, 1):  # noqa: B007 - how many there were
                in_batch.clear()
                subject.forward_fn(model, batch)
                if not all_finite(in_batch):
                    batches.leave_out("what a layer makes of it is not finite")
                    continue
                for name, energy, parts in in_batch:
                    outputs[name] = outputs[name] + energy if name in outputs else energy
                    for group_name, unit_energies in parts:
                        key = group_name, name
                        energies[key] = energies[key] + unit_energies if key in energies else unit_energies
        if count == 0:
            raise ValueError(no_batches("reconstruct"))
        found: GroupScores = {}
        for (group_name, name), energy in energies.items():
            relative = energy / outputs[name].clamp_min(torch.finfo(torch.float64).tiny)
            found[group_name] = found[group_name] + relative if group_name in found else relative
        return found


def _consumed(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, list[tuple[str, Slice]]]:
    """Consumer -> (group, what it reads of it); whole experts have none."""
    modules = dict(model.named_modules())
    found: dict[str, list[tuple[str, Slice]]] = {}
    for group in groups:
        for part in group.consumers:
            module = modules.get(part.module)
            if module is None or part.side != "in":
                continue
            if layout_of(module) is not None or fused_experts(module) is not None:
                found.setdefault(part.module, []).append((group.name, part))
    return found


def _of_experts(
    name: str, module: nn.Module, inputs: Sequence[RoutedInput], parts: Sequence[tuple[str, Slice]]
) -> list[Energies]:
    """The energies of one call of a mixture, expert by expert."""
    found: list[Energies] = []
    for routed in inputs:
        if len(routed.tokens):
            weight, bias = projection(module, DOWN, routed.expert)
            energies = [
                (group, _linear_energies(weight, routed.x, part.channels.to(weight.device))) for group, part in parts
            ]
            energy = F.linear(routed.x, weight, bias).double().square().sum()
            found.append((expert_name(name, routed.expert), energy, energies))
    return found


def _energies(module: nn.Module, x: Tensor, part: Slice) -> Tensor:
    """(units,) float64: the sum of squares of a layer's outputs for each unit's channels alone, without its bias."""
    channels = part.channels.to(x.device)
    if not isinstance(module, _ConvNd):
        layout, weight = layer_of(module)
        return _linear_energies(weight.T if layout.transposed else weight, x, channels)
    return torch.stack([_alone(module, unit)(x[:, unit]).double().square().sum() for unit in channels])


def _linear_energies(weight: Tensor, x: Tensor, channels: Tensor) -> Tensor:
    """Sum over positions p and outputs o of (sum_k W[o, u, k] x[p, u, k])^2, from the k x k moments of x and of W."""
    columns = weight.double()[:, channels]  # (out, units, k)
    inputs = x.reshape(-1, x.shape[-1]).double()[:, channels]  # (positions, units, k)
    weight_moments, input_moments = (torch.einsum("puk,pul->ukl", t, t) for t in (columns, inputs))
    return (weight_moments * input_moments).sum((1, 2))


def _alone(module: _ConvNd, channels: Tensor) -> nn.Module:
    """The layer with only these in channels, one or more in each conv group, and without a bias."""
    alone = copy.copy(module)
    alone.__dict__ = dict(module.__dict__)
    alone._forward_hooks, alone._forward_pre_hooks = type(module._forward_hooks)(), type(module._forward_hooks)()
    weight = module.weight
    chosen = weight[channels] if module.transposed else weight[:, (channels % weight.shape[1]).unique()]
    alone._parameters = {"weight": nn.Parameter(chosen, requires_grad=False), "bias": None}
    return alone
