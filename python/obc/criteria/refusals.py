"""Refusals of what a criterion can't score, in terms of the caller's arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from obc.criteria.protocol import CriterionError, name_of
from obc.model.groups import ChannelGroup
from obc.statistics.errors import NothingToReadError, StatisticsError, TooLargeError
from obc.statistics.names import Chosen
from obc.statistics.part import Part
from obc.statistics.results import Statistics
from obc.statistics.rows import Rows

_BLOCKS = (
    "for a transformers model pass structure=obc.structures.transformers.TransformersStructure(model, ['layers']), "
    "which has whole blocks for groups (--kinds layers of obc prune), for any other "
)


def scores_nothing(criterion: Any, groups: Sequence[ChannelGroup], why: str = "") -> CriterionError:
    """The error that no group has anything which the criterion scores.

    Args:
        why: what is known of the reason, in brackets after a space.
    """
    about, kinds = getattr(criterion, "about", None), sorted({group.kind for group in groups})
    scored = "other units" if about is None else about.kinds
    return CriterionError(
        f"the criterion {name_of(criterion)!r} scores no group of this model{why}: it scores "
        f"{scored}, the groups are of {', '.join(kinds) or 'no kind'}; {_BLOCKS if 'blocks' in scored else ''}pass "
        "another criterion (`obc criteria` lists them with the units that they score)"
    )


def refuse_unread(
    criterion: Any, needs: Sequence[Chosen], groups: Sequence[ChannelGroup], statistics: Statistics, model: nn.Module
) -> None:
    """Raise StatisticsError if a needed statistic was not collected, or not of all that it reads for these groups."""
    statistics.require(needs, f"the criterion {name_of(criterion)!r}")
    for statistic in needs:
        there = _read_in(statistics, statistic)
        missing = _read_for(groups, statistic, model) - there
        if missing:
            lacking = [group.name for group in groups if _read_for([group], statistic, model) - there]
            raise StatisticsError(
                f"the criterion {name_of(criterion)!r} needs the statistic {statistic.name!r} of "
                f"{_some(sorted(missing))}, for the groups {_some(lacking)}; it was collected of "
                f"{_some(sorted(there))}. Pass these groups, or groups=None for every layer, to obc.collect"
            )


def _read_for(groups: Sequence[ChannelGroup], statistic: Chosen, model: nn.Module) -> set[str]:
    """The layers that ``obc.collect`` would read for these groups."""
    if isinstance(statistic, Rows):
        wanted = statistic.wanted(model, groups) or {}
        return {f"{side} channels of {module}" for module, sides in wanted.items() for side in sides}
    return set(statistic.reader(model, groups, Part()).coverage)


def _read_in(statistics: Statistics, statistic: Chosen) -> set[str]:
    """What was read, or could not be, by the names of :func:`_read_for`."""
    coverage = statistics.coverage.get(statistic.name, {})
    if not isinstance(statistic, Rows):
        return set(coverage)
    unread = {module for module, how in coverage.items() if not how.scored}
    return {
        f"{side} channels of {module}"
        for module in coverage
        for side in ("in", "out")
        if module in unread or getattr(statistics.rows[module], f"{side}_channels") is not None
    }


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(map(repr, names[:3])) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def said_of(criterion: Any, groups: Sequence[ChannelGroup], needs: Sequence[str] = ()) -> Iterator[None]:
    """Let errors of collecting and of measuring name the criterion, and what can be done through ``obc.prune``.

    Args:
        criterion: for which statistics are collected, or which runs the model.
        groups: of the model; none if they are not known yet.
        needs: names of its statistics; others are collected for an allocation.
    """
    name = name_of(criterion)
    try:
        yield
    except (StatisticsError, CriterionError) as error:
        if isinstance(error, NothingToReadError):
            if error.statistic not in needs:
                raise
            if groups:
                raise scores_nothing(criterion, groups, f" ({error.reason})") from error
        if repr(name) not in str(error):
            error.args = (f"the criterion {name!r}: {error}{_fewer(criterion, error)}", *error.args[1:])
        raise


def _fewer(criterion: Any, error: Exception) -> str:
    """The remedy in a call of obc.prune for sums that are too large."""
    if not isinstance(error, TooLargeError):
        return ""
    on_host = f", criterion=obc.criteria.{type(criterion).__name__}(to='host') holds them there"
    hosted = on_host if hasattr(criterion, "to") and "to='host'" in str(error) else ""
    parts = "criterion=lambda group, statistics, model: scores[group.name], with steps=1, takes scores made in parts"
    return f". In obc.prune ignored_layers= leaves layers out, {parts}{hosted}"
