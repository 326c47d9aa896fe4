"""Equivalent Pruning, folded: the explicit network's function, gradients and training; a merge that leaves no trace."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from explicit import explicit_model, explicit_name
from prunable import RECIPES, FlattenNet, Pruned
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from obc.equivalent import EquivalentPruning, PlanError, PruningPlan, equivalent_pruning, merge

# One optimizer step is linear in the gradients, whose rounding is 1e-16 of a sum of some hundred terms.
EXACT = 1e-11


def folded(name: str) -> tuple[Pruned, EquivalentPruning]:
    pruned = RECIPES[name].prune()
    return pruned, equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan)


def perturb_factors(equivalent: EquivalentPruning) -> None:
    """Factors away from the identity: there a gather would do."""
    with torch.no_grad():
        for factor in equivalent.param_groups(0.1, 0.0)[1]["params"]:
            factor.add_(torch.randn_like(factor), alpha=0.1)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    target = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)
    return (output - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_starts_as_the_naively_pruned_model(name: str) -> None:
    pruned, equivalent = folded(name)
    x = RECIPES[name].inputs()
    assert (equivalent.model(x) - pruned.model(x)).abs().max() <= EXACT
    assert any(parametrize.is_parametrized(module) for module in equivalent.model.modules())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", RECIPES)
def test_forward_and_gradients_are_the_explicit_networks(name: str, training: bool) -> None:
    pruned, equivalent = folded(name)
    perturb_factors(equivalent)
    explicit = explicit_model(pruned, equivalent).train(training)
    equivalent.model.train(training)
    x = RECIPES[name].inputs()
    assert (equivalent.model(x) - explicit(x)).abs().max() <= EXACT
    loss_of(equivalent.model, x).backward()
    loss_of(explicit, x).backward()
    expected = gradients(explicit)
    got = gradients(equivalent.model)
    assert {explicit_name(key, explicit) for key in got} == set(expected)
    for key, grad in got.items():
        assert (grad - expected[explicit_name(key, explicit)]).abs().max() <= EXACT, key


@pytest.mark.parametrize("name", RECIPES)
def test_trains_like_the_explicit_network(name: str) -> None:
    pruned, equivalent = folded(name)
    explicit = explicit_model(pruned, equivalent)
    models = (equivalent.model.train(), explicit.train())
    groups = equivalent.param_groups(lr=0.02, weight_decay=1e-3, lr_div=2.0, wd_div=4.0)
    twins = {explicit_name(key, explicit): parameter for key, parameter in equivalent.model.named_parameters()}
    by_id = {id(parameter): key for key, parameter in twins.items()}
    explicit_parameters = dict(explicit.named_parameters())
    explicit_groups = [
        group | {"params": [explicit_parameters[by_id[id(parameter)]] for parameter in group["params"]]}
        for group in groups
    ]
    optimizers = [torch.optim.SGD(group, momentum=0.9) for group in (groups, explicit_groups)]
    losses = []
    for step in range(200):
        x = RECIPES[name].inputs(count=6, seed=step % 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0], "the training must be a stable one"
    for key, parameter in twins.items():
        assert (parameter - explicit_parameters[key]).abs().max() <= 1e-6, key


@pytest.mark.parametrize("name", RECIPES)
def test_merged_is_the_folded_model_and_loads_into_the_naive_one(name: str) -> None:
    pruned, equivalent = folded(name)
    perturb_factors(equivalent)
    equivalent.model.eval()
    x = RECIPES[name].inputs()
    expected = equivalent.model(x)
    merged = equivalent.merge()
    assert merged is equivalent.model
    assert torch.equal(merged(x), expected)
    assert list(merged.state_dict()) == list(pruned.model.state_dict())
    naive = copy.deepcopy(pruned.model)
    naive.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(naive(x), expected)
    assert [type(module) for module in merged.modules()] == [type(module) for module in naive.modules()]


@pytest.mark.parametrize("first", ["copy", "model"])
def test_merging_one_of_two_copies_leaves_the_other_folded(first: str) -> None:
    _, equivalent = folded("chain")
    averaged = torch.optim.swa_utils.AveragedModel(equivalent.model)
    perturb_factors(equivalent)
    averaged.update_parameters(equivalent.model)
    models = {"copy": averaged.module, "model": equivalent.model}
    x = RECIPES["chain"].inputs()
    expected = {key: model(x) for key, model in models.items()}
    merged = equivalent.merge(models.pop(first))
    assert torch.equal(merged(x), expected[first])
    ((key, other),) = models.items()
    assert torch.equal(other(x), expected[key])
    loss_of(other, x).backward()
    assert torch.equal(merge(other)(x), expected[key])


def test_half_precision_autocast_folds_in_float32() -> None:
    pruned, _ = folded("flatten")
    equivalent = equivalent_pruning(
        copy.deepcopy(pruned.model).float(), {k: v.float() for k, v in pruned.state_dict.items()}, pruned.plan
    )
    perturb_factors(equivalent)
    model = equivalent.model.eval()
    outside = {name: m.weight.detach() for name, m in model.named_modules() if parametrize.is_parametrized(m)}
    with torch.autocast("cpu", torch.bfloat16):
        for name, weight in outside.items():
            inside = model.get_submodule(name).weight
            assert inside.dtype == torch.float32
            assert torch.equal(inside, weight)
        loss_of(model, RECIPES["flatten"].inputs().float()).backward()
        merged = equivalent.merge()
    for name, weight in outside.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)


@pytest.mark.parametrize("name", ["flatten", "grouped", "vit"])
def test_accumulation_is_exact(name: str) -> None:
    _, equivalent = folded(name)
    perturb_factors(equivalent)
    model = equivalent.model.eval()
    batches = [RECIPES[name].inputs(seed=seed) for seed in range(3)]
    for x in batches:
        loss_of(model, x).backward()
    expected = {key: grad.clone() for key, grad in gradients(model).items()}
    model.zero_grad()
    with equivalent.accumulate():
        for x in batches:
            loss_of(model, x).backward()
    got = gradients(model)
    assert set(got) == set(expected)
    for key, grad in expected.items():
        assert (got[key] - grad).abs().max() <= EXACT, key


def test_accumulation_leaves_nothing_after_an_error_or_without_a_backward() -> None:
    _, equivalent = folded("chain")
    x = RECIPES["chain"].inputs()
    with pytest.raises(KeyError), equivalent.accumulate():
        raise KeyError
    with equivalent.accumulate():
        before = equivalent.model(x)
        with pytest.raises(RuntimeError, match="nested"), equivalent.accumulate():
            pass
    perturb_factors(equivalent)
    assert not torch.equal(equivalent.model(x), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    _, equivalent = folded("chain")
    perturb_factors(equivalent)
    model, x = equivalent.model.eval(), RECIPES["chain"].inputs().requires_grad_()
    loss_of(model, x).backward()
    expected = {key: grad.clone() for key, grad in gradients(model).items()}
    model.zero_grad()
    loss_of(lambda x: checkpoint(model, x, use_reentrant=reentrant), x).backward()
    for key, grad in gradients(model).items():
        assert torch.equal(grad, expected[key]), key


def test_compile() -> None:
    _, equivalent = folded("flatten")
    perturb_factors(equivalent)
    model, x = equivalent.model.eval(), RECIPES["flatten"].inputs()
    loss_of(model, x).backward()
    expected = {key: grad.clone() for key, grad in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - model(x)).abs().max() <= EXACT
    loss_of(compiled, x).backward()
    for key, grad in gradients(model).items():
        assert (grad - expected[key]).abs().max() <= EXACT, key


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
