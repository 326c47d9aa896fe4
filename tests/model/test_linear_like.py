"""Linear layers of other classes are recognised by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from obc.model.layouts import layout_of
from obc.model.linear_like import acts_as_linear, is_linear


class Own(nn.Module):
    """``compute(self, x)`` is its forward."""

    def __init__(self, has_bias: bool = True, width: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 4))
        self.bias = nn.Parameter(torch.randn(width)) if has_bias else None


def own(compute: Callable[[Any, Tensor], Any], has_bias: bool = True, **more: Any) -> nn.Module:
    return type("Made", (Own,), {"forward": compute})(has_bias, **more)


class Named(Own):
    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(bias=self.bias, weight=self.weight, input=features)


def with_more(module: nn.Module, **more: Any) -> nn.Module:
    for name, value in more.items():
        setattr(module, name, value)
    return module


def linear(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def depending(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias) if x.sum() > 0 else x


LIKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: own(linear),
    "without a bias": lambda: own(linear, False),
    "by name": Named,
    "by name, without a bias": lambda: Named(False),
    "no bias passed": lambda: own(lambda self, x: F.linear(x, self.weight), False),
}
UNLIKE: dict[str, Callable[[], nn.Module]] = {
    "no use of the bias": lambda: own(lambda self, x: F.linear(x, self.weight)),
    "scaled": lambda: own(lambda self, x: 2 * F.linear(x, self.weight, self.bias)),
    "transposed": lambda: own(lambda self, x: F.linear(x, self.weight.t()), False),
    "two inputs": lambda: own(lambda self, x, y: F.linear(x, self.weight, self.bias)),
    "depending on values": lambda: own(depending),
    "several outputs": lambda: own(lambda self, x: (F.linear(x, self.weight, self.bias), x)),
    "a normalised weight": lambda: own(lambda self, x: F.linear(x, F.normalize(self.weight), self.bias)),
    "one more parameter": lambda: with_more(own(linear), scale=nn.Parameter(torch.ones(1))),
    "a module inside": lambda: with_more(own(linear), inner=nn.ReLU()),
    "torch's own": lambda: nn.Linear(4, 5),
    "bilinear": lambda: nn.Bilinear(4, 4, 5),
}


@pytest.mark.parametrize("kind", LIKE)
def test_what_computes_a_linear_layer_is_one(kind: str) -> None:
    module = LIKE[kind]()
    layout = layout_of(module)
    assert acts_as_linear(module)
    assert is_linear(module)
    assert layout is not None
    assert layout.sizes(module.weight) == (5, 4)  # type: ignore[arg-type]
    x = torch.randn(3, 4)
    scores = obc.score(nn.Sequential(module, nn.Tanh()), [x], lambda model, x: model(x).square().sum(), progress=False)
    assert scores.coverage["0"] == "gate"
    module.double()
    loss = module(x.double()).tanh().square().sum()
    weight, *biases = module.parameters()
    grad, *bias_grads = torch.autograd.grad(loss, [weight, *biases])
    row = (weight * grad).sum(1) + sum(b * g for b, g in zip(biases, bias_grads, strict=True))
    torch.testing.assert_close(scores["0"].out_channels.double(), row.square().detach(), rtol=1e-4, atol=1e-7)


class Scaled(Own):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        with_more(self, **more)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y * self.scale if getattr(self, "scale", None) else y


def test_each_module_of_a_class_is_examined() -> None:
    """Its forward may depend on what the module holds."""
    for more, like in [({}, True), ({"scale": 2.0}, False), ({"scale": 0.0}, True), ({"kept": [1]}, True)]:
        module = Scaled(**more)
        for _ in range(2):
            assert acts_as_linear(module) == like, more
        module.scale = 3
        assert not acts_as_linear(module)


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_computes_anything_else_is_none(kind: str) -> None:
    module = UNLIKE[kind]()
    assert not acts_as_linear(module)
    assert is_linear(module) == isinstance(module, nn.Linear)
