"""Whole experts by criteria of weights and of gradients, against their formulas on experts that are separate layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import MIXTURES, SIZES, check, gradients, logits, loss, make_subject, separated, values_of
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.criteria.protocol import CriterionError

NAMES = (*MIXTURES, "gpt-oss")
Tensors = dict[str, Tensor]


def slices(subject: Subject, name: str, tensors: Tensors) -> list[list[Tensor]]:
    """By slice, of each expert the entries: its row of the router; its gate and up projections; its down projection.

    Args:
        subject: with separate experts.
        name: name of the mixture.
        tensors: shaped like the parameters.
    """
    count = len(subject.model.get_submodule(name).down)
    parent = name.rpartition(".")[0]
    router = next(key for key in ("gate", "router") if f"{parent}.{key}.weight" in tensors)
    both = [[tensors[f"{name}.{key}.{e}.weight"].flatten() for key in ("gate", "up")] for e in range(count)]
    return [
        list(tensors[f"{parent}.{router}.weight"]),
        [torch.cat(pair) for pair in both],
        [tensors[f"{name}.down.{e}.weight"].flatten() for e in range(count)],
    ]


def expected(
    subject: Subject, tensors: Tensors, value: Callable[[Tensor], Tensor], mean: bool = False, relative: bool = False
) -> Tensors:
    """Per mixture, the sum or mean over slices of value(an expert's entries)."""
    apart, found = separated(subject), {}
    for group in subject.groups:
        parts = [torch.stack([value(one) for one in units]) for units in slices(apart, group.name, tensors)]
        scores = torch.stack(parts).mean(0) if mean else torch.stack(parts).sum(0)
        found[group.name] = scores / scores.mean() if relative else scores
    return found


def products(subject: Subject, functional: Callable[..., Tensor] = loss) -> list[Tensors]:
    """Parameter -> w * dL_n/dw, batch by batch, by autograd on separate experts."""
    apart = separated(subject)
    weights = values_of(apart)
    return [{key: weights[key] * g for key, g in row.items()} for row in gradients(apart, functional)]


def total(rows: list[Tensors]) -> Tensors:
    return {key: torch.stack([row[key] for row in rows]).sum(0) for key in rows[0]}


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes(name: str) -> None:
    subject = make_subject(name, ["experts"])
    weights = values_of(separated(subject))
    for criterion, power in (("l1", 1), ("l2", 2), ("intra_fusion", 1)):
        scores = expected(subject, weights, lambda unit: unit.abs().pow(power).sum(), mean=True, relative=True)  # noqa: B023
        check(group_scores(criterion, subject), scores)


@pytest.mark.parametrize("name", NAMES)
def test_distances(name: str) -> None:
    """FPGM and WHC compare each expert's slices with those of the others."""
    subject = make_subject(name, ["experts"])
    apart = separated(subject)
    median, hybrid = {}, {}
    for group in subject.groups:
        distances, unlike = [], []
        for units in slices(apart, group.name, values_of(apart)):
            distances.append(torch.stack([sum((a - b).norm() for b in units) for a in units]))  # type: ignore[misc]
            pairs = [
                [b.norm() * (1 - (a @ b / (a.norm() * b.norm())).abs()) for b in units if b is not a] for a in units
            ]
            unlike.append(torch.stack([a.norm() * sum(pair) for a, pair in zip(units, pairs, strict=True)]))
        median[group.name], hybrid[group.name] = torch.stack(distances).mean(0), torch.stack(unlike).mean(0)
    check(group_scores("fpgm", subject), {key: s / s.mean() for key, s in median.items()})
    check(group_scores("whc", subject), {key: s / s.mean() for key, s in hybrid.items()})


@pytest.mark.parametrize("name", NAMES)
def test_taylor_and_fisher(name: str) -> None:
    subject = make_subject(name, ["experts"])
    rows = products(subject)
    taylor = expected(subject, total(rows), lambda unit: unit.abs().sum(), mean=True)
    check(group_scores("taylor", subject), taylor, 2e-5)
    squares = total([{key: value.square() for key, value in row.items()} for row in rows])
    check(group_scores("fisher", subject), expected(subject, squares, torch.sum), 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_llm_pruner(name: str) -> None:
    subject = make_subject(name, ["experts"])
    rows = products(subject)
    first, squares = total(rows), total([{key: value.square() for key, value in row.items()} for row in rows])
    second = {key: value - squares[key] / len(rows) / 2 for key, value in first.items()}
    values: dict[Any, Callable[[Tensor], Tensor]] = {
        "element": lambda unit: unit.abs().sum(),
        "vector": lambda unit: unit.sum().abs(),
    }
    for form, value in values.items():
        check(group_scores(criteria.LLMPruner(form), subject), expected(subject, first, value), 2e-5)
        check(group_scores(criteria.LLMPruner(form, True), subject), expected(subject, second, value), 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nirvana(name: str) -> None:
    subject = make_subject(name, ["experts"])

    def functional(model: nn.Module, batch: Any) -> Tensor:
        return logits(model, batch).max(dim=1).values.mean()

    scores = expected(subject, total(products(subject, functional)), lambda unit: unit.abs().sum())
    check(group_scores("nirvana", subject), scores, 2e-5)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize(
    "criterion",
    ["kfac", "kfac_obs", "obs", "slimgpt", "flap", "wanda_sp", "minitron", "reconstruction", "compensated_jacobian",
     "token_jacobian", criteria.GAPrune([torch.zeros(0)], code=True)],
    ids=lambda one: one if isinstance(one, str) else one.name,
)  # fmt: skip
def test_criteria_of_consumers_refuse_whole_experts(criterion: Any) -> None:
    subject = make_subject("mixtral", ["experts"])
    if not isinstance(criterion, str):
        criterion = criteria.GAPrune(subject.batches, code=True)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    with pytest.raises(CriterionError, match=r"scores no group of this model.* the groups are of experts"):
        obc.prune(
            subject.model,
            batches=subject.batches,
            loss_fn=subject.loss_fn,
            forward_fn=subject.forward_fn,
            criterion=criterion,
            structure=obc.structures.transformers.TransformersStructure(subject.model, ["experts"]),
            params=0.9,
            progress=False,
        )
    torch.testing.assert_close(subject.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "criterion", ["obs", "kfac", "kfac_obs", "compensated_jacobian", "token_jacobian", "reconstruction"]
)
def test_experts_that_are_called_otherwise_are_refused_with_the_reason(criterion: str) -> None:
    """Llama 4's experts get the tokens of every expert, multiplied by their gates."""
    import transformers

    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 12, "pad_token_id": 0}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes)).eval()
    subject = make_subject("mixtral")
    with pytest.raises(ValueError, match=r"not called with states, expert indices and weights|scores no group"):
        obc.prune(
            model,
            batches=subject.batches,
            loss_fn=subject.loss_fn,
            forward_fn=subject.forward_fn,
            criterion=criterion,
            structure=obc.structures.transformers.TransformersStructure(model, ["expert_ffn"]),
            params=0.9,
            progress=False,
        )
