"""BatchNorm statistics that fit although the calibration data are not the training data, over four networks."""

from __future__ import annotations

import copy

import pytest
import torch
from prunable import WITH_NORMS, Pruned
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import obc
from obc.recovery.calibration import batch_norms
from obc.recovery.norm_reference import moments_of

NETWORKS = sorted(WITH_NORMS)
# delta in the formula, of var + eps.
DELTA = 0.01


def training_data(name: str, seed: int) -> list[Tensor]:
    return [WITH_NORMS[name].inputs(32, seed=seed + place) for place in range(4)]


def other_data(name: str, seed: int) -> list[Tensor]:
    """Batches with another mean and variance."""
    return [0.4 * batch + 0.7 for batch in training_data(name, seed)]


def trained(name: str) -> nn.Module:
    """A network whose norms know the statistics of the training data."""
    model = WITH_NORMS[name].model()
    obc.recalibrate_norms(model, training_data(name, 100))
    return model


def pruned(name: str) -> Pruned:
    recipe, original = WITH_NORMS[name], trained(name)
    model = copy.deepcopy(original)
    plan = recipe.prune(ratio=0.25).plan  # which channels go depends on weights alone
    return Pruned(original, plan.apply(model), plan)


def arriving(model: nn.Module, data: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Norm -> the means over the batches of the mean and the variance of its input."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm)
    ]
    with torch.no_grad():
        for batch in data:
            model.eval()(batch)
    for handle in handles:
        handle.remove()
    flat = {name: [x.movedim(1, 0).flatten(1) for x in inputs] for name, inputs in seen.items()}
    return {
        name: (
            torch.stack([x.mean(1) for x in inputs]).mean(0),
            torch.stack([x.var(1, unbiased=False) for x in inputs]).mean(0),
        )
        for name, inputs in flat.items()
    }


def error(model: nn.Module, original: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model.eval()(x), original.eval()(x)) for x in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unpruned_model_keeps_its_statistics(name: str) -> None:
    original = trained(name)
    same, plain = copy.deepcopy(original), copy.deepcopy(original)
    obc.recalibrate_norms(same, other_data(name, 200), original_model=original)
    obc.recalibrate_norms(plain, other_data(name, 200))
    assert_close(same.state_dict(), original.state_dict(), rtol=1e-9, atol=1e-9)
    assert error(plain, original, training_data(name, 300)) > 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_follow_the_formula(name: str) -> None:
    """Exact on one batch, where a norm's input does not change with its final statistics."""
    found, data = pruned(name), other_data(name, 200)[:1]
    obc.recalibrate_norms(found.model, data, original_model=found.original, plan=found.plan)
    full, arrived = arriving(found.original, data), arriving(found.model, data)
    for module_name, norm in found.model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        own = found.original.get_submodule(module_name)
        kept = found.plan[module_name].out_channels if module_name in found.plan else None
        index = torch.arange(own.num_features) if kept is None else kept
        own_mean, own_variance = own.running_mean[index], own.running_var[index] + own.eps
        (mean, variance), (full_mean, full_variance) = arrived[module_name], (part[index] for part in full[module_name])
        ratio = (variance + DELTA * own_variance) / (full_variance + DELTA * own_variance)
        assert_close(norm.running_var + norm.eps, ratio * own_variance)
        assert_close(norm.running_mean, mean - ratio.sqrt() * (full_mean - own_mean))
        # What that is for: the mean of what it returns is the unpruned norm's.
        assert_close(
            (mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt(),
            (full_mean - own_mean) / own_variance.sqrt(),
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_on_training_data_it_is_plain_recalibration(name: str) -> None:
    found, data = pruned(name), training_data(name, 100)  # the very batches that the statistics are of
    plain = copy.deepcopy(found.model)
    obc.recalibrate_norms(found.model, data, original_model=found.original, plan=found.plan)
    obc.recalibrate_norms(plain, data)
    for norm, other in zip(batch_norms(found.model), batch_norms(plain), strict=True):
        assert_close(norm.running_mean, other.running_mean, rtol=0, atol=0.05 * float(other.running_var.mean().sqrt()))
        assert_close(norm.running_var, other.running_var, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_other_calibration_data_do_less_harm(name: str) -> None:
    found, data = pruned(name), other_data(name, 200)
    plain = copy.deepcopy(found.model)
    obc.recalibrate_norms(found.model, data, original_model=found.original, plan=found.plan)
    obc.recalibrate_norms(plain, data)
    test = training_data(name, 300)
    assert error(found.model, found.original, test) < 0.8 * error(plain, found.original, test)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", NETWORKS)
def test_prune_and_compensate_compare_with_the_unpruned_model(name: str) -> None:
    """Hardly anything is pruned, on other data than the training data: hardly anything may change."""
    original = trained(name).float()
    data = [batch.float() for batch in other_data(name, 200)]
    test = [batch.float() for batch in training_data(name, 300)]
    plain = copy.deepcopy(original)
    obc.recalibrate_norms(plain, data)
    model = copy.deepcopy(original)
    result = obc.prune(model, data[0][:1], data, macs=0.97, steps=2, labels=False, rows="sample", progress=False)
    assert error(model, original, test) < 0.5 * error(plain, original, test)
    for mode in ("ls", "seq", "correct"):
        again = copy.deepcopy(model)
        obc.compensate(again, original, result.plan, data, mode=mode, progress=False)
        assert error(again, original, test) < 0.5 * error(plain, original, test), mode


@pytest.mark.parametrize("name", NETWORKS)
def test_correcting_starts_from_the_unpruned_statistics(name: str) -> None:
    found, data = pruned(name), training_data(name, 200)
    recalibrated = copy.deepcopy(found.model)
    obc.recalibrate_norms(recalibrated, data, original_model=found.original, plan=found.plan)
    for model in (found.model, recalibrated):
        report = obc.compensate(model, found.original, found.plan, data, mode="correct", progress=False)
        assert report.final_error < report.naive_error
    assert_close(recalibrated.state_dict(), found.model.state_dict())


def test_a_norm_that_did_not_run_keeps_its_statistics() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branch().eval()
    before = copy.deepcopy(model.unused.state_dict())
    obc.recalibrate_norms(model, [torch.randn(8, 3, 4, 4) + 1], original_model=copy.deepcopy(model))
    assert_close(model.unused.state_dict(), before, rtol=0, atol=0)
    assert_close(model.used.running_mean, torch.zeros(3))


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    found, data = pruned("resnet"), other_data("resnet", 200) * 3
    other = copy.deepcopy(found.model)
    obc.recalibrate_norms(found.model, data, original_model=found.original, plan=found.plan)
    bad = torch.full_like(data[0], float("inf"))
    with pytest.warns(UserWarning, match="batch 5 is left out"):
        obc.recalibrate_norms(other, [*data[:5], bad, *data[5:]], original_model=found.original, plan=found.plan)
    assert_close(other.state_dict(), found.model.state_dict())


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 9), (7, 4, 50, 51), (2, 3, 3, 4, 5), (1, 2, 70, 70)])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_moments_of_channels_are_those_of_float64(shape: tuple[int, ...], last: bool) -> None:
    """Of an input whose mean is thirty deviations; added in float32 as it is, its variance would be off by more."""
    x = 3 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    variance, mean = torch.var_mean(x.double(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
    found = moments_of(x)
    assert_close(found[0], mean, rtol=1e-6, atol=0)
    assert_close(found[1], variance, rtol=2e-5, atol=0)
