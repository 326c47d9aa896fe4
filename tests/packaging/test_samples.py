"""Which members of a test marked ``sampled`` stay in ``make test``."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from samples import left_out_of_samples

SIZES = {"model": 3, "dtype": 4, "layout": 2}


class Item(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def members(name: str, *marks: pytest.MarkDecorator) -> list[Any]:
    """A test with every combination of three parameters, as pytest collects it."""
    found = {mark.name: mark.mark for mark in marks}
    return [
        Item(
            nodeid=f"test_some.py::{name}[{'-'.join(map(str, places))}]",
            callspec=SimpleNamespace(params=dict(zip(SIZES, places, strict=True))),
            get_closest_marker=found.get,
        )
        for places in product(*map(range, SIZES.values()))
    ]


def kept(items: list[Any]) -> list[dict[str, int]]:
    left_out = set(map(id, left_out_of_samples(items)))
    return [item.callspec.params for item in items if id(item) not in left_out]


def test_every_value_stays_in_as_few_members_as_the_longest_parameter_has() -> None:
    stay = kept(members("test_one", pytest.mark.sampled))
    assert len(stay) == max(SIZES.values())
    for name, size in SIZES.items():
        assert {values[name] for values in stay} == set(range(size))


def test_every_pair_of_values_stays() -> None:
    stay = kept(members("test_one", pytest.mark.sampled(2)))
    assert 3 * 4 <= len(stay) < 3 * 4 * 2
    for first, second in (("model", "dtype"), ("model", "layout"), ("dtype", "layout")):
        assert {(values[first], values[second]) for values in stay} == set(
            product(range(SIZES[first]), range(SIZES[second]))
        )


@pytest.mark.parametrize(("number", "places"), [(1, [0]), (2, [0, 23]), (4, [0, 8, 15, 23]), (40, [*range(24)])])
def test_as_many_as_named_stay_evenly_among_all(number: int, places: list[int]) -> None:
    every = members("test_one", pytest.mark.sampled(members=number))
    assert kept(every) == [every[place].callspec.params for place in places]


def test_other_tests_stay_whole_and_samples_are_drawn_of_each_test() -> None:
    every = 3 * 4 * 2
    assert len(kept(members("test_one"))) == every
    assert len(kept(members("test_one", pytest.mark.sampled, pytest.mark.slow))) == every
    assert len(kept([*members("test_one", pytest.mark.sampled), *members("test_two", pytest.mark.sampled)])) == 2 * 4


@pytest.mark.sampled
@pytest.mark.parametrize("layout", range(2))
@pytest.mark.parametrize("dtype", range(4))
@pytest.mark.parametrize("model", range(3))
def test_it_is_what_pytest_collects(model: int, dtype: int, layout: int, request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if item.originalname == request.node.originalname]
    quick = [item.callspec.params for item in items if not item.get_closest_marker("slow")]
    if not quick:  # -m slow deselects them
        slow = [item.callspec.params for item in items]
        quick = [item.callspec.params for item in members("test_one") if item.callspec.params not in slow]
    assert len(quick) == 4
    for name, size in SIZES.items():
        assert {values[name] for values in quick} == set(range(size))
