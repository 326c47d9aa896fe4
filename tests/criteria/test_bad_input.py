"""Errors of criteria say what was wrong, and what to do."""

from __future__ import annotations

import logging
from pathlib import Path
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
from obc.selection import BudgetError
from obc.statistics import StatisticsError, memory
from obc.structures.transformers import TransformersStructure

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


@pytest.mark.parametrize(
    ("criterion", "plain", "needed"),
    [
        ("fisher", "weight_gradients", "WeightGradients(square=True)"),
        (criteria.LLMPruner(second_order=True), "weight_gradients", "WeightGradients(square=True)"),
        ("nvit", "rows", "Rows(slices='all')"),
        ("angular_distance", "blocks", "Blocks(tokens='last', span=1, modules=None, entropy_bins=0)"),
        ("entropy", "blocks", "Blocks(tokens='all', span=1, modules=None, entropy_bins=20)"),
        (criteria.REAP("softmax"), "experts", "Experts(gates='softmax')"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_statistic_that_was_collected_with_other_options(
    criterion: Any, plain: str, needed: str, tmp_path: Path
) -> None:
    subject = make_subject("mixtral", ["layers"] if plain == "blocks" else None)

    def found(statistics: Any) -> obc.Statistics:
        return obc.collect(
            subject.model,
            subject.batches,
            subject.loss_fn,
            statistics=statistics,
            groups=subject.groups,
            forward_fn=subject.forward_fn,
        )

    found(plain).save(tmp_path / "file")
    for there in (found(plain), obc.Statistics.load(tmp_path / "file")):
        with pytest.raises(
            StatisticsError, match=f"needs the statistic '{plain}' with .*, which was collected with"
        ) as e:
            scores_from(criterion, subject.groups, there, subject.model)
        assert f"pass statistics=[obc.statistics.{needed}] to obc.collect" in str(e.value)
    scores_from(criterion, subject.groups, found(eval(needed, vars(obc.statistics))), subject.model)


@pytest.mark.parametrize(
    ("criterion", "more"),
    [
        ("jacobian", obc.statistics.Rows("all")),
        ("taylor", obc.statistics.WeightGradients(square=True)),
        ("block_influence", obc.statistics.Blocks(entropy_bins=5)),
        ("obs", obc.statistics.Gram(to="host")),
    ],
)
def test_a_statistic_that_was_collected_with_more_serves(criterion: str, more: Any) -> None:
    subject = make_subject("llama", ["layers", "ffn"])
    options: dict[str, Any] = {"statistics": more, "groups": subject.groups, "forward_fn": subject.forward_fn}
    there = obc.collect(subject.model, subject.batches, subject.loss_fn, **options)
    scores = scores_from(criterion, subject.groups, there, subject.model)
    expected = group_scores(criterion, subject)
    assert set(scores) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values)


def test_rows_of_every_layer_are_rows_of_all_slices() -> None:
    subject = make_subject("llama")
    there = obc.collect(subject.model, subject.batches, subject.loss_fn, statistics="rows")
    scores = scores_from("nvit", subject.groups, there, subject.model)
    for name, values in group_scores("nvit", subject).items():
        torch.testing.assert_close(scores[name], values)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"criterion must be one of 'jacobian', .*'entropy', got 'jacobin'"):
        criteria.get("jacobin")
    with pytest.raises(StatisticsError, match=r"statistics are 'rows', 'moments', .* got 'grams'"):
        obc.collect(models.llama().model, [], statistics="grams")
    with pytest.raises(ValueError, match="registered already"):
        criteria.register("flap", criteria.FLAP())

    subject = make_subject("llama")
    for options, message in (
        ({"criterion": "flapp"}, r"criterion must be one of 'jacobian', .*'entropy', got 'flapp'"),
        ({"allocation": "serch"}, r"allocation must be one of 'global', .*'search', .* got 'serch'"),
        ({"compensate": "lss"}, r"compensate must be one of None, .*'ls', 'seq', got 'lss'"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned(subject, **options)


def pruned(subject: Subject, **options: Any) -> obc.PruningResult:
    """The subject's model pruned by ``obc.prune``; a traced one without its head."""
    traced = {} if hasattr(subject.model, "config") else {"example_inputs": subject.batches[0][0].requires_grad_()}
    given: dict[str, Any] = {"macs": 0.9, "steps": 1, "progress": False, "verify": False} | traced | options
    fields = {"batches": subject.batches, "loss_fn": subject.loss_fn, "forward_fn": subject.forward_fn}
    return obc.prune(subject.model, ignored_layers=["head"] if traced else [], **fields, **given)


@pytest.mark.parametrize(
    ("name", "criterion", "why", "scored", "there"),
    [
        ("chain", "block_influence", " (no residual blocks were found in ConvChain)", "blocks", "channels"),
        ("chain", "entropy", " (no residual blocks were found in ConvChain)", "blocks", "channels"),
        ("llama", "angular_distance", "", "blocks", "ffn, heads"),
        ("llama", "reap", " (these groups have nothing to read 'experts' from)", "experts", "ffn, heads"),
        ("vit", "expert_norm", " (these groups have nothing to read 'experts' from)", "experts", "ffn, heads"),
        ("mixtral", "bn_scale", "", "channels behind a BatchNorm", "expert_ffn, experts, heads"),
    ],
)
def test_units_that_it_can_not_score(name: str, criterion: str, why: str, scored: str, there: str) -> None:
    subject = make_subject(name)
    with pytest.raises(ValueError, match="scores no group") as error:
        pruned(subject, criterion=criterion)
    said = (
        f"the criterion '{criterion}' scores no group of this model{why}: it scores {scored}, the groups are of {there}"
    )
    assert str(error.value).startswith(said)
    assert "pass another criterion (`obc criteria` lists them" in str(error.value)
    assert ("TransformersStructure(model, ['layers'])" in str(error.value)) == (scored == "blocks")
    if name == "llama" and scored == "blocks":  # what the message says serves
        pruned(subject, criterion=criterion, structure=TransformersStructure(subject.model, ["layers"]), macs=0.7)


@pytest.mark.parametrize("criterion", ["l1", "jacobian", "compensated_jacobian"])
def test_an_allocation_that_follows_what_the_model_has_not(criterion: str) -> None:
    with pytest.raises(ValueError, match="the allocation BlockProfile follows the statistic 'blocks', but no residual"):
        pruned(make_subject("chain"), criterion=criterion, allocation="profile")


def test_rows_of_tokens_of_layers_with_unlike_positions() -> None:
    with pytest.raises(
        ValueError, match="the criterion 'token_jacobian': rows of tokens need layers that see the same"
    ):
        pruned(make_subject("chain"), criterion="token_jacobian")


@pytest.mark.parametrize("allocation", ["uniform", "search"])
@pytest.mark.parametrize("criterion", ["reap", "expert_frequency", "expert_norm"])
def test_a_budget_that_the_groups_which_are_scored_do_not_reach(criterion: str, allocation: str) -> None:
    with pytest.raises(BudgetError, match=r"macs=0\.95 is out of reach with the allocation") as error:
        pruned(make_subject("mixtral"), criterion=criterion, allocation=allocation, macs=0.95)
    assert f"6 groups, of which the criterion '{criterion}' scores 2; the others keep all units" in str(error.value)
    assert str(error.value).endswith("Let more remain, or pass another allocation= or criterion=")


@pytest.mark.parametrize("criterion", ["flap", "l1", "jacobian"])
def test_a_budget_of_a_search_that_no_widths_reach(criterion: str) -> None:
    options: dict[str, Any] = {"allocation": "search", "macs": 0.01}
    with pytest.raises(ValueError, match=r"macs=0\.01 is out of reach: 0\.\d+ remain where each of the 4 groups"):
        pruned(make_subject("llama"), criterion=criterion, **options)


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
        (lambda size: torch.zeros(size + 1), "it must give a tensor with one score per unit"),
        (lambda size: [0.0] * size, "list; it must give a tensor"),
        (lambda size: torch.full((size,), float("nan")), "scores that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            group_scores(Bad(value), subject)
    with pytest.raises(TypeError, match="got the class FLAP: call it"):
        group_scores(criteria.FLAP, subject)


@pytest.mark.parametrize("criterion", ["obs", "slimgpt", "kfac", "compensated_jacobian"])
def test_a_gram_matrix_that_is_too_large(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, the largest layer, and what can be done: sums on the host are no less where the layers are there."""
    subject = make_subject("llama")
    sizes = r"take 9\.4 KiB on {}, where {} are free \(the largest, of '.*o_proj' with 16 channels: 3\.0 KiB\); {}"
    for free, said, remedy in ((4096, "4.0 KiB", "pass groups= for fewer layers"), (100, "100 B", "leave the widest")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        found = sizes.format("cpu", said, remedy)
        with pytest.raises(StatisticsError, match=f"the criterion '{criterion}': .*{found}") as error:
            pruned(subject, criterion=criterion)
        assert "In obc.prune ignored_layers= leaves layers out" in str(error.value)
    elsewhere = changed(subject, model=subject.model.to("meta"))
    with pytest.raises(StatisticsError, match=sizes.format("meta", "100 B", "leave the widest")) as error:
        group_scores(criterion, elsewhere)
    for remedy in ("groups=", "Gram(to='host')", "by_block=True", "ignored_layers="):
        assert remedy in str(error.value)
    kind = type(criteria.get(criterion))
    assert f"criterion=obc.criteria.{kind.__name__}(to='host')" in str(error.value)
    assert kind(to="host").to == "host"


@pytest.mark.parametrize("criterion", ["obs", "slimgpt", "kfac"])
def test_the_remedies_for_gram_matrices_that_are_too_large(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the groups give the scores of all of them at once, and obc.prune takes these."""
    subject = make_subject("llama")
    whole, expected = group_scores(criterion, subject), pruned(make_subject("llama"), criterion=criterion)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4096)
    with pytest.raises(StatisticsError, match=r"pass groups= for fewer layers at a time: .*scores_from .* same scores"):
        group_scores(criterion, subject)
    scores = {}
    for group in subject.groups:
        there = obc.collect(
            subject.model,
            subject.batches,
            subject.loss_fn,
            statistics=criteria.get(criterion).needs,
            groups=[group],
            forward_fn=subject.forward_fn,
        )
        scores |= scores_from(criterion, [group], there, subject.model)
    torch.testing.assert_close(scores, whole, rtol=0, atol=0)

    kept = criteria.get(criterion)
    given: Any = lambda group, statistics, model: scores[group.name]  # noqa: E731
    got = pruned(subject, criterion=given, allocation=kept.allocation, per_macs=kept.per_cost)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, got.model.state_dict()[name])


@pytest.mark.parametrize("kind", [criteria.OBS, criteria.KFAC, criteria.CompensatedJacobian])
def test_a_gram_matrix_that_is_singular_asks_for_batches(kind: Any) -> None:
    subject = make_subject("chain")
    zeros: Any = [(torch.zeros_like(x), y) for x, y in subject.batches]
    subject = changed(subject, batches=zeros, groups=subject.groups[:1])
    with torch.no_grad():
        subject.model.features[0].bias.zero_()
        subject.model.features[1].bias.sub_(10.0)  # nothing passes the ReLU
    with pytest.raises(
        ValueError, match=rf"the criterion '{kind.name}': .*'features\.3' reads \(6 channels\) is singular"
    ):
        group_scores(kind(ridge=0.0), subject)


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
