"""A model that draws random numbers runs alike every time, and nobody else's random numbers change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from obc.structures.comparison import run_alike


def test_runs_draw_the_same_numbers_and_leave_those_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, before = nn.Linear(3, 3), torch.get_rng_state()
    first, second = (run_alike(model, lambda model: torch.rand(5)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(before, torch.get_rng_state())
    assert not seeded
