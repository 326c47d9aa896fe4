"""Copies for experiments run their own layers, also where a function replaces a method."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from obc.model.shared_copy import shared_copy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


def closure(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: old(x)


def closure_over_layer(model: Any) -> None:
    layer = model.b
    model.b.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def closure_of_closure(model: Any) -> None:
    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    model.b.forward = wrapped(wrapped(model.b.forward))


def default_argument(model: Any) -> None:
    model.forward = lambda x, layers=model: Net.forward(layers, x)


def keyword_default(model: Any) -> None:
    def forward(x: Tensor, *, layer: Any = model.b) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    model.b.forward = forward


def partial(model: Any) -> None:
    model.forward = functools.partial(Net.forward, model)


def method(model: Any) -> None:
    model.forward = types.MethodType(Net.forward, model)


def closure_over_lists(model: Any) -> None:
    layers, last = [model.a, model.b], {"head": (model.head,)}

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x).relu()
        return last["head"][0](x)

    model.forward = forward


def recursive(model: Any) -> None:
    layers = (model.a, model.b)

    def forward(x: Tensor, depth: int = 0) -> Tensor:
        return model.head(x) if depth == len(layers) else forward(layers[depth](x).relu(), depth + 1)

    model.forward = forward


KINDS = [
    closure,
    closure_over_lists,
    recursive,
    closure_over_layer,
    closure_of_closure,
    default_argument,
    keyword_default,
    partial,
    method,
]


@pytest.mark.parametrize("replace", KINDS)
def test_a_copy_runs_its_own_layers(replace: Callable[[Any], None]) -> None:
    model, x = Net().eval(), torch.randn(4, 5)
    replace(model)
    before, copied = model(x), shared_copy(model)
    assert torch.equal(copied(x), before)
    copied.b.weight = nn.Parameter(torch.zeros_like(model.b.weight))  # type: ignore[union-attr]
    assert torch.equal(copied(x), model.head(model.b.bias.relu().expand(4, -1)))
    assert torch.equal(model(x), before)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("replace", KINDS)
def test_such_a_model_is_proved_and_pruned_like_any_other(replace: Callable[[Any], None]) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
    found = []
    for change in (None, replace):
        torch.manual_seed(0)
        model = Net().eval()
        if change is not None:
            change(model)
        batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(n)) for n in range(20)]
        result = obc.prune(
            model, batches[0], batches, lambda one, x: one(x).square().mean(), macs=0.5, steps=2, progress=False
        )
        assert result.report.proof is not None
        assert set(result.report.proof.proved) == {"a", "b"}
        found.append((result.plan, result.model(batches[0])))
    for name, kept in found[0][0].items():
        for side in ("out_channels", "in_channels"):
            one, other = getattr(kept, side), getattr(found[1][0][name], side)
            assert (one is None and other is None) or torch.equal(one, other)
    assert torch.equal(found[0][1], found[1][1])


def added(adapter: nn.Module, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output + adapter(args[0])


HOOKS: list[Callable[[Any], object]] = [
    lambda model: model.a.register_forward_hook(lambda layer, args, output: output + model.adapter(args[0])),
    lambda model: model.a.register_forward_hook(functools.partial(added, model.adapter)),
    lambda model: model.register_forward_pre_hook(lambda net, args: (args[0] + model.shift(args[0]),)),
]


@pytest.mark.parametrize("add", HOOKS, ids=["hook", "partial", "pre-hook"])
def test_hooks_of_a_copy_call_its_own_layers(add: Callable[[Any], object]) -> None:
    plain, x = Net().eval(), torch.randn(4, 5)
    model: Any = copy.deepcopy(plain)
    width = model.a.out_features
    model.adapter, model.shift = nn.Linear(5, width), nn.Linear(5, 5)
    add(model)
    before, copied = model(x), shared_copy(model)
    assert torch.equal(copied(x), before)
    for layer in (copied.adapter, copied.shift):
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    assert torch.equal(copied(x), plain(x))
    assert torch.equal(model(x), before)


@dataclasses.dataclass
class Kept:
    activation: Tensor


class Keeps(Net):
    """Keeps an activation of its last forward, as networks with deep supervision do."""

    def __init__(self, holder: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.holder, self.kept = holder, holder(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        self.kept = self.holder(y)
        return self.head(y.relu())


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda y: y,
    "a list": lambda y: [y, 1],
    "lists in a dict": lambda y: {"level": [(y,), [y]]},
    "an object": Kept,
}


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("compensate", ["ls", None])
def test_a_model_that_keeps_activations_with_their_graph_is_copied_and_pruned(name: str, compensate: Any) -> None:
    torch.manual_seed(0)
    model, x = Keeps(HOLDERS[name]), torch.randn(40, 5)
    assert model(x).requires_grad
    copied = shared_copy(model)
    assert copied.b.weight.data_ptr() == model.b.weight.data_ptr()
    torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    batches = list(x.split(10))
    result = obc.prune(model, x, batches, loss, macs=0.5, compensate=compensate, progress=False)
    assert result.report.macs_after <= 0.5 * result.report.macs_before
