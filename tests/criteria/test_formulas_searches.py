"""Criteria that measure the model with units masked, against their searches written out, in float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from formulas import changed, check, forward, logits, loss, make_subject, readers, values_of, weighted
from torch import Tensor, nn
from transcribed import ALL, FOUR, transcribes

from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice

Unit = tuple[str, int]  # group, number
METRICS = ("loss", "kl", "mse")


@contextlib.contextmanager
def masked(subject: Subject, units: Iterable[Unit]) -> Iterator[None]:
    """Meanwhile the model's layers don't read these units, and its routers never choose these experts."""
    groups = {group.name: group for group in subject.groups}
    before: list[tuple[Tensor, Tensor]] = []
    experts: dict[str, list[int]] = {}
    with torch.no_grad():
        for name, unit in units:
            for _, layer, channels in readers(subject, groups[name]):
                before.append((layer.weight, layer.weight.clone()))
                for channel in channels[unit].tolist():
                    column(layer, channel).zero_()
            if groups[name].kind == "experts":
                experts.setdefault(name.removesuffix("experts") + "gate", []).append(unit)
        for name, gone in experts.items():
            route_elsewhere(subject.model.get_submodule(name), gone)
        yield
        for weight, values in reversed(before):
            weight.copy_(values)
    for name in experts:
        del subject.model.get_submodule(name).forward


def column(layer: Any, channel: int) -> Tensor:
    """The weight's entries that read one in channel."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight[channel]
    width, groups = layer.weight.shape[1], getattr(layer, "groups", 1)
    return layer.weight.unflatten(0, (groups, -1))[channel // width, :, channel % width]


def route_elsewhere(router: Any, gone: list[int]) -> None:
    """Mixtral's router with logits of minus infinity: softmax, the largest ones, divided by their sum."""

    def routed(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = hidden.flatten(0, -2) @ router.weight.T
        scores[:, gone] = -torch.inf
        chances, chosen = scores.softmax(-1).sort(-1, descending=True)
        chances, chosen = chances[:, : router.top_k], chosen[:, : router.top_k]
        return scores, chances / chances.sum(-1, keepdim=True), chosen

    router.forward = routed


def measure(subject: Subject, metric: str) -> Callable[[Iterable[Unit]], float]:
    """The mean over the batches of the metric with units masked."""
    dense = [logits(subject.model, batch) for batch in subject.batches]

    def of_batch(batch: Any, before: Tensor) -> float:
        if metric == "loss":
            return float(loss(subject.model, batch))
        output = logits(subject.model, batch)
        if metric == "mse":
            return float((output - before).pow(2).mean())
        p, q = before.softmax(-1), output.softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())

    def measured(units: Iterable[Unit]) -> float:
        with masked(subject, units):
            values = [of_batch(batch, before) for batch, before in zip(subject.batches, dense, strict=True)]
        return sum(values) / len(values)

    return measured


def everything(subject: Subject) -> list[Unit]:
    return [(group.name, unit) for group in subject.groups for unit in range(group.size)]


def few(name: str) -> Subject:
    """Of the model's first groups, one of each kind, on its first batch: a search tries every pair of units."""
    subject = make_subject(name)
    first = {group.kind: group for group in reversed(subject.groups)}
    return changed(subject, groups=tuple(reversed(first.values())), batches=subject.batches[:1])


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("metric", METRICS)
@transcribes("masked", "masked(metric='kl')", "masked(metric='mse')", models=FOUR)
def test_masked_evaluation(name: str, metric: Any) -> None:
    """Each unit is masked alone; what the metric is more than of the whole model."""
    subject = make_subject(name)
    subject = changed(subject, batches=subject.batches[:1])
    measured = measure(subject, metric)
    base = measured([])
    expected = {
        group.name: torch.tensor([measured([(group.name, u)]) - base for u in range(group.size)]).double()
        for group in subject.groups
    }
    check(group_scores(criteria.MaskedEvaluation(metric), subject), expected, 1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_greedy_masked_evaluation_measures_again_after_each_round(name: str) -> None:
    """In each round the cheapest units go; a unit's score is its metric then, not below those of earlier rounds."""
    subject, rounds = few(name), 3
    measured, got = measure(subject, "mse"), group_scores(criteria.MaskedEvaluation("mse", rounds=rounds), subject)
    left, highest = everything(subject), 0.0
    total = len(left)
    gone: list[Unit] = []
    for turn in range(rounds):
        values = sorted((measured([*gone, unit]), unit) for unit in left)
        for value, unit in values[: total * (turn + 1) // rounds - total * turn // rounds]:
            highest = max(highest, value)
            assert float(got[unit[0]][unit[1]]) == pytest.approx(highest, rel=1e-6, abs=1e-12)
            gone.append(unit)
            left.remove(unit)
    assert not left


def beam_scores(units: Sequence[Unit], measured: Callable[[Iterable[Unit]], float], removals: int, width: int) -> Any:
    """(unit -> score, the best set): sets grow one unit at a time, the best ``width`` of each size survive."""
    beam: list[list[Unit]] = [[]]
    values: dict[frozenset[Unit], float] = {}
    for _ in range(removals):
        sets = {frozenset([*path, u]): [*path, u] for path in reversed(beam) for u in units if u not in path}
        values |= {key: measured(path) for key, path in sets.items()}
        beam = sorted(sets.values(), key=lambda path: values[frozenset(path)])[:width]
    best, scores, highest = beam[0], {}, 0.0
    for count, unit in enumerate(best, 1):
        highest = max(highest, values[frozenset(best[:count])])
        scores[unit] = highest
    for unit in set(units) - set(best):
        scores[unit] = max(highest, measured([*best, unit]))
    return scores, best


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("metric", METRICS)
@transcribes("beam", "beam(metric='loss')", "beam(metric='kl')", models=FOUR)
def test_beam_search(name: str, metric: Any) -> None:
    subject = few(name)
    expected, _ = beam_scores(everything(subject), measure(subject, metric), removals=2, width=2)
    got = group_scores(criteria.BeamSearch(removals=2, width=2, metric=metric), subject)
    assert sum(len(scores) for scores in got.values()) == len(expected)
    for (group, unit), value in expected.items():
        assert float(got[group][unit]) == pytest.approx(value, rel=1e-6, abs=1e-12)


def small() -> Subject:
    """Six units: two groups of three channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double()
    units = torch.arange(3)[:, None]
    groups = tuple(
        ChannelGroup(a, (Slice(a, "out", units), Slice(b, "in", units))) for a, b in (("0", "2"), ("2", "4"))
    )
    batches: Any = [(torch.randn(5, 4).double(), torch.randn(5).double()) for _ in range(2)]
    return Subject(model, groups, batches, loss, forward)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("width", [1, 2, 100])
def test_a_wide_beam_tries_all_sets(width: int, null: bool) -> None:
    subject = small()
    empty: Any = [(torch.zeros(1, 4).double(), torch.zeros(1).double())]
    parts = [measure(subject, "mse"), measure(changed(subject, batches=empty), "mse")][: 1 + null]

    def measured(units: Iterable[Unit]) -> float:
        return sum(part(units) for part in parts)

    expected, best = beam_scores(everything(subject), measured, removals=3, width=width)
    got = group_scores(criteria.BeamSearch(removals=3, width=width, null=empty if null else None), subject)
    for (group, unit), value in expected.items():
        assert float(got[group][unit]) == pytest.approx(value)
    order = sorted(everything(subject), key=lambda unit: float(got[unit[0]][unit[1]]))
    assert set(order[:3]) == set(best)
    if width == 100:
        assert measured(best) == pytest.approx(min(map(measured, itertools.combinations(everything(subject), 3))))


def other_task(model: nn.Module, batch: Any) -> Tensor:
    return logits(model, batch).abs().mean() + 0.1


def positive(model: nn.Module, batch: Any) -> Tensor:
    return loss(model, batch) + 2.0


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize(("tau", "decay", "backwards"), [(0.02, 0.5, False), (0.3, 0.9, True), (1e6, 1.0, False)])
@transcribes("tolerance", models=ALL)
def test_tolerance_masks_shares_until_a_task_loses_too_much(
    name: str, tau: float, decay: float, backwards: bool
) -> None:
    """Groups with most weights first, or as asked; twentieths of each go, least L2 first, while no task loses more."""
    subject = changed(make_subject(name), loss_fn=positive)
    subject = changed(subject, batches=subject.batches[:1])
    tasks, weights = [positive, other_task], values_of(subject)

    def losses(units: Sequence[Unit]) -> list[float]:
        with masked(subject, units):
            return [float(task(subject.model, subject.batches[0])) for task in tasks]

    ranked, sizes = {}, {}
    for group in subject.groups:
        parts = [[take(weights[key], u) for u in range(group.size)] for _, key, take in weighted(subject, group)]
        if parts:
            squares = [float(sum(part[u].square().sum() for part in parts)) for u in range(group.size)]
            ranked[group.name] = sorted(range(group.size), key=squares.__getitem__)
            sizes[group.name] = sum(unit.numel() for part in parts for unit in part)
    order = sorted(ranked, key=lambda one: -sizes[one])
    order = order[::-1] if backwards else order
    criterion = criteria.Tolerance(tau, decay, tasks=tasks, order=order if backwards else None)
    got, base = group_scores(criterion, subject), losses([])
    assert set(got) == set(ranked)
    gone: list[Unit] = []
    within: dict[Unit, float] = {}
    for group_name in order:
        units, accepted, highest = ranked[group_name], 0, 0.0
        for step in range(1, 20):
            count = len(units) * step // 20
            if count == accepted:
                continue
            ratios = losses([*gone, *((group_name, u) for u in units[:count])])
            ratio = max(a / b for a, b in zip(ratios, base, strict=True)) - 1
            if ratio > tau:
                break
            highest = max(highest, ratio)
            within |= {(group_name, u): highest for u in units[accepted:count]}
            accepted = count
        gone += [(group_name, u) for u in units[:accepted]]
        tau *= decay
    for (group_name, unit), value in within.items():
        assert float(got[group_name][unit]) == pytest.approx(value, abs=1e-7)
    most = max(within.values(), default=0.0)
    outside = [(group_name, u) for group_name in ranked for u in ranked[group_name] if (group_name, u) not in within]
    assert all(float(got[group_name][unit]) >= most + 1 - 1e-7 for group_name, unit in outside)
    assert within or criterion.tau < 1
