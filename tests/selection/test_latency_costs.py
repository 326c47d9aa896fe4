"""obc.select where costs are not proportional to widths: latency tables with flat parts, shared layers and blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import obc
from obc.model.costs import Costs
from obc.model.curves import Curve
from obc.selection import BudgetError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def freed(costs: Costs, removed: dict[str, Tensor]) -> float:
    return costs.freed({name: len(units) for name, units in removed.items()})


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    widths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    share=st.floats(0.05, 0.95),
    selection=st.sampled_from(["joint", "independent"]),
    per_cost=st.booleans(),
    round_to=st.sampled_from([1, 4]),
)
def test_the_budget_is_met_by_the_table(
    seed: int, widths: list[int], share: float, selection: str, per_cost: bool, round_to: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"group {place}" for place in range(len(widths))]
    rows = {name: torch.randn(20, width, generator=generator) for name, width in zip(names, widths, strict=True)}
    curves = {}
    for name, width in zip(names, widths, strict=True):
        values = torch.randint(0, 4, (4,), generator=generator).tolist()
        curves[name] = Curve({max(1, width * place // 4): float(value) for place, value in enumerate(values, 1)})
    upper = torch.triu(torch.randint(0, 3, (len(names), len(names)), generator=generator), 1).double()
    linear = torch.randint(1, 5, (len(names),), generator=generator).double()
    costs = Costs(names, widths, linear=linear, quadratic=upper, unit="seconds", curves=curves)
    options = {"selection": selection, "per_cost": per_cost, "round_to": round_to}
    lowest = [min(width, round_to) for width in widths]
    most = costs.total() - costs.total(torch.tensor(lowest))
    budget = share * most
    if most == 0:
        return
    removed = obc.select(rows, costs, budget, **options)
    assert freed(costs, removed) >= budget * (1 - 1e-9)
    with pytest.raises(BudgetError, match=r"at most .* can be freed") as error:
        obc.select(rows, costs, most * 1.01, **options)
    assert error.value.reachable == pytest.approx(most)


def test_a_line_chooses_as_linear_costs_do() -> None:
    torch.manual_seed(0)
    rows = {"a": torch.randn(30, 12), "b": torch.randn(30, 9)}
    linear, quadratic = torch.tensor([2.0, 3.0]), torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    plain = Costs(["a", "b"], [12, 9], linear=linear, quadratic=quadratic)
    lines = {"a": Curve({0: 0.0, 6: 6.0, 12: 12.0}), "b": Curve({0: 0.0, 9: 9.0})}
    curved = Costs(["a", "b"], [12, 9], linear=linear, quadratic=quadratic, curves=lines)
    for selection in ("joint", "independent"):
        chosen = [obc.select(rows, costs, 50.0, selection=selection) for costs in (plain, curved)]
        assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in rows)


def test_a_flat_part_is_crossed_where_its_end_pays() -> None:
    """Each unit of "stairs" is as harmless as those of "slope"; the first three free nothing, the fourth frees 10."""
    rows = {"stairs": torch.full((8,), 1.0), "slope": torch.full((8,), 1.0)}
    curves = {"stairs": Curve({4: 0.0, 5: 10.0, 8: 10.0}), "slope": Curve({0: 0.0, 8: 8.0})}
    costs = Costs(["stairs", "slope"], [8, 8], linear=torch.tensor([1.0, 1.0]), curves=curves)
    removed = obc.select(rows, costs, 10.0, selection="independent")
    assert {name: len(units) for name, units in removed.items()} == {"stairs": 4, "slope": 0}
    # At the end of the stairs nothing is left to win: all the rest comes from the slope.
    removed = obc.select(rows, costs, 13.0, selection="independent")
    assert {name: len(units) for name, units in removed.items()} == {"stairs": 4, "slope": 3}


def test_a_group_whose_time_does_not_fall_keeps_its_units() -> None:
    rows = {"flat": torch.full((8,), 1e-6), "slope": torch.full((8,), 1.0)}
    curves = {"flat": Curve({1: 5.0, 8: 5.0}), "slope": Curve({0: 0.0, 8: 8.0})}
    costs = Costs(["flat", "slope"], [8, 8], linear=torch.tensor([1.0, 1.0]), curves=curves)
    with pytest.warns(UserWarning, match="'flat' frees nothing"):
        removed = obc.select(rows, costs, 3.0, selection="independent")
    assert {name: len(units) for name, units in removed.items()} == {"flat": 0, "slope": 3}


@pytest.mark.parametrize("selection", ["joint", "independent"])
def test_whole_blocks_compete_with_widths(selection: str) -> None:
    """A block frees its own second and what is left of its group's: the one whose loss a second is smaller goes."""
    torch.manual_seed(0)
    names = ["ffn", "block", "other"]
    costs = Costs(
        names,
        [8, 1, 8],
        linear=torch.tensor([4.0, 1.0, 4.0]),
        unit="seconds",
        inside={"block": ["ffn"]},
        curves={name: Curve({2: 0.5, 8: 1.0}) for name in ("ffn", "other")},
    )
    rows = {"ffn": torch.randn(40, 8), "block": torch.randn(40, 1) * 1e-3, "other": torch.randn(40, 8)}
    least = {"block": 0}
    removed = obc.select(rows, costs, 4.5, selection=selection, min_units=least)
    assert len(removed["block"]) == 1
    assert freed(costs, removed) >= 4.5
    rows["block"] = torch.randn(40, 1) * 1e3
    removed = obc.select(rows, costs, 3.0, selection=selection, min_units=least)
    assert not len(removed["block"])
    assert freed(costs, removed) >= 3.0
