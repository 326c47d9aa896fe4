"""Whether a collected statistic has what its user needs: the same options, or more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obc.statistics.names import Chosen, chosen_statistics, identity

# Option -> its least value, for which every other value is sufficient: rows of all slices include those of the gate.
_LEAST: dict[str, Any] = {"slices": "gate", "square": False, "entropy_bins": 0}
# The modules to read and the weights are the free choice of the caller that collects.
_FREE = ("modules", "weight")


def unlike(wanted: Chosen, collected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Option -> (value that is needed, value it was collected with) for insufficient options."""
    found = {}
    for option, value in identity(wanted).items():
        if option in _FREE or option not in collected or collected[option] == value:
            continue
        if option not in _LEAST or _LEAST[option] != value:
            found[option] = (value, collected[option])
    return found


def written(one: Chosen) -> str:
    """The caller's way to write it: its name, or an object if its options are not the defaults."""
    (default,) = chosen_statistics(one.name)
    return repr(one.name) if one == default else f"obc.statistics.{one!r}"
