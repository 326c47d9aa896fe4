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
from obc.model.layouts import pads_with_zeros
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.refusals import refuse_dropped_biases
from obc.recovery.consumers import PrunedConsumer, find_consumers
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
    No config can express it, so ``from_pretrained`` would drop it: ``save_pretrained`` raises, and the report says so.

    Args:
        pruned_model: the model to change in place.
        original_model: the unpruned model; unchanged.
        plan: what pruning kept.
        batches: calibration batches, used once, without gradients.
        forward_fn: as for :func:`obc.collect`.
    """
    forward = in_present_autocast(forward_fn or call_on_batch)
    refuse_non_plans(plan)
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
    consumers: dict[str, PrunedConsumer] = {}
    for name, consumer in find_consumers(pruned_model, original_model, plan, verify=False).items():
        if consumer.overlaps or pads_with_zeros(consumer.module):  # transposed ones have fewer taps at their borders
            report.left[name] = "it pads with zeros, where dropped channels had another mean"
        else:
            consumers[name] = consumer
    if not consumers:
        return report
    slices = tuple(Slice(name, "in", torch.zeros(1, 1, dtype=torch.int64, device="cpu")) for name in consumers)
    groups = [ChannelGroup("consumers", slices)]
    moments = collect(
        original_model, batches, statistics="moments", groups=groups, forward_fn=forward_fn, progress=False
    ).moments
    with torch.no_grad():
        for name, consumer in consumers.items():
            if name not in moments:
                report.left[name] = "no batch reached it"
                continue
            dropped = moments[name].mean.clone()
            dropped[plan[name].in_columns] = 0.0
            shift, module = consumer.through(dropped), consumer.module
            if consumer.has_bias:
                assert isinstance(module.bias, Tensor)
                module.bias += shift
            else:
                module.bias = nn.Parameter(shift)
                report.created.append(name)
            report.absorbed.append(name)
    if report.created and hasattr(pruned_model, "save_pretrained"):
        report.warnings.append(refuse_dropped_biases(pruned_model, report.created))
    return report
