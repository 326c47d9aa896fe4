"""Perplexity against the chain rule written out, and the comparisons of two models."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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
    [
        ({"length": 1}, "at least 2"),
        ({"length": 4.0}, "length must be a positive integer, got 4.0"),
        ({"length": 4, "stride": 5}, "stride=5"),
        ({"length": 4, "stride": 0}, "stride must be a positive integer, got 0"),
        ({"length": 4, "batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"length": 4, "batch_size": -1}, "batch_size must be a positive integer, got -1"),
    ],
)
def test_bad_windows_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality.perplexity(Bigram(), torch.randint(0, 11, (20,)), **arguments)


def test_a_loss_beyond_what_exp_can_hold_is_an_infinite_perplexity() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.mul_(1e4)
    found = quality.perplexity(model, torch.randint(0, 11, (20,)), length=8)
    assert found.perplexity == float("inf")
    assert found.losses.isfinite().all()


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


MODEL, X, LABELS = nn.Linear(5, 3), torch.ones(7, 5), torch.zeros(7, dtype=torch.long)
SOME = X[:3]
FORWARD: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "one logit": lambda model, batch: model(batch[0])[:, :1],
    "a number": lambda model, batch: model(batch[0])[:, 0],
    "NaN": lambda model, batch: model(batch[0]) * float("nan"),
    "the model's own": lambda model, batch: model(batch[0])[: 7 if model is MODEL else 1],
}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X, "found none in a batch of type Tensor; pass batches of"),
        ((X,), "found none in a batch of type tuple"),
        ({"x": X}, "found none in a batch of type dict"),
        ((X, ["cat"] * 7), "found none in a batch of type tuple"),
        ((X, LABELS[:, None]), r"labels have shape \(7, 1\), predictions \(7,\)"),
        ((X, LABELS[:1]), r"labels have shape \(1,\), predictions \(7,\)"),
        ((SOME, torch.eye(3)), r"labels have shape \(3, 3\), predictions \(3,\)"),
    ],
    ids=["no labels", "inputs alone", "another name", "names", "(B, 1)", "one label", "one-hot"],
)
def test_labels_that_do_not_belong_to_the_predictions(batch: Any, said: str) -> None:
    """All of them were compared with the predictions by broadcasting, or were other samples' inputs."""
    with pytest.raises(ValueError, match=said):
        quality.accuracy(
            MODEL, [batch], lambda model, batch: model(X[:3] if type(batch) is tuple and batch[0] is SOME else X)
        )


@pytest.mark.parametrize("kind", FORWARD)
@pytest.mark.parametrize("figure", ["accuracy", "agreement", "cosine"])
def test_outputs_that_have_no_figure(figure: str, kind: str) -> None:
    said = {"NaN": "outputs have NaN", "the model's own": "shape"}.get(kind, "is not one logit for each of several")
    models = (MODEL,) if figure == "accuracy" else (MODEL, copy.deepcopy(MODEL))
    if figure == "cosine" and kind in ("one logit", "a number"):
        assert getattr(quality, figure)(*models, [(X, LABELS)], FORWARD[kind]) == pytest.approx(1)
        return
    batch = (X, LABELS[:1]) if figure == "accuracy" and kind == "the model's own" else (X, LABELS)
    with pytest.raises(ValueError, match=said):
        getattr(quality, figure)(*models, [batch], FORWARD[kind])


def test_what_is_no_model_and_no_batches() -> None:
    for call in (
        lambda: quality.accuracy("model", [(X, LABELS)]),
        lambda: quality.agreement(MODEL, "reference", [X]),
        lambda: quality.cosine(None, MODEL, [X]),
        lambda: quality.perplexity(None, torch.arange(9), length=4),
    ):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got "):
            call()
    with pytest.raises(ValueError, match="batches must be a list or another iterable of batches, got dict"):
        quality.accuracy(MODEL, {"x": X})


def test_labels_of_any_mapping() -> None:
    batch = UserDict(x=X, labels=MODEL(X).argmax(-1))
    assert quality.accuracy(MODEL, [batch], lambda model, batch: model(batch["x"])) == 1
