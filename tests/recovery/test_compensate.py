"""Compensation: the least-squares solution itself, and the decision on held-out batches."""

from __future__ import annotations

import copy

import pytest
import torch
from prunable import RECIPES
from redundant import MODES, batches, output_error, prune_redundant
from torch import Tensor, nn
from torch.testing import assert_close

from obc.recovery import (
    Kept,
    PruningPlan,
    compensate,
    equivalent_pruning,
)
from obc.recovery.compensate import RIDGES
from obc.recovery.moments import RegressionMoments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("layer", ["linear", "conv", "grouped", "transposed", "flatten"])
def test_redundant_channels_are_recovered_exactly(layer: str, bias: bool, mode: str) -> None:
    if layer == "transposed" and bias:
        bias = False  # the mean can't pass through the bias of a layer whose outputs overlap: it is regressed through 0
    pruned, inputs = prune_redundant(layer, bias)
    report = compensate(pruned.model, pruned.original, pruned.plan, inputs, mode=mode, ridge=1e-12)
    assert report.naive_error > 1e-2
    assert report.layers["consumer"].applied
    layer = report.layers["consumer"]
    assert (layer.error_after if mode == "correct" else layer.input_error_after) < 1e-9
    assert report.final_error < 1e-15
    assert output_error(pruned.model, pruned.original, [torch.randn_like(x) for x in inputs]) < 1e-15


def test_moments_solve_the_least_squares_problem() -> None:
    """Against lstsq on all rows at once: pieces, both kinds of moments, ridge, intercept and the errors reported."""
    torch.manual_seed(0)
    kept = torch.tensor([1, 2, 5])
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + torch.randn(6)
    z = x[:, kept] + 0.3 * torch.randn(200, 3, dtype=torch.float64)
    for paired, centred in ((True, True), (True, False), (False, True), (False, False)):
        regressor = z if paired else x[:, kept]
        moments = RegressionMoments(kept[None], 6, paired)
        for rows, other in zip(x.split(64), regressor.split(64), strict=True):
            moments.add_inputs(rows, other if paired else None)
        solution = moments.solve(0.0, centred)
        design = torch.cat([regressor, torch.ones(200, 1, dtype=torch.float64)], 1) if centred else regressor
        expected = torch.linalg.lstsq(design, x).solution.T
        assert (solution.decompressor - expected[:, :3]).abs().max() < 1e-10
        if centred:
            assert (solution.intercept - expected[:, 3]).abs().max() < 1e-10
        residual = x - design @ expected.T
        energy = x.square().sum()
        assert solution.error_after == pytest.approx(float(residual.square().sum() / energy))
        naive = x.clone()
        naive[:, kept] -= regressor
        assert solution.error_before == pytest.approx(float(naive.square().sum() / energy))


def test_kept_channels_stay_the_identity_and_a_large_ridge_stays_naive() -> None:
    torch.manual_seed(0)
    kept = torch.tensor([[0, 3]])
    moments = RegressionMoments(kept, 5, paired=False)
    moments.add_inputs(torch.randn(100, 5) @ torch.randn(5, 5))
    for ridge in (1e-4, 1e-1, 1e8):
        decompressor = moments.solve(ridge, False).decompressor
        assert (decompressor[kept[0]] - torch.eye(2)).abs().max() < 1e-6
    assert decompressor[[1, 2, 4]].abs().max() < 1e-6


@pytest.mark.parametrize("paired", [False, True])
def test_weighed_rows_count_as_often_as_their_weight_says(paired: bool) -> None:
    """Against rows that are repeated: sums, solutions, and errors on other rows."""
    torch.manual_seed(0)
    kept = torch.tensor([[0, 3]])
    x, z = torch.randn(60, 5, dtype=torch.float64) + 1, torch.randn(60, 2, dtype=torch.float64)
    weights = torch.randint(1, 4, (60,))
    arriving = z if paired else None
    weighed, repeated = (RegressionMoments(kept, 5, paired) for _ in range(2))
    weighed.add_inputs(x, arriving, weights)
    repeated.add_inputs(x.repeat_interleave(weights, 0), z.repeat_interleave(weights, 0) if paired else None)
    solutions = [moments.solve(1e-2, True) for moments in (weighed, repeated)]
    assert_close(solutions[0].decompressor, solutions[1].decompressor)
    assert_close(solutions[0].intercept, solutions[1].intercept)
    assert solutions[0].error_after == pytest.approx(solutions[1].error_after)
    regressor = z if paired else x[:, kept[0]]
    residual = x - regressor @ solutions[0].decompressor.T - solutions[0].intercept
    naive = x.clone()
    naive[:, kept[0]] -= regressor
    error = (weights[:, None] * residual.square()).sum() / (weights[:, None] * naive.square()).sum()
    assert weighed.relative_error(solutions[0]) == pytest.approx(float(error))


def test_a_few_tokens_of_a_large_stream_do_not_decide() -> None:
    """Two rules hold, one at ordinary tokens, another at a few whose stream is a hundred times larger."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.consumer, self.norm = nn.Linear(4, 3, bias=False), nn.LayerNorm(3)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            stream, x = batch
            return self.norm(stream + self.consumer(x[..., : self.consumer.weight.shape[1]]))

    torch.manual_seed(0)
    original = Block().double()
    pruned = copy.deepcopy(original)
    pruned.consumer.weight = nn.Parameter(original.consumer.weight[:, :3].detach())
    plan = PruningPlan({"consumer": Kept(None, torch.arange(3))})
    batches = []
    for _ in range(5):
        x, stream = torch.randn(8, 20, 4, dtype=torch.float64), torch.randn(8, 20, 3, dtype=torch.float64)
        x[..., 3] = x[..., 0]
        x[:, 0] *= 30
        x[:, 0, 3] *= -1
        stream[:, 0] *= 1000
        batches.append((stream, x))
    report = compensate(
        pruned, original, plan, batches, lambda model, batch: model(batch), ridge=1e-6, keep_decompressors=True
    )
    assert report.layers["consumer"].applied
    assert float(report.decompressors["consumer"][3, 0]) == pytest.approx(1.0, abs=0.05)


def test_a_singular_gram_matrix_takes_a_larger_ridge_and_reports_it() -> None:
    moments = RegressionMoments(torch.tensor([[0, 1]]), 3, paired=False)
    rows = torch.randn(50, 1, dtype=torch.float64)
    moments.add_inputs(rows * torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))
    solution = moments.solve(1e-17, False)
    assert solution.ridge > 1e-17
    assert solution.error_after < 1e-6


def test_constant_channels_stay_naive() -> None:
    moments = RegressionMoments(torch.tensor([[0, 1]]), 3, paired=False)
    moments.add_inputs(torch.zeros(10, 3))
    solution = moments.solve(1e-4, True)
    assert torch.equal(solution.decompressor, torch.eye(3, 2, dtype=torch.float64))


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECIPES)
def test_never_ends_below_naive_and_keeps_the_structure(name: str, mode: str) -> None:
    pruned = RECIPES[name].prune()
    naive = copy.deepcopy(pruned.model)
    original_before = copy.deepcopy(pruned.state_dict)
    data = batches(name)
    has_decompressors = mode != "correct"
    report = compensate(
        pruned.model, pruned.original, pruned.plan, data, mode=mode, keep_decompressors=has_decompressors
    )
    assert list(report.layers)
    assert report.final_error <= report.naive_error
    assert output_error(pruned.model, pruned.original, data[4::5]) == pytest.approx(report.final_error, rel=1e-9)
    assert output_error(naive, pruned.original, data[4::5]) == pytest.approx(report.naive_error, rel=1e-9)
    naive.load_state_dict(pruned.model.state_dict(), strict=True)
    for key, tensor in pruned.state_dict.items():
        assert torch.equal(tensor, original_before[key]), f"{key} of the original changed"
    assert report.final_error <= min(report.naive_error, report.compensated_error)
    applied = {key for key, layer in report.layers.items() if layer.applied}
    assert set(report.decompressors) == (applied if has_decompressors else set())


@pytest.mark.parametrize("name", ["vit", "swiglu"])
def test_helps_on_inputs_that_it_never_saw(name: str) -> None:
    pruned = RECIPES[name].prune()
    fresh = [RECIPES[name].inputs(64, seed=seed) for seed in range(900, 903)]
    before = output_error(pruned.model, pruned.original, fresh)
    compensate(pruned.model, pruned.original, pruned.plan, batches(name, 20, 32), mode="seq")
    assert output_error(pruned.model, pruned.original, fresh) < 0.9 * before


def test_a_layer_that_would_do_harm_stays_naive() -> None:
    """A dropped channel follows a kept one in the calibration batches, and does the reverse in the held-out one."""
    pruned, _ = prune_redundant("linear")
    with torch.no_grad():
        pruned.original.producer.weight.copy_(torch.eye(8, 5))
        pruned.original.producer.bias.zero_()
        pruned.original.consumer.weight.copy_(torch.ones(4, 8))
        kept = pruned.plan["producer"].out_channels
        pruned.model.producer.weight.copy_(pruned.original.producer.weight[kept])
        pruned.model.producer.bias.zero_()
        pruned.model.consumer.weight.copy_(pruned.original.consumer.weight[:, kept])
    x = torch.randn(64, 5, dtype=torch.float64)
    x[:, 2] = x[:, 0]
    reversed_x = x * torch.tensor([1.0, 1, -1, 1, 1], dtype=torch.float64)
    before = copy.deepcopy(pruned.model.state_dict())
    report = compensate(pruned.model, pruned.original, pruned.plan, [x, x, reversed_x], mode="ls")
    layer = report.layers["consumer"]
    assert not layer.applied
    assert layer.held_out > 1
    assert all(error > report.naive_error for name, error in report.tried.items() if name != "own ridges")
    assert report.tried["own ridges"] == report.naive_error
    assert layer.input_error_after < layer.input_error_before
    assert report.final_error == report.naive_error
    assert "(left naive)" in str(report)
    for key, tensor in pruned.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_one_harmful_layer_of_several_stays_naive() -> None:
    """Two branches; channel 3 follows channel 0 in the calibration batches of both, held out in one only."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sound, self.harmful = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            parts = ((self.sound, x), (self.harmful, y))
            return torch.cat([layer(part[:, : layer.weight.shape[1]]) for layer, part in parts], 1)

    original = Branches().double()
    pruned = copy.deepcopy(original)
    plan = PruningPlan({name: Kept(None, torch.arange(3)) for name in ("sound", "harmful")})
    for layer in (pruned.sound, pruned.harmful):
        layer.weight = nn.Parameter(layer.weight[:, :3].detach())
    x = torch.randn(64, 4, dtype=torch.float64)
    x[:, 3] = x[:, 0]
    turned = x * torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)
    report = compensate(pruned, original, plan, [(x, x), (x, turned)], mode="ls", ridge=1e-9)
    assert {name: layer.applied for name, layer in report.layers.items()} == {"sound": True, "harmful": False}
    assert report.layers["harmful"].held_out > 1 > report.layers["sound"].held_out
    assert report.tried["own ridges"] == report.final_error < report.tried["ridge 1e-09"]
    assert report.final_error < report.naive_error
    assert torch.equal(pruned.harmful.weight, original.harmful.weight[:, :3])


def test_seq_corrects_what_arrives() -> None:
    """The first consumer loses for good what its inputs carried: only "seq" lets the second one make up for it."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    first, second = torch.arange(5), torch.arange(8)
    plan = PruningPlan({"0": Kept(first), "2": Kept(second, first), "4": Kept(None, second)})
    naive = copy.deepcopy(original)
    for name, kept in plan.items():
        layer = naive.get_submodule(name)
        if kept.out_channels is not None:
            layer.weight = nn.Parameter(layer.weight[kept.out_channels].detach())
            layer.bias = nn.Parameter(layer.bias[kept.out_channels].detach())
        if kept.in_channels is not None:
            layer.weight = nn.Parameter(layer.weight[:, kept.in_channels].detach())
    data = [torch.randn(64, 6, dtype=torch.float64) for _ in range(10)]
    errors = {}
    for mode in MODES:
        errors[mode] = compensate(copy.deepcopy(naive), original, plan, data, mode=mode).final_error
    assert errors["seq"] < errors["ls"]


@pytest.mark.parametrize("mode", ["ls", "seq"])
def test_held_out_batches_choose_the_ridge_by_the_output(mode: str) -> None:
    """The best candidate is kept; with a given ridge only that one is tried."""
    pruned, data = RECIPES["vit"].prune(), batches("vit")
    errors = {}
    for ridge in RIDGES:
        model = copy.deepcopy(pruned.model)
        report = compensate(model, pruned.original, pruned.plan, data, mode="ls", ridge=ridge)
        errors[f"ridge {ridge:g}"] = report.tried[f"ridge {ridge:g}"]
        assert {layer.ridge for layer in report.layers.values()} == {ridge}
    report = compensate(pruned.model, pruned.original, pruned.plan, data, mode=mode)
    assert {name: error for name, error in report.tried.items() if name in errors} == pytest.approx(errors)
    assert report.final_error == min(*report.tried.values(), report.naive_error)
    assert ("layer by layer" in report.tried) == (mode == "seq")


def test_decompressors_start_equivalent_pruning() -> None:
    pruned = RECIPES["swiglu"].prune()
    compensated = copy.deepcopy(pruned.model)
    report = compensate(compensated, pruned.original, pruned.plan, batches("swiglu"), keep_decompressors=True)
    equivalent = equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, decompressor=report.decompressors)
    assert torch.allclose(equivalent.model.down.weight, compensated.down.weight, rtol=0, atol=1e-12)


def test_few_bytes_take_more_passes_and_give_the_same_result() -> None:
    pruned = RECIPES["chain"].prune()
    reports, models = [], []
    for limit in (2**31, 1):
        model = copy.deepcopy(pruned.model)
        reports.append(compensate(model, pruned.original, pruned.plan, batches("chain"), mode="ls", max_bytes=limit))
        models.append(model)
    assert reports[1].moment_bytes < reports[0].moment_bytes
    for key, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[key]), key


def test_forward_fn_nested_outputs_and_generators() -> None:
    pruned = RECIPES["vit"].prune()
    data = ({"x": x} for x in batches("vit"))
    report = compensate(
        pruned.model, pruned.original, pruned.plan, data, lambda model, batch: {"a": [model(batch["x"]), 3]}
    )
    assert report.final_error < report.naive_error
