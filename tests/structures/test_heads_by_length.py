"""Heads of attention beside which there is more with an entry for every head, under names that no family has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

HEADS, SIZE, WIDTH, LENGTH = 4, 6, 20, 9


class Attention(nn.Module):
    """One fused projection; ``kept`` are the heads that the output projection reads, for the expected values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.kept = HEADS, torch.ones(HEADS)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def projected(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * SIZE**-0.5

    def weights(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def values(self, v: Tensor) -> Tensor:
        return v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x).unflatten(-1, (3, self.num_heads, SIZE)).permute(2, 0, 3, 1, 4)
        mixed = self.weights(self.logits(q, k)) @ self.values(v)
        mixed = mixed * self.kept[: self.num_heads, None, None]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Table(Attention):
    """A table of relative places, with a column for every head; and a length that is the number of heads by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.of_places = nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))
        self.register_buffer("four", torch.rand(HEADS), persistent=False)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        bias = self.of_places[place[:, None] - place + len(place) - 1].permute(2, 0, 1)
        return super().logits(q, k) + bias * self.four.sum()


class Places(nn.Module):
    """A bias for every head, from layers; it counts the heads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, HEADS))

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length, dtype=torch.float64)
        far = self.layers(torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).flatten(0, 1))
        return far.view(length, length, self.num_heads).permute(2, 0, 1)


class Cosine(Attention):
    """A scale for every head, biases of all heads outside the layer, and a layer that computes a bias for each."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.bias_of_queries = nn.Parameter(torch.randn(HEADS * SIZE))
        self.register_buffer("bias_of_keys", torch.zeros(HEADS * SIZE), persistent=False)
        self.bias_of_values = nn.Parameter(torch.randn(HEADS * SIZE))
        self.by_place = Places()

    def projected(self, x: Tensor) -> Tensor:
        return self.qkv(x) + torch.cat([self.bias_of_queries, self.bias_of_keys, self.bias_of_values])

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return cosines * self.log_scale.exp() + self.by_place(q.shape[2])


class Gated(Attention):
    """A gate that mixes two kinds of weights, and a filter for every channel of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.gating = nn.Parameter(torch.randn(HEADS))
        self.near = nn.Conv1d(HEADS * SIZE, HEADS * SIZE, 3, padding=1, groups=HEADS * SIZE)

    def weights(self, logits: Tensor) -> Tensor:
        gate = self.gating.sigmoid()[:, None, None]
        return gate * logits.softmax(-1) + (1 - gate) * logits.new_full(logits.shape, 1 / logits.shape[-1])

    def values(self, v: Tensor) -> Tensor:
        flat = v.transpose(2, 3).flatten(1, 2)
        return (flat + self.near(flat)).unflatten(1, (-1, SIZE)).transpose(2, 3)


class Talking(Attention):
    """Two layers that mix heads, before and after the softmax; the second has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Conv2d(HEADS, HEADS, 1)
        self.norm_after = nn.BatchNorm2d(HEADS)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        logits = super().logits(q, k) * self.kept[: self.num_heads, None, None]
        return self.before(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def weights(self, logits: Tensor) -> Tensor:
        return self.norm_after(self.after(logits.softmax(-1)))


class Model(nn.Module):
    """A residual attention."""

    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(5, WIDTH), kind(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x))


KINDS = (Table, Cosine, Gated, Talking)


def made(kind: type[Attention]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = Model(kind)
    for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.double().eval(), torch.randn(2, LENGTH, 5, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_with_everything_that_has_an_entry_for_each(kind: type[Attention]) -> None:
    model, x = made(kind)
    unpruned = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    (heads,) = [group for group in structure.groups if group.kind == "heads"]
    assert heads.size == HEADS
    structure.remove({heads.name: torch.tensor([0, 2])})
    unpruned.attn.kept = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(model(x), unpruned(x), rtol=0, atol=1e-12)
    assert model.attn.num_heads == 2
    if kind is Table:
        assert model.attn.of_places.shape == (2 * LENGTH - 1, 2)
        assert model.attn.four.shape == (HEADS,)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_with_such_heads_is_applied(kind: type[Attention]) -> None:
    model, x = made(kind)
    unpruned = copy.deepcopy(model)
    batches = [torch.randn(2, LENGTH, 5, dtype=torch.float64) for _ in range(4)]
    result = obc.prune(model, x, batches, lambda net, batch: net(batch).square().mean(), macs=0.5)
    assert model.attn.num_heads < HEADS
    applied = result.plan.apply(unpruned)
    applied.load_state_dict(model.state_dict())
    torch.testing.assert_close(applied(x), model(x), rtol=0, atol=1e-12)


def test_a_parameter_with_two_dimensions_of_the_heads_loses_both() -> None:
    class Both(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.randn(HEADS, HEADS))

        def logits(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.einsum("bhij,hg->bgij", super().logits(q, k), self.mixing)

    model, x = made(Both)
    masked: Any = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    (group,) = (group for group in structure.groups if group.name == "attn.qkv")
    assert group.size == HEADS
    structure.remove({"attn.qkv": torch.tensor([1])})
    assert structure.model.attn.mixing.shape == (HEADS - 1, HEADS - 1)  # type: ignore[union-attr]
    masked.attn.mixing.data[1], masked.attn.kept[1] = 0, 0
    torch.testing.assert_close(structure.model(x), masked(x), rtol=1e-10, atol=1e-12)
