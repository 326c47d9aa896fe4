"""The check on one sample: it decides what a whole batch would, is not a row, and is skipped if it can't tell."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from models import Case
from nasty import NASTY
from parity import assert_parity, errors, expected_scores
from torch import Tensor, nn

import obc
from obc.scoring.reading import checking_row

# Of the first row, which one run reads from clones and weight gradients: float32 sums in another order.
AGREEMENT = 1e-4

CASES = {
    "residual-cnn": models.residual_cnn,
    "conv2d": lambda: models.convolutions(2),
    "linears": models.linears,
    "tied": models.tied,
    "llama": models.llama,
    "vit": models.vit,
    **NASTY,
}


class Counting:
    """A loss that notes how many samples it was given, and whether weights needed gradients then."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.samples, self.with_weights = loss, [], []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        self.samples.append(len(first))
        wide = [p for p in model.parameters() if p.dim() > 1]
        self.with_weights.append(any(p.requires_grad for p in wide))
        return self.loss(model, batch)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_a_check_on_the_whole_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = CASES[name]()
    scores = obc.score(case.model, case.batches, case.loss_fn("batch"))
    monkeypatch.setattr(obc.JacobianScorer, "can_check_on_a_sample", False)
    whole = obc.score(case.model, case.batches, case.loss_fn("batch"))
    assert {k: str(v) for k, v in scores.coverage.items()} == {k: str(v) for k, v in whole.coverage.items()}
    assert scores.num_rows == whole.num_rows == len(case.batches)
    sides = {key: (channels.out_channels, channels.in_channels) for key, channels in whole.items()}
    assert max(errors(scores, sides).values()) <= AGREEMENT


def test_only_one_sample_is_run_with_weight_gradients() -> None:
    case = models.residual_cnn()
    loss = Counting(case.loss_fn("batch"))
    scores = obc.score(case.model, case.batches, loss)
    batch = len(case.batches[0][0])
    assert loss.samples == [1, *[batch] * len(case.batches)]
    assert loss.with_weights == [True, *[False] * len(case.batches)]
    assert any("from the" in str(how) for how in scores.coverage.values())  # chains, confirmed by a whole batch


def test_random_numbers_are_those_of_a_run_without_it() -> None:
    case = models.residual_cnn()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (case.loss_fn("batch")(model, batch) * torch.rand(())).sum()

    torch.manual_seed(3)
    scores = obc.score(case.model, case.batches, loss)
    torch.manual_seed(3)
    scorer = obc.JacobianScorer(case.model.eval())
    with scorer:
        for batch in case.batches:
            with scorer.row():
                loss(case.model, batch).backward()
    for name, expected in scorer.scores().items():
        torch.testing.assert_close(scores[name].out_channels, expected.out_channels, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("what", ["raises", "is zero"])
def test_a_loss_that_needs_more_than_one_sample_is_checked_on_the_batch(what: str) -> None:
    case = models.residual_cnn()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 1 and what == "raises":
            raise ValueError("contrastive losses need two samples")
        value: Tensor = case.loss_fn("batch")(model, batch)
        return value * (len(batch[0]) > 1)

    counting = Counting(loss)
    scores = obc.score(case.model, case.batches, counting)
    assert_parity(scores, expected_scores(case))
    assert counting.with_weights == [True, True, *[False] * (len(case.batches) - 1)]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_on_a_gpu_is_no_disagreement(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to eleven bits, gates and weight gradients differ by more than in float32; elsewhere nothing changes."""
    monkeypatch.setattr(checking_row, "tf32_is_allowed", lambda: allowed)
    tolerance = checking_row._tolerance
    assert tolerance(torch.float32, torch.device("cuda")) == (1e-2 if allowed else 1e-3)
    assert tolerance(torch.float32, torch.device("cpu")) == 1e-3
    assert tolerance(torch.float64, torch.device("cuda")) == 1e-3
    assert tolerance(torch.bfloat16, torch.device("cuda")) == 5e-2


class Branching(nn.Module):
    """A branch that the first sample does not take, by the sign of its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.late, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        shared = torch.relu(hidden)
        takes = (x[:, :1] > 0).to(x.dtype)
        return self.last(self.hidden(shared) + takes * self.late(shared))


def test_a_branch_that_the_sample_does_not_take_is_no_chain_and_no_fallback() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    x = torch.randn(6, 4)
    x[:, 0] = torch.tensor([-1.0, 1, 1, -1, 1, 1])
    batches = [(x, torch.randn(6, 4)), (x.flip(0), torch.randn(6, 4))]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    scores, expected = obc.score(model, batches, loss), obc.score(model, batches, loss, chains=False)
    for name in scores:
        torch.testing.assert_close(scores[name].out_channels, expected[name].out_channels, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(scores[name].in_channels, expected[name].in_channels, rtol=1e-4, atol=1e-12)
    assert all(str(how).startswith("gate") for how in scores.coverage.values())
