"""A random half of every group's units: removed, and masked by hooks, which know nothing of how obc masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from obc.model.layouts import layout_of

TOLERANCE = 1e-8  # of outputs in float64


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors that a model returned, caches left out."""
    if hasattr(output, "logits"):
        output = output.logits
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference relative to the largest value."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    scale = max(float(b.abs().max()) for b in theirs) or 1.0
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return worst / scale if worst == worst else float("inf")


def removed_units(structure: Any) -> dict[str, Tensor]:
    """A random half of each group's units, seeded."""
    generator = torch.Generator().manual_seed(1)
    limits = structure.limits
    chosen = {}
    for group in structure.groups:
        most = group.size - max(1, limits.min_units.get(group.name, 1))
        multiple = limits.round_to.get(group.name, 1)
        count = min(most, group.size // 2)
        count -= (group.size - count) % multiple and multiple - (group.size - count) % multiple
        if count > 0:
            chosen[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return chosen


def masked(model: nn.Module, structure: Any, units: dict[str, Tensor]) -> list[str]:
    """Hook ``model`` so that consumers read zeros of these units; returns groups that hooks can't mask."""
    modules = dict(model.named_modules())
    groups = {group.name: group for group in structure.groups}
    beyond = []
    for name, gone in units.items():
        consumers = [part for part in groups[name].slices if part.side == "in"]
        # Experts that are fused into one parameter have no separate input to hook, nor have products of queries and
        # keys; norms over channels need other statistics.
        layers = [layout_of(modules[part.module]) if part.module in modules else None for part in consumers]
        others = [modules[part.module] for part in groups[name].slices if part.module in modules]
        norms = [one for one in others if not layout_of(one) and not isinstance(one, (_NormBase, nn.PReLU))]
        if not consumers or None in layers or norms or groups[name].multiplied:
            beyond.append(name)
            continue
        for part in consumers:
            channels = part.channels[gone].flatten()

            def hook(module: nn.Module, args: tuple[Any, ...], channels: Tensor = channels) -> tuple[Any, ...]:
                dim = -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1
                return (args[0].index_fill(dim, channels, 0.0), *args[1:])

            reader: Any = modules[part.module]
            reader.register_forward_pre_hook(hook)
            reader.forward = _hooked(reader, hook, reader.forward)  # some models call it without hooks
    return beyond


def _hooked(module: nn.Module, hook: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*hook(module, args), **kwargs)
