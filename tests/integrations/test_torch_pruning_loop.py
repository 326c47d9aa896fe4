"""The paper's loop with JacobianImportance in Torch-Pruning, and refusals."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import models
import pytest
import torch
from models import Case, floats, token_losses, tokens, vector_losses
from parity import TOLERANCE, error
from torch import nn

import obc

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from pruned_families import (  # noqa: E402
    Embedded,
    Family,
    Truth,
    fill_as_paper,
    fill_score,
    graph,
    make_pruner,
    residual,
    scored,
    train_step_rows,
)

from obc.integrations.torch_pruning import JacobianImportance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


def assert_same_scores(importance: JacobianImportance, case: Case) -> None:
    expected = obc.score(case.model, case.batches, case.loss)
    assert importance.scores is not None
    assert set(importance.scores) == set(expected)
    for name, channels in expected.items():
        for side in ("out_channels", "in_channels"):
            got, wanted = getattr(importance.scores[name], side), getattr(channels, side)
            assert error(got, None if wanted is None else wanted.double()) <= TOLERANCE, f"{name}.{side}"


ZEROS: dict[str, Callable[[nn.Module], None]] = {
    "dropped": lambda model: model.zero_grad(set_to_none=True),
    "zeroed": lambda model: model.zero_grad(set_to_none=False),
    "never": lambda model: None,
}


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_gradients_may_be_zeroed_between_rows_or_not(zero: Callable[[nn.Module], None]) -> None:
    _, case = residual()
    importance = JacobianImportance()
    train_step_rows(importance, case, zero)
    assert_same_scores(importance, case)


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_several_backwards_make_one_row(zero: Callable[[nn.Module], None]) -> None:
    _, case = residual()
    importance = JacobianImportance()
    for images, labels in case.batches:
        zero(case.model)
        for part in (slice(0, 1), slice(1, None)):
            losses = case.losses(case.model, (images[part], labels[part]))
            (losses.sum() / len(labels)).backward()
        importance.accumulate_grad(case.model)
    importance.accumulate_score(case.model)
    assert_same_scores(importance, case)


def test_a_layer_that_a_row_does_not_reach_adds_nothing_to_it() -> None:
    """If it is not zeroed, its gradient still is that of the row before."""

    def three_layers() -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)])

    case = models.case(three_layers, floats(3), vector_losses)
    first, middle, last = case.model
    expected = []
    importance = JacobianImportance()
    for (x, _), used in zip(case.batches, (True, False, True), strict=True):
        hidden = first(x).tanh()
        hidden = middle(hidden).tanh() if used else hidden
        before = 0.0 if middle.weight.grad is None else middle.weight.grad.clone()
        last(hidden).square().mean().backward()
        expected.append(((middle.weight.grad - before) * middle.weight).sum(0).detach().double().square())
        importance.accumulate_grad(case.model)
    importance.accumulate_score(case.model)
    assert not expected[1].any()
    assert error(importance.scores["1"].in_channels, sum(expected)) <= TOLERANCE


def test_gradients_stay_the_users_and_none_is_kept() -> None:
    _, case = residual()
    importance = JacobianImportance()
    case.loss(case.model, case.batches[0]).backward()
    grads = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    copies = {name: grad.clone() for name, grad in grads.items()}
    importance.accumulate_grad(case.model)
    assert all(parameter.grad is grads[name] for name, parameter in case.model.named_parameters())
    assert all(torch.equal(grads[name], copies[name]) for name in grads)
    references = [weakref.ref(grad) for grad in grads.values()]
    case.model.zero_grad()
    grads.clear()
    assert all(reference() is None for reference in references)


def test_hooks_leave_with_the_next_backward() -> None:
    _, case = residual()
    importance = JacobianImportance()
    train_step_rows(importance, case, lambda model: model.zero_grad())
    case.loss(case.model, case.batches[0]).backward()
    assert not any(parameter._backward_hooks for parameter in case.model.parameters())


def test_flushing_between_rows_adds_up() -> None:
    _, case = residual()
    importance = JacobianImportance()
    for batch in case.batches:
        case.loss(case.model, batch).backward()  # the gradients add up across the flush too
        importance.accumulate_grad(case.model)
        importance.accumulate_score(case.model)
    assert_same_scores(importance, case)
    assert importance.scores.num_rows == len(case.batches)


def test_zero_grad_forgets_rows_and_zero_score_scores() -> None:
    _, case = residual()
    importance = JacobianImportance()
    case.loss(case.model, case.batches[0]).backward()
    importance.accumulate_grad(case.model)
    importance.zero_grad()
    assert all(parameter.grad is not None for parameter in case.model.parameters())
    train_step_rows(importance, case, lambda model: model.zero_grad())
    assert_same_scores(importance, case)
    importance.zero_score()
    assert importance.scores is None


def test_loss_scale_is_divided_out() -> None:
    _, case = residual()
    importance = JacobianImportance()
    for batch in case.batches:
        case.model.zero_grad()
        (case.loss(case.model, batch) * 1024).backward()
        importance.accumulate_grad(case.model, loss_scale=1024)
    importance.accumulate_score(case.model)
    assert_same_scores(importance, case)


def test_a_row_that_is_not_finite_is_left_out() -> None:
    _, case = residual()
    importance = JacobianImportance()
    case.loss(case.model, case.batches[0]).backward()
    case.model.blocks[1].conv2.weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"'blocks\.1\.conv2', and was left out"):
        importance.accumulate_grad(case.model)
    for batch in case.batches:
        case.model.zero_grad()
        case.loss(case.model, batch).backward()
        importance.accumulate_grad(case.model)
    importance.accumulate_score(case.model)
    assert_same_scores(importance, case)


def test_pruning_amid_rows_is_refused_until_they_are_zeroed() -> None:
    family, case = residual()
    importance = JacobianImportance()
    pruner = make_pruner(family, case, importance, iterative_steps=2)
    train_step_rows(importance, case, lambda model: model.zero_grad())
    pruner.step()
    with pytest.raises(RuntimeError, match=r"zero_score\(\) and zero_grad\(\) first"):
        importance.accumulate_grad(case.model)
    with pytest.raises(RuntimeError, match="no row of this model"):
        importance.accumulate_score(case.model)
    train_step_rows(importance, case, lambda model: model.zero_grad())
    assert_same_scores(importance, case)
    pruner.step()


def test_stale_scores_are_refused() -> None:
    family, case, importance = scored("residual")
    pruner = make_pruner(family, case, importance, iterative_steps=3)
    pruner.step()
    with pytest.raises(ValueError, match=r"'[\w.]+' was scored with \d+ (out|in) channels and has \d+ now.*score"):
        pruner.step()
    fill_score(importance, case)
    pruner.step()


def test_nothing_scored_is_refused() -> None:
    family, case = residual()
    with pytest.raises(RuntimeError, match=r"no scores yet: call \.score"):
        make_pruner(family, case, JacobianImportance()).step()


def test_scores_of_another_model_are_refused() -> None:
    family, case, _ = scored("residual")
    *_, other = scored("grouped")
    importance = JacobianImportance()
    importance.scores = other.scores
    with pytest.raises(ValueError, match="another model: they contain '0', '1', '3'"):
        make_pruner(family, case, importance).step()


def test_unscored_layers_are_named_once() -> None:
    family, case = residual()
    importance = JacobianImportance()
    importance.score(case.model, case.batches, case.loss, modules=lambda name, module: name != "blocks.0.conv1")
    pruner = make_pruner(family, case, importance)
    group = pruner.DG.get_pruning_group(case.model.blocks[0].conv1, tp.prune_conv_out_channels, [0, 1])
    with pytest.warns(UserWarning, match=r"without being scored: 'blocks\.0\.conv1' \(not among the scores\)"):
        assert importance(group) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance(group)
    strict = JacobianImportance(strict=True)
    strict.scores = importance.scores
    with pytest.raises(ValueError, match=r"strict: .*'blocks\.0\.conv1'"):
        strict(group)


def test_a_group_without_scores_is_not_pruned() -> None:
    family, case = residual()
    importance = JacobianImportance()
    importance.score(case.model, case.batches, case.loss, modules=["head"])
    group = graph(family, case).get_pruning_group(case.model.blocks[0].conv1, tp.prune_conv_out_channels, [0, 1])
    with pytest.warns(UserWarning, match="without being scored"):
        assert importance(group) is None


def test_a_parameter_of_no_layer_is_scored_from_gradients_and_named_otherwise() -> None:
    family = Family(lambda: models.case(Embedded, tokens(11, 6), token_losses), set(), inputs=lambda batch: batch)
    case = family.build()
    importance = JacobianImportance(strict=True)
    fill_as_paper(importance, case)
    truth = Truth(case, importance)
    truth(graph(family, case).get_pruning_group(case.model.embedding, tp.prune_embedding_out_channels, list(range(8))))
    assert truth.compared == {"Embedding", "LayerNorm", "Linear", "Parameter"}
    importance = JacobianImportance()
    fill_score(importance, case)
    with pytest.warns(UserWarning, match="'positions'"):
        make_pruner(family, case, importance).step()


@pytest.mark.parametrize(
    "options", [{"group_reduction": "median"}, {"normalizer": "entropy"}], ids=["reduction", "normalizer"]
)
def test_unknown_options_are_refused(options: dict[str, str]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}.* must be .*'{value}'"):
        JacobianImportance(**options)


def test_scores_as_the_first_argument_are_refused_with_how_to_pass_them() -> None:
    with pytest.raises(ValueError, match=r"group_reduction, the first argument, .* got a dict; .*scores = scores"):
        JacobianImportance({"conv": torch.ones(3)})  # type: ignore[arg-type]


def test_a_loop_that_fails_leaves_the_scores_alone() -> None:
    _, case, importance = scored("residual")
    before = importance.scores
    with pytest.raises(KeyboardInterrupt), importance.scorer(case.model):
        raise KeyboardInterrupt
    assert importance.scores is before
