"""Widths and counts of heads that modules read in a config, which several of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

DOUBLE = torch.float64


@dataclass
class Config:
    heads: int
    inner: int


@dataclass(frozen=True)
class Frozen:
    heads: int
    inner: int


class Lookup(dict[str, Any]):
    """A dict with attributes, such as libraries of configs have."""

    def __init__(self, **values: int) -> None:
        super().__init__(values)
        self.__dict__ = self


# What holds the two numbers -> how it is made, and how a module reads one.
CONFIGS: dict[str, tuple[Callable[[int, int], Any], Callable[[Any, str], int]]] = {
    "dataclass": (Config, getattr),
    "frozen dataclass": (Frozen, getattr),
    "namespace": (lambda heads, inner: SimpleNamespace(heads=heads, inner=inner), getattr),
    "dict": (lambda heads, inner: {"heads": heads, "inner": inner}, lambda config, key: config[key]),
    "get": (lambda heads, inner: {"heads": heads, "inner": inner}, lambda config, key: config.get(key)),
    "dict with attributes": (lambda heads, inner: Lookup(heads=heads, inner=inner), lambda config, key: config[key]),
    "nested": (
        lambda heads, inner: SimpleNamespace(attention={"sizes": Config(heads, inner)}),
        lambda config, key: getattr(config.attention["sizes"], key),
    ),
}


class Attention(nn.Module):
    def __init__(self, config: Any, read: Callable[[Any, str], int]) -> None:
        super().__init__()
        self.config, self.read = config, read
        self.ask, self.give = nn.Linear(8, 3 * read(config, "inner")), nn.Linear(read(config, "inner"), 8)

    def forward(self, x: Tensor) -> Tensor:
        heads, inner = self.read(self.config, "heads"), self.read(self.config, "inner")
        q, k, v = (
            one.view(*x.shape[:2], heads, inner // heads).transpose(1, 2) for one in self.ask(x).split(inner, -1)
        )
        return self.give(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], inner))


def built(name: str, *heads: int, config: Any = None) -> nn.Sequential:
    make, read = CONFIGS[name]
    configs = [make(n, 2 * n) if config is None else config for n in heads]
    return nn.Sequential(nn.Linear(5, 8), *(Attention(one, read) for one in configs), nn.Linear(8, 3)).double()


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", CONFIGS)
def test_modules_get_a_config_of_their_own(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, read = CONFIGS[name]
    config = make(4, 8)
    model, x = built(name, 4, 4, config=config), torch.randn(2, 3, 5, dtype=DOUBLE)
    original, before = copy.deepcopy(model), copy.deepcopy(config)
    structure = TorchPruningStructure(model, x)
    assert {group.name: group.size for group in structure.groups if group.kind == "heads"} == {"1.ask": 4, "2.ask": 4}
    structure.remove({"1.ask": torch.tensor([1]), "2.ask": torch.tensor([0, 3])})
    assert config == before
    own = [model[place].config for place in (1, 2)]
    assert [(read(one, "heads"), read(one, "inner")) for one in own] == [(3, 6), (2, 4)]  # type: ignore[arg-type]

    narrow = built(name, 3, 2)  # the same classes, made narrow
    narrow.load_state_dict(model.state_dict())
    assert torch.equal(narrow(x), model(x))
    structure.plan.save(tmp_path / "plan.json")
    again = obc.PruningPlan.load(tmp_path / "plan.json").apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert config == before


class Slots:
    __slots__ = ("heads",)


WHOLE = [
    {"heads": 4},
    Lookup(heads=4),
    (4, 8),
    Config(4, 8),
    SimpleNamespace(heads={"inner": 8}),
    Slots(),
    "resnet18",
    3,
]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("config", WHOLE, ids=lambda config: type(config).__name__)
def test_the_whole_model_may_hold_anything_as_its_config(config: Any) -> None:
    """Such as what a hub's mixin keeps: the dict of the arguments with which the model was made."""
    torch.manual_seed(0)
    model, x = built("dataclass", 4), torch.randn(2, 3, 5, dtype=DOUBLE)
    plain = copy.deepcopy(model)
    model.config = config
    results = []
    for one in (plain, model):
        obc.prune(one, x, [x, -x], lambda m, batch: m(batch).square().mean(), macs=0.6, steps=1, progress=False)
        results.append(one(x))
    assert plain[1].ask.out_features < 24
    assert torch.equal(*results)
    assert model.config is config


def test_a_plan_for_a_config_that_a_model_lacks_is_refused() -> None:
    plan = obc.PruningPlan(counts={"1": {"config.heads": 3}})
    with pytest.raises(obc.PlanError, match=r"the plan sets the number '1\.config\.heads', which the model lacks"):
        plan.apply(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
