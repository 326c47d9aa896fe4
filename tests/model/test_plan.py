"""Plans: recorded over steps, verified exactly, saved, and found again from values."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from prunable import RECIPES, Pruned, Recipe, TransformerBlock
from torch import nn
from torch.nn.utils import parametrizations

import obc
from obc.recovery import Kept, PlanError, PruningPlan
from obc.recovery.mean_bias import absorb_means
from obc.structures.traced import TorchPruningStructure
from obc.structures.traced_plan import prune_step


def assert_same_plan(got: PruningPlan, expected: PruningPlan) -> None:
    assert set(got) == set(expected)
    for name, kept in expected.items():
        for field, value in vars(kept).items():
            other = getattr(got[name], field)
            if isinstance(value, torch.Tensor):
                assert torch.equal(other, value), f"{name}.{field}"
            else:
                assert other == value, f"{name}.{field}: {other} != {value}"


@pytest.mark.parametrize("name", RECIPES)
def test_plans_of_single_steps_are_put_together(name: str) -> None:
    """Each step's own plan, of the model before it, after that of the steps before."""
    whole = RECIPES[name].prune(3)
    again = copy.deepcopy(whole.original)
    pruner, plan = RECIPES[name].pruner(again, 3), PruningPlan()
    for _ in range(3):
        plan = prune_step(pruner).after(plan)
    plan.verify(whole.state_dict, again)
    assert_same_plan(plan, whole.plan)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_prune_step_records_what_was_kept(name: str, steps: int) -> None:
    pruned = RECIPES[name].prune(steps)
    assert len(pruned.plan) > 0
    pruned.plan.verify(pruned.state_dict, pruned.model)
    x = RECIPES[name].inputs()
    assert pruned.model(x).shape == pruned.original(x).shape


def test_flatten_is_recorded_as_channels_with_a_repeat() -> None:
    pruned = RECIPES["flatten"].prune()
    kept = pruned.plan["hidden"]
    assert kept.in_repeat == 9
    assert torch.equal(kept.in_channels, pruned.plan["conv2"].out_channels)
    assert pruned.model.hidden.in_features == 9 * len(kept.in_channels)


def test_heads_that_keep_equally_many_channels_are_blocks() -> None:
    pruned = RECIPES["vit"].prune()
    assert {pruned.plan[f"attention.{name}"].out_blocks for name in ("query", "key", "value")} == {4}
    assert pruned.plan["up"].out_blocks == 1


def test_whole_heads_are_recorded_without_blocks() -> None:
    recipe = RECIPES["vit"]
    options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    recipe = Recipe(recipe.build, recipe.shape, recipe.ignored, recipe.heads, options)
    pruned = recipe.prune()
    pruned.plan.verify(pruned.state_dict, pruned.model)
    kept = pruned.plan["attention.query"]
    assert len(kept.out_channels) == 4
    assert kept.out_blocks == 1


def test_residual_width_with_raw_parameters_and_torch_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.position = nn.Parameter(torch.randn(1, 5, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x) + self.position
            return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    recipe = Recipe(Net, (5, 3))
    pruned = recipe.prune(steps=2)
    assert pruned.plan["position"].dim is not None
    pruned.plan.verify(pruned.state_dict, pruned.model)


def test_plans_of_two_pruners_compose() -> None:
    recipe = RECIPES["vit"]
    original = recipe.model()
    pruned = copy.deepcopy(original)
    plan = prune_step(recipe.pruner(pruned, ratio=0.25))
    plan = prune_step(recipe.pruner(pruned, ratio=0.34), plan)
    plan.verify(original.state_dict(), pruned)
    assert pruned.up.out_features == len(plan["up"].out_channels) < 9


def test_a_plan_is_not_changed_by_the_next_step() -> None:
    recipe = RECIPES["chain"]
    model = recipe.model()
    pruner = recipe.pruner(model, steps=2)
    first = prune_step(pruner)
    widths = {name: len(kept.out_channels) for name, kept in first.items() if kept.out_channels is not None}
    prune_step(pruner, first)
    assert widths == {name: len(kept.out_channels) for name, kept in first.items() if kept.out_channels is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_save_and_load(name: str, tmp_path) -> None:
    pruned = RECIPES[name].prune()
    pruned.plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert_same_plan(loaded, pruned.plan)
    loaded.verify(pruned.state_dict, pruned.model)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "obc.PruningPlan", "version": 2, "layers": {}}'])
def test_load_rejects_other_files(content: str, tmp_path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match="not a pruning plan"):
        PruningPlan.load(path)


@pytest.mark.parametrize("name", RECIPES)
def test_from_models_finds_the_plan(name: str) -> None:
    pruned = RECIPES[name].prune(steps=2)
    found = PruningPlan.from_models(pruned.state_dict, pruned.model)
    assert set(found) == set(pruned.plan)
    for layer, kept in pruned.plan.items():
        for side in ("out_channels", "in_channels", "in_repeat"):
            expected, got = getattr(kept, side), getattr(found[layer], side)
            assert torch.equal(got, expected) if isinstance(expected, torch.Tensor) else got == expected, (layer, side)


def test_from_models_with_few_distinct_values() -> None:
    """Repeated values, as in half precision or quantised weights: any slice that explains them all will do."""
    recipe = RECIPES["swiglu"]
    original = recipe.model()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_((parameter * 6).round())
    pruned = copy.deepcopy(original)
    plan = prune_step(recipe.pruner(pruned))
    plan.verify(original.state_dict(), pruned)
    PruningPlan.from_models(original.state_dict(), pruned).verify(original.state_dict(), pruned)


def test_from_models_rejects_another_model() -> None:
    pruned = RECIPES["chain"].prune()
    with torch.no_grad():
        pruned.model.head.weight.add_(1)
    with pytest.raises(PlanError, match=r"head\.weight: \(3, 6\) is not a slice of the original's \(3, 12\)"):
        PruningPlan.from_models(pruned.state_dict, pruned.model)


def broken(change) -> Pruned:
    pruned = RECIPES["flatten"].prune()
    kept = dict(pruned.plan)
    change(kept, pruned.model)
    return Pruned(pruned.original, pruned.model, PruningPlan(kept))


def trained(kept, model) -> None:
    with torch.no_grad():
        model.norm1.running_mean.add_(1e-9)


REJECTED = {
    "missing-layer": (lambda kept, model: kept.pop("conv2"), r"conv2.weight: the plan makes \(6, 8, 3, 3\)"),
    "unknown-layer": (lambda kept, model: kept.update(other=Kept()), "'other', which the pruned model lacks"),
    "other-channels": (
        lambda kept, model: kept.update(conv1=Kept(((kept["conv1"].out_channels + 1) % 8).sort().values)),
        r"conv1.weight: .*\(4, 2, 3, 3\) but other values",
    ),
    "out-of-range": (
        lambda kept, model: kept.update(norm2=Kept(torch.tensor([0, 1, 6]))),
        r"norm2.weight: the plan does not fit the original's shape \(6,\)",
    ),
    "trained": (trained, "norm1.running_mean: .* other values"),
    "other-dtype": (lambda kept, model: model.float(), "conv1.weight: the original is torch.float64"),
}


@pytest.mark.parametrize("fault", REJECTED)
def test_verify_rejects(fault: str) -> None:
    change, message = REJECTED[fault]
    pruned = broken(change)
    with pytest.raises(PlanError, match=message):
        pruned.plan.verify(pruned.state_dict, pruned.model)


def test_unequal_groups_are_rejected() -> None:
    """Torch-Pruning slices every group like the first; a grouped convolution that lost others computes nonsense."""
    pruned = RECIPES["grouped"].prune()
    kept = dict(pruned.plan)
    kept["grouped"] = Kept(kept["grouped"].out_channels, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(PlanError, match=r"grouped\.weight: .* unequal numbers"):
        PruningPlan(kept).verify(pruned.state_dict, pruned.model)


def test_prune_step_refuses_parametrised_and_compiled_models() -> None:
    recipe = RECIPES["chain"]
    model = recipe.model()
    pruner = recipe.pruner(model)
    parametrizations.weight_norm(model.head)
    with pytest.raises(PlanError, match="head is parametrised"):
        prune_step(pruner)
    pruner.model = torch.compile(recipe.model())
    with pytest.raises(PlanError, match="compiled"):
        prune_step(pruner)


def test_prune_step_refuses_lstm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    pruner = tp.pruner.BasePruner(
        Net(),
        torch.randn(2, 5, 3),
        tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        root_module_types=[nn.LSTM],
        in_channel_groups={},
        out_channel_groups={},
    )
    with pytest.raises(PlanError, match="lstm: what Torch-Pruning removes from a LSTM is not recorded"):
        prune_step(pruner)


def test_prune_step_does_not_mistake_even_runs_for_a_flatten() -> None:
    recipe = RECIPES["vit"]
    model = TransformerBlock(False, 4).double()
    with torch.no_grad():  # the norms decide: channels 0, 1, 4, 5, 8, 9 go, which look like blocks of two
        model.up.weight.mul_(torch.tensor([1e-3, 1e-3, 1, 1] * 3, dtype=torch.float64)[:, None])
        model.down.weight.mul_(torch.tensor([1e-3, 1e-3, 1, 1] * 3, dtype=torch.float64))
    plan = prune_step(recipe.pruner(model))
    assert plan["up"].out_channels.tolist() == [2, 3, 6, 7, 10, 11]
    assert plan["down"].in_repeat == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_applied_to_the_unpruned_model_gives_the_pruned_one(name: str) -> None:
    pruned = RECIPES[name].prune(2)
    again = pruned.plan.apply(copy.deepcopy(pruned.original))
    expected = pruned.model.state_dict()
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {
        key: value.tolist() for key, value in expected.items()
    }
    x = RECIPES[name].inputs()
    assert torch.equal(again.eval()(x), pruned.model.eval()(x))
    assert str(again) == str(pruned.model)  # the sizes that layers print
    randomised = {
        key: torch.rand_like(value) if value.is_floating_point() else value for key, value in expected.items()
    }
    again.load_state_dict(randomised)


@pytest.mark.parametrize("sizes", [(8, 4, 4), (6, 2, 2), (9, 3, 3)])
def test_a_transposed_convolution_with_several_inputs_a_group_is_not_depthwise(sizes: tuple[int, int, int]) -> None:
    """Its weight (in, out / groups, ...) has one filter a row, as a depthwise one's; plans of other layers spare it."""
    inputs, outputs, groups = sizes
    layers = nn.ConvTranspose2d(inputs, outputs, 2, groups=groups), nn.Conv2d(outputs, 5, 1), nn.Conv2d(5, 3, 1)
    model = nn.Sequential(*layers).double()
    x = torch.randn(2, inputs, 4, 4, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3])
    expected = layers[2].weight[:, kept, 0, 0] @ model[:2](x)[:, kept].flatten(2) + layers[2].bias[:, None]
    pruned = PruningPlan({"1": Kept(out_channels=kept), "2": Kept(in_channels=kept)}).apply(copy.deepcopy(model))
    torch.testing.assert_close(pruned(x).flatten(2), expected, rtol=1e-12, atol=1e-12)
    found = TorchPruningStructure(model, x)
    assert found.proof is not None
    assert "1" in found.proof.proved


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_depthwise_convolution_may_be_cut_to_one_channel(layer: type[nn.Conv2d], steps: int) -> None:
    """It then looks like a dense one; the plan, compensation and Equivalent Pruning still know its origin."""
    torch.manual_seed(0)
    depthwise = layer(6, 6, 3, padding=1, groups=6)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64) for _ in range(4)]
    result = obc.prune(
        copy.deepcopy(model),
        batches[0],
        batches,
        labels=False,
        macs=0.17,
        steps=steps,
        criterion="l2",
        compensate=False,
    )
    assert tuple(result.model[2].weight.shape) == (1, 1, 3, 3)
    kept = result.plan["2"].out_channels
    narrow = nn.functional.conv2d if layer is nn.Conv2d else nn.functional.conv_transpose2d
    hidden = model[:2](batches[0])[:, kept]
    hidden = narrow(hidden, depthwise.weight[kept], depthwise.bias[kept], padding=1).relu()
    expected = nn.functional.conv2d(hidden, model[4].weight[:, kept], model[4].bias)
    torch.testing.assert_close(result.model(batches[0]), expected, rtol=1e-12, atol=1e-12)
    again = result.plan.apply(copy.deepcopy(model))
    assert torch.equal(again(batches[0]), result.model(batches[0]))
    folded = obc.equivalent_pruning(copy.deepcopy(result.model), model.state_dict(), result.plan)
    torch.testing.assert_close(folded.merge()(batches[0]), expected, rtol=1e-9, atol=1e-9)
    for mode in ("ls", "seq", "correct"):
        report = obc.compensate(copy.deepcopy(result.model), model, result.plan, batches, mode=mode)
        assert report.final_error <= report.naive_error
    absorbed = absorb_means(copy.deepcopy(result.model), model, result.plan, batches)
    assert (absorbed.absorbed, absorbed.left) == (["4"], {})


def test_shared_parameters_stay_shared_when_a_plan_is_applied() -> None:
    model = nn.Module()
    model.table, model.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    model.head.weight = model.table.weight
    features = torch.tensor([0, 2, 5])
    PruningPlan({"table": Kept(features), "head": Kept(None, features)}).apply(model)
    assert model.head.weight is model.table.weight
    assert model.head.weight.shape == (7, 3)
    assert (model.table.embedding_dim, model.head.in_features) == (3, 3)


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"table": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False), "free": nn.Linear(6, 6)})
    model["head"].weight = model["table"].weight
    return model


KEPT = torch.tensor([0, 2, 5])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("plan", [{"table": Kept(KEPT)}, {"head": Kept(None, KEPT)}], ids=lambda plan: next(iter(plan)))
def test_an_entry_of_one_module_cuts_a_shared_parameter(plan: dict[str, Kept], device: str) -> None:
    """The entry of the second module used to do nothing."""
    with torch.device(device):
        model = tied()
    PruningPlan(plan).apply(model)
    assert model.head.weight is model.table.weight
    assert model.head.weight.shape == (7, 3)
    assert (model.table.embedding_dim, model.head.in_features) == (3, 3)


@pytest.mark.parametrize("other", [KEPT[:2], torch.tensor([0, 2, 4])], ids=str)
def test_entries_that_keep_different_channels_of_a_shared_parameter_are_refused(other: torch.Tensor) -> None:
    model, plan = tied(), PruningPlan({"table": Kept(KEPT), "head": Kept(None, other), "free": Kept(KEPT)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PlanError, match=r"^table\.weight and head\.weight are one tensor, of which the plan keeps diff"
    ):
        plan.apply(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.free.out_features == 6


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    for plan in ({"0": Kept(torch.tensor([0, 1])), "1": Kept(None, torch.tensor([9]))}, {"2": Kept(torch.tensor([0]))}):
        with pytest.raises(PlanError, match=r"1\.weight: the plan does not fit|has an entry for '2'"):
            PruningPlan(plan).apply(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model[0].out_features == 6


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_stay_channels_last(dims: int) -> None:
    conv, transposed = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), transposed(8, 6, 3), nn.ReLU(), conv(6, 2, 1))
    last = copy.deepcopy(model).to(memory_format=form)
    x = torch.randn(2, 3, *[6] * dims)
    plan = PruningPlan(
        {"0": Kept(out_channels=torch.tensor([0, 3, 6])), "2": Kept(in_channels=torch.tensor([0, 3, 6]))}
    )
    for one in (model, last):
        plan.apply(one)
    assert all(last[layer].weight.is_contiguous(memory_format=form) for layer in (0, 2, 4))
    assert not last[0].weight.is_contiguous()
    assert all(model[layer].weight.is_contiguous() for layer in (0, 2, 4))
    torch.testing.assert_close(last(x.contiguous(memory_format=form)), model(x))


def test_prune_step_records_the_plan_of_channels_last_weights() -> None:
    """Torch-Pruning slices the weights itself; the plan is the same in both memory formats, and fits."""
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        original = copy.deepcopy(model.to(memory_format=form))
        x = torch.randn(2, 3, 6, 6).to(memory_format=form)
        importance = tp.importance.MagnitudeImportance(p=2)
        plan = prune_step(tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model[3]]))
        assert len(plan["0"].out_channels) == 4
        plan.verify(original.state_dict(), model)
        again = plan.apply(copy.deepcopy(original))
        assert torch.equal(again(x), model(x))
        assert again[0].weight.is_contiguous(memory_format=form)
        found.append(plan)
    assert found[0].keys() == found[1].keys()
    assert torch.equal(found[0]["0"].out_channels, found[1]["0"].out_channels)
