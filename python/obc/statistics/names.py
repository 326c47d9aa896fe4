"""The statistics by name, their options, and whether a collected one has what its user needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from obc.model.arguments import meant
from obc.statistics.blocks import Blocks
from obc.statistics.errors import StatisticsError
from obc.statistics.experts import Experts
from obc.statistics.gradient_moments import GradientMoments
from obc.statistics.gram import Gram
from obc.statistics.moments import Moments
from obc.statistics.reader import Statistic
from obc.statistics.rows import Rows
from obc.statistics.weight_gradients import WeightGradients

Chosen = Statistic | Rows

STATISTICS: dict[str, type[Rows | Moments | Gram | GradientMoments | Experts | Blocks | WeightGradients]] = {
    kind.name: kind for kind in (Rows, Moments, Gram, GradientMoments, Experts, Blocks, WeightGradients)
}

# Option -> its least value, for which every other value is sufficient: rows of all slices include those of the gate.
_LEAST: dict[str, Any] = {"slices": "gate", "square": False, "entropy_bins": 0}
# The modules to read and the weights are the free choice of the caller that collects.
_FREE = ("modules", "weight")


def chosen_statistics(statistics: str | Chosen | Sequence[str | Chosen]) -> list[Chosen]:
    """Objects for names, with their default options.

    Raises:
        StatisticsError: an unknown name, a statistic given twice, or none at all.
    """
    listed = list(statistics) if isinstance(statistics, (list, tuple, set, frozenset)) else [statistics]
    found: dict[str, Chosen] = {}
    for one in listed:
        if isinstance(one, str) and one not in STATISTICS:
            raise StatisticsError(
                f"statistics are {', '.join(map(repr, STATISTICS))}, got {one!r}{meant(one, STATISTICS)}"
            )
        chosen: Chosen = STATISTICS[one]() if isinstance(one, str) else one  # type: ignore[assignment]
        if not hasattr(chosen, "name") or chosen.name not in STATISTICS:
            raise StatisticsError(f"a statistic is a name or an object of obc.statistics, got {one!r}")
        if chosen.name in found:
            raise StatisticsError(f"the statistic {chosen.name!r} was asked for twice")
        found[chosen.name] = chosen
    if not found:
        raise StatisticsError(f"statistics is empty: name some of {', '.join(map(repr, STATISTICS))}")
    return list(found.values())


def identity(statistic: Chosen) -> dict[str, Any]:
    """The options as plain values; a resumed run must have the same. Where sums are kept (``to``) may change."""
    options: Any = statistic
    return {field.name: _plain(getattr(options, field.name)) for field in fields(options) if field.name != "to"}


def _plain(option: Any) -> Any:
    if callable(option):
        return getattr(option, "__qualname__", "an object")
    return option if option is None or isinstance(option, (str, int)) else list(option)


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
