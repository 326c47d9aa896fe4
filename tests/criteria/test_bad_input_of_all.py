"""Bad input to every criterion, allocation and search: an error that names it, or scores; never nothing in silence."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from formulas import changed, make_subject
from test_bad_input import NEEDY, pruned
from torch import Tensor

import obc
from obc import criteria
from obc.criteria import Subject, group_scores, scores_from
from obc.criteria.protocol import CriterionError
from obc.selection.allocations import ALLOCATIONS
from obc.statistics import StatisticsError
from obc.structures.transformers import TransformersStructure

SEARCHES = ("masked", "beam", "tolerance")


def criterion_of(name: str, subject: Subject) -> Any:
    return criteria.GAPrune(subject.batches) if name == "gaprune" else criteria.get(name)


def collected(name: str, subject: Subject, groups: Any) -> obc.Statistics:
    options: dict[str, Any] = {"statistics": criteria.get(name).needs, "groups": groups}
    return obc.collect(subject.model, subject.batches, subject.loss_fn, forward_fn=subject.forward_fn, **options)


@pytest.mark.parametrize("name", NEEDY)
def test_groups_whose_statistics_were_not_collected(name: str) -> None:
    """Alone, and beside groups whose statistics are there: the groups, what is there, and what to do."""
    about = criteria.get(name).about
    assert about is not None
    subject = make_subject("mixtral", ["experts"] if about.kinds == "experts" else None)
    if about.kinds == "blocks":  # these statistics are read whatever the groups are
        return
    there, other = subject.groups[:1], subject.groups[-1:]
    statistics = collected(name, subject, there)
    assert set(scores_from(name, there, statistics, subject.model)) == {there[0].name}
    for groups in (other, [*there, *other]):
        with pytest.raises(StatisticsError, match=f"the criterion '{name}' needs the statistic") as error:
            scores_from(name, groups, statistics, subject.model)
        assert f"for the groups '{other[0].name}'" in str(error.value)
        assert re.search("; it was collected of '.*model.layers.0", str(error.value))
        assert str(error.value).endswith("Pass these groups, or groups=None for every layer, to obc.collect")
    everything = collected(name, subject, None)
    assert set(scores_from(name, [*there, *other], everything, subject.model)) == {there[0].name, other[0].name}


def test_rows_of_the_other_side_of_the_same_module() -> None:
    """Inner channels are read at the inputs of a mixture, whole experts at its outputs."""
    inner, whole = make_subject("mixtral", ["expert_ffn"]), make_subject("mixtral", ["experts"])
    with pytest.raises(StatisticsError, match=r"needs the statistic 'rows' of 'out channels of .*experts'"):
        scores_from("jacobian", whole.groups, collected("jacobian", inner, inner.groups), inner.model)


def scored_or_refused(name: str, subject: Subject) -> tuple[dict[str, Tensor], str]:
    """The scores, or what the refusal says."""
    try:
        return group_scores(criterion_of(name, subject), subject), ""
    except (CriterionError, StatisticsError) as error:
        return {}, str(error)


@pytest.mark.sampled(members=24)
@pytest.mark.parametrize("name", criteria.available())
@pytest.mark.parametrize("kind", ["heads", "expert_ffn", "experts", "layers"])
def test_groups_are_scored_or_refused(name: str, kind: str) -> None:
    subject = make_subject("mixtral", [kind])
    scores, refusal = scored_or_refused(name, subject)
    assert set(scores) == (set() if refusal else {group.name for group in subject.groups})
    assert all(bool(values.isfinite().all()) for values in scores.values())
    if refusal:
        assert re.search(f"the criterion '{name}'(:| scores no group of this model)", refusal)


@pytest.mark.sampled(members=12)
@pytest.mark.parametrize("name", criteria.available())
def test_experts_that_no_token_reached(name: str) -> None:
    """One token reaches two experts of each mixture; the others are scored as what they did: nothing."""
    subject = make_subject("mixtral", ["expert_ffn", "experts"])
    subject = changed(subject, batches=[(x[:1, :1], y[:1]) for x, y in subject.batches[:1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which name them
        scores, refusal = scored_or_refused(name, subject)
    assert bool(scores) != bool(refusal)
    assert all(bool(values.isfinite().all()) for values in scores.values())
    assert f"the criterion '{name}'" in (refusal or f"the criterion '{name}'")


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_budget_that_no_allocation_reaches(name: str) -> None:
    whole = name in ("window", "tail")
    subject = make_subject("llama", ["layers"] if whole else None)
    options: dict[str, Any] = {"criterion": "angular_distance" if whole else "l1", "allocation": name, "macs": 0.01}
    if whole:
        options |= {"structure": TransformersStructure(subject.model, ["layers"])}
    with pytest.raises(ValueError, match=r"macs=0\.01 is out of reach"):
        pruned(subject, **options)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_budget_that_no_search_reaches(name: str) -> None:
    assert hasattr(criteria.get(name), "measure")
    with pytest.raises(ValueError, match=r"macs=0\.01 is out of reach"):
        pruned(make_subject("llama"), criterion=name, macs=0.01)
