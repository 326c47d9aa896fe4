"""Scoring of one side of a module: the same rows as when both are read, and nothing placed or kept for the other."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from models import Case
from nasty import NASTY

import obc
from obc.scoring.results.scores import Scores

CASES = {
    "residual-cnn": models.residual_cnn,
    "conv2d": lambda: models.convolutions(2),
    "linears": models.linears,
    "tied": models.tied,
    "llama-tied": models.llama_tied,
    "vit": models.vit,
    "gpt2": models.gpt2,
    **{
        name: NASTY[name] for name in ("in-place-after-conv", "input-changed", "used-twice", "keywords-only", "adapted")
    },
}


def scores_of(make: Any, rows: str, modules: Any = None, **options: Any) -> tuple[Case, Scores]:
    torch.manual_seed(0)
    case = make()
    kind: Any = rows
    loss = case.loss_fn(rows)
    return case, obc.score(case.model, case.batches, loss, rows=kind, modules=modules, keep_rows=True, **options)


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name", CASES)
def test_one_side_is_read_as_it_is_beside_the_other(name: str, side: str, rows: str) -> None:
    _, both = scores_of(CASES[name], rows)
    attribute, other = ("in_channels", "out_channels") if side == "in" else ("out_channels", "in_channels")
    wanted = {module: [side] for module, channels in both.items() if getattr(channels, attribute) is not None}
    case, one = scores_of(CASES[name], rows, wanted)
    assert set(one) == set(wanted)
    weights = [id(getattr(module, "weight", module)) for key, module in case.model.named_modules() if key in wanted]
    for module in wanted:
        for got, expected in ((one, both), (one.rows, both.rows)):
            truth = getattr(expected[module], attribute)
            # A layer's small entries are what is left of large summands, so the bound is also of its largest.
            bound = 1e-6 * float(truth.abs().max())
            torch.testing.assert_close(getattr(got[module], attribute), truth, rtol=1e-4, atol=bound)
        if len(weights) == len(set(weights)):  # of tied weights, a side may be another's other one
            assert getattr(one[module], other) is None
            assert getattr(one.rows[module], other) is None


def test_no_gate_is_placed_on_the_other_side() -> None:
    case = models.residual_cnn()
    wanted = {name: ["in"] for name, m in case.model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    scorer = obc.JacobianScorer(case.model, modules=wanted)

    def after(name: str) -> set[str]:
        return {hook.__name__ for hook in case.model.get_submodule(name)._forward_hooks.values()}

    with obc.JacobianScorer(case.model, modules=list(wanted)):
        assert all("_after" in after(name) for name in wanted)  # the hook with an output's gate
    with scorer:
        assert not any("_after" in after(name) for name in wanted)
        for batch in case.batches:
            with scorer.row():
                case.loss(case.model, batch).backward()
    in_channels = sum(case.model.get_submodule(name).in_channels for name in wanted)
    assert scorer.rows_bytes(1) == 4 * in_channels


def test_a_state_of_other_sides_is_refused() -> None:
    case = models.residual_cnn()
    name = next(name for name, m in case.model.named_modules() if isinstance(m, torch.nn.Conv2d))
    state = obc.JacobianScorer(case.model, modules={name: ["in"]}).state_dict()
    with pytest.raises(ValueError, match="of another model or other options"):
        obc.JacobianScorer(case.model, modules=[name]).load_state_dict(state)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"0": ["in"], "nowhere": ["in"]}, "no module 'nowhere'"),
        ({"0": ["input"]}, "'in', 'out' or both"),
        ({"0": []}, "or both, got"),
    ],
)
def test_what_is_no_side_or_no_module_is_refused(modules: Any, message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        obc.JacobianScorer(model, modules=modules)
