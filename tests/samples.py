"""Which members of a test with many parameters `make test` runs, where all of them take too long."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import pytest


def left_out_of_samples(items: list[pytest.Item]) -> list[pytest.Item]:
    """The members of tests marked ``sampled`` that ``make test`` leaves out.

    Members stay until they have every value of every parameter, with ``sampled(2)`` every pair of values of two
    parameters, and so on: the one first that has most of what is still lacking. With ``sampled(members=4)`` four stay,
    the first, the last, and two between them.
    """
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not any(map(item.get_closest_marker, ("slow", "gpu"))):
            tests[item.nodeid.partition("[")[0]].append(item)
    left_out = []
    for members in tests.values():
        mark = members[0].get_closest_marker("sampled")
        assert mark is not None
        if "members" in mark.kwargs:
            left_out += _all_but(mark.kwargs["members"], members)
        else:
            left_out += _superfluous(members, *mark.args)
    return left_out


def _all_but(number: int, members: list[pytest.Item]) -> list[pytest.Item]:
    """The members without ``number`` of them that lie evenly among them."""
    stay = {round(place * (len(members) - 1) / max(1, number - 1)) for place in range(number)}
    return [item for place, item in enumerate(members) if place not in stay]


def _superfluous(members: list[pytest.Item], strength: int = 1) -> list[pytest.Item]:
    """The members without which the others have every combination of ``strength`` values."""
    held = {item: set(combinations(_values(item), strength)) for item in members}
    lacking = set().union(*held.values())
    while lacking:
        best = max(held, key=lambda item: len(lacking & held[item]))
        lacking -= held.pop(best)
    return list(held)


def _values(item: pytest.Item) -> list[tuple[str, int]]:
    """Each parameter's name with the identity of its value: ``indices`` counts members, not values, in pytest 9.2."""
    return [(name, id(value)) for name, value in sorted(item.callspec.params.items(), key=lambda pair: pair[0])]
