"""The criterion that nobody asked for: of two, the one whose compensated copy errs less on held-out batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import class_loss, seeded
from prunable import InvertedResiduals
from torch import Tensor, nn

import obc
from obc.pruning import trial
from obc.pruning.trial import read_by_pointwise
from obc.structures.traced import TorchPruningStructure

OF_SEED = {1: "jacobian", 3: "kfac_obs"}  # random weights for which either criterion errs far less than the other


def data(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 3, 12, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(8)
    ]


def pruned(seed: int, batches: list[Any] | None = None, **options: Any) -> obc.PruningResult:
    model = seeded(InvertedResiduals, seed).eval()
    batches = batches or data(seed)
    options = {"compensate": True, "steps": 1, "verify": False, "progress": False, **options}
    return obc.prune(model, data(seed)[0][0], batches, class_loss, macs=0.7, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", OF_SEED)
def test_the_criterion_that_errs_less_after_compensation_prunes(seed: int) -> None:
    asked = {name: pruned(seed, criterion=name) for name in ("jacobian", "kfac_obs")}
    errors = {name: one.report.compensation.final_error for name, one in asked.items()}  # type: ignore[union-attr]
    assert min(errors, key=lambda name: errors[name]) == OF_SEED[seed]
    assert min(errors.values()) < 0.1 * max(errors.values())
    found, wanted = pruned(seed), asked[OF_SEED[seed]]
    report = found.report
    assert report.provenance["criterion"] == OF_SEED[seed]
    assert report.provenance["criteria tried"] == ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    assert f"criterion: {OF_SEED[seed]}; held-out error after compensation: jacobian " in str(report)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), wanted.model.parameters(), strict=True))
    assert len(report.steps) == 1
    assert set(report.seconds) > {"try"}


NOT_OPEN = {
    "a criterion": {"criterion": "jacobian"},
    "an allocation": {"allocation": "global"},
    "a selection": {"selection": "independent"},
    "slices": {"slices": "all"},
    "shrinkage": {"shrinkage": 0.5},
    "no compensation": {"compensate": None},
    "means only": {"compensate": "mean"},
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", NOT_OPEN)
def test_what_is_asked_for_is_not_tried(name: str) -> None:
    report = pruned(3, **NOT_OPEN[name]).report
    assert report.provenance["criterion"] == "jacobian"
    assert "criteria tried" not in report.provenance
    assert "try" not in report.seconds
    assert "criterion:" not in str(report)


class Readers(nn.Module):
    """A convolution, and what reads it."""

    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        self.stem, self.readers, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(readers), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(torch.stack([reader(y) for reader in self.readers]).sum(0).relu().mean((2, 3)))


def conv(kernel: int) -> nn.Module:
    return nn.Conv2d(8, 4, kernel, padding=kernel // 2)


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        ([conv(1)], True),
        ([conv(1), conv(1)], True),
        ([conv(3)], False),
        ([conv(1), conv(3)], False),
        ([nn.Conv2d(8, 4, 1, groups=2)], False),
    ],
    ids=["1x1", "two", "3x3", "both", "grouped"],
)
def test_tried_is_where_pointwise_convolutions_read_a_group(readers: list[nn.Module], expected: bool) -> None:
    torch.manual_seed(0)
    model = Readers(*copy.deepcopy(readers)).eval()
    groups = TorchPruningStructure(model, torch.randn(1, 3, 6, 6)).groups
    assert read_by_pointwise(groups, model) == expected


def test_layers_that_are_too_wide_for_the_other_criterion_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Readers(conv(1)).eval()
    groups = TorchPruningStructure(model, torch.randn(1, 3, 6, 6)).groups
    for widest, expected in ((8, True), (7, False)):
        monkeypatch.setattr(trial, "_WIDEST", widest)
        assert read_by_pointwise(groups, model) == expected


def test_a_batch_left_out_in_the_trial_is_named() -> None:
    batches = data(3) + data(4)
    batches[5][0][0] = float("nan")
    report = pruned(3, batches).report
    assert "criteria tried" in report.provenance
    assert [warning for warning in report.warnings if "batch 5 is left out" in warning]


def test_a_criterion_that_can_not_score_is_said_not_to_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obc.criteria.KFACOBS, "measure", lambda self, subject: {})
    report = pruned(3).report
    assert report.provenance["criterion"] == "jacobian"
    assert [warning for warning in report.warnings if "the criterion 'kfac_obs' was not tried: " in warning]


def test_the_model_is_as_before_if_the_trial_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(InvertedResiduals, 3).eval()
    before = copy.deepcopy(model.state_dict())

    def broken(*_: Any) -> dict[str, Tensor]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(obc.criteria.KFACOBS, "measure", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        obc.prune(model, data(3)[0][0], data(3), class_loss, macs=0.7, compensate=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
