"""Small models, how Torch-Pruning prunes each of them, and the results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from models import ResidualCNN, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import obc.recovery
from obc.structures.traced_plan import prune_step


class ConvChain(nn.Module):
    """Every padding mode, strides, a bias or none, norms or none."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 2
        for index, mode in enumerate(("zeros", "reflect", "replicate", "circular")):
            width = 6 + 2 * index
            layers.append(
                nn.Conv2d(channels, width, 3, stride=1 + index % 2, padding=1, padding_mode=mode, bias=index % 2 == 0)
            )
            layers += [nn.BatchNorm2d(width)] if index < 3 else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class FlattenNet(nn.Module):
    """A VGG in small: pooling, then a flatten before two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6 * 9, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x))).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class GroupedNet(nn.Module):
    """A grouped convolution, a depthwise one and a transposed one between ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.grouped, self.pointwise, self.depthwise, self.up, self.last):
            x = F.gelu(layer(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention whose keys and values may have fewer heads than the queries; head widths follow the projections."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        head_width = width // heads
        self.query = nn.Linear(width, heads * head_width)
        self.key = nn.Linear(width, kv_heads * head_width, bias=False)
        self.value = nn.Linear(width, kv_heads * head_width)
        self.out = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            projection(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for projection in (self.key, self.value)
        )
        if self.kv_heads != self.heads:
            key, value = (states.repeat_interleave(self.heads // self.kv_heads, 1) for states in (key, value))
        scores = (query @ key.transpose(-1, -2) * 0.3).softmax(-1)
        return self.out((scores @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then a GELU or a gated feed-forward network; the residual width stays."""

    def __init__(self, gated: bool, kv_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm1, self.attention = nn.LayerNorm(8), Attention(8, 4, kv_heads)
        self.norm2 = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate = nn.Linear(8, 12, bias=False) if gated else None
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        hidden = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return self.head((x + self.down(hidden)).mean(1))


class InvertedResiduals(nn.Module):
    """Expand, depthwise, project, each with a norm, ReLU6 after the first two; no convolution has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.expand_norm = nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.depthwise_norm = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.project, self.project_norm = nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(x)))
        y = F.relu6(self.expand_norm(self.expand(x)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        return self.head((x + self.project_norm(self.project(y))).mean((2, 3)))


@dataclass
class Pruned:
    """A model, its pruned copy and the plan between them."""

    original: nn.Module
    model: nn.Module
    plan: obc.recovery.PruningPlan

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.original.state_dict()


@dataclass
class Recipe:
    """How a model is built, what goes in, and what Torch-Pruning needs to be told."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ignored: tuple[str, ...] = ("head",)
    heads: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(self.build()).double().eval()

    def inputs(self, count: int = 4, seed: int = 0) -> Tensor:
        return torch.randn(count, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def pruner(self, model: nn.Module, steps: int = 1, ratio: float = 0.5) -> tp.pruner.BasePruner:
        modules = dict(model.named_modules())
        return tp.pruner.BasePruner(
            model,
            self.inputs(2).requires_grad_(),
            tp.importance.MagnitudeImportance(),
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[modules[name] for name in self.ignored],
            num_heads={modules[name]: heads for name, heads in self.heads.items()},
            in_channel_groups={},
            out_channel_groups={},
            **self.options,
        )

    def prune(self, steps: int = 1, ratio: float = 0.5) -> Pruned:
        original = self.model()
        pruned = copy.deepcopy(original)
        pruner = self.pruner(pruned, steps, ratio)
        plan = None
        for _ in range(steps):
            plan = prune_step(pruner, plan)
        assert plan is not None
        return Pruned(original, pruned, plan)


_QKV = ("attention.query", "attention.key", "attention.value")
_RESIDUAL = ("head", "embed", "attention.out", "down")

# Criteria that score experts, blocks or two domains, which none of these models has.
OF_OTHER_MODELS = {
    "reap",
    "expert_frequency",
    "expert_norm",
    "block_influence",
    "angular_distance",
    "entropy",
    "cfsp",
    "gaprune",
}

RECIPES: dict[str, Recipe] = {
    "chain": Recipe(ConvChain, (2, 8, 8)),
    "resnet": Recipe(ResidualCNN, (3, 8, 8)),
    "flatten": Recipe(FlattenNet, (2, 6, 6)),
    "grouped": Recipe(GroupedNet, (2, 6, 6)),
    "vit": Recipe(lambda: TransformerBlock(False, 4), (5, 3), _RESIDUAL, dict.fromkeys(_QKV, 4)),
    "swiglu": Recipe(lambda: TransformerBlock(True, 4), (5, 3), (*_RESIDUAL, *_QKV)),
}

# Networks with BatchNorms: plain, residual, with a flatten, with inverted residuals.
WITH_NORMS = {name: RECIPES[name] for name in ("chain", "resnet", "flatten")}
WITH_NORMS["inverted"] = Recipe(InvertedResiduals, (3, 12, 12), ("head", "stem"))
