"""What criteria can't do is an error that says what was wrong, and what to do."""

from __future__ import annotations

import logging
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from formulas import changed, make_subject
from torch import nn

import obc
from obc import criteria
from obc.criteria import Subject, group_scores, scores_from
from obc.model.groups import ChannelGroup
from obc.statistics import StatisticsError

NEEDY = [name for name in criteria.available() if getattr(criteria.get(name), "needs", ())]


@pytest.mark.parametrize("name", NEEDY)
def test_a_criterion_that_needs_what_was_not_collected(name: str) -> None:
    case = models.llama()
    criterion = criteria.get(name)
    needs = {one if isinstance(one, str) else one.name for one in criterion.needs}
    other = "gram" if "moments" in needs or "gram" not in needs else "moments"
    there = obc.collect(case.model, case.batches[:1], statistics=other)
    with pytest.raises(StatisticsError, match=rf"the criterion '{name}' needs the statistic .*which was not collected"):
        scores_from(name, obc.transformer_groups(case.model), there, case.model)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"criterion must be one of 'jacobian', .*'entropy', got 'jacobin'"):
        criteria.get("jacobin")
    with pytest.raises(StatisticsError, match=r"statistics are 'rows', 'moments', .* got 'grams'"):
        obc.collect(models.llama().model, [], statistics="grams")
    with pytest.raises(ValueError, match="registered already"):
        criteria.register("flap", criteria.FLAP())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reap", "nothing to read 'experts' of in this model"),
        ("block_influence", "the criterion 'block_influence' scores no group of this model"),
        ("bn_scale", "the criterion 'bn_scale' scores no group of this model"),
    ],
)
def test_units_that_it_can_not_score(name: str, message: str) -> None:
    case = models.llama()
    with pytest.raises(ValueError, match=message):
        obc.prune(case.model, batches=case.batches, loss_fn=case.loss, criterion=name, macs=0.9)


def test_experts_that_no_token_reached_score_zero_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    case = families.FAMILIES["mixtral"]()
    groups = obc.transformer_groups(case.model, ["experts"])
    subject = Subject(
        case.model, groups, [case.batches[0][:1, :1]], case.loss, lambda m, b: m(b), "gate", "batch", torch.Generator()
    )  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        scores = group_scores("reap", subject)
    inner = changed(subject, groups=obc.transformer_groups(case.model, ["expert_ffn"]))
    with pytest.warns(UserWarning, match="no token was routed to it"):
        group_scores("obs", inner)
    assert "no token reached experts" in caplog.text
    assert all(int((values == 0).sum()) == 2 for values in scores.values())


def test_scores_of_a_wrong_shape_or_not_finite() -> None:
    subject = make_subject("chain")

    class Bad(criteria.Criterion):
        name = "bad"

        def __init__(self, value: Any) -> None:
            self.value = value

        def score(self, group: ChannelGroup, statistics: Any, model: nn.Module) -> Any:
            return self.value(group.size)

    for value, message in (
        (lambda size: torch.zeros(size + 1), "it must give a tensor of one score a unit"),
        (lambda size: [0.0] * size, "list; it must give a tensor"),
        (lambda size: torch.full((size,), float("nan")), "scores that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            group_scores(Bad(value), subject)
    with pytest.raises(TypeError, match="got the class FLAP: call it"):
        group_scores(criteria.FLAP, subject)


def test_a_gram_matrix_that_is_singular_asks_for_batches() -> None:
    subject = make_subject("chain")
    subject = changed(subject, batches=[(torch.zeros_like(x), y) for x, y in subject.batches])
    with pytest.raises(ValueError, match="a Gram matrix is singular with ridge=0; pass more batches"):
        group_scores(criteria.OBS(ridge=0.0), subject)


def test_options_out_of_range() -> None:
    for make, message in (
        (lambda: criteria.OBS(heads="qr"), "heads must be"),  # type: ignore[arg-type]
        (lambda: criteria.Nirvana(over="classes"), "over must be"),  # type: ignore[arg-type]
        (lambda: criteria.LLMPruner("matrix"), "form must be"),  # type: ignore[arg-type]
        (lambda: criteria.FastOBA(epsilon=0.0), "epsilon must be positive"),
        (lambda: criteria.MaskedEvaluation("accuracy"), "metric must be"),  # type: ignore[arg-type]
        (lambda: criteria.BeamSearch(metric="accuracy"), "metric must be"),  # type: ignore[arg-type]
        (lambda: criteria.MaskedEvaluation(rounds=0), "rounds must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=r"pass criterion=obc\.criteria\.GAPrune"):
        group_scores("gaprune", make_subject("chain"))
