"""Equal widths whose balance the rows decide, against all widths tried one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from obc.model.costs import Costs
from obc.selection.balance import select_balanced
from obc.selection.choice import BudgetError, select
from obc.selection.task import Task

SIZES = {"a.heads": 4, "b.heads": 4, "a.ffn": 7, "b.ffn": 7, "stem": 6}
FAMILIES = [["a.heads", "b.heads"], ["a.ffn", "b.ffn"], ["stem"]]


def costs() -> Costs:
    """Every group has layers of its own, and all of them read from the stem."""
    linear = torch.tensor([20.0, 20.0, 5.0, 5.0, 3.0])
    quadratic = torch.zeros(5, 5)
    quadratic[4, :4] = torch.tensor([4.0, 4.0, 1.0, 1.0])
    return Costs(list(SIZES), list(SIZES.values()), linear=linear, quadratic=quadratic)


def task(values: Mapping[str, Tensor], budget: float, selection: Any = "joint", **limits: Any) -> Task:
    return Task(values, (), costs(), budget, selection, families=FAMILIES, **limits)


def rows(seed: int, count: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    found = {}
    for name, size in SIZES.items():
        scale = torch.rand(size, generator=generator, dtype=torch.float64).exp() * (3 if "heads" in name else 1)
        found[name] = (torch.randn(count, size, generator=generator, dtype=torch.float64) + 0.5 * shared) * scale
    return found


def change(values: Mapping[str, Tensor], removed: Mapping[str, Tensor], selection: str, shrinkage: float) -> float:
    """By the formula, from the rows of every removed unit."""
    gone = torch.cat([values[name][:, units] for name, units in removed.items()], dim=1)
    alone = float(gone.square().sum())
    if selection == "independent":
        return alone
    return (1 - shrinkage) * float(gone.sum(1).square().sum()) + shrinkage * alone


def of_widths(
    values: Mapping[str, Tensor], lost: tuple[int, ...], selection: str, shrinkage: float
) -> dict[str, Tensor]:
    """The units that every group removes by itself."""
    options = {"selection": selection, "shrinkage": shrinkage, "min_units": 0}
    return {
        name: select({name: values[name]}, {name: 1.0}, count, **options)[name]  # type: ignore[arg-type]
        for family, count in zip(FAMILIES, lost, strict=True)
        for name in family
    }


@pytest.mark.parametrize("selection", ["joint", "independent"])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_two_families_get_the_widths_that_change_the_loss_least(seed: int, share: float, selection: str) -> None:
    values, shrinkage = rows(seed), 0.25
    del values["stem"]  # it keeps its width
    budget = share * costs().only(list(values)).freed(
        {name: size - 1 for name, size in SIZES.items() if name in values}
    )
    removed = select_balanced(task(values, budget, selection=selection, shrinkage=shrinkage))
    tried = {}
    for heads, inner in itertools.product(range(4), range(7)):
        lost = {"a.heads": heads, "b.heads": heads, "a.ffn": inner, "b.ffn": inner}
        less = {name: count - (name.endswith("ffn")) for name, count in lost.items()}
        if costs().freed(lost) >= budget and (inner == 0 or costs().freed(less) < budget):
            chosen = of_widths({**values, "stem": rows(seed)["stem"]}, (heads, inner, 0), selection, shrinkage)
            tried[heads, inner] = change({**values, "stem": rows(seed)["stem"]}, chosen, selection, shrinkage)
    widths = {name: len(units) for name, units in removed.items()}
    assert widths["a.heads"] == widths["b.heads"]
    assert widths["a.ffn"] == widths["b.ffn"]
    assert costs().freed(widths) >= budget
    assert change(values, removed, selection, shrinkage) == pytest.approx(min(tried.values()))


def test_what_the_rows_spare_keeps_all_its_units() -> None:
    """Heads that carry a hundred times as much stay, though equal shares would take half of them."""
    values = rows(0)
    values |= {name: values[name] * 100 for name in ("a.heads", "b.heads")}
    removed = select_balanced(task(values, 0.3 * costs().total()))
    assert {name: len(units) for name, units in removed.items() if "heads" in name} == {"a.heads": 0, "b.heads": 0}
    assert costs().freed({name: len(units) for name, units in removed.items()}) >= 0.3 * costs().total()


def test_three_families_end_no_worse_than_any_exchange_between_two() -> None:
    values, shrinkage = rows(1), 0.0
    budget = 0.5 * costs().total()
    removed = select_balanced(task(values, budget, shrinkage=shrinkage))
    lost = tuple(len(removed[family[0]]) for family in FAMILIES)
    least = change(values, removed, "joint", shrinkage)
    for other in itertools.product(range(4), range(7), range(6)):
        if sum(a != b for a, b in zip(other, lost, strict=True)) > 2:
            continue
        counts = {name: count for family, count in zip(FAMILIES, other, strict=True) for name in family}
        if costs().freed(counts) >= budget:
            assert change(values, of_widths(values, other, "joint", shrinkage), "joint", shrinkage) >= least * (
                1 - 1e-9
            )


def test_limits_hold_and_a_budget_out_of_reach_is_refused() -> None:
    values = rows(2)
    limits = {"min_units": {"stem": 3}, "round_to": {"a.ffn": 3}, "widths": {"b.heads": (2,)}}
    removed = select_balanced(task(values, 0.4 * costs().total(), **limits))
    kept = {name: SIZES[name] - len(units) for name, units in removed.items()}
    assert kept["stem"] >= 3
    assert kept["a.ffn"] in (3, 6, 7)
    assert kept["a.heads"] in (2, 4)
    with pytest.raises(BudgetError, match="equal widths free at most"):
        select_balanced(task(values, 0.99 * costs().total(), **limits))


def test_families_with_a_group_without_rows_keep_their_widths() -> None:
    values = {"a.heads": rows(0)["a.heads"]}
    assert {name: len(units) for name, units in select_balanced(task(values, 0.0)).items()} == {"a.heads": 0}
    with pytest.raises(BudgetError, match="free at most 0 of the 1 "):
        select_balanced(task(values, 1.0))
