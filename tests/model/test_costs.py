"""Costs: the polynomial against layers counted one by one, and its marginal against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obc.selection import Costs

SIDE, CLASSES = 8, 10


def residual_costs(widths: list[int]) -> Costs:
    """image -> 3x3 -> stem; block: 3x3 stem -> inner -> stem; pooled head reads stem and inner, concatenated."""
    area = SIDE * SIDE
    quadratic = torch.tensor([[0.0, 2 * 9 * area], [0.0, 0.0]])
    linear = torch.tensor([3 * 9 * area + CLASSES, CLASSES])
    return Costs(["stem", "inner"], widths, constant=CLASSES, linear=linear, quadratic=quadratic)


def counted(stem: int, inner: int) -> int:
    """The same network's MACs, layer by layer."""
    convolutions = [(3, stem), (stem, inner), (inner, stem)]
    return SIDE * SIDE * 9 * sum(a * b for a, b in convolutions) + (stem + inner) * CLASSES + CLASSES


@pytest.mark.parametrize("widths", [[16, 32], [1, 1], [0, 5]])
def test_total_counts_every_layer(widths: list[int]) -> None:
    assert residual_costs(widths).total() == counted(*widths)
    assert residual_costs([16, 32]).total(torch.tensor(widths)) == counted(*widths)


@given(
    size=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_marginal_is_what_one_unit_less_frees(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-9, 10, (size, size + 2), generator=generator).double()
    widths = torch.randint(1, 50, (size,), generator=generator)
    names = [str(place) for place in range(size)]
    costs = Costs(names, widths, constant=5, linear=integers[:, 0], quadratic=2 * integers[:, 2:])
    for place in range(size):
        less = widths - torch.eye(size, dtype=torch.int64)[place]
        freed = costs.total() - costs.total(less)
        assert costs.freed({str(place): 1}) == freed
        assert costs.marginal()[place] == freed
        assert costs.marginal(widths)[place] == freed


def test_the_quadratic_is_the_same_whichever_of_both_groups_it_is_given_for() -> None:
    above = Costs(["a", "b"], [3, 4], quadratic=torch.tensor([[0.0, 6], [0, 0]]))
    below = Costs(["a", "b"], [3, 4], quadratic=torch.tensor([[0.0, 0], [6, 0]]))
    assert torch.equal(above.quadratic, above.quadratic.T)
    assert above.total() == below.total() == 6 * 3 * 4
    assert above.marginal().tolist() == [24, 18]


def test_large_costs_are_exact() -> None:
    # About 5.5e11, where float32 counts by 32,768.
    costs = Costs(["a"], [11008], constant=1, linear=torch.tensor([3.0 * 4096 * 4096], dtype=torch.float64))
    assert costs.total() - costs.total(torch.tensor([11007])) == 3 * 4096 * 4096
    assert costs.total() == 3 * 4096 * 4096 * 11008 + 1


def test_fixed_costs_do_not_depend_on_widths() -> None:
    costs = Costs.fixed({"b": 3.0, "a": 2.0}, {"a": 10, "b": 20}, unit="parameters")
    assert costs.names == ("b", "a")
    assert costs.unit == "parameters"
    assert costs.widths.tolist() == [20, 10]
    assert costs.total() == 80
    assert costs.marginal(torch.tensor([1, 1])).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [1]}, r"costs of 2 groups need 2 widths .* got \(1,\), \(2,\) and \(2, 2\)"),
        ({"linear": torch.ones(3)}, r"got \(2,\), \(3,\) and \(2, 2\)"),
        ({"quadratic": torch.ones(2, 3)}, r"a 2 x 2 quadratic, got \(2,\), \(2,\) and \(2, 3\)"),
        ({"names": ["a", "a"]}, "two groups of the costs are named 'a'"),
        ({"linear": torch.tensor([1.0, float("nan")])}, "costs and widths must be finite"),
        ({"constant": float("inf")}, "costs and widths must be finite"),
    ],
)
def test_costs_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Costs(**({"names": ["a", "b"], "widths": [3, 4]} | arguments))


def test_fixed_costs_of_other_groups_than_the_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="only one of them has 'b', 'c'"):
        Costs.fixed({"a": 1.0, "b": 1.0}, {"a": 3, "c": 4})
