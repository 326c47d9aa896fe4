"""Compensation and folded Equivalent Pruning of transformers models, on the plans that their structure records."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Case
from torch import Tensor, nn
from transformers_families import FAMILIES, double, every_other, output

import obc
from obc.integrations.transformers import TransformersStructure

DENSE = ["llama", "gemma", "bert", "gpt2", "vit", "phi3", "mamba", "deepseek-v3"]


def logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, tuple):
        return model(pixel_values=batch[0].to(next(model.parameters()).dtype)).logits
    return model(input_ids=batch).logits


def drawn(case: Case, count: int, seed: int) -> list[Any]:
    """Batches other than the case's own."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(case.batches[0], tuple):
        shape = case.batches[0][0].shape
        return [(torch.randn(shape, generator=generator), None) for _ in range(count)]
    return [torch.randint(0, 31, case.batches[0].shape, generator=generator) for _ in range(count)]


def pruned(case: Case) -> tuple[nn.Module, nn.Module, obc.PruningPlan]:
    """(pruned, original, plan) in float64: every second unit of every group is gone."""
    original = double(case)
    model = copy.deepcopy(original)
    structure = TransformersStructure(model)
    structure.remove({group.name: every_other(group.size) for group in structure.groups})
    structure.plan.verify(original.state_dict(), model)
    return model, original, structure.plan


def error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Mean squared difference of the outputs."""
    with torch.no_grad():
        differences = [(logits(model, batch) - logits(original, batch)).square().mean() for batch in batches]
    return float(torch.stack(differences).mean())


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("family", DENSE)
def test_least_squares_lowers_the_error_on_batches_that_nothing_saw(family: str) -> None:
    case = FAMILIES[family]()
    model, original, plan = pruned(case)
    unseen = drawn(case, 4, seed=7)
    naive = error(model, original, unseen)
    report = obc.compensate(model, original, plan, drawn(case, 20, seed=3), logits, progress=False)
    assert error(model, original, unseen) < 0.98 * naive
    assert any(layer.applied for layer in report.layers.values())


@pytest.mark.parametrize("family", DENSE)
def test_folded_layers_start_exact_and_merge(family: str) -> None:
    case = FAMILIES[family]()
    model, original, plan = pruned(case)
    naive = copy.deepcopy(model)
    before = output(case, model)
    folded = obc.equivalent_pruning(model, original.state_dict(), plan)
    torch.testing.assert_close(output(case, model), before, rtol=0, atol=1e-12)
    optimizer = torch.optim.SGD(folded.param_groups(lr=0.05, weight_decay=0.0))
    loss = logits(model, case.batches[0]).square().mean()
    loss.backward()
    optimizer.step()
    after = output(case, model)
    assert not torch.allclose(after, before, rtol=0, atol=1e-6)
    merged = folded.merge()
    torch.testing.assert_close(output(case, merged), after, rtol=0, atol=1e-12)
    shapes = {name: tensor.shape for name, tensor in merged.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in naive.state_dict().items()}


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "deepseek-v2"])
def test_fused_experts_stay_sliced_beside_folded_layers(family: str) -> None:
    case = FAMILIES[family]()
    original = double(case)
    model = copy.deepcopy(original)
    structure = TransformersStructure(model)
    least = structure.limits.min_units
    structure.remove({group.name: every_other(group.size, least[group.name]) for group in structure.groups})
    before = output(case, model)
    folded = obc.equivalent_pruning(model, original.state_dict(), structure.plan)
    torch.testing.assert_close(output(case, model), before, rtol=0, atol=1e-12)
    merged = folded.merge()
    structure.plan.verify(original.state_dict(), merged)
    report = obc.compensate(model, original, structure.plan, drawn(case, 10, seed=3), logits, progress=False)
    assert report.final_error <= report.naive_error


def test_compensated_models_start_equivalent_pruning() -> None:
    """The least-squares decompressors of heads and channels fit the folded model's."""
    case = FAMILIES["llama"]()
    model, original, plan = pruned(case)
    naive = copy.deepcopy(model)
    report = obc.compensate(
        model, original, plan, drawn(case, 10, seed=3), logits, keep_decompressors=True, progress=False
    )
    assert report.decompressors
    folded = obc.equivalent_pruning(naive, original.state_dict(), plan, decompressor=report.decompressors)
    torch.testing.assert_close(output(case, folded.merge()), output(case, model), rtol=0, atol=1e-9)


def test_whole_heads_have_no_blocks() -> None:
    """The remaining whole heads may mix: a compressor split by heads would need channels of every head."""
    _, _, plan = pruned(FAMILIES["bert"]())
    kept = plan["bert.encoder.layer.0.attention.self.query"]
    assert kept.out_blocks == 1
    assert len(kept.out_channels) == 16
