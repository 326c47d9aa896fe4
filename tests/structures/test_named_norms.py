"""Norms written by hand, whose scales and shifts have any names, and modules with vectors that are no norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

NAMES = [("weight", "bias"), ("gamma", "beta"), ("scale", "shift"), ("g", None)]
OVER = {"channels": (1,), "channels and time": (1, 2)}


def normalised(x: Tensor, over: str, scale: Tensor, shift: Tensor | float) -> Tensor:
    x = (x - x.mean(OVER[over], keepdim=True)) / (x.var(OVER[over], keepdim=True, unbiased=False) + 1e-5).sqrt()
    return (x.transpose(1, -1) * scale + shift).transpose(1, -1)


class Norm(nn.Module):
    def __init__(self, width: int, over: str, names: tuple[str, str | None]) -> None:
        super().__init__()
        self.over, self.names = over, names
        for name in filter(None, names):
            self.register_parameter(name, nn.Parameter(torch.randn(width)))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (None if name is None else getattr(self, name) for name in self.names)
        return normalised(x, self.over, scale, 0.0 if shift is None else shift)


class Net(nn.Module):
    def __init__(self, over: str, names: tuple[str, str | None]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(3, 8, 1), Norm(8, over, names), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def made(over: str, names: tuple[str, str | None]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(over, names).double().eval(), torch.randn(2, 3, 5, dtype=torch.float64)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("over", OVER)
def test_channels_behind_a_norm_go_whatever_its_parameters_are_called(over: str, names: tuple[str, str | None]) -> None:
    model, x = made(over, names)
    own, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    structure = TorchPruningStructure(model, x)
    (group,) = structure.groups
    assert group.size == 8
    gone, kept = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5, 7])
    structure.remove({group.name: gone})
    scale, shift = (0.0 if name is None else state[f"norm.{name}"][kept] for name in names)
    hidden = torch.einsum("oi,bit->bot", state["first.weight"][kept, :, 0], x) + state["first.bias"][kept, None]
    hidden = normalised(hidden, over, scale, shift).relu()
    expected = torch.einsum("oi,bit->bot", state["last.weight"][:, kept, 0], hidden) + state["last.bias"][:, None]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    structure.plan.apply(own).load_state_dict(model.state_dict())
    assert torch.equal(own(x), model(x))


@pytest.mark.parametrize("names", NAMES)
def test_a_norm_is_scored_by_all_its_parameters(names: tuple[str, str | None]) -> None:
    model, x = made("channels", names)
    scores = obc.score(model, [x], lambda one, batch: one(batch).square().mean(), progress=False)
    parameters = list(model.norm.parameters())
    gradients = torch.autograd.grad(model(x).square().mean(), parameters)
    expected = torch.zeros(8, dtype=torch.float64)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected += (parameter * gradient).detach()
    found = scores["norm"].out_channels
    assert found is not None
    torch.testing.assert_close(found.double(), expected.square(), rtol=1e-5, atol=0)


def reversed_vector(x: Tensor, a: Tensor) -> Tensor:
    return x * a.flip(0)


def convolved(x: Tensor, a: Tensor) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(a) * torch.fft.fft(x)).real


# Modules with a vector or two that neither scale nor shift: x (..., channels) -> the same shape.
ALONE: dict[str, Callable[..., Tensor]] = {
    "snake": lambda x, a: x + (a * x).sin().square() / a,
    "snake of two": lambda x, a, b: x + (a.exp() * x).sin().square() / b.exp(),
    "smooth PReLU": lambda x, a: torch.where(x > 0, x, a * x * x.sigmoid()),
    "power": lambda x, a: (x.abs() + 0.1) ** a,
    "temperature": lambda x, a: x / (a.abs() + 0.5),
    "threshold": lambda x, a: x * (5 * (x - a)).sigmoid(),
    "shift": lambda x, a: x + a,
    "gate": lambda x, a: x * a.sigmoid(),
    "one more": lambda x, a: x * (1 + a),
    "twice": lambda x, a: (x * a).tanh() * a,
    "limits": lambda x, a, b: torch.minimum(torch.maximum(x, -a.abs()), b.abs()),
    "sum": lambda x, a: x * a.sum(),
    "reversed": reversed_vector,
}
# Those whose vector acts on all channels together: what a channel leaves behind is not what the others computed.
TOGETHER: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda x, a: x * a.softmax(0),
    "unit norm": lambda x, a: x * a / a.norm(),
    "centred": lambda x, a: x * (a - a.mean()),
    "convolved": convolved,
}


class Vectors(nn.Module):
    def __init__(self, compute: Callable[..., Tensor], names: tuple[str, str]) -> None:
        super().__init__()
        self.compute = compute
        for name, _ in zip(names, list(signature(compute).parameters)[1:], strict=False):
            self.register_parameter(name, nn.Parameter(torch.randn(8) / 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, *self.parameters())


def net_with(compute: Callable[..., Tensor], names: tuple[str, str]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Vectors(compute, names), nn.Linear(8, 3))
    return model.double().eval(), torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("names", [("weight", "bias"), ("alpha", "beta")])
@pytest.mark.parametrize("kind", ALONE)
def test_of_modules_with_vectors_that_are_no_norms_the_others_compute_what_they_did(
    kind: str, names: tuple[str, str]
) -> None:
    model, x = net_with(ALONE[kind], names)
    masked = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    (group,) = structure.groups
    assert group.size == 8
    gone = torch.tensor([1, 4, 7])
    structure.remove({group.name: gone})
    masked[2].weight.data[:, gone] = 0
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("names", [("weight", "bias"), ("alpha", "beta")])
@pytest.mark.parametrize("kind", TOGETHER)
def test_channels_that_a_vector_joins_keep_their_width(kind: str, names: tuple[str, str]) -> None:
    model, x = net_with(TOGETHER[kind], names)
    structure = TorchPruningStructure(model, x)
    assert not structure.groups
    assert "depends on those removed" in structure.left_out["0"]


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("kind", [*ALONE, *TOGETHER])
def test_scores_of_vectors_are_those_of_their_gradients(kind: str, rows: str) -> None:
    model, x = net_with((ALONE | TOGETHER)[kind], ("alpha", "beta"))

    def losses(one: nn.Module, batch: Tensor) -> Tensor:
        found = one(batch).square().mean(-1)
        return found if rows == "sample" else found.mean()

    scores = obc.score(model, [x], losses, rows=rows, progress=False)
    expected = torch.zeros(8, dtype=torch.float64)
    for loss in losses(model, x).reshape(-1):
        parameters = list(model[1].parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected += sum((p * g).detach() for p, g in zip(parameters, gradients, strict=True)).square()
    found = scores["1"].out_channels
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize(
    ("length", "compute"),
    [
        (2, lambda x, a: x * a.repeat(4)),
        (4, lambda x, a: torch.cat([x[..., :4] * a, x[..., 4:]], -1)),
        (5, lambda x, a: x * a[:, None]),
    ],
    ids=["every second", "half", "positions"],
)
def test_vectors_of_another_length_than_the_channels_are_parameters_outside_layers(
    length: int, compute: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Vectors(compute, ("alpha", "beta")), nn.Linear(8, 3)).double().eval()
    model[1].alpha = nn.Parameter(torch.randn(length, dtype=torch.float64))
    masked, x = copy.deepcopy(model), torch.randn(6, 5, 4, dtype=torch.float64)
    structure = TorchPruningStructure(model, x)
    (group,) = structure.groups
    (read,) = (part.channels[0] for part in group.slices if (part.module, part.side) == ("2", "in"))
    structure.remove({group.name: torch.tensor([0])})
    masked[2].weight.data[:, read] = 0
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
