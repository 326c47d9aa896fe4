"""Every criterion as an importance of Torch-Pruning scores as obc.prune's groups do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import regression_losses  # noqa: E402
from prunable import OF_OTHER_MODELS, RECIPES  # noqa: E402

from obc import criteria  # noqa: E402
from obc.criteria import Subject, group_scores  # noqa: E402
from obc.integrations.torch_pruning import CriterionImportance  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

# Also what scores at random, searches, whose scores depend on all groups that take part, and rows of tokens, of which
# maps of several sizes have different numbers.
OTHERS = OF_OTHER_MODELS | {"random", "beam", "tolerance", "token_jacobian"}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return regression_losses(model(batch[0]), batch[1]).mean()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


@pytest.mark.parametrize("criterion", sorted(set(criteria.available()) - OTHERS))
def test_a_group_is_scored_as_in_obc_prune(criterion: str) -> None:
    recipe = RECIPES["chain" if criterion != "bn_scale" else "flatten"]
    model = recipe.model()
    batches = [(recipe.inputs(3, seed), torch.arange(3.0) + seed) for seed in range(4)]
    structure = TorchPruningStructure(model, recipe.inputs(2).requires_grad_(), ignored_layers=recipe.ignored)
    subject = Subject(model, structure.groups, batches, loss, forward, "gate", "batch", torch.Generator())
    expected = group_scores(criterion, subject)
    importance = CriterionImportance(criterion)
    importance.score(model, batches, loss, forward_fn=forward)
    graph = tp.DependencyGraph().build_dependency(model, recipe.inputs(2).requires_grad_())
    for group in structure.groups:
        layer: Any = model.get_submodule(group.name)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        order = list(range(group.size))[::-1]
        theirs = importance(graph.get_pruning_group(layer, prune, order))
        if group.name not in expected:
            assert theirs is None
            continue
        assert theirs is not None
        torch.testing.assert_close(theirs.double(), expected[group.name].double()[order], rtol=1e-5, atol=1e-8)


def test_it_drives_a_pruner_and_refuses_stale_scores() -> None:
    recipe = RECIPES["resnet"]
    model = recipe.model()
    batches = [(recipe.inputs(3, seed), torch.arange(3.0)) for seed in range(2)]
    importance = CriterionImportance("flap")
    pruner = tp.pruner.BasePruner(
        model,
        recipe.inputs(2).requires_grad_(),
        importance,
        global_pruning=True,
        pruning_ratio=0.5,
        iterative_steps=4,
        ignored_layers=[model.get_submodule(name) for name in recipe.ignored],
    )
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(RuntimeError, match="no statistics yet"):
        pruner.step()
    importance.score(model, batches, forward_fn=forward)
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < before
    model(recipe.inputs(2))
    with pytest.raises(RuntimeError, match="pruned since; score again"):
        pruner.step()
    importance.score(model, batches, forward_fn=forward)
    pruner.step()


def test_random_follows_its_seed() -> None:
    recipe = RECIPES["chain"]
    model = recipe.model()
    graph = tp.DependencyGraph().build_dependency(model, recipe.inputs(2).requires_grad_())
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
    values = []
    for _ in range(2):
        importance = CriterionImportance("random", seed=3)
        importance.score(model)
        values.append(importance(group))
    assert torch.equal(*values)
