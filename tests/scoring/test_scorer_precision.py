"""Scores in half precision, under a loss scale, and of rows that are not finite."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import models
import nasty
import oracle
import pytest
import torch
from models import Case
from parity import assert_parity, eager_scores, error, expected_scores
from torch import Tensor, nn

import obc


def assert_as_good_as_eager(scores: obc.Scores, eager: Any, truth: oracle.Rows) -> None:
    """The error of every layer is at most twice plain autograd's in the same precision, plus one rounding of a score.

    bfloat16 keeps 8 bits: a rounding of r is 2^-8 of it, of its square 2^-7.
    """
    for name, (out, in_) in truth.items():
        for side, got, plain in (
            (out, scores[name].out_channels, eager[name][0]),
            (in_, scores[name].in_channels, eager[name][1]),
        ):
            if side is not None:
                limit = 2 * error(plain, side) + 2**-7
                assert error(got, side) <= limit, f"{name}: {error(got, side):.3f} > {limit:.3f}"


def bf16_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", ["residual_cnn", "linears", "llama", "vit"])
def test_bf16_autocast(family: str, rows: str) -> None:
    case = getattr(models, family)()
    plain = case.losses
    if rows == "sample":
        case.batches = [models_first_sample(batch) for batch in case.batches]
    eager = eager_scores(case, case.model, bf16_autocast)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with bf16_autocast():
            return plain(model, batch) if rows == "sample" else plain(model, batch).mean()

    scores = obc.score(case.model, case.batches, losses, rows=rows)
    assert_as_good_as_eager(scores, eager, expected_scores(case))
    assert all(channels.out_channels.dtype == torch.float32 for channels in scores.values())


def models_first_sample(batch: Any) -> Any:
    """A batch of one sample, for which batch rows and sample rows are equal."""
    return tuple(part[:1] for part in batch) if isinstance(batch, tuple) else batch[:1]


@pytest.mark.parametrize("family", ["residual_cnn", "linears", "llama"])
def test_bf16_weights(family: str) -> None:
    case = getattr(models, family)()
    half = copy.deepcopy(case.model).bfloat16()
    eager = eager_scores(case, half)
    scores = obc.score(half, case.batches, case.loss)
    rounded = Case(half.float(), case.batches, case.losses, half)  # the truth of the rounded weights
    assert_as_good_as_eager(scores, eager, expected_scores(rounded))


def test_grad_scaler() -> None:
    case = models.residual_cnn()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for batch in case.batches:
            with scorer.row(loss_scale=grad_scaler.get_scale()):
                grad_scaler.scale(case.loss(case.model, batch)).backward()
    assert_parity(scorer.scores(), expected_scores(case))


@pytest.mark.parametrize("overflowing", [0, 1, 2])
def test_rows_that_overflow_their_loss_scale_are_left_out_and_named(overflowing: int) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def loop() -> None:
        for index, batch in enumerate(case.batches):
            scale = 2.0**127 if index == overflowing else 2.0**10
            with scorer.row(loss_scale=scale):
                (case.loss(case.model, batch) * scale * 2).backward()

    with scorer, pytest.warns(UserWarning, match=rf"row {overflowing}.*not finite"):
        loop()
    kept = [batch for index, batch in enumerate(case.batches) if index != overflowing]
    assert scorer.scores().num_rows == 2
    assert_parity(scorer.scores(), oracle.scores(case.model, kept, lambda model, batch: 2 * case.loss(model, batch)))


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", ["residual_cnn", "norms"])
def test_channels_last(family: str, rows: str) -> None:
    case = getattr(models, family)()
    expected = expected_scores(case, rows)
    case.model.to(memory_format=torch.channels_last)
    batches = [(x.to(memory_format=torch.channels_last), target) for x, target in case.batches]
    assert_parity(obc.score(case.model, batches, case.loss_fn(rows), rows=rows), expected)


# --- rows that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_row_that_is_not_finite_is_left_out_and_named(bad: int, value: float) -> None:
    case = models.residual_cnn()
    batches = list(case.batches)
    x, labels = batches[bad]
    batches[bad] = (torch.full_like(x, value), labels)
    with pytest.warns(UserWarning, match=f"row {bad} .*not finite.*'(stem|norm|conv1)'"):
        scores = obc.score(case.model, batches, case.loss)
    assert scores.num_rows == 2
    kept = [batch for index, batch in enumerate(case.batches) if index != bad]
    assert_parity(scores, oracle.scores(case.model, kept, case.loss))


def test_a_sample_that_is_not_finite_is_left_out_alone() -> None:
    case = models.residual_cnn()
    x, labels = case.batches[1]
    x = x.clone()
    x[2] = float("nan")
    batches = [case.batches[0], (x, labels), case.batches[2]]
    with pytest.warns(UserWarning, match=r"row 1, sample 2.*not finite"):
        scores = obc.score(case.model, batches, case.losses, rows="sample")
    assert scores.num_rows == 3 * models.BATCH - 1
    finite = torch.arange(models.BATCH) != 2
    kept = [case.batches[0], (x[finite], labels[finite]), case.batches[2]]
    assert_parity(scores, oracle.scores(case.model, kept, case.losses, rows="sample"))


def test_the_first_bad_layer_is_named() -> None:
    """Only the branch behind ``late`` overflows: x -> fc is fine, and its share of the gradient too."""
    case = nasty.branches(False, True, False)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        value = nasty.branch_losses(model, batch)
        return value + model.late.weight.sum() * float("inf") if batch[2] else value

    with pytest.warns(UserWarning, match=r"row 1 .*not finite.*'late'"):
        scores = obc.score(case.model, case.batches, lambda model, batch: losses(model, batch).mean())
    kept = [case.batches[0], case.batches[2]]
    assert_parity(scores, oracle.scores(case.model, kept, case.loss), ["fc", "head"])


@pytest.mark.parametrize("bad", [0, 1])
def test_strict_raises_on_a_row_that_is_not_finite(bad: int) -> None:
    case = models.residual_cnn()
    batches = list(case.batches)
    batches[bad] = (batches[bad][0] * float("nan"), batches[bad][1])
    with pytest.raises(RuntimeError, match=f"row {bad}.*not finite"):
        obc.score(case.model, batches, case.loss, strict=True)
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_beyond_float32_are_refused(dtype: torch.dtype) -> None:
    """Rows of a float64 model, and sums of many rows, are finite where scores no longer are; all would rank alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    batches = [torch.randn(5, 4, dtype=dtype) for _ in range(40)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() * size

    size = 1.0
    plain = obc.score(net, batches, loss, progress=False)["0"].in_channels
    size = 1e25 if dtype == torch.float64 else (5e38 / float(plain.max())) ** 0.5
    with pytest.raises(obc.scoring.ScoringError, match=r"scores of '.*' lie beyond .* divide the loss"):
        obc.score(net, batches, loss, progress=False)
    size = 1e-3
    torch.testing.assert_close(obc.score(net, batches, loss, progress=False)["0"].in_channels, plain * 1e-6)
