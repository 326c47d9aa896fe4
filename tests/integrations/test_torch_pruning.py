"""JacobianImportance in Torch-Pruning: every group against slices of explicit float64 gradients, then a step.

Runs with whichever Torch-Pruning is imported. For the last 1.5, put that into a folder of its own first:
``pip install --target DIR --no-deps torch-pruning==1.5.3``, then ``OBC_TORCH_PRUNING_15=DIR pytest`` this file.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import Case, case, class_losses, floats, labelled, token_losses, tokens, vector_losses
from parity import TOLERANCE, error
from torch import Tensor, nn

import obc

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.demo import models as demo_models  # noqa: E402
from obc.integrations.torch_pruning import JacobianImportance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")

# --- the truth --------------------------------------------------------------------------------------------------

IN_HANDLERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def products(of: Case) -> dict[str, Tensor]:
    """Per parameter (N, *shape): weight times gradient of each row, in float64."""
    model = copy.deepcopy(of.model).double()
    named = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
    rows = []
    for batch in of.batches:
        grads = torch.autograd.grad(of.loss(model, batch), list(named.values()), materialize_grads=True)
        rows.append([p.detach() * g for p, g in zip(named.values(), grads, strict=True)])
    return {name: torch.stack(of_name) for name, of_name in zip(named, zip(*rows, strict=True), strict=True)}


def slices(module: nn.Module, out: bool, index: int, wg: Callable[[str], Tensor]) -> list[Tensor]:
    """The row (N,) of each slice that goes when one channel of a module is pruned; ``wg`` gives w * dL/dw (N, ...)."""
    if isinstance(module, nn.MultiheadAttention):
        weight, bias = wg("in_proj_weight"), wg("in_proj_bias")
        of_out = wg("out_proj.weight")
        projected = [weight[:, i].sum(1) + bias[:, i] for i in range(index, 3 * module.embed_dim, module.embed_dim)]
        out_row = of_out[:, index].sum(1) + wg("out_proj.bias")[:, index]
        return [*projected, weight[:, :, index].sum(1), out_row, of_out[:, :, index].sum(1)]
    weight = wg("weight")
    if isinstance(module, nn.Embedding):
        return [weight[:, :, index].sum(1)]
    dim, of_group = 1, index
    bias = wg("bias")[:, index] if getattr(module, "bias", None) is not None and out else torch.zeros(len(weight))
    if weight.dim() > 2 and out == getattr(module, "transposed", False):
        # Dimension 1 of the weight, 2 here: it counts the channels of one group, and dimension 0 those of every group.
        group, of_group = divmod(index, weight.shape[2])
        dim, weight = 2, weight.unflatten(1, (getattr(module, "groups", 1), -1))[:, group]
    return [weight.select(dim, of_group).reshape(len(weight), -1).sum(1) + bias]


class Truth:
    """An importance that compares another one, group by group, with sums over slices of explicit gradients."""

    def __init__(self, of: Case, importance: JacobianImportance) -> None:
        self.importance, self.products = importance, products(of)
        self.names = {id(part): name for name, part in [*of.model.named_modules(), *of.model.named_parameters()]}
        self.groups, self.compared = 0, set[str]()

    def __call__(self, group: Any) -> Tensor | None:
        got = self.importance(group)
        roots = list(group[0][1])
        expected = torch.zeros(len(roots), dtype=torch.float64)
        for item in group:
            root_idxs = getattr(item, "root_idxs", None)
            if root_idxs is not None and None not in root_idxs:
                for index, root in zip(item[1], root_idxs, strict=True):
                    rows = self.rows(item[0], index)
                    expected[roots.index(root)] += sum(row.square().sum() for row in rows)
        assert got is not None
        assert got.dtype == torch.float32
        assert error(got, expected) <= TOLERANCE
        self.groups += 1
        return got

    def rows(self, dep: Any, index: int) -> list[Tensor]:
        target = dep.target.module
        if isinstance(target, nn.Parameter):
            self.compared.add("Parameter")
            of_dim = self.products[self.names[id(target)]].movedim(1 + dep.target.pruning_dim % target.dim(), 1)
            return [of_dim.flatten(2).sum(2)[:, index] if of_dim.dim() > 2 else of_dim[:, index]]
        if next(target.parameters(), None) is None or (isinstance(target, nn.PReLU) and target.num_parameters == 1):
            return []  # nothing in it is pruned
        self.compared.add(type(target).__name__)
        prefix = self.names[id(target)]
        out = dep.handler not in IN_HANDLERS
        return slices(target, out, index, lambda key: self.products[f"{prefix}.{key}"])


# --- models -----------------------------------------------------------------------------------------------------


@dataclass
class Family:
    """A model to prune, what must be compared in it, and the pruner's options."""

    build: Callable[[], Case]
    compared: set[str]
    options: Callable[[Any], dict[str, Any]] = field(default=lambda model: {})
    inputs: Callable[[Any], Any] = field(default=lambda batch: batch[0])


class Head(nn.Module):
    """The mean over positions, then a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def grouped() -> nn.Module:
    """As in ResNeXt: a grouped convolution between two others."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 6, 1),
        nn.ReLU(),
        Head(6),
    )


def depthwise() -> nn.Module:
    """As in MobileNet: expand, depthwise, project."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        Head(6),
    )


def normed() -> nn.Module:
    """GroupNorm, PReLU of each channel, InstanceNorm, a transposed convolution, PReLU of one slope."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.PReLU(8),
        nn.Conv2d(8, 6, 3),
        nn.InstanceNorm2d(6, affine=True),
        nn.PReLU(),
        nn.ConvTranspose2d(6, 7, 2),
        nn.GELU(),
        Head(7),
    )


class Concatenated(nn.Module):
    """Two branches whose channels stand one after the other: each item has slices of some root channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.norm, self.join = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.join(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))))


class Embedded(nn.Module):
    """An embedding with positions that are a parameter of the model, a LayerNorm and a residual linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positions
        return self.head(x + F.gelu(self.mix(self.norm(x))))


class Attending(nn.Module):
    """torch's own attention, which prunes as one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class RMSNorm(nn.Module):
    """A norm that Torch-Pruning does not know: it prunes the weight as a parameter of no layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class GroupedQueries(nn.Module):
    """Attention in which two query heads share each key and value head, by expanding as transformers does."""

    def __init__(self, width: int = 16, head_width: int = 4) -> None:
        super().__init__()
        self.head_width = head_width
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width // 2, bias=False)

    def repeated(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        x = x.view(samples, length, -1, self.head_width).transpose(1, 2)
        heads = x.shape[1]
        x = x[:, :, None].expand(samples, heads, 2, length, self.head_width)
        return x.reshape(samples, heads * 2, length, self.head_width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        query = self.query(x).view(samples, length, -1, self.head_width).transpose(1, 2)
        weights = (query @ self.repeated(self.key(x)).transpose(2, 3)).softmax(-1)
        attended = (weights @ self.repeated(self.value(x))).transpose(1, 2)
        return self.out(attended.reshape(samples, length, -1))


class Decoder(nn.Module):
    """Llama's block: RMSNorm, grouped-query attention, RMSNorm, gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention_norm, self.attention = nn.Embedding(11, 16), RMSNorm(16), GroupedQueries()
        self.mlp_norm, self.gate, self.up = RMSNorm(16), nn.Linear(16, 12, bias=False), nn.Linear(16, 12, bias=False)
        self.down, self.head = nn.Linear(12, 16, bias=False), nn.Linear(16, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.attention(self.attention_norm(x))
        x = self.mlp_norm(x)
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


def digits_case(build: Callable[[], nn.Module]) -> Callable[[], Case]:
    return lambda: case(build, labelled(1, 8, 8, classes=10), class_losses)


def images_case(build: Callable[[], nn.Module]) -> Callable[[], Case]:
    return lambda: case(build, labelled(3, 8, 8, classes=5), class_losses)


def transformer_options(model: Any) -> dict[str, Any]:
    """Whole heads and feed-forward units; the width of the residual stream stays."""
    projections = [(a.query, a.key, a.value) for a in (layer.attention for layer in model.layers)]
    outputs = [part for layer in model.layers for part in (layer.attention.out, layer.mlp[2])]
    return {
        "num_heads": {projection: 4 for of_layer in projections for projection in of_layer},
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.5,
        "ignored_layers": [model.head, model.embed, model.position, *outputs],
    }


def decoder_options(model: Any) -> dict[str, Any]:
    attention = model.attention
    return {
        "num_heads": {attention.query: 4, attention.key: 2, attention.value: 2},
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.5,
        "ignored_layers": [model.head],
    }


def llama_options(model: Any) -> dict[str, Any]:
    """Feed-forward units only: rotary embeddings of grouped queries send Torch-Pruning 1.6.1 into an endless loop."""
    kept = [model.lm_head]
    for layer in model.model.layers:
        kept += [layer.self_attn, layer.mlp.down_proj]
    return {"ignored_layers": kept, "output_transform": lambda output: output.logits}


FAMILIES = {
    "residual": Family(digits_case(lambda: demo_models.residual_cnn((6, 8), 1)), {"Conv2d", "BatchNorm2d", "Linear"}),
    "flatten": Family(digits_case(lambda: demo_models.vgg((6, 8), 1, 10)), {"Conv2d", "BatchNorm2d", "Linear"}),
    "grouped": Family(images_case(grouped), {"Conv2d", "BatchNorm2d", "Linear"}),
    "depthwise": Family(images_case(depthwise), {"Conv2d", "BatchNorm2d", "Linear"}),
    "norms": Family(
        images_case(normed), {"Conv2d", "ConvTranspose2d", "GroupNorm", "InstanceNorm2d", "PReLU", "Linear"}
    ),
    "concatenated": Family(images_case(Concatenated), {"Conv2d", "BatchNorm2d", "Linear"}),
    "transformer": Family(digits_case(lambda: demo_models.transformer(16, 4, 12, 2)), {"Linear"}, transformer_options),
    "attention": Family(
        lambda: case(Attending, labelled(7, 3, classes=5), class_losses), {"MultiheadAttention", "Linear"}
    ),
    "decoder": Family(
        lambda: case(Decoder, tokens(11, 6), token_losses),
        {"Embedding", "Linear", "Parameter"},
        decoder_options,
        lambda batch: batch,
    ),
    "llama": Family(models.llama, {"Linear"}, llama_options, lambda batch: batch),
}


def make_pruner(family: Family, of: Case, importance: Any, **options: Any) -> Any:
    """A pruner; Torch-Pruning's own default dictionaries are shared by all pruners, so it gets its own."""
    given = {"pruning_ratio": 0.5, "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    given.update({"ignored_layers": classifiers(of.model), **family.options(of.model), **options})
    return tp.pruner.MagnitudePruner(of.model, family.inputs(of.batches[0]), importance, **given)


def classifiers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def train_step_rows(importance: JacobianImportance, of: Case, zero: Callable[[nn.Module], None]) -> None:
    """The paper's loop, with the user's own way to clear gradients."""
    importance.zero_score()
    importance.zero_grad()
    of.model.zero_grad()
    for batch in of.batches:
        zero(of.model)
        of.loss(of.model, batch).backward()
        importance.accumulate_grad(of.model)
    importance.accumulate_score(of.model)


def fill_score(importance: JacobianImportance, of: Case) -> None:
    importance.score(of.model, of.batches, of.loss)


def fill_scorer(importance: JacobianImportance, of: Case) -> None:
    with importance.scorer(of.model) as scorer:
        for batch in of.batches:
            with scorer.row():
                of.loss(of.model, batch).backward()


def fill_as_paper(importance: JacobianImportance, of: Case) -> None:
    train_step_rows(importance, of, lambda model: model.zero_grad())


FILLS = {"score": fill_score, "scorer": fill_scorer, "paper": fill_as_paper}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_match_explicit_slices(name: str, fill: Callable[[JacobianImportance, Case], None]) -> None:
    family = FAMILIES[name]
    of = family.build()
    importance = JacobianImportance(strict=True)
    fill(importance, of)
    before = sum(parameter.numel() for parameter in of.model.parameters())
    truth = Truth(of, importance)
    make_pruner(family, of, truth).step()
    assert truth.groups > 0
    assert truth.compared == family.compared
    assert sum(parameter.numel() for parameter in of.model.parameters()) < before
    of.loss(of.model, of.batches[0])  # the pruned model still runs


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_pruner_may_remove_is_read(name: str) -> None:
    """The pruner asks for the same importances as where everything was read, and no layer that it keeps is read."""
    family = FAMILIES[name]
    of = family.build()
    everything, importance = JacobianImportance(), JacobianImportance(strict=True)
    everything.score(of.model, of.batches, of.loss)
    pruner = make_pruner(family, of, importance)
    scores = importance.score(of.model, of.batches, of.loss, pruner=pruner)
    groups = list(
        pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    )
    assert groups
    pruned = {id(item[0].target.module) for group in groups for item in group}
    for group in groups:
        expected = everything(group)
        assert error(importance(group), expected.double()) <= TOLERANCE
    for layer, module in of.model.named_modules():
        if id(module) not in pruned and isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            assert layer not in scores or layer.endswith("out_proj")
    pruner.step()


def test_a_pruner_of_another_model_is_refused() -> None:
    family, of = residual()
    importance = JacobianImportance()
    pruner = make_pruner(family, of, importance)
    other = family.build()
    with pytest.raises(ValueError, match="none of its groups has a module of this ResidualCNN"):
        importance.score(other.model, other.batches, other.loss, pruner=pruner)
    with pytest.raises(ValueError, match="give pruner or modules, not both"):
        importance.score(of.model, of.batches, of.loss, pruner=pruner, modules=["head"])


# --- the paper's loop -------------------------------------------------------------------------------------------


def residual() -> tuple[Family, Case]:
    return FAMILIES["residual"], FAMILIES["residual"].build()


def assert_same_scores(importance: JacobianImportance, of: Case) -> None:
    expected = obc.score(of.model, of.batches, of.loss)
    assert importance.scores is not None
    assert set(importance.scores) == set(expected)
    for name, channels in expected.items():
        for side in ("out_channels", "in_channels"):
            got, wanted = getattr(importance.scores[name], side), getattr(channels, side)
            assert error(got, None if wanted is None else wanted.double()) <= TOLERANCE, f"{name}.{side}"


ZEROS: dict[str, Callable[[nn.Module], None]] = {
    "dropped": lambda model: model.zero_grad(set_to_none=True),
    "zeroed": lambda model: model.zero_grad(set_to_none=False),
    "never": lambda model: None,
}


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_gradients_may_be_zeroed_between_rows_or_not(zero: Callable[[nn.Module], None]) -> None:
    _, of = residual()
    importance = JacobianImportance()
    train_step_rows(importance, of, zero)
    assert_same_scores(importance, of)


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_several_backwards_make_one_row(zero: Callable[[nn.Module], None]) -> None:
    _, of = residual()
    importance = JacobianImportance()
    for images, labels in of.batches:
        zero(of.model)
        for part in (slice(0, 1), slice(1, None)):
            losses = of.losses(of.model, (images[part], labels[part]))
            (losses.sum() / len(labels)).backward()
        importance.accumulate_grad(of.model)
    importance.accumulate_score(of.model)
    assert_same_scores(importance, of)


def test_a_layer_that_a_row_does_not_reach_adds_nothing_to_it() -> None:
    """Its gradient is still there from the row before when nobody zeroes it."""
    of = case(lambda: nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)]), floats(3), vector_losses)
    first, middle, last = of.model
    expected = []
    importance = JacobianImportance()
    for (x, _), through in zip(of.batches, (True, False, True), strict=True):
        hidden = first(x).tanh()
        hidden = middle(hidden).tanh() if through else hidden
        before = 0.0 if middle.weight.grad is None else middle.weight.grad.clone()
        last(hidden).square().mean().backward()
        expected.append(((middle.weight.grad - before) * middle.weight).sum(0).detach().double().square())
        importance.accumulate_grad(of.model)
    importance.accumulate_score(of.model)
    assert not expected[1].any()
    assert error(importance.scores["1"].in_channels, sum(expected)) <= TOLERANCE


def test_gradients_stay_the_users_and_none_is_kept() -> None:
    _, of = residual()
    importance = JacobianImportance()
    of.loss(of.model, of.batches[0]).backward()
    grads = {name: parameter.grad for name, parameter in of.model.named_parameters()}
    copies = {name: grad.clone() for name, grad in grads.items()}
    importance.accumulate_grad(of.model)
    assert all(parameter.grad is grads[name] for name, parameter in of.model.named_parameters())
    assert all(torch.equal(grads[name], copies[name]) for name in grads)
    references = [weakref.ref(grad) for grad in grads.values()]
    of.model.zero_grad()
    grads.clear()
    assert all(reference() is None for reference in references)


def test_hooks_leave_with_the_next_backward() -> None:
    _, of = residual()
    importance = JacobianImportance()
    train_step_rows(importance, of, lambda model: model.zero_grad())
    of.loss(of.model, of.batches[0]).backward()
    assert not any(parameter._backward_hooks for parameter in of.model.parameters())


def test_flushing_between_rows_adds_up() -> None:
    _, of = residual()
    importance = JacobianImportance()
    for batch in of.batches:
        of.loss(of.model, batch).backward()  # the gradients add up across the flush too
        importance.accumulate_grad(of.model)
        importance.accumulate_score(of.model)
    assert_same_scores(importance, of)
    assert importance.scores.num_rows == len(of.batches)


def test_zero_grad_forgets_rows_and_zero_score_scores() -> None:
    _, of = residual()
    importance = JacobianImportance()
    of.loss(of.model, of.batches[0]).backward()
    importance.accumulate_grad(of.model)
    importance.zero_grad()
    assert all(parameter.grad is not None for parameter in of.model.parameters())
    train_step_rows(importance, of, lambda model: model.zero_grad())
    assert_same_scores(importance, of)
    importance.zero_score()
    assert importance.scores is None


def test_loss_scale_is_divided_out() -> None:
    _, of = residual()
    importance = JacobianImportance()
    for batch in of.batches:
        of.model.zero_grad()
        (of.loss(of.model, batch) * 1024).backward()
        importance.accumulate_grad(of.model, loss_scale=1024)
    importance.accumulate_score(of.model)
    assert_same_scores(importance, of)


def test_a_row_that_is_not_finite_is_left_out() -> None:
    _, of = residual()
    importance = JacobianImportance()
    of.loss(of.model, of.batches[0]).backward()
    of.model.blocks[1].conv2.weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"'blocks\.1\.conv2', and was left out"):
        importance.accumulate_grad(of.model)
    for batch in of.batches:
        of.model.zero_grad()
        of.loss(of.model, batch).backward()
        importance.accumulate_grad(of.model)
    importance.accumulate_score(of.model)
    assert_same_scores(importance, of)


def test_pruning_amid_rows_is_refused_until_they_are_zeroed() -> None:
    family, of = residual()
    importance = JacobianImportance()
    pruner = make_pruner(family, of, importance, iterative_steps=2)
    train_step_rows(importance, of, lambda model: model.zero_grad())
    pruner.step()
    with pytest.raises(RuntimeError, match=r"zero_score\(\) and zero_grad\(\) first"):
        importance.accumulate_grad(of.model)
    with pytest.raises(RuntimeError, match="no row of this model"):
        importance.accumulate_score(of.model)
    train_step_rows(importance, of, lambda model: model.zero_grad())
    assert_same_scores(importance, of)
    pruner.step()


# --- what an importance must get right ---------------------------------------------------------------------------


def scored(name: str, **options: Any) -> tuple[Family, Case, JacobianImportance]:
    family = FAMILIES[name]
    of = family.build()
    importance = JacobianImportance(**options)
    fill_score(importance, of)
    return family, of, importance


def graph(family: Family, of: Case) -> Any:
    for parameter in of.model.parameters():
        parameter.requires_grad_()
    return tp.DependencyGraph().build_dependency(of.model, family.inputs(of.batches[0]))


def test_order_of_indices_is_the_groups() -> None:
    """A group of some channels in any order: each place of the result is its own channel's, and no list changes."""
    family, of, importance = scored("flatten")
    dependencies = graph(family, of)
    first = of.model.features[0]
    every = importance(dependencies.get_pruning_group(first, tp.prune_conv_out_channels, list(range(6))))
    group = dependencies.get_pruning_group(first, tp.prune_conv_out_channels, [5, 0, 3])
    lists = [(list(item[1]), list(item.root_idxs)) for item in group]
    assert torch.equal(importance(group), every[[5, 0, 3]])
    assert [(list(item[1]), list(item.root_idxs)) for item in group] == lists
    last = of.model.features[4]
    every = importance(dependencies.get_pruning_group(last, tp.prune_conv_out_channels, list(range(8))))
    some = importance(dependencies.get_pruning_group(last, tp.prune_conv_out_channels, [7, 1]))
    torch.testing.assert_close(some, every[[7, 1]])


REDUCED = {
    "sum": lambda layers, present: layers.sum(0),
    "mean": lambda layers, present: layers.mean(0),
    "max": lambda layers, present: layers.max(0).values,
    "prod": lambda layers, present: torch.where(present, layers, torch.ones(())).prod(0),
    "first": lambda layers, present: layers[0],
    "gate": lambda layers, present: layers[-1],
    None: lambda layers, present: layers,
}


@pytest.mark.parametrize("reduction", REDUCED)
def test_reductions(reduction: str | None) -> None:
    """On a group in which some layers have slices of some root channels only, and one several of each."""
    family, of, summed = scored("concatenated")
    importance = JacobianImportance(reduction)
    importance.scores = summed.scores
    dependencies = graph(family, of)
    group = dependencies.get_pruning_group(of.model.join, tp.prune_conv_in_channels, list(range(10)))
    scores = summed.scores
    layers, present = torch.zeros(4, 10), torch.ones(4, 10, dtype=torch.bool)
    layers[0] = scores["join"].in_channels
    order = [item[0].target.module for item in group if next(item[0].target.module.parameters(), None) is not None]
    names = {id(module): name for name, module in of.model.named_modules()}
    assert {names[id(module)] for module in order} == {"join", "norm", "left", "right"}
    spans = {"join": slice(0, 10), "norm": slice(0, 10), "left": slice(0, 4), "right": slice(4, 10)}
    for place, module in enumerate(order):
        name = names[id(module)]
        layers[place], present[place] = 0, False
        layers[place, spans[name]] = scores[name].in_channels if name == "join" else scores[name].out_channels
        present[place, spans[name]] = True
    torch.testing.assert_close(importance(group), REDUCED[reduction](layers, present))


NORMALIZED: dict[Any, Callable[[Tensor], Tensor]] = {
    None: lambda s: s,
    "sum": lambda s: s / s.sum(),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "standarization": lambda s: (s - s.min()) / (s.max() - s.min()),
    "gaussian": lambda s: (s - s.mean()) / s.std(),
    "sentinel_0.5": lambda s: s / s.sort().values[len(s) // 2],
    "lamp": lambda s: torch.stack([value / s[s >= value].sum() for value in s]),
}


@pytest.mark.parametrize("normalizer", NORMALIZED)
def test_normalizers(normalizer: str | None) -> None:
    family, of, summed = scored("flatten")
    dependencies = graph(family, of)
    group = dependencies.get_pruning_group(of.model.features[0], tp.prune_conv_out_channels, list(range(6)))
    importance = JacobianImportance(normalizer=normalizer)
    # Torch-Pruning adds 1e-8 to some denominators: scores of about 1 make that nothing.
    large = {
        name: obc.ChannelScores(*(None if side is None else side * 1e4 for side in (c.out_channels, c.in_channels)))
        for name, c in summed.scores.items()
    }
    importance.scores = large
    torch.testing.assert_close(importance(group), NORMALIZED[normalizer](summed(group) * 1e4))
    importance.scores = {
        name: obc.ChannelScores(*(None if side is None else side * 0 for side in (c.out_channels, c.in_channels)))
        for name, c in summed.scores.items()
    }
    assert not importance(group).any()


def test_a_callable_normalizer_gets_the_sums() -> None:
    family, of, summed = scored("flatten")
    group = graph(family, of).get_pruning_group(of.model.features[0], tp.prune_conv_out_channels, list(range(6)))
    importance = JacobianImportance(normalizer=torch.log)
    importance.scores = summed.scores
    assert torch.equal(importance(group), summed(group).log())


def test_scores_of_a_file_serve(tmp_path: Path) -> None:
    family, of, summed = scored("residual")
    summed.scores.save(tmp_path / "scores.safetensors")
    importance = JacobianImportance()
    importance.scores = obc.Scores.load(tmp_path / "scores.safetensors", of.model)
    group = graph(family, of).get_pruning_group(of.model.stem[0], tp.prune_conv_out_channels, list(range(6)))
    assert torch.equal(importance(group), summed(group))


def test_folded_groups_serve_every_group() -> None:
    """The paper's code adds up the groups of a grouped convolution's inputs; each in channel then has the sum."""
    family, of, _ = scored("grouped")
    importance = JacobianImportance()
    importance.score(of.model, of.batches, of.loss, fold_groups=True)
    folded = importance.scores["3"].in_channels
    assert folded.shape == (2,)
    group = graph(family, of).get_pruning_group(of.model[0], tp.prune_conv_out_channels, list(range(8)))
    expected = importance.scores["0"].out_channels + importance.scores["1"].out_channels + folded.repeat(4)
    torch.testing.assert_close(importance(group), expected)


def test_a_tied_weight_counts_once() -> None:
    of = models.tied()
    importance = JacobianImportance(strict=True)
    fill_score(importance, of)
    dependencies = tp.DependencyGraph().build_dependency(of.model, of.batches[0])
    group = dependencies.get_pruning_group(of.model.embedding, tp.prune_embedding_out_channels, list(range(8)))
    scores = importance.scores
    mix, norm, tied = scores["mix"], scores["norm"], scores["embedding"].out_channels
    torch.testing.assert_close(tied, scores["head"].in_channels)
    torch.testing.assert_close(importance(group), tied + mix.out_channels + mix.in_channels + norm.out_channels)


def test_keys_and_values_of_grouped_queries_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    family, of, importance = scored("decoder")
    with caplog.at_level("INFO", logger="obc"):
        make_pruner(family, of, importance).step()
    left_out = {record.args[0] for record in caplog.records if "no root indices" in record.msg}
    assert left_out == {"attention.key", "attention.value"}


# --- refusals ----------------------------------------------------------------------------------------------------


def test_stale_scores_are_refused() -> None:
    family, of, importance = scored("residual")
    pruner = make_pruner(family, of, importance, iterative_steps=3)
    pruner.step()
    with pytest.raises(ValueError, match=r"'[\w.]+' was scored with \d+ (out|in) channels and has \d+ now.*score"):
        pruner.step()
    fill_score(importance, of)
    pruner.step()


def test_nothing_scored_is_refused() -> None:
    family, of = residual()
    with pytest.raises(RuntimeError, match=r"no scores yet: call \.score"):
        make_pruner(family, of, JacobianImportance()).step()


def test_scores_of_another_model_are_refused() -> None:
    family, of, _ = scored("residual")
    *_, other = scored("grouped")
    importance = JacobianImportance()
    importance.scores = other.scores
    with pytest.raises(ValueError, match="another model: they hold '0', '1', '3'"):
        make_pruner(family, of, importance).step()


def test_unscored_layers_are_named_once() -> None:
    family, of = residual()
    importance = JacobianImportance()
    importance.score(of.model, of.batches, of.loss, modules=lambda name, module: name != "blocks.0.conv1")
    pruner = make_pruner(family, of, importance)
    group = pruner.DG.get_pruning_group(of.model.blocks[0].conv1, tp.prune_conv_out_channels, [0, 1])
    with pytest.warns(UserWarning, match=r"without a score of their own: 'blocks\.0\.conv1' \(not among the scores\)"):
        assert importance(group) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance(group)
    strict = JacobianImportance(strict=True)
    strict.scores = importance.scores
    with pytest.raises(ValueError, match=r"strict: .*'blocks\.0\.conv1'"):
        strict(group)


def test_a_group_without_scores_is_not_pruned() -> None:
    family, of = residual()
    importance = JacobianImportance()
    importance.score(of.model, of.batches, of.loss, modules=["head"])
    group = graph(family, of).get_pruning_group(of.model.blocks[0].conv1, tp.prune_conv_out_channels, [0, 1])
    with pytest.warns(UserWarning, match="without a score"):
        assert importance(group) is None


def test_a_parameter_of_no_layer_is_scored_from_gradients_and_named_otherwise() -> None:
    family = Family(lambda: case(Embedded, tokens(11, 6), token_losses), set(), inputs=lambda batch: batch)
    of = family.build()
    importance = JacobianImportance(strict=True)
    fill_as_paper(importance, of)
    truth = Truth(of, importance)
    truth(graph(family, of).get_pruning_group(of.model.embedding, tp.prune_embedding_out_channels, list(range(8))))
    assert truth.compared == {"Embedding", "LayerNorm", "Linear", "Parameter"}
    importance = JacobianImportance()
    fill_score(importance, of)
    with pytest.warns(UserWarning, match="'positions'"):
        make_pruner(family, of, importance).step()


@pytest.mark.parametrize(
    "options", [{"group_reduction": "median"}, {"normalizer": "entropy"}], ids=["reduction", "normalizer"]
)
def test_unknown_options_are_refused(options: dict[str, str]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*'{value}'"):
        JacobianImportance(**options)


def test_a_loop_that_fails_leaves_the_scores_alone() -> None:
    _, of, importance = scored("residual")
    before = importance.scores
    with pytest.raises(KeyboardInterrupt), importance.scorer(of.model):
        raise KeyboardInterrupt
    assert importance.scores is before


# --- the last 1.5 ------------------------------------------------------------------------------------------------

OLDER = os.environ.get("OBC_TORCH_PRUNING_15", "")


@pytest.mark.slow
@pytest.mark.skipif(not OLDER, reason="OBC_TORCH_PRUNING_15 is not set: see the top of this file")
def test_older_version() -> None:
    """The whole file again, in a process that finds the older Torch-Pruning first."""
    path = os.pathsep.join([OLDER, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OBC_TORCH_PRUNING_15": ""}
    version = [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch-pruning'))"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith("1.5."), f"OBC_TORCH_PRUNING_15={OLDER} holds Torch-Pruning {found}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
