"""Perplexity against the chain rule written out, and the comparisons of two models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from obc import quality


class Bigram(nn.Module):
    """A language model whose next token depends on the sum of all tokens before it in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(97, 11))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids.cumsum(1) % 97])


def by_chain_rule(model: Bigram, tokens: Tensor, length: int, stride: int) -> tuple[float, int]:
    """Sum of -log p over the tokens that windows predict, each once, and their number."""
    total, seen = 0.0, set()
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + length]
        for position in range(1, len(window)):
            if start + position in seen:
                continue
            seen.add(start + position)
            logits = model.table[int(window[:position].sum()) % 97].double()
            total -= float(logits[window[position]] - logits.logsumexp(0))
    return total, len(seen)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 3), (5, 1), (64, 64), (2, 2)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_that_of_the_chain_rule(length: int, stride: int, batch_size: int) -> None:
    model, tokens = Bigram(), torch.randint(0, 11, (37,))
    total, count = by_chain_rule(model, tokens, length, stride)
    found = quality.perplexity(model, tokens, length=length, stride=stride, batch_size=batch_size)
    assert int(found.counts.sum()) == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert float((found.losses * found.counts).sum()) == pytest.approx(total, rel=1e-5)


def test_every_token_but_the_first_is_predicted_with_overlap() -> None:
    found = quality.perplexity(Bigram(), torch.randint(0, 11, (50,)), length=16, stride=5)
    assert int(found.counts.sum()) == 49
    assert found.standard_error > 0
    assert "49 tokens" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"length": 1}, "at least 2"), ({"length": 4, "stride": 5}, "stride=5"), ({"length": 4, "stride": 0}, "stride=0")],
)
def test_bad_windows_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality.perplexity(Bigram(), torch.randint(0, 11, (20,)), **arguments)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.fill_(float("nan"))
    with pytest.raises(ValueError, match="window 0 is not finite"):
        quality.perplexity(model, torch.randint(0, 11, (20,)), length=8)


def test_accuracy_agreement_and_cosine() -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    batches = [(torch.randn(7, 5), torch.randint(0, 3, (7,))) for _ in range(3)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    ours, theirs = model(inputs), other(inputs)
    assert quality.accuracy(model, batches) == pytest.approx(float((ours.argmax(1) == labels).float().mean()))
    assert quality.agreement(model, other, batches) == pytest.approx(
        float((ours.argmax(1) == theirs.argmax(1)).float().mean())
    )
    expected = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    assert quality.cosine(model, other, batches) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert quality.agreement(model, model, batches) == 1
    for function in (lambda: quality.accuracy(model, []), lambda: quality.cosine(model, other, [])):
        with pytest.raises(ValueError, match="no batches"):
            function()
