"""A batch that is not finite, or empty, is left out of scoring, recalibration, compensation and every criterion alike:
what comes out is what the other batches alone give.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import class_loss as loss
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc.model.usable_batches import UsableBatches, all_finite

Batch = tuple[Tensor, Tensor]
COUNT, BAD = 22, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return randomise(nn.Sequential(*layers)).eval()


def batches(bad: Callable[[Batch], Batch] | None = None, places: tuple[int, ...] = (BAD,)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(COUNT):
        x = torch.randn(6, 3, 8, 8, generator=generator)
        batch = x, torch.randint(5, (6,), generator=generator)
        found.append(bad(batch) if bad is not None and index in places else batch)
    return found


def good() -> list[Batch]:
    return [batch for index, batch in enumerate(batches()) if index != BAD]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def one_pixel(value: float) -> Callable[[Batch], Batch]:
    def bad(batch: Batch) -> Batch:
        batch[0][1, 0, 0, 0] = value
        return batch

    return bad


def no_labels(batch: Batch) -> Batch:
    """The mean over no label at all is 0 / 0; every activation is finite."""
    return batch[0], torch.full_like(batch[1], -100)


FAULTS: dict[str, Callable[[Batch], Batch]] = {
    "a NaN": one_pixel(math.nan),
    "infinite": one_pixel(math.inf),
    "overflowing": one_pixel(1e38),
    "without samples": lambda batch: (batch[0][:0], batch[1][:0]),
}
CRITERIA = ("jacobian", "taylor", "fisher", "reconstruction", "l1")


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("fault", ["a NaN", "infinite", "without samples"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.filterwarnings("ignore")
def test_pruning_with_a_bad_batch_is_pruning_without_it(fault: str, criterion: str) -> None:
    model, expected, data = network(), network(), batches(FAULTS[fault])
    options: dict[str, Any] = {"macs": 0.7, "steps": 2, "criterion": criterion, "compensate": "ls", "progress": False}
    result = obc.prune(model, data[0][0], data, loss, **options)
    obc.prune(expected, data[0][0], good(), loss, **options)
    assert_same(model, expected)
    assert any(f"batch {BAD} is left out" in warning for warning in result.report.warnings)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.filterwarnings("ignore")
def test_what_overflows_in_one_place_is_left_out_of_all_others(criterion: str) -> None:
    """Gradients of 1e38 may still be finite, and variances are not."""
    model, data = network(), batches(FAULTS["overflowing"])
    result = obc.prune(model, data[0][0], data, loss, macs=0.7, steps=2, criterion=criterion, compensate="ls")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert any(f"batch {BAD} is left out" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("criterion", ["jacobian", "taylor", "fisher"])
@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_is_enough(criterion: str) -> None:
    """Its gradient is zero, and every activation is finite; recalibration sees the other batches alone all the same.

    What arrives at the first norm is what arrives there in the unpruned model, on the batches that count.
    """
    model, data = network(), batches(no_labels)
    before = copy.deepcopy(model[1])
    result = obc.prune(model, data[0][0], data, loss, macs=0.9, steps=1, criterion=criterion, ignored_layers=["0"])
    assert f"batch {BAD} is left out: its loss" in result.report.warnings[0]
    torch.testing.assert_close(model[1].running_mean, before.running_mean)
    torch.testing.assert_close(model[1].running_var, before.running_var)


@pytest.mark.parametrize("options", [{"rows": "sample"}, {"labels": False}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_rows(options: dict[str, Any]) -> None:
    model, data = network(), batches(FAULTS["a NaN"])
    result = obc.prune(model, data[0][0], data, losses if "rows" in options else None, macs=0.7, steps=2, **options)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert any(f"batch {BAD} is left out" in warning for warning in result.report.warnings)


@pytest.mark.filterwarnings("ignore")
def test_more_than_a_tenth_raises_and_the_model_is_as_it_was() -> None:
    model, data = network(), batches(FAULTS["a NaN"], places=(0, 4, 9))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"3 of 22 batches are not usable, more than a tenth \(batch 0: row 0 is not"):
        obc.prune(model, data[1][0], data, loss, macs=0.7, steps=1)
    assert_same(model, before)


def mean_statistics(data: list[Batch]) -> tuple[Tensor, Tensor]:
    """The means over the batches of the first BatchNorm's mean and unbiased variance, in float64."""
    convolution = network()[0].double()
    outputs = [convolution(x.double()).detach() for x, _ in data]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    return means, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)


@pytest.mark.parametrize("fault", ["a NaN", "infinite", "overflowing"])
def test_recalibration_leaves_it_out(fault: str) -> None:
    model = network()
    with pytest.warns(UserWarning, match=f"batch {BAD} is left out: what it gives a BatchNorm is not finite"):
        obc.recalibrate_norms(model, batches(FAULTS[fault]))
    mean, variance = mean_statistics(good())
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-4, atol=1e-6)


def test_recalibration_heals_statistics_that_are_not_finite() -> None:
    model = network()
    model[1].running_mean.fill_(math.nan)
    obc.recalibrate_norms(model, good())
    torch.testing.assert_close(model[1].running_mean.double(), mean_statistics(good())[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_recalibration_that_fails_leaves_the_statistics() -> None:
    model, before = network(), network()
    with pytest.raises(ValueError, match="5 of 22 batches are not usable"):
        obc.recalibrate_norms(model, batches(FAULTS["infinite"], places=(1, 2, 5, 6, 20)))
    assert_same(model, before)
    with pytest.raises(obc.PruningError, match="to have 3 channels"):
        obc.recalibrate_norms(model, [*good(), (torch.zeros(1, 2, 8, 8), torch.zeros(1))])
    assert_same(model, before)


def test_norms_that_are_not_run_keep_their_statistics() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(3)})
    model["unused"].running_mean.fill_(7.0)
    obc.recalibrate_norms(model, good(), lambda m, batch: m["used"](batch[0]))
    assert torch.equal(model["unused"].running_mean, torch.full((3,), 7.0))
    assert model["used"].running_mean.abs().max() < 1


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("place", [0, BAD, 4], ids=["first", "calibration", "held out"])
@pytest.mark.parametrize("mode", ["ls", "seq"])
@pytest.mark.filterwarnings("ignore:fewer calibration")
def test_compensation_leaves_it_out(place: int, mode: str) -> None:
    """Batch 4 is held out. What is left out is so before the batches are divided, where scoring found it: see above."""
    original, data = network(), batches(FAULTS["a NaN"], places=(place,))
    model = copy.deepcopy(original)
    plan = obc.prune(model, data[1][0], good(), loss, macs=0.7, steps=1, recalibrate=False, progress=False).plan
    with pytest.warns(UserWarning, match=f"batch {place} is left out"):
        report = obc.compensate(model, original, plan, data, mode=mode, progress=False)
    assert math.isfinite(report.final_error)
    assert report.final_error < report.naive_error
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.filterwarnings("ignore")
def test_compensation_refuses_more_than_a_tenth() -> None:
    original, data = network(), batches(FAULTS["infinite"], places=(1, 2, 4))
    model = copy.deepcopy(original)
    plan = obc.prune(model, data[0][0], good(), loss, macs=0.7, steps=1, progress=False).plan
    with pytest.raises(ValueError, match="3 of 22 batches are not usable"):
        obc.compensate(model, original, plan, data, progress=False)


def test_numbers_are_those_of_the_batches_as_given() -> None:
    usable, said = UsableBatches(list("abcdefghijklmnopqrstuvwxyz")), []
    usable.on_left_out = said.append
    for letter in usable:
        if letter in "bd":
            usable.leave_out("of its letter")
    assert said == ["batch 1 is left out: of its letter", "batch 3 is left out: of its letter"]
    assert "".join(usable) == "acefghijklmnopqrstuvwxyz"
    part = usable.part(usable.numbered()[1:4])
    for letter in part:
        if letter == "e":
            part.leave_out("of its letter too")
    assert list(part) == ["c", "f"]
    assert usable.left_out == {1: "of its letter", 3: "of its letter", 4: "of its letter too"}
    with pytest.raises(ValueError, match="3 of 26 batches"):
        usable.refuse_many()
    assert UsableBatches.of(usable) is usable


def test_all_finite() -> None:
    fine = [torch.ones(3), {"a": (torch.zeros(2, dtype=torch.int64), "text", None)}]
    assert all_finite(fine)
    assert all_finite([])
    assert not all_finite([fine, torch.tensor([1.0, math.nan])])
    assert not all_finite([fine, torch.tensor(-math.inf)])
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    assert all_finite(torch.full((4,), torch.finfo(torch.float32).max)), "the sum of finite numbers may overflow"
    assert not all_finite([torch.full((4,), torch.finfo(torch.float32).max), torch.tensor(math.nan)])
