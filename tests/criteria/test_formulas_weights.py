"""Criteria of weights alone, and the random one, against their formulas, unit by unit in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import check, make_subject, values_of, weighted
from torch import Tensor, nn
from transcribed import ALL, FOUR, transcribes

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice

Of = Callable[[list[Tensor], int], Tensor]


def relative_means(subject: Subject, value: Of, producers: bool = False) -> dict[str, Tensor]:
    """The mean over a group's slices of value(the weights of all units, u), divided by the group's mean."""
    weights, found = values_of(subject), {}
    for group in subject.groups:
        parts = []
        for part, key, take in weighted(subject, group):
            if producers and part.side == "in":
                continue
            units = [take(weights[key], u) for u in range(group.size)]
            parts.append(torch.stack([value(units, u) for u in range(group.size)]))
        if parts:
            scores = torch.stack(parts).mean(0)
            found[group.name] = scores / scores.mean()
    return found


@transcribes("l1", "l2", "intra_fusion", models=ALL)
def test_magnitudes(name: str) -> None:
    subject = make_subject(name)
    for criterion, power in (("l1", 1), ("intra_fusion", 1), ("l2", 2)):
        expected = relative_means(subject, lambda units, u: units[u].abs().pow(power).sum())  # noqa: B023
        check(group_scores(criterion, subject), expected)


@transcribes("fpgm", models=ALL)
def test_distance_to_the_geometric_median(name: str) -> None:
    subject = make_subject(name)

    def value(units: list[Tensor], u: int) -> Tensor:
        return torch.stack([(units[u] - other).pow(2).sum().sqrt() for other in units]).sum()

    check(group_scores("fpgm", subject), relative_means(subject, value, producers=True))


@transcribes("whc", models=ALL)
def test_weighted_hybrid_criterion(name: str) -> None:
    subject = make_subject(name)

    def value(units: list[Tensor], u: int) -> Tensor:
        norms = [unit.norm() for unit in units]
        unlike = [
            norms[v] * (1 - (units[u] @ units[v] / (norms[u] * norms[v])).abs()) for v in range(len(units)) if v != u
        ]
        return norms[u] * torch.stack(unlike).sum()

    check(group_scores("whc", subject), relative_means(subject, value, producers=True))


@transcribes("bn_scale", models=("chain", "flatten"))
def test_scales_of_batch_norms(name: str) -> None:
    subject = make_subject(name)
    modules: dict[str, Any] = dict(subject.model.named_modules())
    expected = {}
    for group in subject.groups:
        scales = [
            torch.stack([modules[part.module].weight.detach()[c].abs().mean() for c in part.channels])
            for part in group.slices
            if isinstance(modules[part.module], nn.BatchNorm2d)
        ]
        if scales:
            expected[group.name] = torch.stack(scales).mean(0)
    check(group_scores("bn_scale", subject), expected)


@transcribes("random", models=FOUR)
def test_random_scores_are_drawn_from_the_generator(name: str) -> None:
    subject = make_subject(name)
    generator = torch.Generator().manual_seed(subject.generator.initial_seed())
    expected = {group.name: torch.rand(group.size, generator=generator).double() for group in subject.groups}
    got = group_scores("random", subject)
    check(got, expected)
    with pytest.raises(AssertionError):
        check(group_scores("random", subject), expected)


class Experts(nn.Module):
    """Two experts of three inner channels, stored as transformers stores them, or the other way round."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(2, 6, 5, generator=generator), torch.randn(2, 5, 3, generator=generator)]
        for name, tensor in zip(("gate_up_proj", "down_proj"), tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.mT.contiguous() if transposed else tensor))


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "whc"])
def test_experts_that_are_stored_the_other_way_round_score_the_same(criterion: str) -> None:
    units = torch.arange(3)[:, None]
    slices = (Slice("0.gate_up_proj", "out", torch.cat([units, units + 3], 1)), Slice("0", "in", units))
    group = ChannelGroup("0", slices, "expert_ffn")
    nothing = obc.Statistics({}, rows=None, num_batches=0, coverage={})
    found = [
        criteria.get(criterion).score(group, nothing, nn.Sequential(Experts(transposed)))
        for transposed in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0])
    assert len(set(found[0].tolist())) == 3
