"""A pruned model that evaluates but can't be trained is named; nothing of what is tried in train mode stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc


class Middle(nn.Module):
    """What runs in train mode alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.lists = kind, [torch.ones(12)]
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("calls", torch.zeros(()))
        self.mean: Tensor
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.kind == "running mean":
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        if self.kind == "attribute":
            x = x * self.lists[0]
        if self.kind == "reshaped":
            x = x.reshape(len(x), 12)
        if self.kind == "targets":
            raise ValueError("no targets")
        self.calls += 1
        return x + 0.1 * torch.rand_like(x)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.middle, self.b, self.head = nn.Linear(5, 12), Middle(kind), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.middle(self.a(x)).relu()).relu())


def pruned(kind: str, **options: Any) -> tuple[nn.Module, list[str], list[Tensor]]:
    torch.manual_seed(0)
    model = Net(kind).eval()
    batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(n)) for n in range(20)]
    loss: Callable[..., Tensor] = lambda one, x: one(x).square().mean()  # noqa: E731
    result = obc.prune(model, batches[0], batches, loss, macs=0.5, steps=2, progress=False, **options)
    return result.model, [one for one in result.report.warnings if "train mode" in one], batches


@pytest.mark.parametrize("kind", ["attribute", "reshaped"])
def test_a_model_that_cannot_be_trained_any_more_is_named(kind: str) -> None:
    state = torch.get_rng_state()
    model, warnings, batches = pruned(kind)
    assert len(warnings) == 1
    assert "in train mode the pruned model fails in 'middle': RuntimeError" in warnings[0]
    with pytest.raises(RuntimeError):
        model.train()(batches[0])
    torch.set_rng_state(state)
    model, warnings, batches = pruned(kind, ignored_layers=["a"])  # the remedy
    assert not warnings
    assert not model.get_buffer("middle.mean").any()
    assert model.get_buffer("middle.calls") == 0
    model.train()(batches[0])


def test_a_layer_whose_channels_training_alone_writes_down_keeps_its_width() -> None:
    model, warnings, batches = pruned("running mean")
    assert not warnings
    assert len(model.get_buffer("middle.mean")) == model.get_submodule("a").out_features == 12
    assert not model.get_buffer("middle.mean").any()
    assert model.get_submodule("b").out_features < 16
    model.train()(batches[0])


@pytest.mark.parametrize("kind", ["nothing", "targets"])
def test_what_trains_or_never_did_is_not_named(kind: str) -> None:
    model, warnings, batches = pruned(kind)
    assert not warnings
    if kind == "nothing":
        model.train()(batches[0])
