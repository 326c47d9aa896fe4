"""obc.plain_layers: a plain layer in place of every layer that computes its weight, and the same outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

DOUBLE = torch.float64


class Standardised(nn.Conv2d):
    """Weight standardisation (arXiv 1903.10520), as in NFNet and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Equalised(nn.Module):
    """The linear layer of StyleGAN: weight and bias are scaled by constants. It derives from no layer of torch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix * self.matrix.shape[1] ** -0.5, bias=0.1 * self.offset)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=F.normalize(self.weight, dim=1))


class CentredUp(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(x, self.weight - self.weight.mean(), self.bias, 2, 1, 1, self.groups)


class Padded(Standardised):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Scaled(Cosine):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight) + F.linear(x, 3 * self.weight)


class Dynamic(nn.Linear):
    """Its weight is one for positive inputs and another for others."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean().sign(), self.bias)


def images(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers), torch.randn(2, 3, 6, 6, dtype=DOUBLE)


def rows(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), *layers), torch.randn(5, 3, dtype=DOUBLE)


def masked(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", amount=0.3)


# The layer "2" computes its weight.
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "weight standardisation": lambda: images(Standardised(8, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "in groups": lambda: images(Standardised(8, 6, 3, groups=2, dilation=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "changed in place": lambda: images(Standardised(8, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)),
    "padding by name": lambda: images(Standardised(8, 6, 3, padding="same"), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "transposed": lambda: images(CentredUp(8, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "transposed, in groups": lambda: images(CentredUp(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "a class of its own": lambda: rows(Equalised(8, 6), nn.ReLU(), nn.Linear(6, 2)),
    "normalised rows": lambda: rows(Cosine(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)),
    "weight_norm": lambda: rows(parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
    "spectral_norm": lambda: rows(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
    "orthogonal": lambda: rows(parametrizations.orthogonal(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
    "weight_norm by a hook": lambda: rows(weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
    "spectral_norm by a hook": lambda: rows(spectral_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
    "prune by a hook": lambda: rows(masked(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
}
STAYING: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str]] = {
    "pads its input": (lambda: images(Padded(8, 6, 3)), "it changes its input before the product"),
    "scales its output": (lambda: rows(Scaled(8, 6, bias=False)), "it returns something else than the product"),
    "multiplies twice": (lambda: rows(Twice(8, 6)), "it multiplies 2 times in 1 calls"),
    "dynamic": (lambda: rows(Dynamic(8, 6)), "its weight depends on its input: a plain layer differs by"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_the_plain_layer_computes_the_same_and_is_pruned(name: str) -> None:
    torch.manual_seed(1)
    model, x = CASES[name]()
    model.double().train()
    model[2].requires_grad_(False)  # type: ignore[index, operator]
    inputs, gone = [x, 3 * torch.randn_like(x)], torch.tensor([1, 4])
    model.eval()
    expected = [model(one) for one in inputs]
    hidden = model[:2](x).detach()  # type: ignore[index]
    masked_output = model[2:](hidden.index_fill(1, gone, 0))  # type: ignore[index]
    model.train()
    assert obc.plain_layers(model, x) == ["2"]
    assert all(module.training for module in model.modules())
    own: Any = model[2]  # type: ignore[index]
    assert set(dict(own.named_parameters())) <= {"weight", "bias"}
    assert not any(parameter.requires_grad for parameter in own.parameters())
    model.eval()
    for one, output in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(one), output, rtol=1e-12, atol=1e-12)
    structure = TorchPruningStructure(model, x)
    assert [group.name for group in structure.groups] == ["0", "2"]
    if "in groups" not in name:  # there a unit is a channel of each group of the convolution
        structure.remove({"0": gone})
        torch.testing.assert_close(model(x), masked_output, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_weight_of_a_plain_layer_is_a_parameter_that_is_trained_as_before(name: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, x = CASES[name]()
    model.double()[2].requires_grad_(trained)
    assert obc.plain_layers(model, x) == ["2"]
    assert dict(model[2].named_parameters())["weight"].requires_grad is trained
    assert not list(model[2].buffers())


@pytest.mark.parametrize("name", STAYING)
def test_a_layer_that_computes_something_else_stays_and_is_named(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, why = STAYING[name]
    model, x = make()
    model.double()
    before, own = model(x), model[2]  # type: ignore[index]
    monkeypatch.setattr(logging.getLogger("obc"), "propagate", True)
    with caplog.at_level(logging.WARNING, "obc"):
        assert obc.plain_layers(model, x) == []
    assert f"these layers compute their weights and stay: '2' ({type(own).__name__}): {why}" in caplog.text
    assert model[2] is own  # type: ignore[index]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_shared_layers_are_replaced_everywhere_and_others_are_left_alone() -> None:
    shared = Cosine(4, 4, bias=False)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared, nn.LayerNorm(4))})
    model.forward = lambda x: model["b"](model["a"](x))
    x = torch.randn(3, 4)
    before, norm = model(x), model["b"][1]
    assert obc.plain_layers(model, x) == ["a.0"]
    assert type(model["a"][0]) is nn.Linear
    assert model["a"][0] is model["b"][0]
    assert model["b"][1] is norm
    torch.testing.assert_close(model(x), before)


def test_scores_of_a_plain_layer_are_those_of_its_weight() -> None:
    torch.manual_seed(0)
    model, x = CASES["weight standardisation"]()
    model.double()
    obc.plain_layers(model, x)
    scores = obc.score(model, [x], lambda net, batch: net(batch).square().mean(), progress=False)
    layer: Any = model[2]  # type: ignore[index]
    (gradient,) = torch.autograd.grad(model(x).square().mean(), layer.weight)
    expected = (layer.weight * gradient).sum((0, 2, 3)).square()
    torch.testing.assert_close(scores["2"].in_channels.double(), expected.detach(), rtol=1e-5, atol=0)


def test_errors_say_what_to_do_and_leave_the_model_as_it_was() -> None:
    with pytest.raises(obc.PlanError, match="the model is itself a layer, a Cosine; pass the model that it is part of"):
        obc.plain_layers(Cosine(4, 4), torch.randn(2, 4))
    model, _ = CASES["normalised rows"]()
    with pytest.raises(obc.PruningError, match=r"running it on the example inputs failed in '0'.*pass inputs"):
        obc.plain_layers(model, torch.randn(2, 7))
    assert type(model[2]) is Cosine  # type: ignore[index]
    assert "forward" not in vars(model[2])  # type: ignore[index]
