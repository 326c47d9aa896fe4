"""obc.recover: what trains comes closer to the teacher, is a plain model afterwards, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import obc


def networks() -> tuple[nn.Module, nn.Module, obc.PruningPlan]:
    """(pruned, unpruned, plan): a small network half of whose MACs went."""
    teacher = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [(torch.randn(16, 6), torch.randint(0, 4, (16,))) for _ in range(8)]
    pruned = copy.deepcopy(teacher)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    plan = obc.prune(pruned, batches[0][0], batches, loss, macs=0.5, steps=1, progress=False).plan
    return pruned, teacher, plan


BATCHES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def divergence(teacher: nn.Module) -> Any:
    def evaluate(model: nn.Module) -> float:
        return sum(obc.Distillation().loss(model, teacher, batch).item() for batch in BATCHES)

    return evaluate


@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_training_brings_the_pruned_model_closer_and_leaves_a_plain_one(train: Any) -> None:
    pruned, teacher, plan = networks()
    before, shapes = copy.deepcopy(teacher.state_dict()), {k: v.shape for k, v in pruned.state_dict().items()}
    evaluate = divergence(teacher)
    report = obc.recover(pruned, teacher, BATCHES, steps=40, lr=0.02, train=train, plan=plan, evaluate=evaluate)
    (first, start), (last, end) = report.evaluations
    assert (first, last) == (0, 40)
    assert end < 0.7 * start
    assert evaluate(pruned) == pytest.approx(end, rel=1e-3), "merging changed what the model computes"
    assert {k: v.shape for k, v in pruned.state_dict().items()} == shapes
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.ReLU) for module in pruned.modules())
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert len(report.losses) == 40
    assert "40 steps" in str(report)


def test_folded_and_naive_training_start_from_one_function() -> None:
    pruned, teacher, plan = networks()
    starts = []
    for train in ("naive", "folded"):
        model = copy.deepcopy(pruned)
        report = obc.recover(
            model, teacher, BATCHES, steps=1, lr=1e-9, train=train, plan=plan, evaluate=divergence(teacher)
        )
        starts.append(report.evaluations[0][1])
    assert starts[0] == pytest.approx(starts[1], rel=1e-4)


@pytest.mark.parametrize("train", ["naive", "folded"])
def test_accumulated_batches_are_one_large_batch(train: Any) -> None:
    pruned, teacher, plan = networks()
    results = []
    for batches, accumulate in ((BATCHES[:4], 4), ([torch.cat(BATCHES[:4])], 1)):
        model = copy.deepcopy(pruned)
        obc.recover(
            model, teacher, batches, steps=3, lr=0.01, train=train, plan=plan, accumulate=accumulate, progress=False
        )
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_a_run_that_was_cut_short_resumes_bit_for_bit(train: Any, tmp_path: Path) -> None:
    pruned, teacher, plan = networks()
    options: dict[str, Any] = {"steps": 8, "lr": 0.01, "train": train, "plan": plan, "every": 4, "progress": False}

    def run(model: nn.Module, path: Path, stop: int | None = None) -> obc.RecoveryReport:
        torch.manual_seed(3)
        seen = 0

        def evaluate(network: nn.Module) -> float:
            nonlocal seen
            seen += 1
            if stop is not None and seen > stop:
                raise KeyboardInterrupt
            return 0.0

        return obc.recover(model, teacher, BATCHES, checkpoint=path, evaluate=evaluate, **options)

    whole = copy.deepcopy(pruned)
    run(whole, tmp_path / "whole")
    cut = copy.deepcopy(pruned)
    with pytest.raises(KeyboardInterrupt):
        run(cut, tmp_path / "cut", stop=2)  # killed at step 8's evaluation: the checkpoint is of step 4
    again = copy.deepcopy(pruned)
    report = run(again, tmp_path / "cut")
    assert report.resumed_at == 4
    assert len(report.losses) == 8
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_a_run_inside_autocast_trains_the_present_weights(train: Any, evaluated: bool) -> None:
    """Torch keeps casts of weights until the outermost autocast ends; a forward with one of its own keeps none."""
    pruned, teacher, plan = networks()

    def cast(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    def run(distillation: obc.Distillation) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = copy.deepcopy(pruned)
        torch.manual_seed(0)
        evaluate = (lambda one: float(cast(one, BATCHES[0]).sum())) if evaluated else None
        options: dict[str, Any] = {"train": train, "plan": plan, "evaluate": evaluate, "distillation": distillation}
        report = obc.recover(model, teacher, BATCHES, steps=6, lr=0.01, every=2, progress=False, **options)
        return report.losses, model.state_dict()

    losses, weights = run(obc.Distillation(forward_fn=cast))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(obc.Distillation())
    assert inside[0] == losses
    for name, value in weights.items():
        assert torch.equal(inside[1][name], value), name


def with_old_gradients(model: nn.Module) -> Any:
    model(BATCHES[0]).square().sum().backward()
    return contextlib.nullcontext()


@pytest.mark.parametrize("entered", [with_old_gradients, lambda model: torch.no_grad()], ids=["gradients", "no-grad"])
def test_what_the_caller_did_before_does_not_change_a_run(entered: Any) -> None:
    pruned, teacher, _ = networks()
    other = copy.deepcopy(pruned)
    obc.recover(pruned, teacher, BATCHES, steps=2, lr=0.01, progress=False)
    with entered(other):
        obc.recover(other, teacher, BATCHES, steps=2, lr=0.01, progress=False)
    for name, value in pruned.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_model() -> None:
    pruned, teacher, _ = networks()
    batches = [BATCHES[0], torch.full((4, 6), float("nan"))]
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        obc.recover(pruned, teacher, batches, steps=5, lr=0.01, progress=False)
    assert all(value.isfinite().all() for value in pruned.state_dict().values())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_model(train: Any, clip: float | None) -> None:
    """The loss is; the next one would not be."""
    pruned, teacher, plan = networks()
    roots = obc.Distillation(labels=1.0, label_loss=lambda outputs, batch: (0 * outputs.sum()).abs().sqrt())
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(
        ValueError, match="the loss is finite at step 0, and its gradient is not; the model keeps the par"
    ):
        obc.recover(pruned, teacher, BATCHES, steps=2, lr=0.01, train=train, plan=plan, clip=clip, distillation=roots)
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "magic"}, "train must be one of 'naive', 'folded', 'lora', got 'magic'"),
        ({"train": "folded"}, "needs plan="),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 1.0}, "warmup is a share"),
        ({"accumulate": 0}, "accumulate must be a positive integer"),
        ({"lr": float("nan")}, "lr must be finite, got nan"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"warmup": float("nan")}, "warmup is a share"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite"),
        ({"clip": -1.0}, "clip is the largest gradient norm, above 0, got -1.0; None does not clip"),
        ({"clip": 0}, "clip is the largest gradient norm, above 0, got 0"),
        ({"clip": float("nan")}, "clip is the largest gradient norm, above 0, got nan"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    pruned, teacher, _ = networks()
    with pytest.raises(ValueError, match=message):
        obc.recover(pruned, teacher, BATCHES, **({"steps": 2, "lr": 0.01, "progress": False} | changed))


@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_what_changes_with_the_model_is_no_teacher(train: Any) -> None:
    pruned, teacher, plan = networks()
    shared = copy.deepcopy(teacher)
    shared[4].bias = pruned[4].bias
    remedy = "pass the unpruned model, or a copy.deepcopy of it from before it was pruned"
    for other, said in (
        (pruned, f"the model and the teacher are one object; {remedy}"),
        (nn.DataParallel(pruned), "which shares parameters with the model: 0.weight, "),
        (shared, f"which shares parameters with the model: 4.bias; {remedy}, or freeze them"),
    ):
        before = copy.deepcopy(pruned.state_dict())
        with pytest.raises(ValueError, match=re.escape(said)):
            obc.recover(pruned, other, BATCHES, steps=1, lr=0.01, train=train, plan=plan, progress=False)
        assert all(torch.equal(pruned.state_dict()[name], value) for name, value in before.items())


def test_frozen_parameters_may_be_the_teachers() -> None:
    pruned, teacher, _ = networks()
    teacher[4].bias = pruned[4].bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obc.recover(pruned, teacher, BATCHES, steps=1, lr=0.01, progress=False)


def test_a_copy_of_the_model_is_warned_of() -> None:
    pruned, _, _ = networks()
    with pytest.warns(UserWarning, match="the teacher has the same weights as the model, .*; pass the unpruned model"):
        obc.recover(pruned, copy.deepcopy(pruned), BATCHES, steps=1, lr=0.01, progress=False)


def test_models_in_the_wrong_order_are_warned_of() -> None:
    pruned, teacher, _ = networks()
    with pytest.warns(
        UserWarning, match=r"the model has 636 parameters, more than the teacher's \d+; .* obc\.recover\(pr"
    ):
        obc.recover(teacher, pruned, BATCHES, steps=1, lr=0.01, progress=False)


def test_norms_are_not_recalibrated_against_themselves() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="the model and original_model are one object; pass the unpruned model"):
        obc.recalibrate_norms(model, BATCHES, original_model=model)


def test_a_batch_without_samples_is_refused() -> None:
    pruned, teacher, _ = networks()
    with pytest.raises(ValueError, match="batch 1 has no samples; leave empty batches out"):
        obc.recover(pruned, teacher, [BATCHES[0], torch.zeros(0, 6)], steps=2, lr=0.01, progress=False)


def test_empty_batches_are_refused() -> None:
    pruned, teacher, _ = networks()
    with pytest.raises(ValueError, match="batches is empty"):
        obc.recover(pruned, teacher, [], steps=2, lr=0.01, progress=False)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    pruned, teacher, _ = networks()
    obc.recover(pruned, teacher, BATCHES, steps=1, lr=0.01, checkpoint=tmp_path / "state", progress=False)
    other = nn.Linear(6, 4)
    with pytest.raises(
        ValueError, match="belongs to another run: other weights than it began with; delete it, or pass"
    ):
        obc.recover(other, teacher, BATCHES, steps=2, lr=0.01, checkpoint=tmp_path / "state", progress=False)
    (tmp_path / "state").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a training checkpoint, or is damaged"):
        obc.recover(pruned, teacher, BATCHES, steps=2, lr=0.01, checkpoint=tmp_path / "state", progress=False)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 0.02}, "lr=0.01, this run has 0.02"),
        ({"steps": 1}, "steps=2, this run has 1"),
        ({"train": "folded"}, "train='naive', this run has 'folded'"),
        ({"accumulate": 2}, "accumulate=1, this run has 2"),
        ({"clip": None}, "clip=1.0, this run has None"),
        ({"warmup": 0.5}, "warmup=0.05, this run has 0.5"),
        ({"distillation": obc.Distillation(temperature=2.0)}, "temperature=1.0, this run has 2.0"),
        ({"distillation": obc.Distillation(hidden=1.0, modules=["4"])}, "hidden=0.0, this run has 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_checkpoint_of_a_run_with_other_options_is_refused(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pruned, teacher, plan = networks()
    options = {"steps": 2, "lr": np.float64(0.01), "plan": plan, "checkpoint": tmp_path / "state", "progress": False}
    obc.recover(copy.deepcopy(pruned), teacher, BATCHES, **options)
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(
        ValueError, match=re.escape(f"belongs to another run: other {said}; delete it, or pass another")
    ):
        obc.recover(pruned, teacher, BATCHES, **(options | changed))
    assert all(torch.equal(pruned.state_dict()[name], value) for name, value in before.items())
    assert obc.recover(pruned, teacher, BATCHES, **options).resumed_at == 2


def test_a_checkpoint_of_other_models_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    pruned, teacher, _ = networks()
    options: dict[str, Any] = {"steps": 1, "lr": 0.01, "checkpoint": tmp_path / "state", "progress": False}
    obc.recover(copy.deepcopy(pruned), teacher, BATCHES, **options)
    others = copy.deepcopy((pruned, teacher))
    with torch.no_grad():
        for other in others:
            other[0].weight.mul_(1.5)
    for student, other, whose in ((others[0], teacher, "weights"), (pruned, others[1], "the teacher's weights")):
        with pytest.raises(ValueError, match=f"belongs to another run: other {whose} than it began with"):
            obc.recover(student, other, BATCHES, **options)


@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_hidden_states_are_compared_by_the_models_own_names(train: Any) -> None:
    """Low-rank updates stand inside the layers: names of modules are those of the pruned model."""
    pruned, teacher, plan = networks()
    distillation = obc.Distillation(logits=0.0, hidden=1.0, modules=["4"])
    report = obc.recover(
        pruned, teacher, BATCHES, steps=30, lr=0.02, train=train, plan=plan, distillation=distillation, progress=False
    )
    assert report.losses[-1] < 0.7 * report.losses[0]


def test_short_floats_are_warned_of() -> None:
    pruned, teacher, _ = networks()
    pruned, teacher = pruned.bfloat16(), teacher.bfloat16()
    batches = [batch.bfloat16() for batch in BATCHES]
    with pytest.warns(UserWarning, match="what trains is bfloat16"):
        obc.recover(pruned, teacher, batches, steps=1, lr=0.01, progress=False)


def test_a_compensated_model_is_not_folded_and_the_error_says_so() -> None:
    pruned, teacher, plan = networks()
    with torch.no_grad():
        pruned[2].weight.add_(0.1)
    with pytest.raises(obc.PlanError, match="compensated or trained can't be folded"):
        obc.recover(pruned, teacher, BATCHES, steps=1, lr=0.01, train="folded", plan=plan, progress=False)
