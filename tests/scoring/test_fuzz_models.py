"""Scores of random networks against the oracle, for batch rows and sample rows, read in several ways.

``make fuzz`` draws OBC_FUZZ_MODELS networks from the number OBC_FUZZ_FIRST on; the closing lines count them and name
the worst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from models import Case
from parity import TOLERANCE, error, expected_scores
from random_models import random_case, scales
from snapshot import Snapshot, unusual
from torch import Tensor

import obc

FIRST = int(os.environ.get("OBC_FUZZ_FIRST", "0"))
MODELS = range(FIRST, FIRST + int(os.environ.get("OBC_FUZZ_MODELS", "20")))

# The error of the root of a score, relative to the size of what the row sums up (random_models.scales). A network of a
# few dozen operations, each off by up to 6e-8, and sums of a few thousand terms: about 1e-6, with room for the few
# whose gradients grow on their way back.
OF_SCALE = 1e-5
# Roots of scores below this share of the scale have cancelled, so that their own digits mean little.
CANCELLED = 0.1
# Of a model's largest scale: at or below it the oracle's gradients are zero, as before the mean of an InstanceNorm,
# which is its bias; float32 then leaves about one rounding of what did not arrive.
NOTHING = 1e-7


@dataclass
class Worst:
    """The largest error so far, and where."""

    figure: float = 0.0
    where: str = "nowhere"

    def take(self, figure: float, where: str) -> None:
        if figure > self.figure:
            self.figure, self.where = figure, where


checked: set[int] = set()
worst_scale, worst_score = Worst(), Worst()


@pytest.fixture(scope="module", autouse=True)
def _print_worst(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz: {len(checked)} random models, batch rows and sample rows, in float32")
        print(f"fuzz: largest error of a root {worst_scale.figure:.1e} of the layer's scale ({worst_scale.where})")
        relative = f"{worst_score.figure:.1e} ({worst_score.where})"
        print(f"fuzz: largest relative error of a score that did not cancel {relative}")


def in_one_call(case: Case, rows: str) -> obc.Scores:
    return obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)


def by_micro_batches(case: Case, rows: str) -> obc.Scores:
    """Two backwards of unequal parts in every row."""
    if rows == "sample":
        return in_one_call(case, rows)
    scorer = obc.JacobianScorer(case.model.eval())
    with scorer:
        for x, target in case.batches:
            with scorer.row():
                for part in (slice(0, 1), slice(1, None)):
                    (case.losses(case.model, (x[part], target[part])).sum() / len(x)).backward()
    return scorer.scores()


def resumed(case: Case, rows: str) -> obc.Scores:
    """A new scorer for every batch, which resumes from the state of the one before."""
    if rows == "sample":
        return in_one_call(case, rows)
    state = None
    for batch in case.batches:
        scorer = obc.JacobianScorer(case.model.eval())
        if state is not None:
            scorer.load_state_dict(state)
        with scorer, scorer.row():
            case.loss(case.model, batch).backward()
        state = scorer.state_dict()
    return scorer.scores()


WAYS = [in_one_call, by_micro_batches, resumed]


def compare(got: Tensor | None, expected: Tensor | None, scale: float, where: str) -> None:
    assert (got is None) == (expected is None), where
    if got is None or expected is None:
        return
    assert got.shape == expected.shape, where
    assert bool(got.isfinite().all()), where
    figure = float((got.double().sqrt() - expected.sqrt()).abs().max()) / scale
    worst_scale.take(figure, where)
    assert figure <= OF_SCALE, f"{where}: off by {figure:.1e} of the layer's scale"
    if float(expected.max().sqrt()) >= CANCELLED * scale:
        relative = error(got, expected)
        worst_score.take(relative, where)
        assert relative <= TOLERANCE, f"{where}: relative error {relative:.1e}"


@pytest.mark.sampled(members=10)
@pytest.mark.parametrize("number", MODELS)
def test_random_models_match_the_oracle(number: int) -> None:
    case = random_case(number)
    way = WAYS[number % len(WAYS)]
    for rows in ("batch", "sample"):
        expected, scale = expected_scores(case, rows), scales(case, rows)
        nothing = NOTHING * max(scale.values())
        snapshot = Snapshot(unusual(case.model) if way is in_one_call else case.model)
        with torch.random.fork_rng():
            scores = way(case, rows)
        snapshot.assert_restored()
        for name, sides in expected.items():
            where = f"model {number}, rows={rows!r}, {way.__name__}, {name!r} ({scores.coverage[name]})"
            if name not in scores:
                assert not any(side is not None and side.any() for side in sides), where
                continue
            for side, truth in zip(("out_channels", "in_channels"), sides, strict=True):
                got = getattr(scores[name], side)
                if scale.get(name, 0.0) > nothing:
                    compare(got, truth, scale[name], f"{where} {side}")
                else:
                    assert got is None or float(got.max().sqrt()) <= nothing, f"{where} {side}"
    checked.add(number)
