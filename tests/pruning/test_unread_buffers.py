"""Buffers that no run reads, such as averages of weights, are named if they keep the shape of what was pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def average_of_a_weight(model: Network) -> list[str]:
    model.register_buffer("average", model.first.weight.detach().clone())
    return ["average"]


def averages_at_the_root(model: Network) -> list[str]:
    for name, parameter in list(model.named_parameters()):
        model.register_buffer("ema_" + name.replace(".", "_"), parameter.detach().clone())
    return ["ema_first_weight", "ema_first_bias", "ema_second_weight", "ema_second_bias", "ema_head_weight"]


def mean_of_channels(model: Network) -> list[str]:
    model.register_buffer("mean", torch.zeros(16))
    return ["mean"]


def seen_only_in_train_mode(model: Network) -> list[str]:
    model.register_buffer("running", torch.zeros(8))

    def track(module: nn.Module, args: object, output: Tensor) -> None:
        if module.training:
            model.running.lerp_(output.detach().mean((0, 2, 3)), 0.1)

    model.second.register_forward_hook(track)
    return ["running"]


def read_as_a_constant(model: Network) -> list[str]:
    """What is read is not named: the proof compares it."""
    model.register_buffer("shift", torch.full((16,), 0.5))
    model.first.register_forward_hook(lambda module, args, output: output + model.shift.mean())
    return []


def one_read_one_not(model: Network) -> list[str]:
    read_as_a_constant(model)
    return average_of_a_weight(model)


def of_no_weight_s_shape(model: Network) -> list[str]:
    model.register_buffer("table", torch.zeros(7))
    model.register_buffer("classes", torch.zeros(5))
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return []


CASES: list[Callable[[Network], list[str]]] = [
    average_of_a_weight,
    averages_at_the_root,
    mean_of_channels,
    seen_only_in_train_mode,
    read_as_a_constant,
    one_read_one_not,
    of_no_weight_s_shape,
]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_unread_buffers_with_the_unpruned_shape_are_named(change: Callable[[Network], list[str]]) -> None:
    model = Network().eval()
    expected = change(model)
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = obc.prune(
        model, X, [X, X + 1], lambda model, batch: F.cross_entropy(model(batch), torch.arange(4)), macs=0.4, steps=2
    )
    assert result.report.widths["first"][1] < 16
    assert result.report.widths["second"][1] < 8
    warned = " ".join(warning for warning in result.report.warnings if "keep their unpruned shape" in warning)
    for name in expected[:3]:
        assert f"{name} {tuple(shapes[name])}" in warned
    assert (f"and {len(expected) - 3} more" in warned) == (len(expected) > 3)
    assert bool(warned) == bool(expected)
    for name, buffer in result.model.named_buffers():
        assert torch.equal(buffer, values[name])
