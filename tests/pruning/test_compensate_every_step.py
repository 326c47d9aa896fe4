"""obc.prune with compensation after every step: what the next step scores, and what the result is."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_families import FAMILIES

import obc
from obc.demo import models as demo_models

SHARES = [0.85, 0.7]


def cnn() -> tuple[nn.Module, Any, list[Any], Any]:
    torch.manual_seed(0)
    model = randomise(demo_models.ResidualCNN()).eval()
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(6)]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1])

    return model, torch.zeros(1, 1, 8, 8), batches, loss


def llama() -> tuple[nn.Module, Any, list[Any], Any]:
    case = FAMILIES["llama"]()
    return case.model, None, list(case.batches), case.loss


MODELS = {"cnn": cnn, "llama": llama}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["correct", "ls"])
@pytest.mark.parametrize("name", MODELS)
def test_the_second_step_scores_what_the_first_compensation_made(name: str, how: Any) -> None:
    model, example, batches, loss = MODELS[name]()
    original, scored, after = copy.deepcopy(model), [], []

    def watched(network: nn.Module, batch: Any) -> Tensor:
        if network is model:
            scored.append(weights(network))
        return loss(network, batch)

    def keep(result: obc.PruningResult) -> None:
        after.append((weights(result.model), result.plan, len(scored)))

    result = obc.prune(
        model,
        example,
        batches,
        watched,
        macs=SHARES[-1],
        steps=SHARES,
        compensate=how,
        compensate_every_step=True,
        on_step=keep,
        progress=False,
    )
    (first, plan, calls), (second, last_plan, _) = after
    assert same(scored[calls], first)  # what the second step reads first
    assert same(weights(model), second)  # verified with its slices, and given back what compensation found

    # Each compensation starts from slices of the unpruned model: one of them by hand gives the same.
    for known, kept_plan in ((first, plan), (second, last_plan)):
        alone = kept_plan.apply(copy.deepcopy(original))
        obc.recalibrate_norms(alone, batches, loss, original_model=original, plan=kept_plan)
        obc.compensate(alone, original, kept_plan, batches, outputs_inside(loss), mode=how, progress=False)
        assert same(weights(alone), known)
    if how == "correct":
        assert result.report.compensation.final_error < result.report.compensation.naive_error
    assert result.report.error is not None  # the naive model was compared with the masked one


def outputs_inside(loss: Any) -> Any:
    """The model's outputs while the loss is computed, which obc.prune preserves without a forward_fn."""

    def forward(model: nn.Module, batch: Any) -> list[Any]:
        found: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: found.append(output))
        loss(model, batch)
        handle.remove()
        return found

    return forward


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in ((True, True), ("ls", False), ("seq", False), ("mean", False))
]


@pytest.mark.parametrize(("how", "by_default"), [("correct", True), *SLOW])
def test_by_default_errors_are_corrected_after_every_step(how: Any, by_default: bool) -> None:
    found = {}
    for every in (None, by_default):
        model, example, batches, loss = cnn()
        options = {"compensate": how, "compensate_every_step": every, "progress": False}
        result = obc.prune(model, example, batches, loss, macs=0.5, steps=3, **options)
        found[every] = weights(model)
        assert result.report.provenance["compensate"].endswith(" after every step") == by_default
    assert same(found[None], found[by_default])


@pytest.mark.slow
def test_one_step_is_compensation_at_the_end() -> None:
    results = []
    for every in (False, True):
        model, example, batches, loss = cnn()
        options = {"compensate": "correct", "compensate_every_step": every, "progress": False}
        obc.prune(model, example, batches, loss, macs=0.6, steps=1, **options)
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("compensate", [None, "mean", "fusion"])
def test_ways_that_know_no_steps_are_refused(compensate: Any) -> None:
    model, example, batches, loss = cnn()
    before = weights(model)
    with pytest.raises(ValueError, match=f"compensate_every_step=True is for .* got compensate={compensate!r}"):
        obc.prune(model, example, batches, loss, macs=0.6, compensate=compensate, compensate_every_step=True)
    assert same(before, weights(model))


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_put_back(name: str) -> None:
    model, example, batches, loss = MODELS[name]()
    original = weights(model)
    plan = obc.prune(model, example, batches, loss, macs=0.8, steps=1, recalibrate=False, progress=False).plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(obc.PlanError):
        plan.verify(original, model)
    plan.put_slices(original, model)
    plan.verify(original, model)


class Biased(nn.Module):
    """Residual blocks whose last biases are compensated before the stream that they write to is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.first = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.last = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, last in zip(self.first, self.last, strict=True):
            x = x + last(F.relu(first(x)))
        return self.head(x.mean((2, 3)))


def test_biases_that_compensation_changes_and_a_later_step_cuts() -> None:
    torch.manual_seed(0)
    model, batches = Biased().eval(), [(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(12)]
    widths: list[tuple[int, int]] = []
    with torch.no_grad():  # its units count least
        model.first[0].weight.mul_(0.3)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1])

    def note(result: obc.PruningResult) -> None:
        widths.append((result.report.widths["stem"][1], result.report.widths["first.0"][1]))

    arguments: Any = {"macs": 0.75, "steps": 12, "compensate": "correct", "on_step": note, "progress": False}
    result = obc.prune(model, batches[0][0], batches, loss, min_units=10, **arguments)  # then the stream has to go
    assert any(after[0] < before[0] and before[1] < 12 for before, after in itertools.pairwise(widths))
    assert result.report.error is not None
    assert result.report.error < result.report.tolerance
