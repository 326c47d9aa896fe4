"""Refusals of obc.select, and their messages."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import obc
from obc.selection import BudgetError, Costs

pytestmark = pytest.mark.filterwarnings("ignore:.* rows are fewer:UserWarning")


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("selection", ["joint", "independent"])
def test_units_that_are_all_alike_are_said_so_once_and_go_in_order(value: float, selection: str) -> None:
    rows = {"a": torch.full((9, 3), value), "b": torch.full((9, 3), value)}
    with pytest.warns(UserWarning, match=f"are {'equal' if value else 'zero'}: the choice is arbitrary") as warned:
        removed = obc.select(rows, {"a": 1.0, "b": 1.0}, 3)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert {name: units.tolist() for name, units in removed.items()} == {"a": [0, 1], "b": [0]}


COSTS: dict[str, Any] = {
    "numbers": {"a": 100.0, "b": 40.0},
    "units": {"a": torch.arange(40.0, 49.0), "b": torch.full((9,), 50.0)},
    "fixed": Costs.fixed({"a": 40.0, "b": 100.0}, {"a": 9, "b": 9}),
}


@pytest.mark.parametrize("costs", COSTS)
def test_a_budget_that_looks_like_a_share_is_warned_of(costs: str) -> None:
    rows = {"a": torch.rand(30, 9), "b": torch.rand(30, 9)}
    with pytest.warns(UserWarning, match=r"the budget 0\.5 is no share, .*: one unit frees 40 at least; for") as warned:
        removed = obc.select(rows, COSTS[costs], 0.5)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert sum(len(units) for units in removed.values()) == 1  # what it means has not changed


@pytest.mark.parametrize(("cost", "budget"), [(1e-4, 5e-4), (0.01, 0.5), (100.0, 200.0), (100.0, 0.0), (0.5, 0.2)])
def test_a_budget_in_the_units_of_costs_is_not(cost: float, budget: float) -> None:
    rows = {"a": torch.rand(60, 60)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obc.select(rows, {"a": cost}, budget)


def test_groups_that_become_narrow_are_named() -> None:
    rows = {"wide": torch.rand(1, 30), "narrow": torch.rand(1, 30)}
    with pytest.warns(UserWarning, match=r"fewer than a tenth of the units stay in 'narrow' \(2 of 30\)") as warned:
        obc.select(rows, {"wide": 0.0001, "narrow": 1.0}, 28, selection="independent")
    assert warned[0].filename == __file__


def budget_errors() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "all units": ({"budget": 99.0}, r"99 of the given costs can't be met: at most 11 can be freed.*'a': 1 of 5"),
        "minimum": ({"budget": 9.0, "min_units": {"b": 4}}, r"at most 8 can be freed.*'b': 4 of 4 units"),
        "multiple": ({"budget": 8.0, "round_to": 4}, r"at most 2 can be freed.*'a': 4 of 5 units, 'b': 4 of 4"),
    }


@pytest.mark.parametrize("case", budget_errors())
def test_a_budget_out_of_reach_is_refused_with_what_is_reachable(case: str) -> None:
    options, message = budget_errors()[case]
    rows = {"a": torch.rand(20, 5), "b": torch.rand(20, 4)}
    with pytest.raises(BudgetError, match=message) as caught:
        obc.select(rows, {"a": 2.0, "b": 1.0}, **options)
    assert obc.select(rows, {"a": 2.0, "b": 1.0}, **(options | {"budget": caught.value.reachable}))


def test_the_error_names_the_unit_of_the_costs() -> None:
    rows = {"a": torch.rand(20, 5)}
    costs = Costs(["a"], [5], linear=torch.tensor([3.0]), unit="parameters")
    with pytest.raises(BudgetError, match="a budget of 15 parameters can't be met: at most 12 can be freed"):
        obc.select(rows, costs, 15)


BAD_ROWS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no groups": ({}, "no groups to select from"),
    "no rows": ({"a": torch.rand(0, 3), "b": torch.rand(0, 2)}, r"'a' has no rows: its shape is \(0, 3\)"),
    "no units": ({"a": torch.rand(4, 3), "b": torch.rand(4, 0)}, r"'b' has no units: its shape is \(4, 0\)"),
    "NaN": ({"a": torch.tensor([[1.0, 2], [3, float("nan")]]), "b": torch.rand(2, 2)}, "'a': unit 1 in row 1 is nan"),
    "Inf": ({"a": torch.rand(2, 2), "b": torch.tensor([[float("-inf"), 2]])}, "'b': unit 0 in row 0 is -inf"),
    "different rows": ({"a": torch.rand(4, 3), "b": torch.rand(5, 2)}, "got 4 rows of 'a' and 5 of 'b'"),
    "scores": (
        {"a": torch.rand(4, 3), "b": torch.rand(2)},
        r"'b': joint selection needs rows \(N, units\), got shape \(2,\)",
    ),
    "no costs": ({"a": torch.rand(4, 3), "c": torch.rand(4, 2)}, "no costs of 'c': are these rows of another model"),
    "no rows of a group": ({"a": torch.rand(4, 3)}, "costs but no rows of 'b': are these rows of another model"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_select_rejects_bad_rows(case: str) -> None:
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        obc.select(rows, {"a": 1.0, "b": 1.0}, 1)


def test_select_rejects_a_score_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="'a': unit 1 is inf"):
        obc.select({"a": torch.tensor([1.0, float("inf")])}, {"a": 1.0}, 1, selection="independent")


def test_select_rejects_integers() -> None:
    with pytest.raises(TypeError, match=r"'a': rows must be floating point, got torch.int64"):
        obc.select({"a": torch.ones(2, 2, dtype=torch.int64)}, {"a": 1.0}, 1)


def test_select_rejects_rows_of_the_model_before_it_was_pruned() -> None:
    costs = Costs(["a"], [3], linear=torch.ones(1))
    with pytest.raises(ValueError, match="'a' has rows of 4 units and costs of 3: are these rows of another model"):
        obc.select({"a": torch.rand(9, 4)}, costs, 1)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (-1.0, "'a': what a unit frees must be finite and not negative, got -1"),
        (float("nan"), "'a': what a unit frees must be finite and not negative, got nan"),
        (torch.tensor([1.0, -2, 3]), "'a': what a unit frees must be finite and not negative, got -2"),
        (torch.ones(4), r"costs of 'a' must be one number or \(3,\), got shape \(4,\)"),
    ],
)
def test_select_rejects_bad_costs(cost: float | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        obc.select({"a": torch.rand(9, 3)}, {"a": cost}, 1)


def test_select_rejects_a_polynomial_that_frees_less_than_nothing() -> None:
    costs = Costs(["a", "b"], [3, 3], linear=torch.tensor([1.0, -1]))
    with pytest.raises(ValueError, match="'b': what a unit frees must be finite and not negative, got -1"):
        obc.select({"a": torch.rand(9, 3), "b": torch.rand(9, 3)}, costs, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "the budget, how much to free, must be finite and not negative, got -1"),
        ({"budget": float("nan")}, "must be finite and not negative, got nan"),
        ({"selection": "both"}, "selection must be 'joint' or 'independent', got 'both'"),
        ({"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\], got 1.5"),
        ({"form": "dense"}, "form must be one of None, 'full', 'blocked', 'rows', got 'dense'"),
        ({"max_bytes": -1}, "max_bytes must not be negative, got -1"),
        ({"min_units": -1}, "min_units of 'a' must be an integer of at least 0, got -1"),
        ({"min_units": {"c": 1}}, "min_units names groups without rows: 'c'"),
        ({"round_to": 0}, "round_to of 'a' must be an integer of at least 1, got 0"),
        ({"round_to": {"a": 2.5}}, "round_to of 'a' must be an integer of at least 1, got 2.5"),
    ],
)
def test_select_rejects_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        obc.select({"a": torch.rand(9, 3)}, {"a": 1.0}, **({"budget": 1} | options))
