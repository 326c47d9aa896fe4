"""Intra-Fusion without data: removed units are fused into kept ones by optimal transport between their weights.

Theus et al., arXiv 2402.07839; code alexandertheus/Intra-Fusion. Let v_u be the weights of unit u in all layers of the
group, concatenated and divided by their norm, K the kept units, and T >= 0 (K, units) the plan that moves the mass of
all units, 1 each, to the kept ones, equally much to each, at the least cost

    sum over k, u of T_ku |v_k - v_u|_p,        sum over k of T_ku = 1,

Layers that write the units get the rows T W (with T's rows divided by their sums: means of what they fuse), and layers
that read them the columns W T^T (sums of what they fuse). Units with equal input weights are fused exactly. T solves
one linear program per group, with |K| * units variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from obc import ops
from obc.criteria.units import TINY, by_unit, weight_of
from obc.model.arguments import one_of
from obc.model.autocast import without_autocast
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.kept import Kept
from obc.model.layouts import layer_of, layout_of
from obc.model.names import named_modules
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.recurrent import is_recurrent

Outputs = Literal["mean", "sum"]


@dataclass
class FusionReport:
    """The report of :func:`fuse_units`.

    Attributes:
        fused: group -> (number of units before, number after).
        left: pruned groups that were not fused -> why.
    """

    fused: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@without_autocast()
def fuse_units(
    pruned_model: nn.Module,
    original_model: nn.Module,
    plan: PruningPlan,
    groups: Sequence[ChannelGroup],
    *,
    outputs: Outputs = "mean",
    p: float = 1.0,
) -> FusionReport:
    """Fuse what was pruned into what was kept, in place. Needs scipy.

    Norms and other modules that are neither linear nor convolutional keep the entries of the kept units.

    Args:
        pruned_model: the model as pruning left it.
        original_model: the unpruned model; unchanged.
        plan: what pruning kept.
        groups: groups of the unpruned model.
        outputs: "mean", or "sum" as in the released code.
        p: exponent of the norm of differences.

    Raises:
        ValueError: unknown ``outputs``.
        ImportError: scipy is missing.
    """
    one_of("outputs", outputs, get_args(Outputs))
    refuse_non_plans(plan)
    report = FusionReport()
    originals, modules = dict(named_modules(original_model)), dict(named_modules(pruned_model))
    factors: dict[str, dict[Side, Tensor]] = {}  # layer -> C, and D transposed
    for group in groups:
        kept = _kept_units(group, plan)
        if kept is None or len(kept) == group.size:
            continue
        layers = _layers_of(group, originals)
        if (reason := _unfusable(group, layers, originals)) is not None:
            report.left[group.name] = reason
            continue
        transported = transport(_vectors(layers), kept, p)
        means = transported / transported.sum(1, keepdim=True).clamp_min(TINY) if outputs == "mean" else transported
        for part, module in layers:
            own = factors.setdefault(part.module, {})
            if part.side not in own:
                own[part.side] = _selection(module, plan[part.module], part.side)
            _fill(own[part.side], part.channels, kept, means if part.side == "out" else transported)
        report.fused[group.name] = (group.size, len(kept))
    with torch.no_grad():
        for name, own in factors.items():
            _fold(modules[name], originals[name], plan[name], own)
    return report


def transport(vectors: Tensor, kept: Tensor, p: float = 1.0) -> Tensor:
    """(K, units) T: the exact optimal transport from all units to the kept ones; its columns sum to 1.

    Args:
        vectors: (units, entries).
        kept: (K,) indices of units.
        p: exponent of the norm of differences of vectors of length 1.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True).clamp_min(TINY)
    cost = torch.cdist(unit[kept], unit, p=p).cpu()
    count, size = cost.shape
    columns = sparse.kron(torch.ones(1, count, device="cpu").numpy(), sparse.identity(size))
    rows = sparse.kron(sparse.identity(count), torch.ones(1, size, device="cpu").numpy())
    # The last kept unit gets the remainder; a redundant constraint could contradict the others by rounding.
    amounts = torch.cat([torch.ones(size, device="cpu"), torch.full((count - 1,), size / count, device="cpu")]).double()
    constraints = sparse.vstack([columns, rows.tocsr()[:-1]])
    solved = linprog(cost.flatten().numpy(), A_eq=constraints, b_eq=amounts.numpy(), method="highs-ds")
    if not solved.success:
        raise ValueError(f"the transport of {size} units to {count} was not found: {solved.message}")
    found = torch.from_numpy(solved.x).reshape(count, size).clamp_min(0)
    return found / found.sum(0, keepdim=True)


def _kept_units(group: ChannelGroup, plan: PruningPlan) -> Tensor | None:
    """The units that the plan keeps; None if it does not mention the group."""
    for part in group.slices:
        if part.module in plan and (channels := plan[part.module].on(part.side)) is not None:
            return torch.isin(part.channels, channels.cpu()).all(1).nonzero().flatten()
    return None


def _layers_of(group: ChannelGroup, modules: dict[str, nn.Module]) -> list[tuple[Slice, nn.Module]]:
    """The group's slices of linear layers and convolutions."""
    found = ((part, modules.get(part.module)) for part in group.slices)
    return [(part, module) for part, module in found if module is not None and layout_of(module) is not None]


def _unfusable(
    group: ChannelGroup, layers: Sequence[tuple[Slice, nn.Module]], modules: dict[str, nn.Module]
) -> str | None:
    if any(is_recurrent(modules.get(part.module)) for part in group.slices):
        return "a recurrent layer holds its units, and fusion does not change its weights"
    if {part.side for part, _ in layers} != {"out", "in"}:
        return "no linear layer or convolution both writes and reads its units"
    grouped = any(layer_of(module)[0].groups > 1 for _, module in layers)
    return "a grouped convolution would mix its groups" if grouped else None


def _vectors(layers: Sequence[tuple[Slice, nn.Module]]) -> Tensor:
    """(units, entries) weights of every unit in all layers."""
    weights = [(part, module, weight_of(module)) for part, module in layers]
    parts = [by_unit(module, weight, part) for part, module, weight in weights if weight is not None]
    return torch.cat([part.double().cpu() for part in parts], 1)


def _selection(original: nn.Module, kept: Kept, side: Side) -> Tensor:
    """(kept channels, channels): the rows of the identity that the plan selects on one side of a layer."""
    layout, weight = layer_of(original)
    identity = torch.eye(layout.sizes(weight)[side == "in"], dtype=torch.float64, device="cpu")
    stays = kept.on(side)
    return identity if stays is None else identity[stays.cpu()]


def _fill(factor: Tensor, channels: Tensor, kept: Tensor, matrix: Tensor) -> None:
    """Put ``matrix`` in place of the units of one group in a selection."""
    for own in range(channels.shape[1]):  # a head's channels are fused one by one with those of other heads
        rows = factor[:, channels[kept, own]].argmax(0)
        factor[rows[:, None], channels[:, own]] = matrix


def _fold(pruned: nn.Module, original: nn.Module, kept: Kept, fused: dict[Side, Tensor]) -> None:
    """weight = C W D, bias = C b, with the plan's selection on a side where nothing is fused."""
    layout, weight = layer_of(original)
    missing = [side for side in get_args(Side) if side not in fused and kept.on(side) is not None]
    fused |= {side: _selection(original, kept, side) for side in missing}
    out_factor, in_factor = (fused[side].to(weight) if side in fused else None for side in get_args(Side))
    first, second = (in_factor, out_factor) if layout.transposed else (out_factor, in_factor)
    pruned.weight.copy_(ops.fold(weight, first, None if second is None else second.mT))  # type: ignore[operator]
    bias = original._parameters.get("bias")
    if bias is not None and out_factor is not None:
        pruned.bias.copy_(out_factor @ bias.detach())  # type: ignore[operator]
