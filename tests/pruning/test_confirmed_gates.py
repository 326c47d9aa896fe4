"""Steps after the first check nothing again that the first one confirmed, and remove what they would remove with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import class_loss as loss
from torch import Tensor, nn

import obc
from obc.criteria import rows
from obc.model.evaluation import LossFn


class Plain(nn.Module):
    """Three linear layers, each called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Uses a weight outside its layer, which only a check detects."""
    return loss(model, batch) + model.get_parameter("second.weight").square().sum()


def pruned(loss_fn: LossFn, monkeypatch: pytest.MonkeyPatch, always: bool = False) -> tuple[list[bool], Any]:
    """(whether each step's rows were checked, what ``obc.prune`` kept)."""
    checks: list[bool] = []
    score = rows.score

    def noted(*arguments: Any, check: bool, **options: Any) -> obc.Scores:
        checks.append(check)
        return score(*arguments, check=check or always, **options)

    monkeypatch.setattr(rows, "score", noted)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(12)]
    result = obc.prune(Plain(), batches[0][0], batches, loss_fn, macs=0.4, steps=3, progress=False)
    monkeypatch.undo()
    return checks, {name: kept.out_channels for name, kept in result.plan.items()}


def test_later_steps_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, kept = pruned(loss, monkeypatch)
    assert checks == [True, False, False]
    _, expected = pruned(loss, monkeypatch, always=True)
    assert kept.keys() == expected.keys()
    for name, channels in expected.items():
        assert (channels is None) == (kept[name] is None)
        assert channels is None or torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(channels))


def test_what_no_gate_serves_is_checked_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, _ = pruned(penalised, monkeypatch)
    assert checks == [True, True, True]
