"""Joint selection where groups are whole blocks, held against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import obc
from obc.selection import Costs

# Two blocks around groups of channels, a branch inside the first, and a group outside.
SIZES = {"a": 4, "b": 3, "c": 5, "outside": 4, "branch": 1, "block": 1, "other": 1}
INSIDE = {"branch": ["b"], "block": ["a", "b", "branch"], "other": ["c"]}


def _costs(seed: int) -> Costs:
    generator = torch.Generator().manual_seed(seed)
    size = len(SIZES)
    linear = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    quadratic = torch.zeros(size, size, dtype=torch.float64)
    quadratic[0, 1] = quadratic[1, 0] = 0.3
    quadratic[2, 3] = quadratic[3, 2] = 0.2
    return Costs(list(SIZES), list(SIZES.values()), constant=7.0, linear=linear, quadratic=quadratic, inside=INSIDE)


def _defined(rows: dict[str, Tensor], costs: Costs, budget: float, strength: float) -> dict[str, set[int]]:
    """Each step tries every removal from scratch: the change of the loss, and of the cost."""
    gone: dict[str, set[int]] = {name: set() for name in SIZES}

    def vanished(removed: dict[str, set[int]]) -> set[str]:
        return {inner for name, inner_names in INSIDE.items() if removed[name] for inner in inner_names}

    def delta(removed: dict[str, set[int]]) -> tuple[Tensor, Tensor]:
        """(sum of rows, sum of squares of what each step took) is path dependent: here only the sum."""
        total = torch.zeros(rows["a"].shape[0], dtype=torch.float64)
        dead = vanished(removed)
        for name, units in removed.items():
            if name in INSIDE and units and name not in dead:
                total += rows[name][:, 0].double()
            elif name not in dead and name not in INSIDE:
                total += rows[name][:, sorted(units)].double().sum(1)
        return total, total

    def cost(removed: dict[str, set[int]]) -> float:
        dead = vanished(removed)
        widths = [0 if name in dead else size - len(removed[name]) for name, size in SIZES.items()]
        return costs.total(torch.tensor(widths, dtype=torch.float64))

    start = cost(gone)
    while start - cost(gone) < budget:
        dead, best = vanished(gone), None
        for name, size in SIZES.items():
            for unit in range(size):
                if name in dead or unit in gone[name] or (name not in INSIDE and size - len(gone[name]) <= 1):
                    continue
                after = {other: units | ({unit} if other == name else set()) for other, units in gone.items()}
                now, then = delta(gone)[0], delta(after)[0]
                step = then - now
                increment = float(step @ step + 2 * strength * (now @ step))
                freed = cost(gone) - cost(after)
                score = increment * freed if increment < 0 else increment / freed
                if best is None or score < best[0]:
                    best = (score, name, unit)
        assert best is not None
        gone[best[1]].add(best[2])
    return gone


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_choice_is_the_defined_one(seed: int, shrinkage: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(40, size, generator=generator, dtype=torch.float64) for name, size in SIZES.items()}
    costs = _costs(seed)
    budget = (0.25 + 0.05 * seed) * (costs.total() - costs.constant)
    removed = obc.select(rows, costs, budget, shrinkage=shrinkage, min_units=dict.fromkeys(INSIDE, 0))
    expected = _defined(rows, costs, budget, 1 - shrinkage)
    assert {name: set(units.tolist()) for name, units in removed.items()} == expected


def test_costs_over_some_groups_take_along_what_lies_in_a_block() -> None:
    costs = _costs(3)
    some = costs.only(["block", "outside", "a"])
    for block in (0.0, 1.0):
        widths = torch.tensor([block, 2.0, 3.0], dtype=torch.float64)
        full = torch.tensor([3.0, 3.0, 5.0, 2.0, 1.0, block, 1.0], dtype=torch.float64)
        assert some.total(widths) == pytest.approx(costs.total(full), rel=1e-12)


def test_independent_scores_choose_blocks_by_what_they_free() -> None:
    costs = _costs(0)
    scores = {name: torch.full((size,), 1.0) for name, size in SIZES.items()}
    removed = obc.select(scores, costs, 1.0, selection="independent", min_units=dict.fromkeys(INSIDE, 0))
    marginal = dict(zip(costs.names, costs.marginal().tolist(), strict=True))
    assert [name for name, units in removed.items() if len(units)] == [max(marginal, key=lambda name: marginal[name])]


def test_a_group_that_costs_do_not_have_can_not_be_inside() -> None:
    with pytest.raises(ValueError, match="'z'"):
        Costs(["a"], [2], inside={"a": ["z"]})
