"""Every criterion as an importance of Torch-Pruning scores as obc.prune's groups do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import Case, case, regression_losses  # noqa: E402
from prunable import OF_OTHER_MODELS, RECIPES, TransformerBlock  # noqa: E402
from transformers_families import language_model  # noqa: E402

from obc import criteria  # noqa: E402
from obc.criteria import Subject, group_scores  # noqa: E402
from obc.criteria.protocol import CriterionError  # noqa: E402
from obc.criteria.scoring import scored  # noqa: E402
from obc.integrations.torch_pruning import CriterionImportance  # noqa: E402
from obc.model.groups import ChannelGroup, Slice  # noqa: E402
from obc.model.usable_batches import UsableBatches  # noqa: E402
from obc.statistics import StatisticsError  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

# Also what scores at random, searches, whose scores depend on all groups that take part, and rows of tokens, of which
# maps of several sizes have different numbers.
SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # Torch-Pruning does not finish on fewer
    "initializer_range": 0.1,
    "use_cache": False,
}
OTHERS = OF_OTHER_MODELS | {"random", "beam", "tolerance", "token_jacobian"}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return regression_losses(model(batch[0]), batch[1]).mean()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


@pytest.mark.sampled(members=5)
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


# Score other units, or need a second domain.
REFUSED = {
    **dict.fromkeys(("reap", "expert_frequency", "expert_norm"), "scores experts, and Torch-Pruning removes channels"),
    **dict.fromkeys(("block_influence", "angular_distance", "entropy"), "scores blocks, and Torch-Pruning removes"),
    "gaprune": "the criterion 'gaprune': it compares two domains: pass criterion=obc.criteria.GAPrune(general=batches)",
}


class Mixture(nn.Module):
    """Attention, then a mixture whose experts are layers of their own; a token is sent to two of three."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TransformerBlock(gated=False, kv_heads=4)
        self.router = nn.Linear(3, 3)
        self.up = nn.ModuleList(nn.Linear(3, 6) for _ in range(3))
        self.gate = nn.ModuleList(nn.Linear(3, 6, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weights = torch.where(scores >= scores.topk(2).values[..., 1:], scores, 0.0)
        for index, (up, gate, down) in enumerate(zip(self.up, self.gate, self.down, strict=True)):
            x = x + weights[..., index, None] * down(nn.functional.silu(gate(x)) * up(x))
        return self.block(x)


def mixture() -> Case:
    batches = [(torch.randn(4, 5, 3), torch.randn(4)) for _ in range(2)]
    return case(Mixture, batches, lambda model, batch: regression_losses(model(batch[0]), batch[1]))


def vit() -> Case:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        initializer_range=0.1,
    )  # fmt: skip
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 2) for _ in range(2)]
    return case(
        lambda: transformers.ViTForImageClassification(config),
        batches,
        lambda model, batch: nn.functional.cross_entropy(outputs_of(model, batch), batch[1], reduction="none"),
    )


# What is called, its inputs, and groups as (layers pruned at their outputs, layers pruned at their inputs).
KINDS: dict[str, tuple[Callable[[], Case], list[tuple[list[str], list[str]]]]] = {
    "vit": (
        vit,
        [
            (["vit.layers.1.mlp.fc1"], ["vit.layers.1.mlp.fc2"]),
            ([f"vit.layers.0.attention.{name}_proj" for name in "qkv"], ["vit.layers.0.attention.o_proj"]),
        ],
    ),
    "llama": (
        lambda: language_model("Llama", **SIZES),
        [
            (["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"], ["model.layers.1.mlp.down_proj"]),
            ([f"model.layers.0.self_attn.{name}_proj" for name in "qkv"], ["model.layers.0.self_attn.o_proj"]),
        ],
    ),
    "mixture": (mixture, [(["up.1", "gate.1"], ["down.1"]), (["block.up"], ["block.down"])]),
}


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "vit")) for kind in KINDS])
def test_transformers_are_scored_as_by_obc(kind: str) -> None:
    """Every criterion, on groups written down by hand; what it does not score is refused with the reason."""
    build, layers = KINDS[kind]
    one = build()
    model = one.model.double().eval()
    batches = [as_float64(batch) for batch in one.batches][:2]
    graph = tp.DependencyGraph().build_dependency(model, inputs_of(batches[0]))
    refused = REFUSED | ({"cfsp": "the criterion 'cfsp': no residual blocks were found"} if kind == "mixture" else {})
    for criterion in criteria.available():
        if criterion in refused:
            with pytest.raises((CriterionError, StatisticsError), match=re.escape(refused[criterion])):
                scored_by_importance(criterion, one, batches, graph, layers[0])
            continue
        for outputs, consumers in layers:
            units = torch.arange(model.get_submodule(outputs[0]).weight.shape[0])[:, None]  # type: ignore[arg-type]
            slices = [
                *(Slice(name, "out", units) for name in outputs),
                *(Slice(name, "in", units) for name in consumers),
            ]
            group = ChannelGroup(outputs[0], tuple(slices))
            subject = Subject(model, [group], UsableBatches(batches), one.loss, outputs_of)
            theirs = scored_by_importance(criterion, one, batches, graph, (outputs, consumers))
            expected = scored(criterion, subject)[0].get(group.name)
            if criterion == "bn_scale":  # there is no BatchNorm
                assert theirs is None
                assert expected is None
                continue
            assert theirs is not None
            assert expected is not None
            torch.testing.assert_close(theirs.double(), expected.double(), rtol=1e-5, atol=1e-8, msg=criterion)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [False, True])
def test_two_domains_under_torch_pruning(kind: str, code: bool) -> None:
    """GAPrune's own domain is what is passed to ``score``, the general one is the criterion's."""
    build, layers = KINDS[kind]
    one = build()
    model = one.model.double().eval()
    domain, *general = [as_float64(batch) for batch in one.batches][:2]
    graph = tp.DependencyGraph().build_dependency(model, inputs_of(domain))
    criterion = criteria.GAPrune(general=general, code=code)
    for outputs, consumers in layers:
        units = torch.arange(model.get_submodule(outputs[0]).weight.shape[0])[:, None]  # type: ignore[arg-type]
        slices = [*(Slice(name, "out", units) for name in outputs), *(Slice(name, "in", units) for name in consumers)]
        group = ChannelGroup(outputs[0], tuple(slices))
        expected = group_scores(criterion, Subject(model, [group], UsableBatches([domain]), one.loss, outputs_of))
        theirs = scored_by_importance(criterion, one, [domain], graph, (outputs, consumers))
        assert theirs is not None
        assert theirs.unique().numel() > 1
        torch.testing.assert_close(theirs.double(), expected[group.name].double(), rtol=1e-5, atol=1e-8)


def scored_by_importance(
    criterion: Any, one: Case, batches: list[Any], graph: Any, layers: tuple[list[str], list[str]]
) -> Tensor | None:
    importance = CriterionImportance(criterion)
    importance.score(one.model, batches, one.loss, forward_fn=outputs_of)
    root: Any = one.model.get_submodule(layers[0][0])
    return importance(graph.get_pruning_group(root, tp.prune_linear_out_channels, list(range(root.out_features))))


def as_float64(batch: Any) -> Any:
    """The batch with its floating tensors in float64."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    parts = tuple(part.double() if part.is_floating_point() else part for part in parts)
    return parts if isinstance(batch, tuple) else parts[0]


def inputs_of(batch: Any) -> Any:
    """What the model is called with."""
    if not isinstance(batch, tuple):
        return {"input_ids": batch}
    return {"pixel_values": batch[0]} if batch[0].dim() == 4 else batch[0].clone().requires_grad_()


def outputs_of(model: nn.Module, batch: Any) -> Any:
    given = inputs_of(batch)
    return model(**given).logits if isinstance(given, dict) else model(given)


def test_groups_that_a_criterion_does_not_score_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    recipe = RECIPES["chain"]
    model = recipe.model()
    layer: Any = next(module for module in model.modules() if isinstance(module, nn.Linear))
    graph = tp.DependencyGraph().build_dependency(model, recipe.inputs(2).requires_grad_())
    group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, list(range(layer.out_features)))
    importance = CriterionImportance("bn_scale")
    importance.score(model)
    with caplog.at_level("WARNING", logger="obc"):
        assert importance(group) is None
        assert importance(group) is None
    assert [record.message for record in caplog.records] == [
        "head: the criterion 'bn_scale' does not score it, so it stays"
    ]


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
