"""Every criterion of ``obc.prune``: one score per unit of each group, the least important lowest.

Written for unit u of a group with slices m (what layer m loses with u), W_m,u the slice as a vector, r_m,u[n] =
W_m,u . dL_n/dW_m,u its row. Criteria that look at weights alone are not comparable between groups as they are: they
are divided by their group's mean, as Torch-Pruning does for global ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc import ops
from obc.criteria.reconstruction import relative_errors
from obc.model.evaluation import ForwardFn, evaluating
from obc.model.groups import ChannelGroup, Sided, Slice, Slices
from obc.model.layouts import layout_of
from obc.scoring.run import score

LossFn = Callable[[nn.Module, Any], Tensor]
GroupScores = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is scored, and on what.

    Attributes:
        model: as it is now.
        groups: its groups.
        batches: an iterable that can be passed over again.
        loss_fn: ``loss_fn(model, batch)``.
        forward_fn: ``forward_fn(model, batch)``: any forward pass.
        slices: whether the Jacobian Criterion reads every slice or the group's gate.
        rows: "batch" or "sample", of the Jacobian Criterion.
        generator: of random numbers.
        micro_batch: samples that the Jacobian Criterion runs at once; None runs whole batches.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    batches: Iterable[Any]
    loss_fn: LossFn
    forward_fn: ForwardFn
    slices: Slices
    rows: Literal["batch", "sample"]
    generator: torch.Generator
    micro_batch: int | None = None


@dataclass(frozen=True)
class GroupRows:
    """Rows of every group, and what had none.

    Attributes:
        rows: module -> (N, channels) on both sides.
        unscored: module -> why it has no rows.
    """

    rows: Mapping[str, Sided]
    unscored: Mapping[str, str]


def read_rows(subject: Subject) -> GroupRows:
    """Rows of the layers that the groups' scores need: of the consumers for gates, else of every slice."""
    wanted = {
        part.module
        for group in subject.groups
        for part in (group.consumers if subject.slices == "gate" else group.slices)
    }
    scores = score(
        subject.model,
        subject.batches,
        subject.loss_fn,
        rows=subject.rows,
        keep_rows=True,
        micro_batch=subject.micro_batch,
        modules=lambda name, module: name in wanted,
        progress=False,
    )
    unscored = {name: str(how.reason) for name, how in scores.coverage.items() if name in wanted and not how.scored}
    return GroupRows(scores.rows, unscored)


def random(subject: Subject) -> GroupScores:
    """S_u uniform in [0, 1)."""
    return {group.name: torch.rand(group.size, generator=subject.generator) for group in subject.groups}


def l1(subject: Subject) -> GroupScores:
    """S_u = mean over m of |W_m,u|_1, relative to the group's mean (Li et al., arXiv 1608.08710)."""
    return _by_weights(subject, lambda weights: _moments(weights)[4])


def l2(subject: Subject) -> GroupScores:
    """S_u = mean over m of |W_m,u|_2^2, relative to the group's mean."""
    return _by_weights(subject, lambda weights: _moments(weights)[3])


def bn_scale(subject: Subject) -> GroupScores:
    """S_u = mean over the group's BatchNorms of |gamma_u| (Network Slimming, Liu et al., arXiv 1708.06519).

    Groups without a BatchNorm have none.
    """

    def of_norm(part: Slice) -> Tensor | None:
        module = _module(subject.model, part)
        if not isinstance(module, _BatchNorm) or not module.affine:
            return None
        return module.weight.detach()[part.channels.to(module.weight.device)].abs().mean(1)

    return _mean_over_slices(subject.groups, of_norm)


def fpgm(subject: Subject) -> GroupScores:
    """S_u = mean over producers m of sum_v |W_m,u - W_m,v|_2, relative to the group's mean.

    Distance to the geometric median, He et al., arXiv 1811.00250.
    """
    return _by_weights(subject, lambda weights: torch.cdist(weights, weights).sum(1), producers=True)


def whc(subject: Subject) -> GroupScores:
    """S_u = mean over producers m of |W_u| sum_(v != u) |W_v| (1 - |cos(W_u, W_v)|), relative to the group's mean.

    Weighted Hybrid Criterion, Chen et al., arXiv 2302.08185.
    """

    def hybrid(weights: Tensor) -> Tensor:
        norms = weights.norm(dim=1)
        products = norms[:, None] * norms - (weights @ weights.T).abs()
        return products.fill_diagonal_(0).sum(1)

    return _by_weights(subject, hybrid, producers=True)


def taylor(subject: Subject) -> GroupScores:
    """S_u = mean over m of sum over w in W_m,u of |w dL/dw|, L the sum of the batches' mean losses.

    First-order Taylor as in Torch-Pruning's default, without its division by the group's mean (Molchanov et al.,
    arXiv 1906.10771, rank globally by it).
    """
    names = _layers(subject)
    total: dict[str, Tensor] = {}
    for gradients in _gradients(subject, names):
        for name, gradient in gradients.items():
            total[name] = gradient if name not in total else total[name].add_(gradient)
    return _mean_over_slices(
        subject.groups, lambda part: _slice_moments(subject.model, part, total, 2) if part.module in total else None
    )


def fisher(subject: Subject) -> GroupScores:
    """S_u = sum over m and n of sum over w in W_m,u of (w dL_n/dw)^2: the empirical Fisher's diagonal of w^2.

    Each row's squares are added, of slices at once: no gradient outlives its row. (Adding gradients first, or keeping
    the last row only, is another criterion.)
    """
    names = _layers(subject)
    total: dict[tuple[str, str], Tensor] = {}
    for gradients in _gradients(subject, names):
        for group in subject.groups:
            for part in group.slices:
                if part.module in gradients:
                    squares = _slice_moments(subject.model, part, gradients, 1)
                    key = (group.name, f"{part.module}:{part.side}")
                    total[key] = squares if key not in total else total[key] + squares
    found: GroupScores = {}
    for (name, _), squares in total.items():
        found[name] = squares.double() if name not in found else found[name] + squares.double()
    return found


def jacobian(subject: Subject) -> GroupScores:
    """S_u = sum over n and m of r_m,u[n]^2, or with ``slices="gate"`` sum over n of (sum over consumers r_m,u[n])^2.

    The Jacobian Criterion (arXiv 2508.05521). With ``selection="joint"`` the gate's rows are used instead of scores.
    """
    found = read_rows(subject)
    scores = ((group.name, group.scores(found.rows, subject.slices)) for group in subject.groups)
    return {name: values for name, values in scores if values is not None}


def reconstruction(subject: Subject) -> GroupScores:
    """S_u = sum over consumers m of E|W_m x_u|^2 / E|y_m|^2: the error of what they compute where u is zero.

    y_m is the consumer's output and x_u the part of its input that belongs to u. No labels and no gradients.
    """
    return relative_errors(subject.model, subject.groups, subject.batches, subject.forward_fn)


CRITERIA: dict[str, Callable[[Subject], GroupScores]] = {
    criterion.__name__: criterion
    for criterion in (jacobian, random, l1, l2, bn_scale, fpgm, whc, taylor, fisher, reconstruction)
}


def _module(model: nn.Module, part: Slice) -> nn.Module | None:
    return dict(model.named_modules()).get(part.module)


def _weight(module: nn.Module | None) -> Tensor | None:
    """The weight of a layer that has slices on both sides."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight
    if module is None or layout_of(module) is None:
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _of_units(module: nn.Module, tensor: Tensor, part: Slice) -> Tensor:
    """(units, entries) what of ``tensor``, shaped like the layer's weight, goes with each unit."""
    layout = layout_of(module)
    transposed, groups = (False, 1) if layout is None else (layout.transposed, layout.groups)
    if (part.side == "in") != transposed:  # dim 1: one group's channels, of which each group has its own
        tensor = tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return tensor.flatten(1)[part.channels.to(tensor.device)].flatten(1)


def _moments(weights: Tensor) -> tuple[Tensor, ...]:
    return ops.weight_moments(weights, weights)


def _slice_moments(model: nn.Module, part: Slice, gradients: Mapping[str, Tensor], moment: int) -> Tensor:
    """(units,) a moment of weight times gradient over each unit's slice: see :func:`obc.ops.weight_moments`."""
    module = _module(model, part)
    weight = _weight(module)
    assert module is not None
    assert weight is not None
    weights, of_gradient = (_of_units(module, t, part) for t in (weight.detach(), gradients[part.module]))
    return ops.weight_moments(weights.contiguous(), of_gradient.contiguous())[moment]


def _mean_over_slices(groups: Sequence[ChannelGroup], value: Callable[[Slice], Tensor | None]) -> GroupScores:
    found: GroupScores = {}
    for group in groups:
        parts = [values.double() for part in group.slices if (values := value(part)) is not None]
        if parts:
            found[group.name] = torch.stack(parts).mean(0)
    return found


def _by_weights(subject: Subject, value: Callable[[Tensor], Tensor], producers: bool = False) -> GroupScores:
    """The mean of ``value`` of (units, entries) over the layers' slices, relative to the group's mean."""

    def of_part(part: Slice) -> Tensor | None:
        module = _module(subject.model, part)
        weight = _weight(module)
        if module is None or weight is None or (producers and part.side == "in"):
            return None
        return value(_of_units(module, weight.detach(), part).contiguous())

    scores = _mean_over_slices(subject.groups, of_part)
    return {name: values / values.mean().clamp_min(torch.finfo(values.dtype).tiny) for name, values in scores.items()}


def _layers(subject: Subject) -> list[str]:
    names = dict.fromkeys(part.module for group in subject.groups for part in group.slices)
    modules = dict(subject.model.named_modules())
    return [name for name in names if _weight(modules.get(name)) is not None]


def _gradients(subject: Subject, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Weight gradients by layer, batch after batch, in eval mode; the model's own gradients are left alone."""
    modules = dict(subject.model.named_modules())
    weights = {name: weight for name in names if (weight := _weight(modules[name])) is not None}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(subject.model):
            for batch in subject.batches:
                loss = subject.loss_fn(subject.model, batch).mean()
                gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
                yield dict(zip(weights, gradients, strict=True))
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
