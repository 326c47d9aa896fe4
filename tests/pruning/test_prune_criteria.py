"""Every criterion of obc.prune against its definition, written out unit by unit in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import regression_losses  # noqa: E402
from prunable import OF_OTHER_MODELS, RECIPES, Recipe  # noqa: E402

from obc.criteria import Jacobian, Subject, available, group_scores  # noqa: E402
from obc.model.groups import ChannelGroup, Slice, Slices  # noqa: E402
from obc.model.layouts import layout_of  # noqa: E402
from obc.model.usable_batches import UsableBatches  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

NAMES = ("chain", "flatten", "grouped", "resnet", "vit")


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return regression_losses(model(x), target).mean()


def make_subject(recipe: Recipe, slices: Slices = "gate") -> Subject:
    model = recipe.model()
    structure = TorchPruningStructure(
        model, recipe.inputs(2).requires_grad_(), ignored_layers=recipe.ignored, num_heads=recipe.heads
    )
    batches = [(recipe.inputs(3, seed), torch.arange(3.0) + seed) for seed in range(4)]

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return model(batch[0])

    return Subject(model, structure.groups, UsableBatches(batches), loss, forward, slices, "batch", torch.Generator())


def mask(layer: Any, part: Slice, unit: int) -> Tensor:
    """Which entries of a layer's weight go with a unit, entry by entry."""
    layout = layout_of(layer)
    assert layout is not None
    rows, columns = layer.weight.shape[:2]
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    channels = set(part.channels[unit].tolist())
    for row in range(rows):
        for column in range(columns):
            # Dimension 1 counts the channels of one group, which dimension 0 tells.
            dim_1_index = row // (rows // layout.groups) * columns + column
            out, in_ = (dim_1_index, row) if layout.transposed else (row, dim_1_index)
            chosen[row, column] = (out if part.side == "out" else in_) in channels
    return chosen.reshape(rows, columns, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)


def weighted(subject: Subject, group: ChannelGroup) -> list[Slice]:
    """The group's slices of layers with weights on two sides."""
    return [part for part in group.slices if layout_of(subject.model.get_submodule(part.module)) is not None]


def mean_over_slices(
    subject: Subject, value: Callable[[Any, Slice, int], Tensor], relative: bool, side: str | None = None
) -> dict[str, Tensor]:
    found = {}
    for group in subject.groups:
        parts = [part for part in weighted(subject, group) if side in (None, part.side)]
        layers = [subject.model.get_submodule(part.module) for part in parts]
        pairs = list(zip(layers, parts, strict=True))
        rows = [[value(layer, part, unit).item() for unit in range(group.size)] for layer, part in pairs]
        scores = torch.tensor(rows, dtype=torch.float64).mean(0)
        found[group.name] = scores / scores.mean() if relative else scores
    return found


def gradients(subject: Subject, batch: Any) -> dict[int, Tensor]:
    parameters = list(subject.model.parameters())
    grads = torch.autograd.grad(loss(subject.model, batch), parameters, materialize_grads=True)
    return {id(parameter): grad for parameter, grad in zip(parameters, grads, strict=True)}


def assert_scores(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, scores in expected.items():
        torch.testing.assert_close(got[name].double(), scores, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes(name: str) -> None:
    subject = make_subject(RECIPES[name])
    for criterion, power in (("l1", 1), ("l2", 2)):
        expected = mean_over_slices(subject, lambda m, p, u: m.weight[mask(m, p, u)].abs().pow(power).sum(), True)  # noqa: B023
        assert_scores(group_scores(criterion, subject), expected)


@pytest.mark.parametrize("name", NAMES)
def test_relations_between_filters(name: str) -> None:
    subject = make_subject(RECIPES[name])

    def filters(layer: Any, part: Slice) -> list[Tensor]:
        return [layer.weight[mask(layer, part, unit)].detach() for unit in range(len(part.channels))]

    def fpgm(layer: Any, part: Slice, unit: int) -> Tensor:
        all_filters = filters(layer, part)
        return torch.stack([(all_filters[unit] - other).norm() for other in all_filters]).sum()

    def whc(layer: Any, part: Slice, unit: int) -> Tensor:
        all_filters = filters(layer, part)
        own = all_filters[unit]
        return own.norm() * sum(
            other.norm() * (1 - torch.cosine_similarity(own, other, 0).abs())
            for index, other in enumerate(all_filters)
            if index != unit
        )

    assert_scores(group_scores("fpgm", subject), mean_over_slices(subject, fpgm, True, "out"))
    assert_scores(group_scores("whc", subject), mean_over_slices(subject, whc, True, "out"))


@pytest.mark.parametrize("name", NAMES)
def test_taylor(name: str) -> None:
    subject = make_subject(RECIPES[name])
    per_batch = [gradients(subject, batch) for batch in subject.batches]
    total = {key: sum(grads[key] for grads in per_batch) for key in per_batch[0]}
    expected = mean_over_slices(
        subject, lambda m, p, u: (m.weight * total[id(m.weight)])[mask(m, p, u)].abs().sum().detach(), False
    )
    assert_scores(group_scores("taylor", subject), expected)


@pytest.mark.parametrize("name", NAMES)
def test_fisher_adds_the_squares_of_every_batch(name: str) -> None:
    subject = make_subject(RECIPES[name])
    per_batch = [gradients(subject, batch) for batch in subject.batches]

    def value(layer: Any, part: Slice, unit: int) -> Tensor:
        chosen = mask(layer, part, unit)
        return sum((layer.weight * grads[id(layer.weight)])[chosen].square().sum().detach() for grads in per_batch)

    means = mean_over_slices(subject, value, False)
    expected = {group.name: means[group.name] * len(weighted(subject, group)) for group in subject.groups}
    assert_scores(group_scores("fisher", subject), expected)


@pytest.mark.parametrize("name", NAMES)
def test_jacobian_of_the_gate(name: str) -> None:
    """The consumers' rows are added up before they are squared."""
    subject = make_subject(RECIPES[name])
    expected = {}
    for group in subject.groups:
        rows = torch.zeros(len(list(subject.batches)), group.size, dtype=torch.float64)
        for n, batch in enumerate(subject.batches):
            grads = gradients(subject, batch)
            for part in group.consumers:
                layer: Any = subject.model.get_submodule(part.module)
                product = (layer.weight * grads[id(layer.weight)]).detach()
                rows[n] += torch.stack([product[mask(layer, part, unit)].sum() for unit in range(group.size)])
        expected[group.name] = rows.square().sum(0)
    assert_scores(group_scores("jacobian", subject), expected)


def test_jacobian_of_all_slices() -> None:
    """Every slice is squared by itself: of producers with their biases, norms, consumers."""
    subject = make_subject(RECIPES["chain"], "all")
    expected = {}
    for group in subject.groups:
        scores = torch.zeros(group.size, dtype=torch.float64)
        for batch in subject.batches:
            grads = gradients(subject, batch)
            for part in group.slices:
                layer: Any = subject.model.get_submodule(part.module)
                product = (layer.weight * grads[id(layer.weight)]).detach()
                for unit in range(group.size):
                    channel = int(part.channels[unit, 0])
                    row = product[channel].sum() if part.side == "out" else product[:, channel].sum()
                    if part.side == "out" and layer.bias is not None:
                        row = row + (layer.bias * grads[id(layer.bias)])[channel].detach()
                    scores[unit] += row.square()
        expected[group.name] = scores
    assert_scores(group_scores(Jacobian("all"), subject), expected)


def test_bn_scale_reads_batch_norms_alone() -> None:
    subject = make_subject(RECIPES["flatten"])
    got = group_scores("bn_scale", subject)
    model: Any = subject.model
    assert_scores(got, {"conv1": model.norm1.weight.abs().detach(), "conv2": model.norm2.weight.abs().detach()})


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_is_what_consumers_lose(name: str) -> None:
    subject = make_subject(RECIPES[name])
    expected = {}
    for group in subject.groups:
        expected[group.name] = torch.zeros(group.size, dtype=torch.float64)
        for part in group.consumers:
            layer: Any = subject.model.get_submodule(part.module)
            seen: list[tuple[Tensor, Tensor]] = []
            handle = layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append((args[0], y.clone())))
            for batch in subject.batches:
                subject.forward_fn(subject.model, batch)
            handle.remove()
            energy = sum(y.square().sum() for _, y in seen).detach()
            weight = layer.weight.detach().clone()
            for unit in range(group.size):
                with torch.no_grad():
                    layer.weight.copy_(weight.where(~mask(layer, part, unit), 0))
                    lost = sum((y - layer(x)).square().sum() for x, y in seen)
                    layer.weight.copy_(weight)
                expected[group.name][unit] += lost / energy
    assert_scores(group_scores("reconstruction", subject), expected)


def test_random_follows_the_generator() -> None:
    subject = make_subject(RECIPES["chain"])
    first = group_scores("random", subject)
    again = group_scores("random", subject)
    subject.generator.manual_seed(subject.generator.initial_seed())
    assert_scores(group_scores("random", subject), {name: scores.double() for name, scores in first.items()})
    assert any(not torch.equal(first[name], again[name]) for name in first)


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
