"""Autocast inside the loss, or around the call of obc: the model runs under it, obc's own arithmetic does not."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from models import labelled_images
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.model.autocast import PresentAutocast, callers_autocast, in_present_autocast, without_autocast
from obc.recovery.moments import RegressionMoments
from obc.structures.transformers import TransformersStructure


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net().eval()


def data() -> list[tuple[Tensor, Tensor]]:
    return labelled_images(8, 16)


def half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def outputs(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def pruned(within: bool, **options: Any) -> obc.PruningResult:
    """With autocast inside the functions, or around all of ``obc.prune``."""
    call = outputs if options.get("labels") is False else loss

    def function(model: nn.Module, batch: Any) -> Tensor:
        if not within:
            return call(model, batch)
        with half():
            return call(model, batch)

    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        return obc.prune(net(), data()[0][0], data(), function, macs=0.5, steps=2, progress=False, **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"labels": False},
    {"compensate": "ls"},
    {"compensate": "seq"},
    {"compensate": "correct"},
    {"compensate": "correct", "compensate_every_step": True},
    {"compensate": "mean"},
    {"criterion": "compensated_jacobian"},
    {"criterion": "kfac_obs"},
]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_around_the_call_gives_the_same_as_autocast_inside_the_loss(options: dict[str, Any]) -> None:
    inner, outer = pruned(True, **options), pruned(False, **options)
    assert not torch.is_autocast_enabled("cpu")
    assert outer.model.state_dict().keys() == inner.model.state_dict().keys()
    for name, tensor in inner.model.state_dict().items():
        assert torch.equal(outer.model.state_dict()[name], tensor), name


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("mode", ["ls", "seq", "correct"])
@pytest.mark.parametrize("within", [True, False], ids=["inside", "around"])
def test_the_reported_error_is_that_of_the_returned_weights(mode: Any, within: bool) -> None:
    """Autocast keeps casts of weights until its outermost block ends; errors of changed weights must not use them."""
    bare = pruned(True)
    model, original = copy.deepcopy(bare.model), net()
    batches = [image for image, _ in data()]

    def forward(one: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=True) if within else torch.autocast("cpu", enabled=False):
            return one(batch)

    def error(one: nn.Module) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        for image in batches[4::5]:
            with half(), torch.no_grad():
                got, wanted = one.eval()(image).double(), original(image).double()
            total += torch.stack([(got - wanted).square().sum(), wanted.square().sum()])
        return float(total[0] / total[1])

    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        report = obc.compensate(model, original, bare.plan, batches, forward if within else None, mode=mode)
    assert report.final_error < report.naive_error
    assert error(bare.model) == pytest.approx(report.naive_error, rel=1e-6)
    assert error(model) == pytest.approx(report.final_error, rel=1e-6)


def test_sums_of_products_are_those_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, kept = torch.randn(64, 8, generator=generator), torch.arange(4)[None]
    plain, cast = RegressionMoments(kept, 8, True), RegressionMoments(kept, 8, True)
    plain.add_inputs(x, x[:, :4])
    with half():
        cast.add_inputs(x, x[:, :4])
    assert torch.equal(plain.gram, cast.gram)
    torch.testing.assert_close(cast.gram[0], x[:, :4].double().T @ x[:, :4].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast.cross[0, 4:], x[:, 4:].double().T @ x[:, :4].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selection", ["joint", "independent"])
def test_a_selection_does_not_depend_on_autocast(selection: Any) -> None:
    rows = {"a": torch.randn(64, 24, generator=torch.Generator().manual_seed(0))}
    costs = {"a": torch.ones(24)}
    with half():
        got = obc.select(rows, costs, 12, selection=selection)
    assert torch.equal(got["a"], obc.select(rows, costs, 12, selection=selection)["a"])


def test_a_function_keeps_the_autocast_in_which_it_was_given() -> None:
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    assert in_present_autocast(outputs) is outputs
    assert in_present_autocast(None) is None
    with half():
        product, present = in_present_autocast(torch.matmul), PresentAutocast()
        with without_autocast():
            assert product(a, b).dtype == torch.bfloat16
            assert (a @ b).dtype == torch.float32
        assert (a @ b).dtype == torch.bfloat16
    with present():
        assert (a @ b).dtype == torch.bfloat16
    assert (a @ b).dtype == torch.float32


def test_a_model_that_runs_only_under_autocast_is_pruned_under_it() -> None:
    model, steps = net(), list[bool]()
    model.get_submodule("a").bfloat16()
    model.get_submodule("b").bfloat16()

    def on_step(result: obc.PruningResult) -> None:
        steps.append(torch.is_autocast_enabled("cpu"))
        assert result.model(data()[0][0]).shape == (4, 5)

    with half():
        result = obc.prune(
            model, data()[0][0], data(), loss, macs=0.5, steps=2, recalibrate=False, on_step=on_step, progress=False
        )
        assert result.model(data()[0][0]).shape == (4, 5)
    assert steps == [True, True]
    assert not result.report.unproved
    assert result.report.widths["a"][1] < 12


def test_code_that_calls_the_model_itself_finds_the_callers_autocast() -> None:
    a = torch.randn(3, 3)
    with callers_autocast():
        assert (a @ a).dtype == torch.float32
    with half():
        with without_autocast(), without_autocast(), callers_autocast():
            assert (a @ a).dtype == torch.bfloat16
            with without_autocast():
                assert (a @ a).dtype == torch.float32
        with callers_autocast():
            assert (a @ a).dtype == torch.bfloat16
    with without_autocast(), half(), callers_autocast():  # the caller had none
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize(
    "options",
    [
        {"memory": 0.9, "memory_use": obc.MemoryUse(length=512)},
        {"macs": 0.8, "memory_use": obc.MemoryUse(length=512)},
        {"macs": 0.8, "measure": True},
        {"macs": 0.8, "compensate": "correct"},
        {"macs": 0.8, "criterion": "masked"},
        {"macs": 0.8, "allocation": "search"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_call_of_a_language_model_is_under_the_callers_autocast(options: dict[str, Any]) -> None:
    case, seen = models.llama(), set[bool]()

    def note(module: nn.Module, *_: Any) -> None:
        seen.add(torch.is_autocast_enabled("cpu"))

    def language_loss(model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss.float()

    case.model.register_forward_pre_hook(note)
    with half():
        result = obc.prune(
            case.model, batches=case.batches[:4], loss_fn=language_loss, steps=1, progress=False, **options
        )
    assert seen == {True}
    if "memory_use" in options:
        whole, model = models.llama().model, result.report.known["memory"].before
        weights = TransformersStructure(whole).memory(obc.MemoryUse()).total()
        with half(), torch.no_grad():
            cache = whole(input_ids=case.batches[0][:1], use_cache=True).past_key_values
        per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / cache.get_seq_length()
        assert model - weights == 512 * per_token
