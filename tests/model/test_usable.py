"""What no call can work on is refused by name, with the remedy, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from models import class_loss
from torch import Tensor, nn
from torch.nn import functional as F

import obc

PLAN = obc.PruningPlan({"0": obc.Kept(out_channels=torch.arange(4)), "2": obc.Kept(in_channels=torch.arange(4))})


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))


def _data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3), torch.arange(4)) for _ in range(4)]


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


CALLS: dict[str, Callable[[Any], Any]] = {
    "score": lambda model: obc.score(model, _data(), class_loss),
    "collect": lambda model: obc.collect(model, _data(), class_loss, statistics="gradient_moments"),
    "prune": lambda model: obc.prune(model, _data()[0][0], _data(), class_loss, macs=0.8, steps=1),
    "compensate": lambda model: obc.compensate(model, _model(), PLAN, _data()),
    "equivalent_pruning": lambda model: obc.equivalent_pruning(model, _model().state_dict(), PLAN),
    "recover": lambda model: obc.recover(model, _model(), _data(), steps=1, lr=0.1),
}


def _made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return _model().requires_grad_(False)


def _offloaded() -> nn.Module:
    model = _model()
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a state dict": (lambda: _model().state_dict(), TypeError, "got OrderedDict; a state dict must be loaded"),
    "a function": (lambda: F.relu, TypeError, "must be a torch.nn.Module, got function"),
    "on meta": (lambda: _model().to("meta"), ValueError, "0.weight is on the meta device, so it has no values"),
    "offloaded": (_offloaded, ValueError, "0.weight is on the meta device, because hooks of accelerate"),
    "from inference mode": (_made_in_inference_mode, ValueError, "0.weight was made inside torch.inference_mode"),
}


@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_models_that_no_call_can_work_on(call: str, state: str) -> None:
    make, error, message = MODELS[state]
    with pytest.raises(error, match=message):
        CALLS[call](make())


def _data_from_inference_mode() -> list[tuple[Tensor, Tensor]]:
    with torch.inference_mode():
        return _data()


def _weights_after(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[Tensor]:
    found = call(model)
    scored = [one.out_channels for one in found.values()] if isinstance(found, obc.Scores) else []
    return [*scored, *model.state_dict().values()]


ON_BATCHES: dict[str, Callable[[nn.Module, list[tuple[Tensor, Tensor]]], Any]] = {
    "score": lambda model, data: obc.score(model, data, class_loss),
    "score samples": lambda model, data: obc.score(model, iter(data), _losses, rows="sample", micro_batch=2),
    "collect": lambda model, data: obc.collect(model, data, class_loss, statistics="gradient_moments"),
    "prune": lambda model, data: obc.prune(model, data[0][0], data, class_loss, macs=0.7, steps=1, compensate=True),
    "compensate": lambda model, data: obc.compensate(PLAN.apply(model), _model(), PLAN, data),
    "recover": lambda model, data: obc.recover(PLAN.apply(model), _model(), data, steps=2, lr=0.1),
    "memory_estimate": lambda model, data: obc.memory_estimate(model, data[0], class_loss),
}


@pytest.mark.parametrize("call", ON_BATCHES)
def test_batches_from_inference_mode_count_like_others(call: str) -> None:
    plain, other = (
        _weights_after(_model(), lambda model, data=data: ON_BATCHES[call](model, data))
        for data in (_data(), _data_from_inference_mode())
    )
    assert [tensor.shape for tensor in plain] == [tensor.shape for tensor in other]
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_norms_from_inference_mode_are_named() -> None:
    with torch.inference_mode():
        norm = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    with pytest.raises(ValueError, match=r"0\.running_mean was made inside torch\.inference_mode.*nothing written"):
        obc.recalibrate_norms(norm, _data())


def test_a_model_without_norms_is_said_to_keep_its_state() -> None:
    for model in (_model(), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))):
        with pytest.warns(UserWarning, match="Sequential has no BatchNorm .* so recalibrate_norms changed nothing"):
            obc.recalibrate_norms(model, _data())


def test_no_batch_is_named() -> None:
    with pytest.raises(TypeError, match="batch must be one batch, like those to score with, got None"):
        obc.memory_estimate(_model(), None)


@pytest.mark.parametrize("call", CALLS)
def test_calls_inside_inference_mode(call: str) -> None:
    model = _model()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"this is inside torch\.inference_mode\(\).*outside"):
        CALLS[call](model)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_errors_of_the_loss_name_batch_and_layer(rows: Any) -> None:
    data = _data()
    data[2] = (torch.randn(4, 3).double(), torch.arange(4))
    loss = class_loss if rows == "batch" else _losses
    calls = (
        lambda: obc.score(_model(), data, loss, rows=rows),
        lambda: obc.collect(_model(), data, loss, rows=rows, statistics="rows"),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
            call()
        assert raised.value.__notes__ == [
            "loss_fn(model, batch) failed on batch 2 in layer '0'; this batch is a tuple of float64 (4, 3) on cpu, "
            "int64 (4,) on cpu"
        ]


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_batch_without_samples_is_named(rows: Any) -> None:
    data = _data()
    data.insert(1, (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="batch 1 has no samples; leave empty batches out"):
        obc.score(_model(), data, _losses if rows == "sample" else lambda m, b: _losses(m, b).mean(), rows=rows)


@pytest.mark.parametrize("statistics", ["moments", "gram", "gradient_moments", "rows"])
def test_collect_names_a_batch_without_samples(statistics: str) -> None:
    """It used to count in num_batches."""
    data = _data()
    data.insert(1, (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="batch 1 has no samples; leave empty batches out"):
        obc.collect(_model(), data, lambda m, b: _losses(m, b).mean(), statistics=statistics)


def test_a_loss_of_another_model_is_refused_with_what_it_lacks() -> None:
    other = _model()
    with pytest.raises(
        obc.scoring.ScoringError, match="the loss must come from the model that is scored, as loss_fn get"
    ):
        obc.score(_model(), _data(), lambda model, batch: _losses(other, batch).mean())


def test_plans_of_models_without_values_are_refused() -> None:
    pruned = PLAN.apply(copy.deepcopy(_model()))
    with pytest.raises(ValueError, match=r"the pruned model: 0\.weight is on the meta device"):
        obc.PruningPlan.from_models(_model().state_dict(), pruned.to("meta"))
