"""Compensation in use: norms, flags, processes; and bad input."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from prunable import RECIPES, ConvChain
from redundant import MODES, batches
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from obc.recovery import (
    Kept,
    PlanError,
    PruningPlan,
    compensate,
    recalibrate_norms,
)
from obc.recovery.calibration import batch_norms


def test_recalibrated_norms_have_the_batches_statistics() -> None:
    model = ConvChain()
    norm = model.features[1]
    model.train()
    data = [torch.randn(32, 2, 8, 8) + 1 for _ in range(3)]
    tracked = norm.num_batches_tracked.clone()
    recalibrate_norms(model, data)
    activations = [model.features[0](x) for x in data]
    mean = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    var = torch.stack([a.var((0, 2, 3)) for a in activations]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, var, rtol=1e-4)
    assert norm.training
    assert norm.momentum == 0.1
    assert torch.equal(norm.num_batches_tracked, tracked)


def test_compensated_norms_have_the_statistics_of_the_final_weights() -> None:
    """Estimating them once more from the same batches changes nothing."""
    pruned, data = RECIPES["resnet"].prune(), batches("resnet", 5)
    before = [norm.running_mean.clone() for norm in batch_norms(pruned.model)]
    report = compensate(pruned.model, pruned.original, pruned.plan, data, mode="seq")
    assert report.norms_recalibrated
    again = copy.deepcopy(pruned.model)
    recalibrate_norms(again, data[:4], original_model=pruned.original, plan=pruned.plan)  # the fifth is held out
    assert_close(again.state_dict(), pruned.model.state_dict(), rtol=0, atol=0)
    # Those before the first pruned layer see what they always saw.
    assert not all(torch.equal(norm.running_mean, mean) for norm, mean in zip(batch_norms(again), before, strict=True))


@pytest.mark.parametrize(("mode", "asked"), [("seq", False), ("ls", True)], ids=["not asked for", "harmful"])
def test_norms_that_are_not_recalibrated_stay_as_they_were(mode: str, asked: bool) -> None:
    """Statistics that fit batches unlike those that are held out do harm there."""
    pruned = RECIPES["resnet"].prune()
    before = copy.deepcopy([norm.state_dict() for norm in batch_norms(pruned.model)])
    data = batches("resnet", 5)
    if asked:
        data[:4] = [20 * batch - 30 for batch in data[:4]]
    report = compensate(pruned.model, pruned.original, pruned.plan, data, mode=mode, recalibrate_norms=asked)
    assert not report.norms_recalibrated
    assert_close([norm.state_dict() for norm in batch_norms(pruned.model)], before, rtol=0, atol=0)


def test_norms_that_make_no_difference_stay_as_they_were() -> None:
    """Beside a layer whose compensation does harm: the error with new statistics is the naive one, not below it."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.consumer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return self.consumer(x[:, : self.consumer.weight.shape[1]])

    original = Beside().double()
    pruned = copy.deepcopy(original)
    pruned.consumer.weight = nn.Parameter(original.consumer.weight[:, :3].detach())
    plan = PruningPlan({"consumer": Kept(None, torch.arange(3))})
    x = torch.randn(64, 4, dtype=torch.float64)
    x[:, 3] = x[:, 0]
    report = compensate(pruned, original, plan, [x, x * torch.tensor([1.0, 1, 1, -1])])
    assert not report.layers["consumer"].applied
    assert not report.norms_recalibrated
    assert_close(pruned.norm.state_dict(), original.norm.state_dict(), rtol=0, atol=0)


def test_models_and_their_flags_are_left_as_they_were() -> None:
    pruned = RECIPES["resnet"].prune()
    pruned.model.train()
    pruned.model.norm1.eval()
    compensate(pruned.model, pruned.original, pruned.plan, batches("resnet", 3), mode="seq")
    assert pruned.model.training
    assert not pruned.model.norm1.training
    assert not pruned.original.training
    assert not any(module._forward_pre_hooks for model in (pruned.model, pruned.original) for module in model.modules())
    assert all(parameter.requires_grad for parameter in pruned.model.parameters())


def _compensate_in_two_processes(rank: int, port: int, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    try:
        for mode in MODES:
            pruned = RECIPES["resnet"].prune()
            mine = batches("resnet")[5 * rank :][:5]  # the fifth of each process is held out, as of all ten
            report = compensate(pruned.model, pruned.original, pruned.plan, mine, mode=mode, process_group=group)
            state_dict = {key: tensor.numpy() for key, tensor in pruned.model.state_dict().items()}
            results[mode, rank] = (state_dict, report.final_error, [layer.applied for layer in report.layers.values()])
        with pytest.raises(ValueError, match="got 1 batches"):
            compensate(pruned.model, pruned.original, pruned.plan, mine[: 1 + rank], process_group=group)
        results["refused", rank] = True
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_batches_of_their_own_decide_as_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_compensate_in_two_processes, (port, results), nprocs=2)
    for mode in MODES:
        pruned = RECIPES["resnet"].prune()
        report = compensate(pruned.model, pruned.original, pruned.plan, batches("resnet"), mode=mode)
        for rank in range(2):
            state_dict, final_error, applied = results[mode, rank]
            assert final_error == pytest.approx(report.final_error, rel=1e-9)
            assert applied == [layer.applied for layer in report.layers.values()]
            for key, tensor in pruned.model.state_dict().items():
                assert (torch.from_numpy(state_dict[key]) - tensor).abs().max() <= 1e-9, key
                assert (state_dict[key] == results[mode, 0][0][key]).all(), key
    assert results["refused", 0]
    assert results["refused", 1]


def rejected(change) -> None:
    pruned = RECIPES["flatten"].prune()
    data = batches("flatten", 3)
    options: dict = {}
    data = change(pruned, data, options) or data
    compensate(pruned.model, pruned.original, pruned.plan, data, **options)


def trained(pruned, data, options) -> None:
    with torch.no_grad():
        pruned.model.hidden.weight.add_(1)


def unreached(pruned, data, options) -> None:
    options["forward_fn"] = lambda model, x: model.conv1(x).mean()


def parametrised(pruned, data, options) -> None:
    parametrizations.weight_norm(pruned.model.hidden)


def compiled(pruned, data, options) -> None:
    pruned.model = torch.compile(pruned.model)


def itself(pruned, data, options) -> None:
    pruned.original = pruned.model


def compiled_layer(pruned, data, options) -> None:
    pruned.original.hidden.compile(backend="eager")


BAD = {
    "itself": (itself, ValueError, "are one object; pass the unpruned model"),
    "trained": (trained, PlanError, r"hidden\.weight: .* other values"),
    "unreached": (unreached, ValueError, "no calibration batch reached conv2; pass batches"),
    "one-batch": (lambda pruned, data, options: data[:1], ValueError, "got 1 batches; pass at least two"),
    "mode": (
        lambda pruned, data, options: options.update(mode="lsq"),
        ValueError,
        "mode must be one of 'correct', 'ls', 'seq', got",
    ),
    "ridge": (
        lambda pruned, data, options: options.update(ridge=-1.0),
        ValueError,
        "ridge must not be negative, got -1",
    ),
    "parametrised": (parametrised, ValueError, "hidden is parametrised"),
    "compiled-layer": (compiled_layer, ValueError, "the original model: hidden is compiled"),
    "compiled": (compiled, ValueError, "the pruned model is compiled"),
}


@pytest.mark.parametrize("fault", BAD)
def test_rejects(fault: str) -> None:
    change, error, message = BAD[fault]
    with pytest.raises(error, match=message):
        rejected(change)


def test_too_few_samples_without_a_ridge_are_an_error() -> None:
    pruned = RECIPES["vit"].prune()
    data = [RECIPES["vit"].inputs(1, seed=seed)[:, :1].repeat(1, 5, 1) for seed in range(2)]
    with pytest.raises(
        ValueError, match=r"attention\.out: its Gram matrix is singular .* it saw 5 positions for 4 columns"
    ):
        compensate(pruned.model, pruned.original, pruned.plan, data, mode="ls", ridge=0.0)


def test_fewer_positions_than_channels_are_named() -> None:
    pruned = RECIPES["flatten"].prune()
    with pytest.warns(UserWarning, match=r"head \(2 positions for 5 channels\); pass more batches") as warned:
        compensate(pruned.model, pruned.original, pruned.plan, [RECIPES["flatten"].inputs(2, s) for s in range(2)])
    assert "conv2" not in str(warned[0].message)


def test_recalibrate_norms_needs_batches() -> None:
    with pytest.raises(ValueError, match="got no batches"):
        recalibrate_norms(ConvChain(), iter(()))
