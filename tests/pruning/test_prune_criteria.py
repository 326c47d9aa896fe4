"""Criteria beside Torch-Pruning's own, and what scoring leaves behind; tests/criteria has their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import regression_losses  # noqa: E402
from prunable import OF_OTHER_MODELS, RECIPES, Recipe  # noqa: E402

from obc.criteria import Subject, available, group_scores  # noqa: E402
from obc.model.usable_batches import UsableBatches  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return regression_losses(model(x), target).mean()


def make_subject(recipe: Recipe) -> Subject:
    model = recipe.model()
    structure = TorchPruningStructure(
        model, recipe.inputs(2).requires_grad_(), ignored_layers=recipe.ignored, num_heads=recipe.heads
    )
    batches = [(recipe.inputs(3, seed), torch.arange(3.0) + seed) for seed in range(4)]

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return model(batch[0])

    return Subject(model, structure.groups, UsableBatches(batches), loss, forward, "gate", "batch", torch.Generator())


@pytest.mark.parametrize("name", ["resnet", "chain"])
def test_l1_and_l2_match_torch_pruning(name: str) -> None:
    """Its group magnitude, of convolutions and linear layers without biases, by its default mean and normaliser."""
    subject = make_subject(RECIPES[name])
    graph = tp.DependencyGraph().build_dependency(subject.model, RECIPES[name].inputs(2).requires_grad_())
    for criterion, power in (("l1", 1), ("l2", 2)):
        importance = tp.importance.GroupMagnitudeImportance(p=power, target_types=[nn.Conv2d, nn.Linear], bias=False)
        got = group_scores(criterion, subject)
        for group in subject.groups:
            layer = subject.model.get_submodule(group.name)
            theirs = importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(group.size))))
            torch.testing.assert_close(got[group.name], theirs.double(), rtol=1e-6, atol=0)  # it adds in float32


@pytest.mark.sampled(members=8)
@pytest.mark.parametrize("criterion", sorted(set(available()) - OF_OTHER_MODELS))
def test_scoring_leaves_no_trace(criterion: str) -> None:
    subject = make_subject(RECIPES["flatten"])
    subject.model.train()
    flags = {
        name: p.requires_grad_(index % 2 == 0).requires_grad
        for index, (name, p) in enumerate(subject.model.named_parameters())
    }
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    group_scores(criterion, subject)
    assert all(module.training for module in subject.model.modules())
    assert {name: p.requires_grad for name, p in subject.model.named_parameters()} == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
