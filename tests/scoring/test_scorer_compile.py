"""Scoring and torch.compile: attach, then compile; the other way round is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from models import Case
from nasty import NASTY
from parity import assert_parity, expected_scores
from torch import Tensor, nn

import obc


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def score_compiled(case: Case, backend: str, rows: str = "batch") -> obc.Scores:
    scorer = obc.JacobianScorer(case.model, rows=rows)
    with scorer:
        compiled = torch.compile(case.model, backend=backend, fullgraph=True)
        for batch in case.batches:
            with scorer.row(samples=models.BATCH if rows == "sample" else None):
                losses = case.losses(compiled, batch)
                (losses.sum() if rows == "sample" else losses.mean()).backward()
    return scorer.scores()


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("residual_cnn", "sample"),
        pytest.param("residual_cnn", "batch", marks=pytest.mark.slow),
        pytest.param("llama", "batch", marks=pytest.mark.slow),
        pytest.param("linears", "sample", marks=pytest.mark.slow),
    ],
)
def test_compiled_after_attaching(family: str, rows: str, fresh_dynamo: None) -> None:
    """fullgraph: the gates break no graph."""
    case = getattr(models, family)()
    assert_parity(score_compiled(case, "aot_eager", rows), expected_scores(case, rows))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("in-place-after-conv", "used-twice")]


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("family", ["in-place-after-norm", "functional-weight", *SLOW])
def test_nasty_modules_compiled_after_attaching(family: str, fresh_dynamo: None) -> None:
    case = NASTY[family]()
    assert_parity(score_compiled(case, "aot_eager"), expected_scores(case))


def seen(module: nn.Module, args: Any, output: Tensor) -> None:
    """A user's hook that is a function, where the gates' are methods."""


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize(("rows", "prepend"), [pytest.param("batch", False, marks=pytest.mark.slow), ("sample", True)])
def test_compiled_beside_hooks_of_the_user(rows: str, prepend: bool, fresh_dynamo: None) -> None:
    """torch 2.11 compiles hooks in the order of an OrderedDict and guards them in that of the dictionary beneath."""
    case = models.residual_cnn()
    for module in case.model.modules():
        module.register_forward_hook(seen, prepend=prepend)
    scorer = obc.JacobianScorer(case.model, rows=rows)
    with scorer:
        hooks = [module._forward_hooks for module in case.model.modules()]
        assert max(map(len, hooks)) > 1 + (rows == "sample")
        assert all(list(each) == list(dict.keys(each)) for each in hooks)
    assert all(list(module._forward_hooks.values()) == [seen] for module in case.model.modules())
    assert_parity(score_compiled(case, "aot_eager", rows), expected_scores(case, rows))


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_an_input_changed_in_place_in_a_compiled_model_is_refused(fresh_dynamo: None) -> None:
    """No such model can be trained; uncompiled it is scored all the same."""
    with pytest.raises(RuntimeError, match="modified inplace"):
        score_compiled(NASTY["input-changed"](), "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_compiled_by_inductor_after_attaching(fresh_dynamo: None) -> None:
    case = models.linears()
    assert_parity(score_compiled(case, "inductor"), expected_scores(case))


@pytest.mark.slow
def test_score_with_a_loss_that_compiles_the_model(fresh_dynamo: None) -> None:
    """obc.score attaches first, so a model compiled inside the loss is seen."""
    case = models.linears()
    compiled: list[nn.Module] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not compiled:
            compiled.append(torch.compile(model, backend="aot_eager"))
        return case.loss(compiled[0], batch)

    assert_parity(obc.score(case.model, case.batches, loss), expected_scores(case))


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_part(model: nn.Module) -> nn.Module:
    model.conv2 = torch.compile(model.conv2, backend="eager")
    return model


@pytest.mark.parametrize("compile_", [compiled_whole, compiled_in_place, compiled_part])
def test_a_model_compiled_before_attaching_is_refused_with_the_remedy(
    compile_: Callable[[nn.Module], nn.Module], fresh_dynamo: None
) -> None:
    case = models.residual_cnn()
    model = compile_(case.model)
    with pytest.raises(RuntimeError, match=r"compiled before attaching.*compiled\._orig_mod.*attach, then compile"):
        obc.score(model, case.batches, case.loss)


def test_a_model_compiled_between_making_the_scorer_and_attaching_is_refused(fresh_dynamo: None) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    case.model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled before attaching"), scorer:
        pass
    assert all(p.requires_grad for p in case.model.parameters())
