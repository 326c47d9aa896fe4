"""Batches of one sample whose gradients torch's norms would read in a wrong order, against norms written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import Subject
from obc.model.groups import ChannelGroup, Slice


class Tokens(nn.Module):
    """A convolution and a norm whose output goes on as tokens, so that its gradient comes from a transposed tensor."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.head(x.flatten(2).transpose(1, 2)).tanh()


class WrittenOut(nn.Module):
    """The same norm from elementary operations."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.weight, self.bias = norm, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        if mean is None:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        scale = self.weight / (var + self.norm.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def norm_of(kind: str) -> nn.Module:
    norm = nn.BatchNorm2d(6) if kind == "BatchNorm" else nn.InstanceNorm2d(6, affine=True)
    with torch.no_grad():
        for values in (*norm.parameters(), *(buffer for buffer in norm.buffers() if buffer.dim())):
            values.uniform_(0.5, 2)
    return norm.eval()


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum((1, 2)).mean()


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_rows_of_single_samples_are_right(kind: str, rows: str) -> None:
    torch.manual_seed(0)
    model = Tokens(norm_of(kind))
    batches = [torch.randn(1, 3, 5, 7) for _ in range(3)]
    written = copy.deepcopy(model).double()
    written.norm = WrittenOut(written.norm)
    expected = {name: torch.zeros(size, dtype=torch.float64) for name, size in (("conv", 6), ("norm", 6), ("head", 4))}
    for batch in batches:
        written.zero_grad()
        loss_fn(written, batch.double()).backward()
        for name in expected:
            module = getattr(written, name)
            products = (module.weight * module.weight.grad).detach().reshape(len(module.weight), -1).sum(1)
            expected[name] += (products + (module.bias * module.bias.grad).detach()).square()

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum((1, 2))

    scores = obc.score(model, batches, loss_fn if rows == "batch" else losses, rows=rows)
    # A convolution before an InstanceNorm scores zero, up to rounding relative to the other layers' scores.
    noise = 1e-6 * max(float(values.max()) for values in expected.values())
    for name, values in expected.items():
        torch.testing.assert_close(scores[name].out_channels.double(), values, rtol=1e-4, atol=noise)


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("criterion", [criteria.TokenJacobian(1000), criteria.CompensatedJacobian()])
def test_criteria_that_read_rows_without_a_scorer(kind: str, criterion: criteria.MeasuredCriterion) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), Tokens(norm_of(kind)))
    written = copy.deepcopy(model)
    written[2].norm = WrittenOut(written[2].norm)  # type: ignore[arg-type]
    channels = torch.arange(3).unsqueeze(1)
    group = ChannelGroup("hidden", (Slice("0", "out", channels), Slice("2.conv", "in", channels)), "channels")
    batches = [torch.randn(1, 3, 5, 7) for _ in range(3)]
    got, expected = (
        criterion.measure(Subject(one, (group,), batches, loss_fn, forward, "gate", "batch", torch.Generator()))
        for one in (model, written)
    )
    torch.testing.assert_close(got["hidden"], expected["hidden"], rtol=1e-4, atol=0)
    assert not model[2].norm._forward_hooks  # type: ignore[union-attr]


def test_the_guard_goes_with_the_scorer() -> None:
    model = Tokens(norm_of("BatchNorm"))
    with obc.JacobianScorer(model):
        assert model.norm._forward_hooks
    assert not model.norm._forward_hooks
