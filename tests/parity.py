"""How close scores are to the oracle's: the measure and the tolerance of every comparison, and a user's own loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import oracle
import torch
from models import Case
from torch import Tensor

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
    """What a user's own loop does."""
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
