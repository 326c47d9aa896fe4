"""Channels that copy others cost nothing: compensation makes up for them exactly, however the layers are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from obc.model.kept import Kept
from obc.recovery import compensate

IN, WIDTH, OUT = 6, 8, 5


class Net(nn.Module):
    """``forward`` of the layers; the second half of the producer's channels copies the first."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], consumers: int = 1) -> None:
        super().__init__()
        self.first, self.use = nn.Linear(IN, WIDTH), use
        self.c, self.d = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
        self.consumers = ("c", "d")[:consumers]
        with torch.no_grad():
            for one in (self.first.weight, self.first.bias):
                one[WIDTH // 2 :] = one[: WIDTH // 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x).relu())


def in_one_sum(net: Any, h: Tensor) -> Tensor:
    result: Tensor = net.c(h) + net.d(h.sin())
    return result


def one_is_reshaped(net: Any, h: Tensor) -> Tensor:
    """The sum shows what ``c`` has lost and what ``d`` has, whose own output is corrected as well."""
    result: Tensor = net.c(h) + net.d(h.sin())[..., None][..., 0]
    return result


def twice_in_one_sum(net: Any, h: Tensor) -> Tensor:
    result: Tensor = net.c(h) + net.c(h.sin())
    return result


def without_gradient(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = net.c(h)
    result: Tensor = net.c(h) + teacher
    return result


def product(net: Any, h: Tensor) -> Tensor:
    result: Tensor = net.c(h) * net.c(h.flip(0))
    return result


def late(net: Any, h: Tensor) -> Tensor:
    result: Tensor = net.c(h)
    return result + F.linear(h.sin(), net.c.weight) if float(h.sum()) > 30 else result


def plain(net: Any, h: Tensor) -> Tensor:
    result: Tensor = net.c(h)
    return result


def tied() -> Net:
    net = Net(in_one_sum, 2)
    net.d.weight = net.c.weight
    return net


def hooked(kind: str) -> Net:
    net = Net(plain)
    if kind == "output":
        net.c.register_forward_hook(lambda layer, args, output: output * 3 - 1)
    elif kind == "input":
        net.c.register_forward_pre_hook(lambda layer, args: (args[0] * 2 + 1,))
    else:
        net.c.register_forward_pre_hook(lambda layer, args, kwargs: ((), {"input": args[0]}), with_kwargs=True)
    return net


MODELS: dict[str, Callable[[], Net]] = {
    "one is reshaped": lambda: Net(one_is_reshaped, 2),
    "twice in one sum": lambda: Net(twice_in_one_sum),
    "without gradient": lambda: Net(without_gradient),
    "product": lambda: Net(product),
    "late function": lambda: Net(late),
    "tied": tied,
    "hook after": lambda: hooked("output"),
    "hook before": lambda: hooked("input"),
    "hook makes keywords": lambda: hooked("keywords"),
}


@pytest.mark.parametrize("mode", ["correct", "ls", "seq"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_nothing_is_lost(kind: str, mode: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    kept = torch.arange(WIDTH // 2)
    plan = obc.PruningPlan({"first": Kept(kept), **{name: Kept(in_channels=kept) for name in model.consumers}})
    pruned, x = copy.deepcopy(model), torch.randn(9, IN).double()
    plan.apply(pruned)
    lost = _difference(pruned, model, x)
    batches = [torch.randn(6, IN).double() for _ in range(10)]
    report = compensate(pruned, model, plan, batches, mode=mode, ridge=1e-9, progress=False)
    assert _difference(pruned, model, x) < 1e-6 * lost
    assert not report.unreached


def _difference(pruned: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((pruned(x) - model(x)).abs().max())
