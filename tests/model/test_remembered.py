"""Modules that keep what they computed in eval mode until ``train()`` is called: obc leaves nothing stale behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from obc.model.evaluation import evaluating
from obc.model.shared_copy import shared_copy
from obc.structures.traced import TorchPruningStructure


class Remembering(nn.Module):
    """Multiplies by a table, computed once in eval mode; ``train()`` forgets it."""

    def __init__(self, empty: Callable[[], Any]) -> None:
        super().__init__()
        self.empty = empty
        self.table, self.cache = nn.Parameter(torch.rand(6) + 0.5), empty()

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.cache = self.empty()
        return super().train(mode)

    def scale(self) -> Tensor:
        return self.table * 2

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InDict(Remembering):
    def __init__(self) -> None:
        super().__init__(dict)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.scale()
        if "table" not in self.cache:
            self.cache["table"] = self.scale()
        return x * self.cache["table"]


class InList(Remembering):
    def __init__(self) -> None:
        super().__init__(list)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.cache:
            self.cache.append((self.scale(),))
        return x * (self.scale() if self.training else self.cache[0][0])


class InAttribute(Remembering):
    def __init__(self) -> None:
        super().__init__(lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.cache is None:
            self.cache = self.scale()
        return x * (self.scale() if self.training else self.cache)


class Merged(nn.Module):
    """A product whose second factor is merged into the first in eval mode, as LoRA's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.more, self.merged = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6)), False

    def train(self, mode: bool = True) -> Merged:
        if self.merged == mode:
            with torch.no_grad():
                self.table += self.more * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.table if self.merged else self.table + self.more)


KINDS = (InDict, InList, InAttribute, Merged)


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), kind(), nn.ReLU(), nn.Linear(6, 3)).double()
    return model, torch.randn(8, 4, dtype=torch.float64)


def explicit(model: Any, x: Tensor) -> Tensor:
    """What the model computes, from its parameters alone."""
    inner = model[1]
    scale = inner.table * 2 if isinstance(inner, Remembering) else inner.table + inner.more * (not inner.merged)
    return model[3]((model[0](x) * scale).relu())


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_train_mode_forgets_what_it_computed_before_training(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    assert model.training
    with evaluating(model):
        model(x)
    with torch.no_grad():  # a step of a training that goes on in train mode
        model[1].table += 1
    wanted = explicit(model, x)
    torch.testing.assert_close(model.eval()(x), wanted)


def test_merged_weights_of_a_model_in_eval_mode_stay_as_they_are() -> None:
    model, x = made(Merged)
    table = model.eval()[1].table.clone()
    obc.score(model, [x, x + 1], _loss, progress=False)
    assert torch.equal(model[1].table, table)
    torch.testing.assert_close(model(x), explicit(model, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_plan", [True, False])
def test_what_was_computed_before_channels_went_is_forgotten(kind: type[nn.Module], by_plan: bool) -> None:
    model, x = made(kind)
    with torch.no_grad():
        model.eval()(x)
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    structure.remove({"0": torch.tensor([1, 4])})
    wanted = original[0](x) * (original[1].table * 2 if kind is not Merged else original[1].table)  # it has merged
    wanted[:, [1, 4]] = 0
    wanted = original[3](wanted.relu())
    pruned = structure.plan.apply(original) if by_plan else model
    torch.testing.assert_close(pruned(x), wanted)
    assert not pruned.training


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("mode", [True, False])
def test_obc_prunes_such_a_model(kind: type[nn.Module], mode: bool) -> None:
    model, x = made(kind)
    model.train(mode)
    result = obc.prune(model, x, [x, x + 1], _loss, macs=0.6, progress=False)
    assert model.training is mode
    assert model[0].out_features < 6
    assert result.report.error is not None
    assert result.report.error < 1e-12
    torch.testing.assert_close(model.eval()(x), explicit(model, x))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_group_is_found_and_nothing_with_a_graph_stays_behind(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    (group,) = TorchPruningStructure(model.eval(), x).groups
    assert {part.module for part in group.slices} == {"0", "1.table", "3"}
    assert not model[1].cache
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_model_that_remembers_something_with_a_graph_is_copied(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    model.eval()(x)
    copied = shared_copy(model)
    torch.testing.assert_close(copied(x), explicit(model, x))
