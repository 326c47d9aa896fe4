"""``obc.prune`` on transformers models: budgets, equal widths, rounding, experts that must stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from transformers_families import FAMILIES, double, output

import obc
from obc.integrations.transformers import TransformersStructure
from obc.selection import BudgetError, Costs
from obc.selection.task import Task
from obc.selection.uniform import select_uniform


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit", "mamba", "gemma"])
def test_prune_reaches_its_share(family: str) -> None:
    case = FAMILIES[family]()
    structure = TransformersStructure(case.model)
    result = obc.prune(case.model, None, case.batches, case.loss, macs=0.8, steps=2, structure=structure)
    assert result.report.macs_after <= 0.8 * result.report.macs_before
    assert result.report.parameters_after == sum(parameter.numel() for parameter in case.model.parameters())
    assert output(case, case.model).isfinite().all()
    result.plan.verify(FAMILIES[family]().model.state_dict(), case.model)


def test_neither_example_inputs_nor_structure_is_needed() -> None:
    case, twin = FAMILIES["llama"](), FAMILIES["llama"]()
    result = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, macs=0.8, steps=1)
    obc.prune(twin.model, None, twin.batches, twin.loss, macs=0.8, steps=1, structure=TransformersStructure(twin.model))
    assert result.report.macs_after < result.report.macs_before
    assert torch.equal(output(case, case.model), output(twin, twin.model))


def test_equal_widths_can_be_said_by_the_config() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model, uniform=True, round_to=8)
    result = obc.prune(case.model, None, case.batches, case.loss, macs=0.8, steps=2, structure=structure)
    widths = {group.kind: set() for group in structure.groups}
    for group in structure.groups:
        widths[group.kind].add(group.size)
    assert {kind: len(found) for kind, found in widths.items()} == {"heads": 1, "ffn": 1}
    assert widths["ffn"].pop() % 8 == 0
    assert structure.config_refused is None
    assert case.model.config.intermediate_size < 48
    assert result.report.macs_after <= 0.8 * result.report.macs_before


@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
def test_equal_widths_still_rank_within_each_layer() -> None:
    """The units that go from one layer are those that ``obc.select`` takes from it alone."""
    case = FAMILIES["llama"]()
    twin = copy.deepcopy(case.model)
    structure = TransformersStructure(case.model, kinds=("ffn",), uniform=True)
    groups = structure.groups
    rows = obc.score(case.model, case.batches, case.loss, keep_rows=True).rows
    result = obc.prune(case.model, None, case.batches, case.loss, macs=0.9, steps=1, structure=structure)
    removed = 48 - structure.groups[0].size
    assert removed > 0
    for group in groups:
        expected = obc.select({group.name: group.gate_rows(rows)}, {group.name: 1.0}, removed)[group.name]
        kept = result.plan[group.name].out_channels
        assert set(kept.tolist()) == set(range(48)) - set(expected.tolist())
    result.plan.verify(twin.state_dict(), case.model)


def test_a_failed_call_leaves_the_model_as_it_was() -> None:
    case = FAMILIES["llama"]()
    before = output(case, case.model)
    calls = []

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if model is not case.model:  # a copy, on which removing is tried
            return case.loss(model, batch)
        calls.append(model.config.intermediate_size)
        if calls[-1] < 48:
            raise RuntimeError("after the first step")
        return case.loss(model, batch)

    structure = TransformersStructure(case.model, kinds=("ffn",), uniform=True)
    with pytest.raises(RuntimeError, match="after the first step"):
        obc.prune(case.model, None, case.batches, loss, macs=0.7, steps=2, structure=structure)
    assert min(calls) < 48
    assert case.model.config.intermediate_size == 48
    assert case.model.model.layers[0].mlp.intermediate_size == 48
    assert torch.equal(output(case, case.model), before)


@pytest.mark.parametrize("options", [{}, {"selection": "independent", "slices": "all"}, {"per_macs": False}], ids=str)
def test_experts_that_are_one_tensor_are_pruned(options: dict[str, Any]) -> None:
    """Uses the library's default implementation, whose grouped products need multiples of 16 bytes."""
    case = FAMILIES["mixtral"]()
    structure = TransformersStructure(case.model)
    result = obc.prune(case.model, None, case.batches, case.loss, macs=0.7, steps=2, structure=structure, **options)
    assert result.report.macs_after <= 0.7 * result.report.macs_before
    assert not result.report.left_out
    assert output(case, case.model).isfinite().all()
    widths = {group.kind: group.size for group in structure.groups}
    assert widths["expert_ffn"] % 4 == 0
    assert widths["experts"] >= 2
    result.plan.verify(FAMILIES["mixtral"]().model.state_dict(), case.model)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek-v2"])
def test_the_budget_may_be_of_parameters(family: str, uniform: bool) -> None:
    case = FAMILIES[family]()
    before = sum(parameter.numel() for parameter in case.model.parameters())
    structure = TransformersStructure(case.model, uniform=uniform)
    report = obc.prune(case.model, None, case.batches, case.loss, params=0.8, steps=2, structure=structure).report
    after = sum(parameter.numel() for parameter in case.model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert after <= 0.8 * before
    assert [step.parameters for step in report.steps][-1] == after / before
    assert output(case, case.model).isfinite().all()


def test_whole_experts_free_parameters_and_hardly_any_macs() -> None:
    """A token is routed to as many as before."""
    case = FAMILIES["mixtral"]()
    before = sum(parameter.numel() for parameter in case.model.parameters())
    structure = TransformersStructure(case.model, kinds=("experts",))
    with pytest.raises(ValueError, match=r"macs=0.8 is out of reach: 0\.99"):
        obc.prune(case.model, None, case.batches, case.loss, macs=0.8, structure=structure)
    report = obc.prune(case.model, None, case.batches, case.loss, params=0.8, steps=2, structure=structure).report
    assert sum(parameter.numel() for parameter in case.model.parameters()) <= 0.8 * before
    assert {(was, now) for was, now in report.widths.values()} <= {(4, 4), (4, 3), (4, 2)}
    assert report.steps[-1].macs > 0.99


def test_without_example_inputs_the_models_own_blocks_are_pruned() -> None:
    case = FAMILIES["llama"]()
    result = obc.prune(case.model, None, case.batches, case.loss, macs=0.9, steps=1, ignored_layers=("lm_head",))
    assert set(result.report.widths) == {group.name for group in obc.transformer_groups(case.model)}
    with pytest.raises(ValueError, match="num_heads is for traced models"):
        obc.prune(case.model, None, case.batches, case.loss, num_heads={"model.layers.0.self_attn.q_proj": 4})


def test_compensation_in_the_same_call() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model)
    result = obc.prune(
        case.model, None, case.batches, case.loss, macs=0.8, steps=1, structure=structure, compensate="ls"
    )
    report = result.report.compensation
    assert report is not None
    assert report.final_error <= report.naive_error


# --- selection under equal widths ---------------------------------------------------------------------------------


FAMILY_OF_TWO = [["a", "b"], ["h"]]


def two_layers(first: int = 12, second: int = 12, heads: int = 4) -> Costs:
    return Costs(
        ["a", "b", "h"], [first, second, heads], constant=10.0, linear=torch.tensor([1.0, 1.0, 5.0]), unit="macs"
    )


def rows_of(**sizes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(32, size, generator=generator) for name, size in sizes.items()}


def test_families_keep_the_largest_equal_share_that_frees_the_budget() -> None:
    removed = select_uniform(Task(rows_of(a=12, b=12, h=4), (), two_layers(), 16.0, "joint"), FAMILY_OF_TWO)
    counts = {name: len(units) for name, units in removed.items()}
    assert counts["a"] == counts["b"]
    assert counts["a"] + counts["b"] + 5 * counts["h"] >= 16
    # At 5/8 of all widths the second head goes and, were it needed too, the fifth channel of both layers.
    assert counts == {"a": 4, "b": 4, "h": 2}


def test_shares_are_of_the_full_widths() -> None:
    """Families that lost half their width before are at the share that the others come to."""
    costs = Costs(["a", "b"], [6, 12], linear=torch.tensor([1.0, 1.0]), unit="macs")
    task = Task(rows_of(a=6, b=12), (), costs, 6.0, "joint", full_widths={"a": 12, "b": 12})
    removed = select_uniform(task, [["a"], ["b"]])
    assert {name: len(units) for name, units in removed.items()} == {"a": 0, "b": 6}


def test_uniform_widths_are_rounded_and_bounded() -> None:
    rows = rows_of(a=12, b=12, h=4)
    task = Task(rows, (), two_layers(), 24.0, "joint", min_units={"h": 2}, round_to={"a": 4, "b": 4})
    removed = select_uniform(task, FAMILY_OF_TWO)
    assert {name: len(units) for name, units in removed.items()} == {"a": 8, "b": 8, "h": 2}


def test_families_without_rows_keep_their_widths() -> None:
    removed = select_uniform(Task(rows_of(a=12, h=4), (), two_layers(), 10.0, "joint"), FAMILY_OF_TWO)
    assert {name: len(units) for name, units in removed.items()} == {"a": 0, "h": 2}


def test_uniform_budgets_out_of_reach() -> None:
    with pytest.raises(BudgetError, match="free at most 37 of the 40") as caught:
        select_uniform(Task(rows_of(a=12, b=12, h=4), (), two_layers(), 40.0, "joint"), FAMILY_OF_TWO)
    assert caught.value.reachable == 37
    with pytest.raises(ValueError, match=r"a, b have \[8, 12\]"):
        select_uniform(Task(rows_of(a=12, b=8, h=4), (), two_layers(second=8), 1.0, "joint"), FAMILY_OF_TWO)


def test_prune_keeps_the_experts_that_tokens_go_to() -> None:
    model = double(FAMILIES["mixtral"]())
    structure = TransformersStructure(model, round_to=3)
    kinds = {group.name: group.kind for group in structure.groups}
    least = {kinds[name]: count for name, count in structure.limits.min_units.items()}
    assert least == {"heads": 1, "experts": 2, "expert_ffn": 1}
    multiples = {kinds[name]: count for name, count in structure.limits.round_to.items()}
    assert multiples == {"heads": 1, "experts": 1, "expert_ffn": 6}
    assert {kinds[name] for name in structure.limits.whole} == {"heads", "experts"}


def test_the_callers_rounding_spares_heads() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model)
    obc.prune(case.model, None, case.batches, case.loss, macs=0.6, steps=1, structure=structure, round_to=16)
    widths = {group.name: group.size for group in structure.groups}
    assert all(widths[name] % 16 == 0 for name in widths if "mlp" in name)
    assert min(widths[name] for name in widths if "attn" in name) == 1


def test_reasons_that_differ_in_the_layers_number_are_given_once() -> None:
    """A model of many layers would give each its own sentence."""
    model = FAMILIES["llama"]().model
    layers = model.model.layers
    for layer in layers:
        weight_norm(layer.self_attn.q_proj)
        weight_norm(layer.mlp.up_proj)
    batches, structure = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], TransformersStructure(model)
    with pytest.raises(ValueError, match="no layer can be pruned") as error:
        obc.prune(model, None, batches, lambda model, batch: model(**batch).logits.sum(), structure=structure)
    said = str(error.value)
    assert said.count(" is parametrised") == 2
    assert said.count(f" (and {len(layers) - 1} like it)") == 2
    assert "model.layers.0.self_attn.q_proj is" in said
