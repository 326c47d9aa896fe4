"""Adds the mean contribution of dropped channels to their consumers' biases: FLAP's update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.autocast import in_present_autocast, without_autocast
from obc.model.depth import expanded
from obc.model.evaluation import ForwardFn, call_on_batch
from obc.model.groups import ChannelGroup, Slice
from obc.model.kept import Kept
from obc.model.layouts import expand, layout_of
from obc.model.names import named_modules
from obc.model.plan import PruningPlan
from obc.model.slicing import original_tensor, sliced, was_depthwise
from obc.statistics.run import collect


@dataclass
class MeansReport:
    """The report of :func:`absorb_means`.

    Attributes:
        absorbed: consumers whose bias absorbed the mean of their dropped channels.
        created: those among them without a bias before.
        left: consumers that were left unchanged -> why.
        warnings: what the caller should know.
    """

    absorbed: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def absorb_means(
    pruned_model: nn.Module,
    original_model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
) -> MeansReport:
    """bias += W_d E[x_d] in every consumer of dropped channels d, in place; a bias is created if there is none.

    x is the consumer's input in the unpruned model (An et al., arXiv 2312.11983). Convolutions that pad with zeros are
    left unchanged, because at the border the dropped channels had another mean.

    A created bias is an ordinary parameter, which ``torch.save`` and ``obc.structures.transformers.save_pruned`` keep.
    ``save_pretrained`` writes it, but ``from_pretrained`` drops it, because no config can express it; the report warns
    of that.

    Args:
        pruned_model: the model to change in place.
        original_model: the unpruned model; unchanged.
        plan: what pruning kept.
        batches: calibration batches, used once, without gradients.
        forward_fn: as for :func:`obc.collect`.
    """
    forward = in_present_autocast(forward_fn or call_on_batch)
    plan.refuse_unknown(pruned_model, "the pruned model")
    with without_autocast(), expanded(pruned_model, plan.depth):
        return _absorb_all(pruned_model, original_model, plan, batches, forward)


def _absorb_all(
    pruned_model: nn.Module,
    original_model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None,
) -> MeansReport:
    report = MeansReport()
    state = original_model.state_dict()
    consumers: dict[str, Kept] = {}
    for name, module in named_modules(pruned_model):
        kept = plan.get(name)
        if kept is None or kept.in_channels is None or layout_of(module) is None:
            continue
        if was_depthwise(module, original_tensor(state, f"{name}.weight"), kept):
            continue
        if _pads_with_zeros(module):
            report.left[name] = "it pads with zeros, where dropped channels had another mean"
        else:
            consumers[name] = kept
    if not consumers:
        return report
    slices = tuple(Slice(name, "in", torch.zeros(1, 1, dtype=torch.int64)) for name in consumers)
    groups = [ChannelGroup("consumers", slices)]
    moments = collect(
        original_model, batches, statistics="moments", groups=groups, forward_fn=forward_fn, progress=False
    ).moments
    modules = dict(named_modules(pruned_model))
    with torch.no_grad():
        for name, kept in consumers.items():
            if name not in moments:
                report.left[name] = "no batch reached it"
                continue
            original = original_tensor(state, f"{name}.weight")
            weight = sliced(modules[name], "weight", original, Kept(kept.out_channels), name)
            _absorb(name, modules[name], weight, kept, moments[name].mean, report)
    if report.created and hasattr(pruned_model, "save_pretrained"):
        named = ", ".join(report.created[:3]) + (" and more" if len(report.created) > 3 else "")
        report.warnings.append(
            f"{named} have a bias now that no config can express: from_pretrained would drop it; "
            "obc.structures.transformers.save_pruned and load_pruned keep it"
        )
    return report


def _absorb(name: str, module: nn.Module, weight: Tensor, kept: Kept, mean: Tensor, report: MeansReport) -> None:
    """Add the dropped channels' contribution at their means; ``weight`` has the kept outputs and all inputs."""
    assert kept.in_channels is not None
    dropped = torch.ones(len(mean), dtype=torch.bool)
    dropped[expand(kept.in_channels.cpu(), kept.in_repeat)] = False
    constant = mean.cpu() * dropped
    layout = layout_of(module)
    assert layout is not None
    matrix = (weight.transpose(0, 1) if layout.transposed else weight).double().cpu()
    if layout.convolution:  # every tap reads the same mean
        matrix = matrix.flatten(2).sum(2)
    outputs = matrix.unflatten(0, (layout.groups, -1)) @ constant.reshape(layout.groups, -1, 1)
    shift = outputs.flatten().to(weight)
    if module.bias is None:
        module.bias = nn.Parameter(shift.clone())
        report.created.append(name)
    else:
        assert isinstance(module.bias, Tensor)
        module.bias += shift
    report.absorbed.append(name)


def _pads_with_zeros(module: nn.Module) -> bool:
    padding: Any = getattr(module, "padding", 0)
    if layout_of(module) is None or getattr(module, "padding_mode", "") != "zeros" or padding == "valid":
        return False
    layout = layout_of(module)
    if layout is not None and layout.convolution and layout.transposed:
        return True  # fewer taps reach its borders, with any padding
    return isinstance(padding, str) or any(padding)
