"""Equivalent Pruning, folded: the explicit network's function, gradients and training; a merge that leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from explicit import as_stored, explicit_model, explicit_name
from folding import EXACT, both_factors, folded, gradients, loss_of, perturb_factors
from prunable import RECIPES
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from obc.backends import gemm
from obc.recovery import equivalent_pruning, merge


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


# test_forward_and_gradients covers the others in make test.
SHORT = ("grouped", "resnet", "swiglu")


@pytest.mark.slow
@both_factors
@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in SHORT)]
)
def test_trains_like_the_explicit_network(name: str, factors: str) -> None:
    """Reduced factors train like explicit layers whose kept part is frozen to the identity."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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
