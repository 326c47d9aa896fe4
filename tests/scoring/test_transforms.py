"""No gate serves losses that differentiate a gradient once more, or forwards inside transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import labelled_images
from torch import Tensor, nn
from torch.nn import functional as F

import obc

pytestmark = pytest.mark.usefixtures("gates")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.softplus(self.a(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.b(self.features(x))))


class Mapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.head(F.softplus(self.b(row))))(self.features(x))


class MappedAndPlain(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(F.softplus(self.b(y)) + torch.func.vmap(self.b)(y).tanh())


class Differentiated(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y + torch.func.grad(lambda row: F.softplus(self.b(row)).sum())(y))


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def penalised(strength: float) -> Callable[[nn.Module, Any], Tensor]:
    """With a penalty on the gradient of the outputs with respect to the inputs, per sample."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        outputs = model(x)
        (grad,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        return F.cross_entropy(outputs, batch[1], reduction="none") + strength * grad.square().flatten(1).sum(1)

    return losses


def data() -> list[tuple[Tensor, Tensor]]:
    return labelled_images(6, 3, torch.float64)


def expected(model: nn.Module, losses: Callable[[nn.Module, Any], Tensor], rows: str) -> dict[str, Tensor]:
    """Out channels: the squares of <w, dL/dw> + b dL/db, with the gradients of torch."""
    sums: dict[str, Tensor] = {}
    layers: Any = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    for batch in data():
        found = losses(model, batch)
        for loss in found.unbind() if rows == "sample" else [found.mean()]:
            for name, layer in layers.items():
                weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
                row = (layer.weight * weight).flatten(1).sum(1) + layer.bias * bias
                sums[name] = sums.get(name, torch.zeros(())) + row.detach().square()
    return sums


CASES: dict[str, tuple[type[Net], Callable[[nn.Module, Any], Tensor], list[str]]] = {
    "faint penalty": (Net, penalised(1e-4), ["a", "b", "head"]),
    "penalty": (Net, penalised(1.0), ["a", "b", "head"]),
    "strong penalty": (Net, penalised(100.0), ["a", "b", "head"]),
    "vmap": (Mapped, entropy, ["b", "head"]),
    "vmap and a plain call": (MappedAndPlain, entropy, ["b"]),
    "grad": (Differentiated, entropy, ["b"]),
}


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_weight_gradients(name: str, rows: Any) -> None:
    torch.manual_seed(0)
    kind, losses, beyond_gates = CASES[name]
    model = kind().double()

    def loss(one: nn.Module, batch: Any) -> Tensor:
        return losses(one, batch) if rows == "sample" else losses(one, batch).mean()

    scores = obc.score(model, data(), loss, rows=rows, progress=False)
    fallen = [name for name, coverage in scores.coverage.items() if str(coverage).startswith("weight gradient")]
    assert fallen == beyond_gates
    for layer, wanted in expected(model, losses, rows).items():
        found = scores[layer].out_channels
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))
