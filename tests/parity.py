"""How close scores are to the oracle's: the measure and the tolerance of every comparison, and a user's own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import oracle
import torch
from models import Case
from torch import Tensor, nn

import obc

# The demand for float32. A float32 sum of n terms of either sign is off by about sqrt(n) * 6e-8 of their
# size, and terms cancel: a sum a hundred times smaller than its terms still keeps five digits.
TOLERANCE = 1e-4


def error(got: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference, relative to the largest expected score of the layer."""
    assert (got is None) == (expected is None), f"got {got}, expected {expected}"
    if got is None or expected is None:
        return 0.0
    assert got.shape == expected.shape, f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    largest = expected.abs().max().item()
    difference = (got.double() - expected).abs().max().item()
    return difference / largest if largest > 0 else difference


def errors(scores: obc.Scores, expected: oracle.Rows, names: Iterable[str] | None = None) -> dict[str, float]:
    """The error of every module of the oracle (or of ``names``), the worse of its two sides."""
    chosen = list(expected) if names is None else list(names)
    found = {}
    for name in chosen:
        out, in_ = expected[name]
        found[name] = max(error(scores[name].out_channels, out), error(scores[name].in_channels, in_))
    return found


def assert_parity(
    scores: obc.Scores, expected: oracle.Rows, names: Iterable[str] | None = None, tolerance: float = TOLERANCE
) -> None:
    for name, found in errors(scores, expected, names).items():
        assert found <= tolerance, f"{name} ({scores.coverage[name]}): relative error {found:.2e} > {tolerance:.0e}"


def expected_scores(case: Case, rows: str = "batch") -> oracle.Rows:
    return oracle.scores(case.oracle_model, case.batches, case.loss_fn(rows), rows=rows)


def score_in_a_loop(
    scorer: obc.JacobianScorer, case: Case, batches: list[Any] | None = None, loss_scale: float = 1.0
) -> obc.Scores:
    """A user's own loop."""
    with scorer:
        for batch in case.batches if batches is None else batches:
            with scorer.row(loss_scale=loss_scale):
                (case.loss(case.model, batch) * loss_scale).backward()
    return scorer.scores()


def assert_equal(first: obc.Scores, second: obc.Scores) -> None:
    """The same modules with the same bits."""
    assert list(first) == list(second)
    for name in first:
        for side in ("out_channels", "in_channels"):
            one, other = getattr(first[name], side), getattr(second[name], side)
            assert (one is None) == (other is None), f"{name}.{side}"
            assert one is None or torch.equal(one, other), f"{name}.{side} differs"


def eager_scores(case: Case, model: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Any:
    """Scores from plain weight gradients in the model's own precision: as good as that precision gets."""
    model = copy.deepcopy(model).requires_grad_()
    modules = oracle.scorable(model)
    total: dict[str, list[Tensor | None]] = {}
    for batch in case.batches:
        model.zero_grad()
        with context():
            loss = case.loss(model, batch)
        loss.backward()
        for name, module in modules.items():
            wide = copy.deepcopy(module).double()
            bias = getattr(module, "bias", None)
            sides = oracle.row(wide, module.weight.grad.double(), None if bias is None else bias.grad.double())
            squares = [None if side is None else side.square() for side in sides]
            before = total.get(name, [0.0 if side is not None else None for side in sides])
            total[name] = [None if s is None else s + b for s, b in zip(squares, before, strict=True)]
    return {name: tuple(sides) for name, sides in total.items()}
