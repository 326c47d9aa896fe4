"""Criteria that evaluate the masked model leave out the batches that scoring by rows leaves out, and say so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import class_loss as loss
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc import criteria
from obc.criteria.protocol import CriterionError
from obc.selection.search import Search

CRITERIA: dict[str, dict[str, Any]] = {
    "rows": {"criterion": "jacobian", "selection": "independent"},
    "loss": {"criterion": "masked"},
    "kl": {"criterion": criteria.MaskedEvaluation("kl")},
    "mse": {"criterion": criteria.MaskedEvaluation("mse")},
    "beam": {"criterion": "beam"},
    "tolerance": {"criterion": "tolerance"},
    "search": {"criterion": "l2", "allocation": Search(generations=2, offspring=4)},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def data(bad: int | None) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(12)
    ]
    if bad is not None:
        batches.insert(bad, (torch.full((8, 6), torch.nan), torch.zeros(8, dtype=torch.int64)))
    return batches


def pruned(bad: int | None, **options: Any) -> obc.PruningResult:
    torch.manual_seed(0)
    batches = data(bad)
    return obc.prune(Net(), data(None)[0][0], batches, loss, steps=2, progress=False, **copy.deepcopy(options))


@pytest.mark.sampled(members=7)
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("bad", [0, 5])
def test_a_batch_whose_loss_is_not_finite_is_left_out_and_named(name: str, bad: int) -> None:
    clean, dirty = pruned(None, **CRITERIA[name]), pruned(bad, **CRITERIA[name])
    assert any(f"batch {bad} is left out" in warning for warning in dirty.report.warnings)
    for key, tensor in clean.model.state_dict().items():
        assert torch.equal(dirty.model.state_dict()[key], tensor), key
    assert not any("left out" in warning for warning in clean.report.warnings)


@pytest.mark.parametrize("name", CRITERIA)
def test_too_many_such_batches_are_refused(name: str) -> None:
    batches = [(x * torch.nan, y) if n % 3 == 1 else (x, y) for n, (x, y) in enumerate(data(None))]
    with pytest.raises(ValueError, match=r"4 of 12 batches are not usable.*not finite"):
        obc.prune(Net(), data(None)[0][0], batches, loss, steps=1, progress=False, **CRITERIA[name])


def test_a_unit_that_keeps_the_loss_finite_is_named() -> None:
    def logarithm(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0].abs()).sum().log()

    model = Net()
    with torch.no_grad():
        model.a.weight.fill_(1.0)
        model.b.weight.fill_(-0.1)
        model.b.weight[:, 3] = 2.0  # the others together are negative
    with pytest.raises(CriterionError, match="with unit 3 of 'a' masked, the loss is not finite"):
        obc.prune(model, data(None)[0][0], data(None), logarithm, criterion="masked", steps=1, progress=False)


def test_a_functional_of_a_batch_refuses_rows_of_samples() -> None:
    def per_sample(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(CriterionError, match=r"'nirvana'.*no value per sample; pass rows='batch'"):
        obc.prune(Net(), data(None)[0][0], data(None), per_sample, criterion="nirvana", rows="sample", progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), r"BlockProfile follows.*no residual blocks were found in Net.*allocation='global'.*'uniform'"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in "ab"))),
            r"'0' is in none of the residual blocks.*2\.0, 2\.1.*ignored_layers.*'uniform'",
        ),
    ],
)
def test_a_profile_without_blocks_names_the_allocations_that_fit(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        obc.prune(model, data(None)[0][0], data(None), loss, allocation="profile", steps=1, progress=False)
