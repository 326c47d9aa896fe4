"""Scores every group by a criterion: collects its statistics in one run, then scores each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from obc.criteria.protocol import CriterionError, GroupScores, name_of
from obc.criteria.refusals import refuse_unread, said_of, scores_nothing
from obc.criteria.registry import get
from obc.criteria.subject import Subject
from obc.model.by_name import MissingNameError
from obc.model.evaluation import ForwardFn, LossFn
from obc.model.groups import ChannelGroup
from obc.statistics.errors import StatisticsError
from obc.statistics.names import Chosen, chosen_statistics
from obc.statistics.results import Statistics
from obc.statistics.run import collect


def group_scores(criterion: Any, subject: Subject) -> GroupScores:
    """(units,) scores of every group that the criterion can score, lowest for the least important.

    Args:
        criterion: a name, an object or a function.
        subject: the model to score, and the data to use.

    Raises:
        ValueError: scores have another shape than (units,), or are not finite; the message names the group.
        CriterionError: the criterion can score none of the groups.
    """
    found = scored(criterion, subject)[0]
    if subject.groups and not found:
        raise scores_nothing(get(criterion), subject.groups)
    return found


def scored(criterion: Any, subject: Subject, also: Sequence[str] = ()) -> tuple[GroupScores, Statistics]:
    """:func:`group_scores`, and the collected statistics, which include ``also``."""
    criterion = get(criterion)
    measure = getattr(criterion, "measure", None)
    needs = [] if measure else needed(criterion)
    with said_of(criterion, subject.groups, [one.name for one in needs]):
        statistics = collected(needs, also, subject, getattr(criterion, "functional", None))
        if measure is not None:
            found = measure(subject)
        else:
            found = scores_of_read(criterion, subject.groups, statistics, subject.model)
    for group in subject.groups:
        if group.name in found:
            _check(criterion, group.name, group.size, found[group.name])
    return found, statistics


def scores_from(criterion: Any, groups: Any, statistics: Statistics, model: nn.Module) -> GroupScores:
    """The scores from statistics collected before, for example in one run for several criteria.

    Args:
        criterion: a name, an object or a function.
        groups: the groups to score (:class:`obc.model.groups.ChannelGroup`).
        statistics: what :func:`obc.collect` returned for this model.
        model: the model with the weights that it had then.

    Returns:
        Group -> (units,), without those that the criterion can't score.

    Raises:
        StatisticsError: a needed statistic was not collected, or not of all that it reads for a group.
        CriterionError: the criterion can score none of the groups.
    """
    criterion, groups = get(criterion), list(groups)
    refuse_unread(criterion, needed(criterion), groups, statistics, model)
    found = scores_of_read(criterion, groups, statistics, model)
    if groups and not found:
        raise scores_nothing(criterion, groups)
    return found


def scores_of_read(
    criterion: Any, groups: Sequence[ChannelGroup], statistics: Statistics, model: nn.Module
) -> GroupScores:
    """:func:`scores_from` for groups whose statistics are known to be there; empty if it can score none of them."""
    found = {}
    for group in groups:
        try:
            scores = criterion.score(group, statistics, model)
        except MissingNameError as error:
            raise StatisticsError(
                f"the criterion {name_of(criterion)!r} can't score the group {group.name!r}: {error.args[0]}"
            ) from error
        if scores is not None:
            found[group.name] = scores
    finish = getattr(criterion, "finish", None)
    return found if finish is None else finish(found, statistics, model)


def needed(criterion: Any) -> list[Chosen]:
    """The statistics that a criterion needs, as objects."""
    return chosen_statistics(list(criterion.needs)) if criterion.needs else []


def collected(
    needs: Sequence[Chosen], also: Sequence[str], subject: Subject, functional: Callable[[Any], Tensor] | None = None
) -> Statistics:
    """Collect what is needed in one run; nothing is run if nothing is needed."""
    names = {one.name for one in needs}
    further = [name for name in also if name not in names]
    chosen = [*needs, *(chosen_statistics(further) if further else [])]
    if not chosen:
        return Statistics({}, rows=None, num_batches=0, coverage={})
    if functional is not None and subject.rows == "sample":
        raise CriterionError(
            "it reads one number per batch, its own functional of the outputs in place of loss_fn, which has no value "
            "per sample; pass rows='batch'"
        )
    loss = subject.loss_fn if functional is None else functional_loss(functional, subject.forward_fn)
    return collect(
        subject.model,
        subject.batches,
        loss if any(one.backward for one in chosen) else None,
        statistics=chosen,
        groups=subject.groups,
        rows=subject.rows,
        micro_batch=subject.micro_batch,
        forward_fn=subject.forward_fn,
        progress=False,
    )


def functional_loss(functional: Callable[[Any], Tensor], forward_fn: ForwardFn) -> LossFn:
    """The loss for a criterion's own functional of the outputs."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = forward_fn(model, batch)
        return functional(output[0] if isinstance(output, list) and len(output) == 1 else output)

    return loss


def _check(criterion: Any, group: str, size: int, scores: Any) -> None:
    what = f"the criterion {name_of(criterion)!r} gave the group {group!r}"
    if not isinstance(scores, Tensor) or scores.shape != (size,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{what} {shape}; it must give a tensor with one score per unit, ({size},)")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{what} scores that are not finite; check the batches, the loss and the weights")
