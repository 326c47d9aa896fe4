"""Time of a training step with Equivalent Pruning: ``python -m benchmarks.bench_equivalent``.

Side by side, each a step of SGD with momentum on the same batch: the unpruned model ("full"), the naively pruned one
("naive"), the pruned one between explicit 1x1 layers, as in the paper ("explicit"), and ours, with whole factors
("folded") and with factors of the dropped channels only ("reduced"). Before anything is timed, the first losses of all
pruned ones are compared: they are one function at the start.

The limit is a naive step followed by the fold's own multiplications, forward and backward, as plain products of the
same shapes by the faster library: what no fold of whole factors can beat. The line before each table says how many
there are, and how fast they are when they have the processor to themselves for a moment.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.harness import Case, Provider, Target, main
from obc.backends.products import mm
from obc.recovery import PruningPlan, equivalent_pruning
from obc.structures.traced_plan import prune_step

CLASSES = 10
LIMIT = "naive + products"
# Widths to keep for so many times fewer multiplications: they fall with the square of uniform widths, but linearly
# with the width of a transformer's feed-forward network, of which half the multiplications remain elsewhere.
KEPT_WIDTH = {2: 2**-0.5, 4: 0.5}


def vgg19() -> nn.Sequential:
    """VGG-19 with batch norm for 32 x 32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for width, convs in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(convs):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


def resnet56() -> nn.Sequential:
    """ResNet-56 for 32 x 32 images: 3 stages of 9 basic blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(9):
            layers.append(BasicBlock(channels, width, stride=1 if channels == width else 2))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 of 32 x 32 images, width 192, six layers: 2.7 million parameters."""

    def __init__(self, width: int = 192, heads: int = 3, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*[EncoderLayer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x).flatten(2).transpose(1, 2))).mean(1))


def prune(model: nn.Module, kept: float, ignored: Sequence[nn.Module]) -> PruningPlan:
    """Uniform widths; which channels go does not matter for the time."""
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(2, 3, 32, 32),
        tp.importance.MagnitudeImportance(),
        pruning_ratio=1 - kept,
        ignored_layers=list(ignored),
        in_channel_groups={},
        out_channel_groups={},
    )
    return prune_step(pruner)


class Mixed(nn.Module):
    """A layer between real 1x1 layers, as the paper inserts them."""

    def __init__(self, full: nn.Module, compressor: Tensor | None, decompressor: Tensor | None) -> None:
        super().__init__()
        self.before = nn.Identity() if decompressor is None else _mixing(full, decompressor)
        self.full = full
        self.after = nn.Identity() if compressor is None else _mixing(full, compressor)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.full(self.before(x)))


def _mixing(full: nn.Module, matrix: Tensor) -> nn.Module:
    to, from_ = matrix.shape
    layer = nn.Conv2d(from_, to, 1, bias=False) if isinstance(full, nn.Conv2d) else nn.Linear(from_, to, bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix.reshape(layer.weight.shape))
    return layer


def explicit(naive: nn.Module, folded: nn.Module, original: nn.Module) -> nn.Module:
    """The naive model with every folded layer's original between its explicit factors."""
    model = copy.deepcopy(naive)
    for name, module in folded.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        fold = module.parametrizations.weight[0]
        factors = (None if f is None else f.detach().clone() for f in (fold.compressor, fold.decompressor))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Mixed(copy.deepcopy(original.get_submodule(name)), *factors))
    return model


def product_shapes(folded: nn.Module) -> list[tuple[int, int, int]]:
    """(a, b, c) of every product a x b times b x c of the folds' forward."""
    shapes = []
    for module in folded.modules():
        if not parametrize.is_parametrized(module):
            continue
        chain = module.parametrizations.weight
        out_channels, in_channels = chain.original.shape[:2]
        positions = chain.original.shape[2:].numel()
        kept_out, kept_in = module.weight.shape[:2]
        compressor, decompressor = chain[0].compressor, chain[0].decompressor
        orders = []
        for first in (True, False):  # C before D, D before C
            order = []
            if compressor is not None:
                columns = in_channels if first else kept_in
                order.append((kept_out, compressor.shape[1], columns * positions))
            if decompressor is not None:
                rows = kept_out if first else out_channels
                order.append((rows * positions, decompressor.shape[0], kept_in))
            orders.append(order)
        shapes += min(orders, key=lambda order: sum(a * b * c for a, b, c in order))
    return shapes


def products(shapes: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
    """Each product and the two of its backward."""
    operands = [(torch.randn(1, a, b), torch.randn(1, b, c), torch.randn(1, a, c)) for a, b, c in shapes]

    @torch.no_grad()
    def run() -> None:
        for left, right, grad in operands:
            mm(left, right)
            mm(grad, right.mT)
            mm(left.mT, grad)

    return run


def bound(name: str, shapes: Sequence[tuple[int, int, int]]) -> str:
    """The FLOPs of a step's folds, and the time and rate of their products."""
    flops = 6 * sum(a * b * c for a, b, c in shapes)
    run, seconds = products(shapes), math.inf
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds = min(seconds, time.perf_counter() - start)
    return f"{name} {flops / 1e9:.2f} GFLOP a step, {1e3 * seconds:.1f} ms at {flops / seconds / 1e9:.0f} GFLOP/s"


def step(model: nn.Module, batch: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """One training step; returns its loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def case(build: Callable[[], nn.Module], kept: float, batch_size: int, targets: Sequence[Target]) -> Case:
    torch.manual_seed(0)
    original = build()
    naive = copy.deepcopy(original)
    is_transformer = isinstance(naive, VisionTransformer)
    ignored = [naive.head if is_transformer else naive[-1]]
    if is_transformer:
        ignored += [naive.embed, *(part for layer in naive.layers for part in (layer.qkv, layer.out, layer.down))]
    plan = prune(naive, kept, ignored)
    plan.verify(original.state_dict(), naive)
    folded, reduced = (
        equivalent_pruning(copy.deepcopy(naive), original.state_dict(), plan, factors=factors).model
        for factors in ("full", "reduced")
    )
    models = {"full": original, "naive": naive, "explicit": explicit(naive, folded, original)}
    models |= {"folded": folded, "reduced": reduced}
    batch, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(CLASSES, (batch_size,))
    expected = F.cross_entropy(copy.deepcopy(naive).train()(batch), labels).item()

    def check(loss: Any) -> None:
        # The same function, its sums in another order: float32 rounding through some tens of normalised layers.
        assert abs(loss.item() - expected) < 1e-3 * abs(expected), f"first loss {loss.item()}, expected {expected}"

    naive_step, fold_products = step(copy.deepcopy(naive), batch, labels), products(product_shapes(folded))
    print("products alone: " + "; ".join(bound(name, product_shapes(models[name])) for name in OURS))
    return Case(
        providers=[Provider(name, step(model, batch, labels)) for name, model in models.items()],
        baseline="naive",
        limit=Provider(LIMIT, lambda: (naive_step(), fold_products())),
        bytes_moved=sum(parameter.nbytes for parameter in naive.parameters()),
        check=check,
        unchecked=frozenset({"full"}),
        targets=targets,
    )


OURS = ("folded", "reduced")
HALF_OF_EXPLICIT = [Target(name, "explicit", 0.5) for name in OURS]


def _cases() -> dict[str, Callable[[], Case]]:
    cases: dict[str, Callable[[], Case]] = {}
    for times, kept in KEPT_WIDTH.items():
        at_four = HALF_OF_EXPLICIT if times == 4 else []
        vgg = [*(Target(name, LIMIT, 1.1) for name in OURS), *at_four]
        resnet = [*(Target(name, "naive", 1.3) for name in OURS), *at_four] if times == 4 else []
        vit = [*(Target(name, "naive", 1.15) for name in OURS), *at_four]
        cases |= {
            f"VGG-19, {times}x fewer MACs, batch 64": lambda kept=kept, t=vgg: case(vgg19, kept, 64, t),
            f"ResNet-56, {times}x fewer MACs, batch 64": lambda kept=kept, t=resnet: case(resnet56, kept, 64, t),
            f"ViT, feed-forward width / {times}, batch 64": lambda times=times, t=vit: case(
                VisionTransformer, 1 / times, 64, t
            ),
        }
    return cases


CASES = _cases()


@pytest.mark.parametrize("title", CASES)
def test_step(benchmark: Any, title: str) -> None:
    """The folded step alone, for pytest-benchmark."""
    providers = {provider.name: provider for provider in CASES[title]().providers}
    benchmark(providers["folded"].call)


if __name__ == "__main__":
    sys.exit(main("bench_equivalent", CASES))
