"""Attention that splits its channels by the width of what it reads: the stream and its heads shrink together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

HEADS, SIZE, SIDE = 4, 6, 4
WIDTH = HEADS * SIZE


class Attention(nn.Module):
    """One fused projection. ``alive`` are the channels that are not masked, for the expected values."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = self.heads, (WIDTH // self.heads) ** -0.5
        self.alive: Tensor | None = None
        self.project()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def project(self) -> None:
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).tensor_split(3, -1)

    def split(self, x: Tensor, width: int) -> Tensor:
        if self.alive is not None:
            x = x * self.alive
        return x.reshape(len(x), -1, self.num_heads, width // self.num_heads).transpose(1, 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * self.scale).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(one, x.shape[-1]) for one in self.projected(x))
        return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(x.shape))


class TwoHeads(Attention):
    heads = 2


class Gated(Attention):
    """[queries | keys] of one layer, values of another, and a gate for every head, as in ConViT."""

    def project(self) -> None:
        self.qk, self.v = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.gating = nn.Parameter(torch.randn(HEADS))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*self.qk(x).chunk(2, -1), self.v(x))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mixed(q, k, v) * self.gating.sigmoid()[:, None, None]


class Cosine(Attention):
    """Biases outside the layer, of which the keys' is a buffer, and a scale for every head, as in Swin V2."""

    def project(self) -> None:
        super().project()
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.rand(WIDTH), persistent=False)
        self.log_scale = nn.Parameter(torch.rand(HEADS, 1, 1))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().projected(x)
        return q + self.q_bias, k + self.k_bias, v + self.v_bias

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mixed(F.normalize(q, dim=-1) * self.log_scale.exp(), F.normalize(k, dim=-1), v)


class ByWidth(Attention):
    """Products are scaled by the width of a head as it is, so that only whole heads can go; a bias table for each."""

    def project(self) -> None:
        super().project()
        self.of_places = nn.Parameter(torch.randn(2 * SIDE**2, HEADS))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        bias = self.of_places[place[:, None] - place[: k.shape[2]] + q.shape[2] - 1].permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Shortened(ByWidth):
    """Keys and values of fewer places, which a convolution of the stream's width makes, as in PVT."""

    def project(self) -> None:
        super().project()
        del self.qkv
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        few = self.sr(x.transpose(1, 2).reshape(len(x), x.shape[2], SIDE, SIDE))
        few = self.norm(few.reshape(len(x), x.shape[2], -1).transpose(1, 2))
        return (self.q(x), *self.kv(few).chunk(2, -1))


class AcrossChannels(Attention):
    """Weights between channels, as in XCiT: the softmax is over a head's channels, so that only whole heads can go."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v @ (F.normalize(q, dim=2).mT @ F.normalize(k, dim=2)).softmax(-1).mT


class Functional(ByWidth):
    """A function gets the projection's weight, as in torchvision's Swin."""

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)


class Model(nn.Module):
    """Blocks of attention and feed-forward layers."""

    def __init__(self, kinds: tuple[type[Attention], ...]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.attentions = nn.ModuleList(kind() for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in kinds)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for attention, norm, mlp in zip(self.attentions, self.norms, self.mlps, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.head(self.merged(x))

    def merged(self, x: Tensor) -> Tensor:
        return x


class Merging(Model):
    """Four places are joined to one, as in Swin, which tracing does not follow."""

    def __init__(self, kinds: tuple[type[Attention], ...]) -> None:
        super().__init__(kinds)
        self.norm, self.head = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 3)

    def merged(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (SIDE, SIDE))
        rows = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.norm(torch.cat(rows, -1))


# The attentions -> (channels that one unit takes, number of units).
BY_CHANNEL = {(Attention,): HEADS, (Gated, Attention): HEADS, (Cosine,): HEADS, (TwoHeads, Attention): HEADS}
BY_HEAD = {
    **dict.fromkeys([(ByWidth,), (Shortened,), (AcrossChannels, Attention)], HEADS),
    (ByWidth, TwoHeads, Shortened): 2,
}


def made(kinds: tuple[type[Attention], ...], whole: type[Model] = Model) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = whole(kinds)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double().eval(), torch.randn(2, SIDE**2, 5, dtype=torch.float64)


def without(model: Any, gone: Tensor) -> nn.Module:
    """The model that reads zeros of these channels of the stream and of its attentions, without any group."""
    masked = copy.deepcopy(model)
    alive = torch.ones(WIDTH, dtype=torch.float64).index_fill(0, gone, 0)
    for module in masked.modules():
        if isinstance(module, Attention):
            module.alive = alive
        if isinstance(module, nn.LayerNorm):
            module.forward = of_remaining(module, alive.repeat(len(module.weight) // WIDTH).nonzero()[:, 0])
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[1] % WIDTH == 0:
            module.register_forward_pre_hook(reading(alive.repeat(module.weight.shape[1] // WIDTH)))
    return masked


def reading(alive: Tensor) -> Callable[..., Any]:
    return lambda module, args: (args[0] * (alive if isinstance(module, nn.Linear) else alive[:, None, None]),)


def of_remaining(norm: nn.LayerNorm, stays: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        kept = F.layer_norm(x[..., stays], (len(stays),), norm.weight[stays], norm.bias[stays], norm.eps)
        return torch.zeros_like(x).index_copy(-1, stays, kept)

    return forward


def removed(structure: TorchPruningStructure) -> tuple[Tensor, Tensor]:
    """(units, channels) removed from the stream."""
    stream = {group.name: group for group in structure.groups}["embed"]
    units = torch.arange(0, stream.size, 2)
    (own,) = [part for part in stream.slices if part.module == "embed"]
    return units, own.channels[units].flatten()


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("kinds", BY_CHANNEL)
def test_a_channel_of_every_head_goes_with_the_streams(kinds: tuple[type[Attention], ...]) -> None:
    model, x = made(kinds)
    structure = TorchPruningStructure(model, x)
    units, channels = removed(structure)
    expected = without(model, channels)(x)
    structure.remove({"embed": units})
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert len(channels) == len(units) * BY_CHANNEL[kinds] == WIDTH // 2
    assert [attention.num_heads for attention in model.attentions] == [kind.heads for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "whole"),
    [*((kinds, Model) for kinds in BY_HEAD), ((Functional,), Merging)],
)
def test_whole_heads_go_with_the_streams_channels(kinds: tuple[type[Attention], ...], whole: type[Model]) -> None:
    model, x = made(kinds, whole)
    structure = TorchPruningStructure(model, x)
    units, channels = removed(structure)
    expected = without(model, channels)(x)
    structure.remove({"embed": units})
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert len(units) * 2 == BY_HEAD.get(kinds, HEADS)
    assert [attention.num_heads for attention in model.attentions] == [kind.heads // 2 for kind in kinds]


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kinds", [(Cosine,), (Gated, Attention), (Shortened,)])
def test_such_streams_are_pruned_by_a_plan(kinds: tuple[type[Attention], ...]) -> None:
    model, x = made(kinds)
    unpruned = copy.deepcopy(model)
    batches = [torch.randn(2, SIDE**2, 5, dtype=torch.float64) for _ in range(4)]
    result = obc.prune(model, x, batches, lambda net, batch: net(batch).square().mean(), macs=0.4)
    assert model.embed.out_features < WIDTH
    applied = result.plan.apply(unpruned)
    applied.load_state_dict(model.state_dict())
    torch.testing.assert_close(applied(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_attention_that_keeps_a_width_of_its_own_leaves_the_stream_out() -> None:
    class Fixed(Attention):
        def split(self, x: Tensor, width: int) -> Tensor:
            return super().split(x, WIDTH)

    model, x = made((Fixed,))
    structure = TorchPruningStructure(model, x)
    assert {"embed", "attentions.0.qkv"} <= structure.left_out.keys()
    assert [group.name for group in structure.groups] == ["mlps.0.0"]
