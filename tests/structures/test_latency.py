"""Latency tables that are measured: with a timer that counts, their sum is what the model itself takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counted_seconds import A_CALL, counted_seconds
from torch import Tensor, nn
from transformers_families import FAMILIES, qwen2_moe

from obc.model.timing import median_seconds
from obc.structures.latency import measure_latency
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure


class Residual(nn.Module):
    """stem -> x + b(a(x)) -> head: a layer whose inputs and outputs both become narrower, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """A layer that reads two groups, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 24, 3, padding=1)
        self.c, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x).relu(), self.b(x).relu()], 1)).relu())


@pytest.mark.parametrize("build", [Residual, Joined])
def test_convolutions(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 8, 8)
    structure = TorchPruningStructure(model, x)
    table = measure_latency(structure, lambda copied: copied(x), timer=counted_seconds)
    assert table.device == "cpu"
    assert table.batch == [[2, 3, 8, 8]]
    assert {name: max(widths) for name, widths in table.seconds.items()} == {
        group.name: group.size for group in structure.groups
    }
    # Every layer timed alone includes the overhead of a call, which the whole model has only once.
    overhead = 20 * A_CALL
    assert table.costs(structure.groups).total() == pytest.approx(counted_seconds(lambda: model(x), None), abs=overhead)
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    taken = counted_seconds(lambda: model(x), None)
    assert table.costs(structure.groups).total() == pytest.approx(taken, abs=overhead)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("family", ["llama", "bert", "vit", "gpt2", "mamba", "moe"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers(family: str) -> None:
    torch.manual_seed(0)
    case = qwen2_moe() if family == "moe" else FAMILIES[family]()

    def run(model: nn.Module) -> Any:
        return case.loss(model, case.batches[0])

    structure = TransformersStructure(case.model)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    table = measure_latency(structure, run, timer=counted_seconds)
    costs = table.costs(structure.groups, structure.costs("parameters").inside)
    assert costs.total() == pytest.approx(counted_seconds(lambda: run(case.model), None), rel=1e-9, abs=5 * A_CALL)
    after = case.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    costs = table.costs(structure.groups, structure.costs("parameters").inside)
    assert costs.total() == pytest.approx(counted_seconds(lambda: run(case.model), None), rel=0.01, abs=5 * A_CALL)


def test_whole_blocks_and_branches() -> None:
    case = FAMILIES["llama"]()

    def run(model: nn.Module) -> Any:
        return case.loss(model, case.batches[0])

    structure = TransformersStructure(case.model, ["ffn", "heads", "layers", "sublayers"])
    table = measure_latency(structure, run, timer=counted_seconds)
    costs = table.costs(structure.groups, structure.costs("parameters").inside)
    assert costs.total() == pytest.approx(counted_seconds(lambda: run(case.model), None), abs=5 * A_CALL)
    structure.remove({"model.layers.1": torch.tensor([0]), "model.layers.0.mlp": torch.tensor([0])})
    costs = table.costs(structure.groups, structure.costs("parameters").inside)
    assert costs.total() == pytest.approx(counted_seconds(lambda: run(case.model), None), abs=5 * A_CALL)


def test_equal_groups_are_measured_once_and_widths_are_rounded() -> None:
    case = FAMILIES["llama"]()
    calls = []

    def timer(call: Callable[[], Any], device: torch.device) -> float:
        calls.append(device)
        return counted_seconds(call, device)

    structure = TransformersStructure(case.model, ["ffn"], round_to=16)
    table = measure_latency(structure, lambda model: case.loss(model, case.batches[0]), points=3, timer=timer)
    first, second = table.seconds.values()
    assert list(first) == [16, 32, 48]
    assert first == second
    assert len(calls) == 3 + 1  # and the whole model
    with pytest.raises(ValueError, match="at least 2 widths a group, got points=1"):
        measure_latency(structure, lambda model: None, points=1)


def test_medians_of_calls_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    times = iter([0.0, 9.0, 0.0, 9.0, 0.0, 1.0, 0.0, 4.0, 0.0, 3.0, 0.0, 6.0, 0.0, 2.0, 0.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    calls = [lambda: turns.append("a"), lambda: turns.append("b")]
    assert median_seconds(calls, torch.device("cpu"), repeats=3, warm_ups=1) == [2.0, 5.0]
    assert turns == ["a", "b"] * 4
