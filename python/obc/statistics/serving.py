"""Whether a statistic as it was collected serves what needs it: with the same options, or with more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obc.statistics.names import Chosen, chosen_statistics

# Option -> its least value, which every other one serves as well: rows of all slices are those of the gate, too.
_LEAST: dict[str, Any] = {"slices": "gate", "square": False, "entropy_bins": 0}
# What is read, and how it is weighed, is the choice of whoever collects.
_FREE = ("modules", "weight")


def unlike(wanted: Chosen, collected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Option -> (value that is needed, value it was collected with) of those that do not serve."""
    found = {}
    for option, value in wanted.identity().items():
        if option in _FREE or option not in collected or collected[option] == value:
            continue
        if option not in _LEAST or _LEAST[option] != value:
            found[option] = (value, collected[option])
    return found


def written(one: Chosen) -> str:
    """How a caller names it: by its name, or where its options are not the default ones as an object."""
    (default,) = chosen_statistics(one.name)
    return repr(one.name) if one == default else f"obc.statistics.{one!r}"
