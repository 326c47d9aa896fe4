"""Allocations: how much each group loses, whatever the criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from obc.model.costs import Costs
from obc.model.groups import ChannelGroup, Slice
from obc.selection.allocation import BlockProfile, LogProfile, Profile, TwoClasses
from obc.selection.allocations import ALLOCATIONS, allocation_of
from obc.selection.choice import BudgetError
from obc.selection.search import Search
from obc.selection.task import Task

SIZES = {f"layers.{i}.{part}": size for i in range(3) for part, size in (("attention", 8), ("mlp", 40))}
# What a unit of each kind frees.
UNIT = {"heads": 20.0, "ffn": 3.0}


def group(name: str, size: int) -> ChannelGroup:
    kind = "heads" if name.endswith("attention") else "ffn"
    return ChannelGroup(name, (Slice(name, "in", torch.arange(size)[:, None]),), kind)


def make_task(share: float = 0.3, **options: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in SIZES.items()}
    groups = [group(name, size) for name, size in SIZES.items()]
    costs = Costs.fixed({g.name: UNIT[g.kind] for g in groups}, SIZES)
    return Task(scores, groups, costs, share * costs.total(), **options)


def freed(removed: Mapping[str, Tensor]) -> float:
    return sum(len(units) * UNIT[group(name, 1).kind] for name, units in removed.items())


def shares(removed: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: len(removed.get(name, ())) / size for name, size in SIZES.items()}


STRENGTHS = {"layers.0": 0.0, "layers.1": 1.0, "layers.2.mlp": 2.0}
KINDS: dict[str, Any] = {
    **{name: name for name in ("global", "uniform", "equal", "two_classes")},
    "given": STRENGTHS,
    "log": LogProfile(),
    "sigmoid": BlockProfile(),
    "linear": BlockProfile("cosine", "linear"),
}
IMPORTANCE = {"layers.0": 0.5, "layers.1": 0.1, "layers.2": 0.3}


@pytest.mark.parametrize("name", KINDS)
def test_the_budget_is_freed_by_the_least_important_units_of_each_group(name: str) -> None:
    task = make_task(importance=IMPORTANCE)
    removed = allocation_of(KINDS[name]).select(task)
    assert task.budget <= freed(removed) < task.budget + (40 if name in ("global", "two_classes") else 8 * 3 * 20)
    for group_name, units in removed.items():
        cheapest = task.scores[group_name].argsort()[: len(units)].sort().values
        assert torch.equal(units, cheapest)


def test_uniform_and_equal_take_the_same_share_of_every_group() -> None:
    for name in ("uniform", "equal"):
        taken = shares(allocation_of(name).select(make_task()))
        # To the nearest unit of eight or of forty, and one more.
        assert all(abs(share - 0.3) <= 1.5 / 8 for share in taken.values())
    assert len({shares(allocation_of("equal").select(make_task()))[f"layers.{i}.mlp"] for i in range(3)}) == 1


def test_a_profile_takes_multiples() -> None:
    taken = shares(Profile(STRENGTHS).select(make_task(0.2)))
    assert taken["layers.0.mlp"] == taken["layers.0.attention"] == 0
    assert taken["layers.2.mlp"] == pytest.approx(2 * taken["layers.1.mlp"], abs=1 / 40)
    assert taken["layers.2.attention"] == pytest.approx(taken["layers.1.attention"], abs=1 / 8)
    deep = shares(Profile(STRENGTHS).select(make_task(0.5)))
    assert deep["layers.2.mlp"] == pytest.approx(39 / 40), "what should lose more than all keeps its minimum"


def test_shares_of_depth_grow_logarithmically() -> None:
    taken = shares(LogProfile(0.1, 0.3).select(make_task(0.25)))
    wanted = [0.1, 0.1 + 0.2 * math.log(2) / math.log(3), 0.3]
    scale = sum(taken[f"layers.{i}.mlp"] for i in range(3)) / sum(wanted)
    for i, value in enumerate(wanted):
        assert taken[f"layers.{i}.mlp"] == pytest.approx(scale * value, abs=1.5 / 40)


def test_blocks_that_change_their_input_more_keep_more() -> None:
    for allocation in (BlockProfile(), BlockProfile("cosine", "linear")):
        taken = shares(allocation.select(make_task(0.3, importance=IMPORTANCE)))
        assert taken["layers.1.mlp"] > taken["layers.2.mlp"] > taken["layers.0.mlp"]
    values = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64).repeat_interleave(2)
    stays = torch.sigmoid((values - values.mean()) / values.std(correction=0))
    task = BlockProfile().of(make_task(importance=IMPORTANCE))
    assert list(task.values()) == pytest.approx((1 / stays).tolist())


def test_two_classes_split_the_budget_by_gamma() -> None:
    removed = TwoClasses(2.0).select(make_task(0.3))
    attention = sum(len(units) * 20 for name, units in removed.items() if name.endswith("attention"))
    assert attention == pytest.approx(make_task().budget / 3, abs=20)
    # More than attention can give: the rest gives it.
    task = make_task(0.6)
    removed = TwoClasses(0.1).select(task)
    assert sum(len(units) for name, units in removed.items() if name.endswith("attention")) == 3 * 7
    assert freed(removed) >= task.budget


def test_a_search_finds_the_widths_that_it_is_led_to() -> None:
    """The units that cost most by the fitness are those that equal shares take from the first layer."""

    def evaluate(removed: Mapping[str, Tensor]) -> float:
        return sum((10.0 if name.startswith("layers.0") else 1.0) * len(units) for name, units in removed.items())

    task = make_task(0.3, evaluate=evaluate)
    search = Search(generations=30, offspring=6)
    removed = search.select(task)
    assert freed(removed) >= task.budget * (1 - 1e-9)
    assert search.history == sorted(search.history, reverse=True), "the best one survives"
    assert search.history[-1] < 0.7 * search.history[0]
    assert len(removed["layers.0.mlp"]) < len(removed["layers.1.mlp"])
    again = Search(generations=30, offspring=6).select(task)
    assert all(torch.equal(again[name], units) for name, units in removed.items())


def test_a_search_is_no_worse_than_the_better_start() -> None:
    """Whichever of equal shares and competing units the fitness prefers."""
    tasks = {
        "uniform": make_task(0.3, evaluate=widest),
        "global": make_task(0.3, evaluate=lambda removed: -widest(removed)),
    }
    for better, task in tasks.items():
        assert task.evaluate is not None
        lone = {start: Search(generations=1, offspring=1, starts=(start,)) for start in ("uniform", "global")}
        for search in lone.values():
            search.select(task)
        both = Search(generations=1, offspring=1)
        removed = both.select(task)
        assert lone[better].history[0] == min(search.history[0] for search in lone.values())
        assert lone["uniform"].history[0] != lone["global"].history[0]
        assert both.history[0] == lone[better].history[0]
        assert task.evaluate(removed) <= both.history[0]
    with pytest.raises(ValueError, match="'uniform' and 'global', got \\('even',\\)"):
        Search(starts=("even",))  # type: ignore[arg-type]


def widest(removed: Mapping[str, Tensor]) -> float:
    """The largest share of a group that goes: least with equal shares."""
    return max(len(units) / SIZES[name] for name, units in removed.items())


def test_limits_hold() -> None:
    least = {name: 4 if name.endswith("attention") else 24 for name in SIZES}
    round_to = {name: 1 if name.endswith("attention") else 8 for name in SIZES}
    task = make_task(0.3, min_units=least, round_to=round_to, importance=IMPORTANCE, evaluate=lambda removed: 0.0)
    for name in (*KINDS, "search"):
        removed = allocation_of(KINDS.get(name, name)).select(task)
        for group_name, units in removed.items():
            stays = SIZES[group_name] - len(units)
            assert stays >= least[group_name]
            assert not len(units) or stays % round_to[group_name] == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="allocation must be one of 'global', 'uniform'"):
        allocation_of("evenly")
    with pytest.raises(TypeError, match="an allocation is a name"):
        allocation_of(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not negative"):
        Profile({"layers.0": -1.0})
    with pytest.raises(ValueError, match="similarity of the blocks"):
        BlockProfile().select(make_task())
    with pytest.raises(ValueError, match="is in none of the residual blocks that the allocation BlockProfile follows"):
        BlockProfile().select(make_task(importance={"layers.0": 1.0}))
    with pytest.raises(ValueError, match="measures the model"):
        Search().select(make_task())
    for name in ("window", "tail"):
        with pytest.raises(ValueError, match="need whole blocks"):
            allocation_of(name).select(make_task())
    for name in set(ALLOCATIONS) - {"window", "tail"}:
        with pytest.raises(BudgetError):
            allocation_of(name).select(make_task(1.0, importance=IMPORTANCE, evaluate=lambda removed: 0.0))
