"""Sample rows where modules have no per-sample form, or share an output among the samples: as many rows as samples,
and each the one that float64 autograd gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from models import regression_losses, seeded
from parity import assert_parity
from torch import Tensor, nn
from torch.nn import functional as F

import obc

BATCH, LENGTH, WIDTH, WORDS = 4, 7, 8, 11


def numbers(length: int = LENGTH, batch: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, length, 6, generator=generator), torch.randn(batch, generator=generator)) for _ in range(3)
    ]


def words(length: int = LENGTH, batch: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(WORDS, (batch, length), generator=generator), torch.randn(batch, generator=generator))
        for _ in range(3)
    ]


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, target = batch
    weight = next(model.parameters())
    return regression_losses(model(x.to(weight.dtype) if x.is_floating_point() else x), target.to(weight.dtype))


def assert_right(model: nn.Module, batches: list[Any], **options: Any) -> obc.Scores:
    scores = obc.score(model, batches, losses, rows="sample", keep_rows=True, **options)
    expected = oracle.rows(model, batches, losses, rows="sample")
    assert scores.num_rows == sum(len(batch[0]) for batch in batches)
    for name, (out, in_) in expected.items():
        kept = scores.rows[name]
        for got, truth in ((kept.out_channels, out), (kept.in_channels, in_)):
            if truth is not None:
                torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    assert_parity(scores, oracle.scores(model, batches, losses, rows="sample"))
    return scores


class Two(nn.Module):
    """Two linear layers; subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)


class TimeFirst(Two):
    """(T, B, C) inside, with as many steps as samples: nothing but the gradients tells them apart."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.transpose(0, 1)))).mean(0)


class Functional(Two):
    """The layers' forwards are never called."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("...i,oi->...o", x, self.first.weight) + self.first.bias)
        return torch.einsum("...i,oi->...o", hidden, self.second.weight) + self.second.bias


class Mixed(Two):
    """Tokens of all samples as one long row of samples, and one layer that is never called."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("...i,oi->...o", x, self.first.weight) + self.first.bias)
        return self.second(hidden.transpose(0, 1)).transpose(0, 1)


class Attention(nn.Module):
    """torch's own attention: its projections are read from their gradients alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("build", [TimeFirst, Functional, Mixed])
def test_every_module_falls_back_to_one_sample_at_a_time(build: Callable[[], nn.Module]) -> None:
    scores = assert_right(seeded(build), numbers(BATCH))
    assert all(how.startswith("weight gradient") for how in scores.coverage.values())


@pytest.mark.parametrize("options", [{"micro_batch": 3}, {"micro_batch": 1}], ids=str)
def test_layers_that_are_never_called(options: dict[str, Any]) -> None:
    assert_right(seeded(Functional), numbers(), **options)


def test_attention_is_read_one_sample_at_a_time() -> None:
    model = seeded(Attention)
    scores = obc.score(model, numbers(), losses, rows="sample")
    assert scores.num_rows == 3 * BATCH
    wide = seeded(Attention).double()
    expected = torch.zeros(6, dtype=torch.float64)
    for batch in numbers():
        for loss in losses(wide, batch):
            weight = wide.attention.out_proj.weight
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            expected += (weight * gradient).sum(0).square()
    torch.testing.assert_close(scores["attention.out_proj"].in_channels.double(), expected, rtol=1e-4, atol=1e-8)


def test_rows_of_one_sample_in_a_loop_of_ones_own() -> None:
    model = seeded(Functional)
    scorer = obc.JacobianScorer(model, rows="sample")
    with scorer:
        for x, target in numbers():
            for index in range(BATCH):
                with scorer.row():
                    losses(model, (x[index : index + 1], target[index : index + 1])).sum().backward()
    scores = scorer.scores()
    assert scores.num_rows == 3 * BATCH
    assert_parity(scores, oracle.scores(model, numbers(), losses, rows="sample"))


def test_several_samples_in_a_row_without_a_per_sample_form_are_refused() -> None:
    model = seeded(Functional)
    scorer = obc.JacobianScorer(model, rows="sample")

    def one_row() -> None:
        with scorer.row():
            per_sample = losses(model, numbers()[0])
            scorer.check_samples(per_sample)
            per_sample.sum().backward()

    with scorer, pytest.raises(obc.scoring.errors.ScoringError, match="pass one sample a row"):
        one_row()


# --- outputs that all samples share -----------------------------------------------------------------------------


class Embedded(nn.Module):
    """Word embeddings, and others that are looked up once; subclasses say how these come together."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.other, self.head = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.together(tokens)))

    def together(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class Positions(Embedded):
    """(B, T, C) + (1, T, C): the one that can be spread."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.arange(tokens.shape[1])[None])


class Kind(Embedded):
    """(B, T, C) + (1, C)."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.zeros(1, dtype=torch.int64))


class KindFirst(Embedded):
    """(1, C) + (B, T, C), looked up before the words: it does not say how many samples there are."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.other(torch.zeros(1, dtype=torch.int64)) + self.word(tokens)


class PositionsFirst(Embedded):
    """(1, T, C) + (B, T, C)."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.other(torch.arange(tokens.shape[1])[None]) + self.word(tokens)


class Indexed(Embedded):
    """(B, T, C) + (1, T, C)[0]."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.arange(tokens.shape[1])[None])[0]


class LastIndexed(Embedded):
    """(B, T, C) + (1, T, C)[-1]."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.arange(tokens.shape[1])[None])[-1]


class Repeated(Embedded):
    """(B, T, C) + (1, T, C) repeated for every sample."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.arange(tokens.shape[1])[None]).repeat(len(tokens), 1, 1)


class Swapped(Embedded):
    """(B, T, C) + (T, 1, C) turned."""

    def together(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.other(torch.arange(tokens.shape[1])[None]).transpose(0, 1).transpose(0, 1)


class ByShape(Embedded):
    """Looks at how many entries it has."""

    def together(self, tokens: Tensor) -> Tensor:
        other = self.other(torch.arange(tokens.shape[1])[None])
        return self.word(tokens) + other / len(other)


class Both(Embedded):
    """Two that can't be spread, one before and one after the words."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Embedding(3, WIDTH)

    def together(self, tokens: Tensor) -> Tensor:
        first = self.other(torch.zeros(1, dtype=torch.int64))
        return self.word(tokens) + first + self.third(torch.ones(1, dtype=torch.int64))


SHARED = (Positions, Kind, KindFirst, PositionsFirst, Indexed, LastIndexed, Repeated, Swapped, ByShape, Both)


@pytest.mark.sampled(members=10)
@pytest.mark.parametrize("build", SHARED)
@pytest.mark.parametrize("length", [1, BATCH, LENGTH])
def test_an_output_that_all_samples_share(build: Callable[[], nn.Module], length: int) -> None:
    assert_right(seeded(build), words(length))


def test_positions_are_still_read_by_gates() -> None:
    scores = assert_right(seeded(Positions), words())
    assert scores.coverage["other"] == "gate"


@pytest.mark.parametrize("build", [Kind, Indexed, Positions])
def test_one_sample_a_batch(build: Callable[[], nn.Module]) -> None:
    assert_right(seeded(build), words(batch=1))


def test_an_error_of_the_loss_function_is_raised_as_it_is() -> None:
    def failing(model: nn.Module, batch: Any) -> Tensor:
        losses(model, batch)
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        obc.score(seeded(Positions), words(), failing, rows="sample")


# --- a batch that is repeated -----------------------------------------------------------------------------------


class LaterInPlace(nn.Module):
    """Changes an activation in place where the input says so: not in the checking row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(F.leaky_relu(y, inplace=bool(x[0, 0, 0] > 5)))


def test_only_the_part_that_was_dropped_is_repeated() -> None:
    """In-place changes begin in the second part of the first batch: its first part is not counted twice."""
    model, data = seeded(LaterInPlace), numbers()
    data[0][0][2:] += 9
    assert_right(model, data, micro_batch=2, chains=False)


# --- nothing but zeros ------------------------------------------------------------------------------------------


class Dead(Two):
    """No loss depends on anything."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) * 0


def test_scores_that_are_all_zero_are_refused() -> None:
    model = seeded(Dead)
    for rows, loss in (("sample", losses), ("batch", lambda m, b: losses(m, b).mean())):
        with pytest.raises(ValueError, match="all rows are zero"):
            obc.score(model, numbers(), loss, rows=rows)
    with pytest.raises(ValueError, match="all rows are zero"):
        obc.score(model, numbers(), labels=False)
