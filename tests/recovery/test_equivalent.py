"""Equivalent Pruning, folded: the explicit network's function, gradients and training; a merge that leaves no trace."""

from __future__ import annotations

import copy
import socket
import warnings
from typing import Literal

import pytest
import torch
from explicit import as_stored, explicit_model, explicit_name
from prunable import RECIPES, FlattenNet, Pruned
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from obc.backends import gemm
from obc.recovery import EquivalentPruning, Kept, PlanError, PruningPlan, equivalent_pruning, merge

# One optimizer step is linear in the gradients, whose rounding is 1e-16 of a sum of some hundred terms.
EXACT = 1e-11


both_factors = pytest.mark.parametrize("factors", ["full", "reduced"])


def folded(name: str, factors: Literal["full", "reduced"] = "full") -> tuple[Pruned, EquivalentPruning]:
    pruned = RECIPES[name].prune()
    return pruned, equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan, factors=factors)


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


@both_factors
@pytest.mark.parametrize("name", RECIPES)
def test_starts_as_the_naively_pruned_model(name: str, factors: str) -> None:
    pruned, equivalent = folded(name, factors)
    x = RECIPES[name].inputs()
    assert (equivalent.model(x) - pruned.model(x)).abs().max() <= EXACT
    assert any(parametrize.is_parametrized(module) for module in equivalent.model.modules())


@both_factors
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", RECIPES)
def test_forward_and_gradients_are_the_explicit_networks(name: str, training: bool, factors: str) -> None:
    pruned, equivalent = folded(name, factors)
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
        truth = as_stored(key, expected[explicit_name(key, explicit)], explicit, pruned)
        assert (grad - truth).abs().max() <= EXACT, key


@both_factors
@pytest.mark.parametrize("name", RECIPES)
def test_trains_like_the_explicit_network(name: str, factors: str) -> None:
    """With "reduced" factors: like explicit layers whose kept part is frozen to the identity."""
    pruned, equivalent = folded(name, factors)
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
    for key, parameter in equivalent.model.named_parameters():
        truth = as_stored(key, explicit_parameters[explicit_name(key, explicit)], explicit, pruned)
        assert (parameter - truth).abs().max() <= 1e-6, key


@both_factors
@pytest.mark.parametrize("name", RECIPES)
def test_merged_is_the_folded_model_and_loads_into_the_naive_one(name: str, factors: str) -> None:
    pruned, equivalent = folded(name, factors)
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


@pytest.mark.slow
@both_factors
def test_training_compiled_by_inductor(factors: str) -> None:
    """Forward, backward and the change that a step makes to factors that were the identity when it was compiled."""
    _, equivalent = folded("flatten", factors)
    twin = copy.deepcopy(equivalent.model)
    models = (torch.compile(equivalent.model, fullgraph=True), twin)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (equivalent.model, twin)]
    for step in range(4):
        x = RECIPES["flatten"].inputs(seed=step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    for (key, parameter), expected in zip(equivalent.model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter - expected).abs().max() <= EXACT, key
    torch.compiler.reset()


@pytest.mark.parametrize("name", RECIPES)
@both_factors
def test_identity_factors_take_channels_instead_of_multiplying(name: str, factors: str, monkeypatch) -> None:
    pruned, equivalent = folded(name, factors)
    x = RECIPES[name].inputs()
    expected = pruned.model(x)

    def multiply(*args: object, **options: object) -> None:
        raise AssertionError("a fold multiplied although its factors are the identity")

    with monkeypatch.context() as patched:
        patched.setattr("obc.ops.fold", multiply)
        patched.setattr("obc.backends.gemm._products", multiply)
        weights = [module.weight for module in equivalent.model.modules() if parametrize.is_parametrized(module)]
    assert len(weights) > 0
    assert (equivalent.model(x) - expected).abs().max() <= EXACT


def optimizer_step(model: nn.Module) -> None:
    loss_of(model, RECIPES["chain"].inputs()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def loaded(model: nn.Module) -> None:
    state_dict = {
        key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()
    }
    model.load_state_dict(state_dict, strict=False)


def assigned(model: nn.Module) -> None:
    state_dict = {
        key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()
    }
    model.load_state_dict(state_dict, strict=False, assign=True)


def written_past_the_version_counter(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("compressor"):
            version = parameter._version
            parameter.data.add_(0.1)
            assert parameter._version == version


def one_entry(model: nn.Module) -> None:
    with torch.no_grad():
        model.features[3].parametrizations.weight[0].decompressor[-1, 0] = 1e-30


CHANGES = [optimizer_step, loaded, assigned, written_past_the_version_counter, one_entry]


@both_factors
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_of_the_factors_is_noticed(change, factors: str) -> None:
    _, equivalent = folded("chain", factors)
    model = equivalent.model.eval()
    model(RECIPES["chain"].inputs())
    change(model)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            chain = module.parametrizations.weight
            expected = gemm.fold(chain.original, chain[0].compressor, chain[0].decompressor, reduced=chain[0].reduced)
            assert torch.equal(module.weight, expected)


def test_a_compiled_model_notices_changed_factors() -> None:
    _, equivalent = folded("chain")
    model, x = equivalent.model.eval(), RECIPES["chain"].inputs()
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    perturb_factors(equivalent)
    assert (compiled(x) - model(x)).abs().max() <= EXACT
    assert not torch.allclose(compiled(x), before)


@pytest.mark.parametrize("name", RECIPES)
def test_reduced_factors_are_fewer(name: str) -> None:
    (_, full), (_, reduced) = (folded(name, factors) for factors in ("full", "reduced"))
    sizes = [sum(p.numel() for p in each.param_groups(0.1, 0.0)[1]["params"]) for each in (full, reduced)]
    assert sizes[1] < sizes[0]
    assert sum(reduced.break_even.values()) < sum(full.break_even.values())


def test_reduced_factors_take_least_squares_decompressors_and_no_others() -> None:
    pruned = RECIPES["flatten"].prune()
    kept = pruned.plan["conv2"].in_channels
    start = torch.randn(8, len(kept), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"conv2 mixes kept channels.* pass factors='full'"):
        equivalent_pruning(
            pruned.model, pruned.state_dict, pruned.plan, decompressor={"conv2": start}, factors="reduced"
        )
    start[kept] = torch.eye(len(kept), dtype=torch.float64)
    models = [
        equivalent_pruning(
            copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan, decompressor={"conv2": start}, factors=factors
        ).model
        for factors in ("full", "reduced")
    ]
    assert (models[0].conv2.weight - models[1].conv2.weight).abs().max() <= EXACT


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
