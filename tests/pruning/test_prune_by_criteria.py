"""obc.prune with every registered criterion, with objects, functions and allocations; the mean into biases."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_families as families
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import registry
from obc.recovery.mean_bias import absorb_means
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

# What needs another model than a Llama, or data of a second domain.
OF_OTHERS = {
    "bn_scale",
    "reap",
    "expert_frequency",
    "expert_norm",
    "gaprune",
    "block_influence",
    "angular_distance",
    "entropy",
}


def llama_pruned(**options: Any) -> obc.PruningResult:
    case = families.FAMILIES["llama"]()
    options = {"macs": 0.85, "steps": 1, "verify": False, "progress": False, **options}
    return obc.prune(case.model, batches=case.batches, loss_fn=case.loss, **options)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", sorted(set(criteria.available()) - OF_OTHERS - {"masked"}))
def test_every_criterion_prunes_a_llama(name: str) -> None:
    report = llama_pruned(criterion=name, min_units=1).report
    assert report.steps[-1].macs <= 0.85
    assert not report.left_out


@pytest.mark.parametrize("name", ["reap", "expert_frequency", "expert_norm"])
def test_criteria_of_experts_prune_experts(name: str) -> None:
    case = families.FAMILIES["mixtral"]()
    options: dict[str, Any] = {"params": 0.8, "steps": 1, "verify": False, "progress": False}
    report = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, criterion=name, **options).report
    experts = {widths for name, widths in report.widths.items() if name.endswith("experts")}
    assert experts == {(4, 3)}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize(
    "name", ["l1", "fpgm", "taylor", "fisher", "llm_pruner_vector", "nirvana", "reconstruction", "tolerance"]
)
def test_criteria_of_weights_and_their_gradients_prune_what_lies_inside_experts(name: str) -> None:
    case = families.FAMILIES["mixtral"]()
    structure = TransformersStructure(case.model, ["expert_ffn"])
    options: dict[str, Any] = {"params": 0.8, "steps": 1, "progress": False, "structure": structure}
    report = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, criterion=name, **options).report
    assert not report.left_out
    assert all(1 <= after <= before == 48 for before, after in report.widths.values())
    assert report.steps[-1].parameters <= 0.8


@pytest.mark.parametrize("name", sorted(OF_OTHERS - {"gaprune"}))
def test_a_criterion_without_anything_to_score_says_what_it_scores(name: str) -> None:
    with pytest.raises(ValueError, match=r"scores no group|nothing to read 'experts'"):
        llama_pruned(criterion=name)


def test_gaprune_needs_a_second_domain() -> None:
    with pytest.raises(ValueError, match="compares two domains"):
        llama_pruned(criterion="gaprune")
    case = families.FAMILIES["llama"]()
    assert llama_pruned(criterion=criteria.GAPrune(case.batches)).report.steps[-1].macs <= 0.85


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("allocation", ["global", "uniform", "equal", "profile", "two_classes", "search"])
def test_every_allocation_serves_a_criterion(allocation: Any) -> None:
    if allocation == "search":
        from obc.selection.search import Search

        allocation = Search(generations=2, offspring=2)
    report = llama_pruned(criterion="flap", allocation=allocation, steps=2).report
    assert report.steps[-1].macs <= 0.85


def test_functions_and_objects_are_criteria() -> None:
    def first_units_go(group: Any, statistics: obc.Statistics, model: nn.Module) -> Tensor:
        assert statistics.collected == ("moments",)
        return torch.arange(group.size, dtype=torch.float32)

    first_units_go.needs = ("moments",)  # type: ignore[attr-defined]

    class AsObject:
        needs = ("moments",)

        def score(self, group: Any, statistics: obc.Statistics, model: nn.Module) -> Tensor:
            return first_units_go(group, statistics, model)

    for criterion in (first_units_go, AsObject()):
        result = llama_pruned(criterion=criterion, allocation="uniform")
        kept = result.plan["model.layers.0.mlp.down_proj"].in_channels
        assert kept is not None
        assert torch.equal(kept, torch.arange(48 - len(kept), 48))
    registry.register("first_units_go", first_units_go)
    try:
        assert "first_units_go" in criteria.available()
        with pytest.raises(ValueError, match="registered already"):
            criteria.register("flap", first_units_go)
        assert llama_pruned(criterion="first_units_go").report.steps
    finally:
        registry._REGISTERED.pop("first_units_go")


def test_bad_criteria_are_refused_and_nothing_changes() -> None:
    cases = {
        "flip": "criterion must be one of 'jacobian', 'compensated_jacobian'",
        (lambda group, statistics, model: torch.zeros(3)): r"gave the group .* \(3,\); it must give",
        (lambda group, statistics, model: torch.full((group.size,), torch.nan)): "not finite",
    }
    for criterion, message in cases.items():
        with pytest.raises(ValueError, match=message):
            llama_pruned(criterion=criterion)
    with pytest.raises(TypeError, match="got the class FLAP"):
        llama_pruned(criterion=criteria.FLAP)
    with pytest.raises(TypeError, match="a criterion is a name"):
        llama_pruned(criterion=3)
    with pytest.raises(ValueError, match="needs rows"):
        llama_pruned(criterion="flap", selection="joint")
    needs = obc.collect(nn.Linear(2, 2), [torch.ones(1, 2)], statistics="moments", progress=False)
    with pytest.raises(obc.statistics.StatisticsError, match="'obs' needs the statistic 'gram'"):
        criteria.scores_from("obs", [], needs, nn.Linear(2, 2))


def test_the_compensated_criterion_selects_jointly() -> None:
    assert llama_pruned(criterion="compensated_jacobian", selection="joint").report.steps[-1].macs <= 0.85


# --- the mean into biases ------------------------------------------------------------------------------------------


def test_biases_take_what_dropped_channels_carried_on_average(tmp_path: Path) -> None:
    """The outputs agree if removed channels are replaced by their means at every consumer's input."""
    case = families.FAMILIES["llama"]()
    original = copy.deepcopy(case.model)
    result = obc.prune(
        case.model,
        batches=case.batches,
        loss_fn=case.loss,
        criterion="flap",
        macs=0.8,
        steps=1,
        compensate="mean",
        verify=False,
        progress=False,
    )
    seen: dict[str, list[Tensor]] = {}
    means = result.report.means
    assert means is not None
    assert means.absorbed == means.created
    for name in means.absorbed:
        hook = lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, 1))  # noqa: E731
        original.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in case.batches:
            original(batch)
    for name in means.absorbed:
        layer: Any = original.get_submodule(name)
        kept = result.plan[name].in_channels
        assert kept is not None
        mean = torch.cat(seen[name]).double().mean(0)
        mean[kept] = 0
        rows = result.plan[name].out_channels
        expected = layer.weight.double() @ mean
        pruned: Any = result.model.get_submodule(name)
        torch.testing.assert_close(
            pruned.bias.double(), expected if rows is None else expected[rows], rtol=1e-5, atol=1e-7
        )
    assert any("from_pretrained would drop it" in warning for warning in result.report.warnings)
    save_pruned(result.model, result.plan, tmp_path / "saved")
    loaded = load_pruned(tmp_path / "saved")
    for model in (result.model, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model)), loaded):
        with pytest.raises(obc.PlanError, match="from_pretrained would drop it"):
            model.save_pretrained(tmp_path / "dropped")
    with torch.no_grad():
        assert torch.equal(loaded(case.batches[0]).logits, result.model.eval()(case.batches[0]).logits)
    assert result.report.as_dict()["means"]["created"]


def test_a_constant_channel_is_absorbed_exactly_and_zero_padding_is_left() -> None:
    class Net(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 1)
            self.second = nn.Conv2d(4, 3, 3, padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    for padding in (0, 1):
        torch.manual_seed(0)
        original = Net(padding).eval()
        with torch.no_grad():
            original.first.weight[1] = 0  # channel 1 is its bias everywhere
        pruned = copy.deepcopy(original)
        pruned.first = nn.Conv2d(2, 3, 1)
        pruned.second = nn.Conv2d(3, 3, 3, padding=padding)
        stays = torch.tensor([0, 2, 3])
        with torch.no_grad():
            for layer, weight, bias in (
                (pruned.first, original.first.weight[stays], original.first.bias[stays]),
                (pruned.second, original.second.weight[:, stays], original.second.bias),
            ):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        plan = obc.PruningPlan({"first": obc.Kept(out_channels=stays), "second": obc.Kept(in_channels=stays)})
        batches = [torch.randn(2, 2, 5, 5) for _ in range(2)]
        report = absorb_means(pruned, original, plan, batches)
        if padding:
            assert "pads with zeros" in report.left["second"]
            assert not report.absorbed
        else:
            torch.testing.assert_close(pruned(batches[0]), original(batches[0]), rtol=1e-5, atol=1e-6)
