"""Heads of attention as timm writes it, whose own counts of heads and of their channels change with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc.structures.masking import masked_copy
from obc.structures.traced import TorchPruningStructure

HEADS, SIZE, WIDTH = 4, 6, 20


class Fused(nn.Module):
    """One projection, and the attention's own counts of heads and of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, SIZE, HEADS * SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(length))
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, self.attn_dim))

    def bias(self, length: int) -> Tensor | None:
        return None


class Biased(Fused):
    """A table with a bias for every head, as Swin's."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(7, HEADS))

    def bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        return self.relative_position_bias_table[(place[:, None] - place).remainder(7)].permute(2, 0, 1)


class Separate(nn.Module):
    """Separate projections, without fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).reshape(*x.shape[:2], self.num_heads, SIZE).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * SIZE))


class Shared(Separate):
    """Two query heads share a head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kv_heads = HEADS // 2
        self.q_proj, self.k_proj, self.v_proj = self.q, nn.Linear(WIDTH, 2 * SIZE), nn.Linear(WIDTH, 2 * SIZE)
        self.q = self.k = self.v = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        counts = ((self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads))
        q, k, v = (one(x).reshape(*x.shape[:2], count, SIZE).transpose(1, 2) for one, count in counts)
        repeat = self.num_heads // self.num_kv_heads
        mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
        return self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * SIZE))


class Model(nn.Module):
    """Residual attention, so that no other group holds the projections."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm, self.attn, self.head = (
            nn.Linear(5, WIDTH),
            nn.LayerNorm(WIDTH),
            kind(),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(self.norm(x)))


UNITS = {Fused: HEADS, Biased: HEADS, Separate: HEADS, Shared: HEADS // 2}


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model(kind).double().eval(), torch.randn(2, 9, 5, dtype=torch.float64)


@pytest.mark.parametrize("kind", UNITS)
def test_heads_are_removed_exactly_and_a_plan_has_their_counts(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = made(kind)
    unpruned = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    (heads,) = [group for group in structure.groups if group.kind == "heads"]
    assert heads.size == UNITS[kind]
    assert not any(name.startswith("attn") for name in structure.left_out)
    masked = masked_copy(unpruned, [heads], {heads.name: torch.tensor([1])})
    structure.remove({heads.name: torch.tensor([1])})
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
    attn: Any = model.attn
    left = HEADS - HEADS // UNITS[kind]
    assert attn.num_heads == left
    assert attn.proj.in_features == left * SIZE
    structure.plan.save(tmp_path / "plan.json")
    loaded = obc.PruningPlan.load(tmp_path / "plan.json").apply(unpruned)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_obc_prune_removes_heads() -> None:
    model, x = made(Biased)
    batches = [torch.randn(4, 9, 5, dtype=torch.float64) for _ in range(3)]
    result = obc.prune(model, x, batches, lambda model, batch: model(batch).square().mean(), macs=0.5, progress=False)
    attn: Any = model.attn
    assert attn.num_heads < HEADS
    assert attn.relative_position_bias_table.shape == (7, attn.num_heads)
    assert result.report.macs_after <= result.report.macs_before / 2


class Table(nn.Module):
    """A bias for every head and every two places."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(7, HEADS))

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length)
        return self.relative_position_bias_table[(place[:, None] - place).remainder(7)].permute(2, 0, 1)


class Places(nn.Module):
    """A bias of every two places for all heads, from a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length, dtype=torch.float64)
        return self.layer((place[:, None] - place)[..., None])[..., 0]


class Sharing(Fused):
    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = position

    def bias(self, length: int) -> Tensor:
        return self.position(length)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kind", [Table, Places])
def test_attentions_that_share_a_module_are_pruned_exactly(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    position = kind()
    blocks = [nn.Linear(5, WIDTH), Sharing(position), Sharing(position), nn.Linear(WIDTH, 12), nn.Linear(12, 2)]
    model, x = nn.Sequential(*blocks).double().eval(), torch.randn(2, 9, 5, dtype=torch.float64)
    structure = TorchPruningStructure(model, x)
    found = {group.name for group in structure.groups}
    assert {"0", "1.proj", "2.proj", "3"} <= found
    assert not {"1.qkv", "2.qkv"} & structure.left_out.keys()
    assert ({"1.qkv", "2.qkv"} <= found) is (kind is Places)  # by the table's columns the heads of both go together
    units = {group.name: torch.tensor([0]) for group in structure.groups}
    expected = masked_copy(model, structure.groups, units)(x)
    structure.remove(units)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert [structure.plan.counts[name]["num_heads"] for name in ("1", "2")] == [HEADS - 1, HEADS - 1]
