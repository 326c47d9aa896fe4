"""Models for the tests of Torch-Pruning, and the truth about their groups: slices of explicit float64 gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import Case, class_losses, labelled, token_losses, tokens
from parity import TOLERANCE, error
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from benchmarks.small_vgg import VGG  # noqa: E402
from obc.demo import models as demo_models  # noqa: E402
from obc.integrations.torch_pruning import JacobianImportance  # noqa: E402

IN_HANDLERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def products(case: Case) -> dict[str, Tensor]:
    """Per parameter (N, *shape): weight times gradient of each row, in float64."""
    model = copy.deepcopy(case.model).double()
    named = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
    rows = []
    for batch in case.batches:
        grads = torch.autograd.grad(case.loss(model, batch), list(named.values()), materialize_grads=True)
        rows.append([p.detach() * g for p, g in zip(named.values(), grads, strict=True)])
    return {name: torch.stack(name_rows) for name, name_rows in zip(named, zip(*rows, strict=True), strict=True)}


def slices(module: nn.Module, out: bool, index: int, wg: Callable[[str], Tensor]) -> list[Tensor]:
    """The row (N,) of each slice that goes when one channel of a module is pruned; ``wg`` gives w * dL/dw (N, ...)."""
    if isinstance(module, nn.MultiheadAttention):
        weight, bias = wg("in_proj_weight"), wg("in_proj_bias")
        out_products = wg("out_proj.weight")
        projected = [weight[:, i].sum(1) + bias[:, i] for i in range(index, 3 * module.embed_dim, module.embed_dim)]
        out_row = out_products[:, index].sum(1) + wg("out_proj.bias")[:, index]
        return [*projected, weight[:, :, index].sum(1), out_row, out_products[:, :, index].sum(1)]
    weight = wg("weight")
    if isinstance(module, nn.Embedding):
        return [weight[:, :, index].sum(1)]
    dim, group_index = 1, index
    bias = wg("bias")[:, index] if getattr(module, "bias", None) is not None and out else torch.zeros(len(weight))
    if weight.dim() > 2 and out == getattr(module, "transposed", False):
        # Dimension 1 of the weight, 2 here: it counts the channels of one group, and dimension 0 those of every group.
        group, group_index = divmod(index, weight.shape[2])
        dim, weight = 2, weight.unflatten(1, (getattr(module, "groups", 1), -1))[:, group]
    return [weight.select(dim, group_index).reshape(len(weight), -1).sum(1) + bias]


class Truth:
    """An importance that compares another one, group by group, with sums over slices of explicit gradients."""

    def __init__(self, case: Case, importance: JacobianImportance) -> None:
        self.importance, self.products = importance, products(case)
        self.names = {id(part): name for name, part in [*case.model.named_modules(), *case.model.named_parameters()]}
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
            dim_products = self.products[self.names[id(target)]].movedim(1 + dep.target.pruning_dim % target.dim(), 1)
            return [dim_products.flatten(2).sum(2)[:, index] if dim_products.dim() > 2 else dim_products[:, index]]
        if next(target.parameters(), None) is None or (isinstance(target, nn.PReLU) and target.num_parameters == 1):
            return []  # nothing in it is pruned
        self.compared.add(type(target).__name__)
        prefix = self.names[id(target)]
        out = dep.handler not in IN_HANDLERS
        return slices(target, out, index, lambda key: self.products[f"{prefix}.{key}"])


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
    """A grouped convolution between two others, as in ResNeXt."""
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
    """Expand, depthwise, project, as in MobileNet."""
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
    """Two branches with concatenated channels: each item has slices of some root channels only."""

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
    return lambda: models.case(build, labelled(1, 8, 8, classes=10), class_losses)


def images_case(build: Callable[[], nn.Module]) -> Callable[[], Case]:
    return lambda: models.case(build, labelled(3, 8, 8, classes=5), class_losses)


def transformer_options(model: Any) -> dict[str, Any]:
    """Whole heads and feed-forward units; the width of the residual stream stays."""
    projections = [(a.query, a.key, a.value) for a in (layer.attention for layer in model.layers)]
    outputs = [part for layer in model.layers for part in (layer.attention.out, layer.mlp[2])]
    return {
        "num_heads": {projection: 4 for layer_projections in projections for projection in layer_projections},
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
    "residual": Family(digits_case(lambda: demo_models.ResidualCNN((6, 8), 1)), {"Conv2d", "BatchNorm2d", "Linear"}),
    "flatten": Family(digits_case(lambda: VGG((6, 8), 1, 10)), {"Conv2d", "BatchNorm2d", "Linear"}),
    "grouped": Family(images_case(grouped), {"Conv2d", "BatchNorm2d", "Linear"}),
    "depthwise": Family(images_case(depthwise), {"Conv2d", "BatchNorm2d", "Linear"}),
    "norms": Family(
        images_case(normed), {"Conv2d", "ConvTranspose2d", "GroupNorm", "InstanceNorm2d", "PReLU", "Linear"}
    ),
    "concatenated": Family(images_case(Concatenated), {"Conv2d", "BatchNorm2d", "Linear"}),
    "transformer": Family(digits_case(lambda: demo_models.Transformer(16, 4, 12, 2)), {"Linear"}, transformer_options),
    "attention": Family(
        lambda: models.case(Attending, labelled(7, 3, classes=5), class_losses), {"MultiheadAttention", "Linear"}
    ),
    "decoder": Family(
        lambda: models.case(Decoder, tokens(11, 6), token_losses),
        {"Embedding", "Linear", "Parameter"},
        decoder_options,
        lambda batch: batch,
    ),
    "llama": Family(models.llama, {"Linear"}, llama_options, lambda batch: batch),
}


def make_pruner(family: Family, case: Case, importance: Any, **options: Any) -> Any:
    """A pruner; Torch-Pruning's own default dictionaries are shared by all pruners, so it gets its own."""
    given = {"pruning_ratio": 0.5, "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    given.update({"ignored_layers": classifiers(case.model), **family.options(case.model), **options})
    return tp.pruner.MagnitudePruner(case.model, family.inputs(case.batches[0]), importance, **given)


def classifiers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def train_step_rows(importance: JacobianImportance, case: Case, zero: Callable[[nn.Module], None]) -> None:
    """The paper's loop, with the user's own way to clear gradients."""
    importance.zero_score()
    importance.zero_grad()
    case.model.zero_grad()
    for batch in case.batches:
        zero(case.model)
        case.loss(case.model, batch).backward()
        importance.accumulate_grad(case.model)
    importance.accumulate_score(case.model)


def fill_score(importance: JacobianImportance, case: Case) -> None:
    importance.score(case.model, case.batches, case.loss)


def fill_scorer(importance: JacobianImportance, case: Case) -> None:
    with importance.scorer(case.model) as scorer:
        for batch in case.batches:
            with scorer.row():
                case.loss(case.model, batch).backward()


def fill_as_paper(importance: JacobianImportance, case: Case) -> None:
    train_step_rows(importance, case, lambda model: model.zero_grad())


FILLS = {"score": fill_score, "scorer": fill_scorer, "paper": fill_as_paper}


def residual() -> tuple[Family, Case]:
    return FAMILIES["residual"], FAMILIES["residual"].build()


def scored(name: str, **options: Any) -> tuple[Family, Case, JacobianImportance]:
    family = FAMILIES[name]
    case = family.build()
    importance = JacobianImportance(**options)
    fill_score(importance, case)
    return family, case, importance


def graph(family: Family, case: Case) -> Any:
    for parameter in case.model.parameters():
        parameter.requires_grad_()
    return tp.DependencyGraph().build_dependency(case.model, family.inputs(case.batches[0]))
