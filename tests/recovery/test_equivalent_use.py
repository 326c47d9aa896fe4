"""Equivalent Pruning in use: files, optimizers, processes, break-even; and refusals."""

from __future__ import annotations

import copy
import socket
import warnings

import pytest
import torch
from folding import EXACT, folded, loss_of, perturb_factors
from prunable import RECIPES, FlattenNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from obc.recovery import Kept, PlanError, PruningPlan, equivalent_pruning, merge


def test_break_even_is_where_the_multiplications_are_equal() -> None:
    """o = 12, i = 8 to k = 6, j = 4, a kernel of 9: the smaller of the two orders, against the explicit layers."""
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 2, 3))
    narrow, wide = torch.arange(4), torch.arange(6)
    plan = PruningPlan({"0": Kept(narrow), "1": Kept(wide, narrow), "2": Kept(None, wide)})
    pruned = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3))
    for name, kept in plan.items():
        source, target = original.get_submodule(name), pruned.get_submodule(name)
        rows = torch.arange(source.out_channels) if kept.out_channels is None else kept.out_channels
        columns = torch.arange(source.in_channels) if kept.in_channels is None else kept.in_channels
        target.weight, target.bias = nn.Parameter(source.weight[rows][:, columns]), nn.Parameter(source.bias[rows])
    equivalent = equivalent_pruning(pruned, original.state_dict(), plan)
    fold = 9 * min(6 * 12 * 8 + 6 * 8 * 4, 12 * 8 * 4 + 6 * 12 * 4)
    explicit_per_position = 12 * 8 * 9 + 6 * 12 + 8 * 4
    naive_per_position = 6 * 4 * 9
    assert equivalent.break_even["1"] == pytest.approx(fold / (explicit_per_position - naive_per_position))


@pytest.mark.parametrize(
    "inputs", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "mapping"]
)
def test_warns_of_layers_below_their_break_even(inputs) -> None:
    pruned = RECIPES["flatten"].prune()
    few, many = RECIPES["flatten"].inputs(1), RECIPES["flatten"].inputs(64)
    statistics = pruned.model.norm1.running_mean.clone()
    with pytest.warns(UserWarning, match=r"hidden \(T = 1, T\* = [0-9]+\).*accumulate.*'reduced'") as warned:
        equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan, example_inputs=inputs(few))
    assert "conv1" not in str(warned[0].message)  # 36 positions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, example_inputs=inputs(many))
    assert torch.equal(pruned.model.norm1.running_mean, statistics)


@pytest.mark.parametrize("order", ["BC", "BCB"])
def test_rejects_norms_before_the_compressor(order: str) -> None:
    pruned = RECIPES["flatten"].prune()
    with pytest.raises(ValueError, match=rf"conv1: order '{order}' has a norm .* use order='CB'"):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, order=order)
    assert not any(map(parametrize.is_parametrized, pruned.model.modules()))
    with pytest.raises(ValueError, match="order must be 'CB', got 'CBC'"):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, order="CBC")


def test_rejects_unknown_factors() -> None:
    pruned = RECIPES["flatten"].prune()
    with pytest.raises(ValueError, match="factors must be 'full' or 'reduced', got 'half'"):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, factors="half")


def test_export() -> None:
    _, equivalent = folded("swiglu")
    perturb_factors(equivalent)
    model, x = equivalent.model.eval(), RECIPES["swiglu"].inputs()
    exported = torch.export.export(model, (x,)).module()
    assert (exported(x) - model(x)).abs().max() <= EXACT


def test_state_dict_resumes_training(tmp_path) -> None:
    pruned, equivalent = folded("flatten")
    perturb_factors(equivalent)
    torch.save(equivalent.model.state_dict(), tmp_path / "folded.pt")
    pruned.plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    resumed = equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, plan)
    resumed.model.load_state_dict(torch.load(tmp_path / "folded.pt", weights_only=True), strict=True)
    x = RECIPES["flatten"].inputs()
    assert torch.equal(resumed.model(x), equivalent.model(x))


def test_param_groups() -> None:
    _, equivalent = folded("chain")
    own, factors = equivalent.param_groups(lr=0.1, weight_decay=0.02, lr_div=5.0, wd_div=4.0)
    assert (own["lr"], own["weight_decay"]) == (0.1, 0.02)
    assert (factors["lr"], factors["weight_decay"]) == (0.1 / 5, 0.02 / 4)
    assert equivalent.param_groups(0.1, 0.02, wd_div=0)[1]["weight_decay"] == 0
    everything = [id(parameter) for group in (own, factors) for parameter in group["params"]]
    assert sorted(everything) == sorted(id(parameter) for parameter in equivalent.model.parameters())
    assert {parameter.dim() for parameter in factors["params"]} == {2}


def test_decompressors_can_start_elsewhere() -> None:
    pruned = RECIPES["flatten"].prune()
    start = torch.randn(8, len(pruned.plan["conv2"].in_channels), dtype=torch.float64)
    equivalent = equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, decompressor={"conv2": start})
    weight = pruned.state_dict["conv2.weight"][pruned.plan["conv2"].out_channels]
    expected = torch.einsum("oihw,ij->ojhw", weight, start)
    assert (equivalent.model.conv2.weight - expected).abs().max() <= EXACT


def _train_in_two_processes(rank: int, port: int, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    _, equivalent = folded("flatten")
    model = nn.parallel.DistributedDataParallel(equivalent.model.eval())
    optimizer = torch.optim.SGD(equivalent.param_groups(0.05, 1e-3), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, RECIPES["flatten"].inputs(seed=rank)).backward()
        optimizer.step()
    results[rank] = {name: tensor.detach().numpy() for name, tensor in equivalent.merge().state_dict().items()}
    del model  # before its process group: destroying both at once can wait for ever (torch 2.13)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_train_in_two_processes, (port, results), nprocs=2)
    _, equivalent = folded("flatten")
    model = equivalent.model.eval()
    optimizer = torch.optim.SGD(equivalent.param_groups(0.05, 1e-3), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(model, RECIPES["flatten"].inputs(seed=rank)) / 2).backward()
        optimizer.step()
    for name, tensor in equivalent.merge().state_dict().items():
        for rank in range(2):
            assert (torch.from_numpy(results[rank][name]) - tensor).abs().max() <= EXACT, name


def test_a_frozen_layer_stays_frozen() -> None:
    pruned = RECIPES["chain"].prune()
    pruned.model.features[0].weight.requires_grad_(False)
    equivalent = equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan)
    assert not equivalent.model.features[0].parametrizations.weight.original.requires_grad
    assert not equivalent.merge().features[0].weight.requires_grad


def test_merging_twice_is_refused() -> None:
    _, equivalent = folded("chain")
    equivalent.merge()
    with pytest.raises(RuntimeError, match="merged already, or never folded"):
        equivalent.merge()
    with pytest.raises(RuntimeError, match="merged already"), equivalent.accumulate():
        pass


def test_an_optimizer_from_before_the_merge_is_refused() -> None:
    _, equivalent = folded("chain")
    optimizer = torch.optim.SGD(equivalent.param_groups(0.1, 0.0))
    merged = equivalent.merge()
    with pytest.raises(RuntimeError, match=r"features\.0\.weight from before the merge; build a new optimizer"):
        optimizer.step()
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    loss_of(merged, RECIPES["chain"].inputs()).backward()
    optimizer.step()


def test_rejects_a_trained_model() -> None:
    pruned = RECIPES["flatten"].prune()
    with torch.no_grad():
        pruned.model.conv2.weight.add_(1e-3)
    before = copy.deepcopy(pruned.model.state_dict())
    with pytest.raises(PlanError, match=r"conv2\.weight: .* other values"):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan)
    assert list(pruned.model.state_dict()) == list(before), "a refused model must stay as it was"


def test_rejects_parametrised_and_compiled_models() -> None:
    pruned = RECIPES["flatten"].prune()
    with pytest.raises(ValueError, match="compiled"):
        equivalent_pruning(torch.compile(pruned.model), pruned.state_dict, pruned.plan)
    parametrizations.weight_norm(pruned.model.conv2)
    with pytest.raises(ValueError, match="conv2 is already parametrised"):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"conv1": torch.eye(2)}, "inputs were not pruned: conv1"),
        ({"conv2": torch.eye(8)}, r"decompressor of conv2 must be \(8, 4\), got \(8, 8\)"),
    ],
)
def test_rejects_decompressors_that_do_not_fit(start: dict[str, Tensor], message: str) -> None:
    pruned = RECIPES["flatten"].prune()
    with pytest.raises(ValueError, match=message):
        equivalent_pruning(pruned.model, pruned.state_dict, pruned.plan, decompressor=start)


def test_merge_refuses_further_parametrisations() -> None:
    _, equivalent = folded("flatten")
    parametrizations.weight_norm(equivalent.model.conv2)
    with pytest.raises(RuntimeError, match=r"conv2\.weight has other parametrisations"):
        equivalent.merge()


def test_merge_refuses_a_model_that_was_never_folded() -> None:
    with pytest.raises(RuntimeError, match="never folded"):
        merge(FlattenNet())
