"""Experts whose tensors no table knows: what one token meets of them, and what it multiplies by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obc.structures.counted_macs import counted_macs
from obc.structures.transformers import TransformersStructure
from obc.structures.transformers.costs import macs_for_one_token

FEATURES, INNER, EXPERTS, CHOSEN = 6, 5, 4, 2


def stacked(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Mixture(nn.Module):
    """A token's two experts of four, summed with their weights; subclasses say how experts are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = CHOSEN
        self.make()

    def make(self) -> None:
        self.router = nn.Linear(FEATURES, EXPERTS)

    def logits(self, x: Tensor) -> Tensor:
        return self.router(x)

    def expert(self, x: Tensor, number: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x.flatten(0, -2):
            weights, chosen = self.logits(token[None])[0].topk(self.top_k)
            parts = [w * self.expert(token[None], int(e))[0] for w, e in zip(weights.softmax(-1), chosen, strict=True)]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows).view_as(x)


class Product(nn.Module):
    """One projection of all experts, as a module."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.groups, self.weight = EXPERTS, stacked(*shape)

    def forward(self, x: Tensor, number: int) -> Tensor:
        return x @ self.weight[number]


class Grouped(Mixture):
    """A module for each projection, inside the experts (Aria until 5.17)."""

    def make(self) -> None:
        super().make()
        self.experts = nn.Module()
        self.experts.fc1, self.experts.fc2 = Product(EXPERTS, FEATURES, INNER), Product(EXPERTS, INNER, FEATURES)

    def expert(self, x: Tensor, number: int) -> Tensor:
        return self.experts.fc2(self.experts.fc1(x, number).tanh(), number)


class OwnNames(Mixture):
    """Both tensors in the mixture itself, under names of its own."""

    def make(self) -> None:
        super().make()
        self.w1, self.w2 = stacked(EXPERTS, FEATURES, INNER), stacked(EXPERTS, INNER, FEATURES)

    def expert(self, x: Tensor, number: int) -> Tensor:
        return (x @ self.w1[number]).tanh() @ self.w2[number]


class Multiplied(nn.Module):
    """Tensors with the rows of one expert after those of the other, whose views are multiplied here."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = stacked(EXPERTS * INNER, FEATURES), stacked(EXPERTS * INNER, FEATURES)

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (x @ up.T).tanh() @ down


class Rows(Mixture):
    """The rows of all experts in one matrix (DBRX); the router has a layer in it."""

    def make(self) -> None:
        self.router = nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, EXPERTS))
        self.experts = nn.Module()
        self.experts.mlp = Multiplied()

    def expert(self, x: Tensor, number: int) -> Tensor:
        mlp: Any = self.experts.mlp
        up, down = (w.view(EXPERTS, INNER, FEATURES)[number] for w in (mlp.w1, mlp.w2))
        return mlp(x, up, down)


class FourDimensions(Mixture):
    """Gates and up projections beside each other in a dimension of their own; the router is called gate."""

    def make(self) -> None:
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.weight_up, self.weight_down = stacked(EXPERTS, 2, FEATURES, INNER), stacked(EXPERTS, INNER, FEATURES)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def expert(self, x: Tensor, number: int) -> Tensor:
        gate, up = (x @ self.weight_up[number, part] for part in range(2))
        return (gate.tanh() * up) @ self.weight_down[number]


class Listed(Mixture):
    """A list under another name."""

    def make(self) -> None:
        super().make()
        parts = (nn.Sequential(nn.Linear(FEATURES, INNER), nn.Tanh(), nn.Linear(INNER, FEATURES)) for _ in range(4))
        self.branches = nn.ModuleList(parts)

    def expert(self, x: Tensor, number: int) -> Tensor:
        return self.branches[number](x)


class Switch(OwnNames):
    """A router under another name."""

    def make(self) -> None:
        super().make()
        self.switch = self.router
        del self.router

    def logits(self, x: Tensor) -> Tensor:
        return self.switch(x)


class OwnRouter(OwnNames):
    """A router that is a matrix of the mixture."""

    def make(self) -> None:
        super().make()
        self.choose = stacked(EXPERTS, FEATURES)
        del self.router

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.choose.T


class Dense(Mixture):
    """No experts: a tensor of as many matrices, all of which every token meets."""

    def make(self) -> None:
        self.maps = stacked(EXPERTS, FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.maps:
            x = (x @ weight).tanh()
        return x


def model_of(mixture: Callable[[], nn.Module]) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential() for _ in range(2))
    for layer in model.layers:
        layer.mlp = mixture()
    model.forward = lambda x: [x := x + layer.mlp(x) for layer in model.layers][-1]  # type: ignore[method-assign]
    return model.double()


def met(model: nn.Module, name: str) -> float:
    """Entries of a parameter in rows that one token's output depends on."""
    x = torch.randn(1, 1, FEATURES, dtype=torch.float64)
    (grad,) = torch.autograd.grad((model(x) * torch.randn_like(x)).sum(), model.get_parameter(name))
    return float((grad.flatten(1) != 0).any(1).double().mean() * grad.numel())


@pytest.mark.parametrize("mixture", [Grouped, OwnNames, Rows, FourDimensions, Listed, Dense])
def test_active_parameters_and_macs_are_those_of_one_token(mixture: type[Mixture]) -> None:
    """Truth: the rows with a gradient, and the products that torch counts."""
    torch.manual_seed(0)
    model = model_of(mixture)
    # A router's outputs that were not chosen have no gradient, but the token meets them; biases of experts in lists.
    experts = [key for key, one in model.named_parameters() if "router" not in key and "gate" not in key]
    others = sum(one.numel() for key, one in model.named_parameters() if key not in experts)
    share = CHOSEN / EXPERTS if mixture is not Dense else 1
    expected = sum(share * model.get_parameter(key).numel() for key in experts)
    if mixture is not Listed:
        assert sum(met(model, key) for key in experts) == expected
    assert TransformersStructure(model).costs("active_parameters").total() == others + expected

    counted = counted_macs(model, lambda one: one(torch.randn(1, 1, FEATURES, dtype=torch.float64)))
    if mixture is Listed or mixture is Dense:  # only tensors that stack experts have MACs without counting
        return
    executed = {name: macs for name, macs in counted.items() if macs}
    assert macs_for_one_token(model) == pytest.approx(executed)


@pytest.mark.parametrize("mixture", [Switch, OwnRouter])
def test_a_tensor_that_may_stack_experts_is_refused_by_name(mixture: type[Mixture]) -> None:
    torch.manual_seed(0)
    structure = TransformersStructure(model_of(mixture))
    router = "switch.weight" if mixture is Switch else "choose"
    message = rf"\(4, 6, 5\) of layers\.0\.mlp \({mixture.__name__}\) may hold 4 experts that layers\.0\.mlp\.{router}"
    with pytest.raises(ValueError, match=message):
        structure.costs("active_parameters")
    assert structure.costs("parameters").total() == sum(one.numel() for one in structure.model.parameters())
