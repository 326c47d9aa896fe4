"""The measure of a search over widths: the output after compensation, if the model is to be compensated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import obc
from obc.criteria.subject import Subject
from obc.model.evaluation import call_on_batch
from obc.model.groups import ChannelGroup, Slice
from obc.model.usable_batches import UsableBatches
from obc.pruning.search_fitness import fitness_of
from obc.selection.search import Search


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def subject(model: nn.Module, batches: list[Tensor], groups: tuple[ChannelGroup, ...] = ()) -> Subject:
    generator = torch.Generator().manual_seed(0)
    return Subject(model, groups, UsableBatches(batches), loss, call_on_batch, "gate", "batch", generator, None)


def group(name: str, size: int) -> ChannelGroup:
    return ChannelGroup(name, (Slice(name, "in", torch.arange(size)[:, None]),), "channels")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["linear", "conv", "padded"])
def test_fitness_is_the_error_after_least_squares(kind: str, bias: bool) -> None:
    """Against ridge regression on the rows themselves, at every position, of batches that are not measured."""
    torch.manual_seed(0)
    model: Any
    if kind == "linear":
        model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4, bias=bias)).double()
        batches = [torch.randn(20, 5, dtype=torch.float64) for _ in range(4)]
    else:
        padding = 1 if kind == "padded" else 0
        model = nn.Sequential(nn.Conv2d(3, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 3, bias=bias, padding=padding)).double()
        batches = [torch.randn(5, 3, 6, 6, dtype=torch.float64) for _ in range(4)]
    gone, stays = torch.tensor([1, 4, 5]), torch.tensor([0, 2, 3, 6, 7, 8])
    evaluation = fitness_of(subject(model, batches, (group("2", 9),)), "mse", 2, compensated=True)
    with torch.no_grad():
        hidden = torch.cat([model[:2](x) for x in batches[2:]])
        rows = hidden if kind == "linear" else hidden.movedim(1, -1).flatten(0, 2)
        mean = rows.mean(0) if bias and kind != "padded" else torch.zeros(9, dtype=torch.float64)
        centred = rows - mean
        gram = centred[:, stays].T @ centred[:, stays] / len(rows)
        gram += 1e-2 * gram.diagonal().mean() * torch.eye(6)
        predict = torch.linalg.solve(gram, centred[:, stays].T @ centred[:, gone] / len(rows))
        wanted = copy.deepcopy(model)
        total = []
        for x in batches[:2]:
            z = model[:2](x)
            z = z if kind == "linear" else z.movedim(1, -1)
            z = z.clone()
            z[..., gone] = mean[gone] + (z[..., stays] - mean[stays]) @ predict
            z = z if kind == "linear" else z.movedim(-1, 1)
            total.append(float((wanted[2](z) - model(x)).square().mean()))
    assert evaluation.of_removed({"2": gone}) == pytest.approx(sum(total) / 2, rel=1e-8)
    assert evaluation.of_removed({"2": gone}) == pytest.approx(sum(total) / 2, rel=1e-8)  # as it was solved for before
    assert evaluation.of_removed({"2": gone}) < fitness_of(
        subject(model, batches, (group("2", 9),)), "mse", 2, compensated=False
    ).of_removed({"2": gone})
    before = copy.deepcopy(model.state_dict())
    assert_close(model.state_dict(), before, rtol=0, atol=0)


class Redundant(nn.Module):
    """Two parallel wide layers; the channels of one follow from a quarter of them, if consumers take over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(6, 32)
        self.read_a, self.read_b = nn.Linear(32, 4), nn.Linear(32, 4)
        with torch.no_grad():  # as many directions as there are inputs: linear layers without an activation
            self.a.weight.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_a(self.a(x)) + self.read_b(torch.sin(3 * self.b(x)))


def test_a_search_can_be_told_what_to_measure() -> None:
    torch.manual_seed(0)
    original = Redundant()
    batches = [torch.randn(32, 6) for _ in range(5)]
    found = {}
    for told in (False, True):
        model = copy.deepcopy(original)
        search = Search(generations=12, offspring=6, metric="mse", compensated=told)
        obc.prune(
            model, batches[0], batches, loss, params=0.6, criterion="l2", allocation=search, steps=1, progress=False
        )
        found[told] = (model.a.out_features, search.history[-1])
    assert found[True][0] < found[False][0]
    assert found[True][1] < found[False][1]
