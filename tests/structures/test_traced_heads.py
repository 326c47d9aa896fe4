"""Heads of attention written by hand, in models that are traced: found by names, exact, counted, and in the plan."""

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

HEADS, SIZE, WIDTH = 4, 3, 10


class Normed(nn.Module):
    """An RMS norm with weights of its own for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(HEADS, 1, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.gamma


class Rearrange(nn.Module):
    """Splits heads by a length of its own, kept as einops' layers keep it."""

    def __init__(self, **axes_lengths: int) -> None:
        super().__init__()
        self.axes_lengths, self._axes_lengths = axes_lengths, tuple(axes_lengths.items())

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (dict(self._axes_lengths)["h"], -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention by products, as in vit-pytorch and diffusers."""

    def __init__(self, form: str) -> None:
        super().__init__()
        inner = HEADS * SIZE
        self.form, self.heads, self.scale = form, HEADS, SIZE**-0.5
        if form == "fused":
            self.to_qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        elif form == "keys and values":
            self.to_q, self.to_kv = nn.Linear(WIDTH, inner), nn.Linear(WIDTH, 2 * inner)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, inner) for _ in range(3))
        if form == "two streams":
            self.inner_dim = inner
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(WIDTH, inner) for _ in range(3))
            self.to_add_out = nn.Linear(inner, WIDTH)
        if form == "norms of every head":
            self.q_norm, self.k_norm = Normed(), Normed()
        if form == "norms over all heads":
            self.norm_q, self.norm_k = nn.LayerNorm(inner), nn.LayerNorm(inner)
        if form == "gates":
            self.to_gates, self.temperature = nn.Linear(WIDTH, HEADS), nn.Parameter(torch.rand(HEADS, 1, 1))
        if form == "learned keys":
            self.mem_k, self.mem_v = (nn.Parameter(torch.rand(HEADS, 2, SIZE)) for _ in range(2))
            self.head_scale_params = nn.Parameter(torch.rand(1, HEADS, 1, 1))
        if form == "einops":
            self.split_heads = Rearrange(h=HEADS)
        if form == "scale":
            self.temperature = nn.Parameter(torch.tensor(0.7))
        out = nn.Linear(inner, WIDTH)
        self.to_out = nn.ModuleList([out, nn.Identity()]) if form == "two streams" else nn.Sequential(out)

    def split(self, x: Tensor) -> Tensor:
        if self.form == "einops":
            return self.split_heads(x)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "fused":
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        elif self.form == "keys and values":
            q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.form == "two streams":
            q, k, v = (
                torch.cat([one, project(other)], 1)
                for one, project in zip((q, k, v), (self.add_q_proj, self.add_k_proj, self.add_v_proj), strict=True)
            )
        if self.form == "norms over all heads":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = self.split(q), self.split(k), self.split(v)
        if self.form == "norms of every head":
            q, k = self.q_norm(q), self.k_norm(k)
        scale = self.temperature if self.form in ("gates", "scale") else self.scale
        if self.form == "learned keys":
            k, v = (
                torch.cat([more.expand(len(x), -1, -1, -1), y], 2) for more, y in ((self.mem_k, k), (self.mem_v, v))
            )
        result = (q @ k.mT * scale).softmax(-1) @ v
        if self.form == "gates":
            result = result * self.to_gates(x).sigmoid().mT.unsqueeze(-1)
        if self.form == "learned keys":
            result = result * self.head_scale_params
        result = result.transpose(1, 2).flatten(2)
        if self.form != "two streams":
            return self.to_out(result), other
        first, second = result[:, : x.shape[1]], result[:, x.shape[1] :]
        return self.to_out[0](first), self.to_add_out(second)


class Blocks(nn.Module):
    """Two attentions, and what comes before and after."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2)
        self.attentions = nn.ModuleList(Attention(form) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y.flip(1) * 0.5
        for attention in self.attentions:
            more, others = attention(y, z)
            y, z = y + more, z + others
        return self.last(y + z)


FORMS = (
    *("fused", "keys and values", "separate", "two streams", "norms of every head"),
    *("norms over all heads", "gates", "scale", "einops", "learned keys"),
)


def case(form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Blocks(form).double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)


def half_of_the_heads(structure: TorchPruningStructure) -> dict[str, Tensor]:
    return {group.name: torch.tensor([0, 2]) for group in structure.groups if group.kind == "heads"}


def without_heads(model: Any) -> nn.Module:
    """The model whose output projections read zeros of heads 0 and 2, written down without any group."""
    masked = copy.deepcopy(model)
    gone = torch.cat([torch.arange(0, SIZE), torch.arange(2 * SIZE, 3 * SIZE)])
    with torch.no_grad():
        for attention in masked.attentions:
            for layer in (attention.to_out[0], getattr(attention, "to_add_out", None)):
                if layer is not None:
                    layer.weight[:, gone] = 0
            stays = [channel for channel in range(HEADS * SIZE) if channel not in gone]
            for norm in (getattr(attention, key, None) for key in ("norm_q", "norm_k")):
                if norm is not None:  # takes its statistics from what remains
                    norm.forward = of_remaining(norm, torch.tensor(stays))
    return masked


def of_remaining(norm: nn.LayerNorm, stays: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        kept = F.layer_norm(x[..., stays], (len(stays),), norm.weight[stays], norm.bias[stays], norm.eps)
        return torch.zeros_like(x).index_copy(-1, stays, kept)

    return forward


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("form", FORMS)
def test_heads_are_found_and_their_removal_is_exact(form: str) -> None:
    model, x = case(form)
    expected = without_heads(model)(x)
    structure = TorchPruningStructure(model, x)
    heads = half_of_the_heads(structure)
    assert len(heads) == 2, structure.left_out
    assert not [name for name in structure.left_out if "attentions" in name]
    structure.remove(heads)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [attention.heads for attention in model.attentions] == [2, 2]  # type: ignore[union-attr]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("form", FORMS)
def test_a_plan_with_heads_is_applied_with_their_counts(form: str) -> None:
    model, x = case(form)
    unpruned = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    structure.remove(half_of_the_heads(structure))
    applied = structure.plan.apply(unpruned)
    applied.load_state_dict(model.state_dict())
    assert torch.equal(applied(x), model(x))


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("form", ["fused", "two streams", "norms over all heads"])
def test_pruning_chooses_among_heads_and_channels(form: str) -> None:
    model, x = case(form)
    batches = [torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(4)]
    result = obc.prune(model, x, batches, lambda net, batch: net(batch).square().mean(), macs=0.5)
    assert 0.3 < result.report.macs_after / result.report.macs_before <= 0.5
    assert {attention.heads for attention in model.attentions} < {1, 2, 3, 4}  # type: ignore[union-attr]


def test_heads_that_the_caller_speaks_of_are_his() -> None:
    model, x = case("separate")
    structure = TorchPruningStructure(model, x, ignored_layers=["attentions.0"])
    assert list(half_of_the_heads(structure)) == ["attentions.1.to_q"]


@pytest.mark.slow
def test_heads_that_a_module_counts_elsewhere_stay() -> None:
    class Fixed(Attention):
        def split(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (4, -1)).transpose(1, 2)

    model, x = case("separate")
    model.attentions[0] = Fixed("separate").double()  # type: ignore[union-attr]
    structure = TorchPruningStructure(model, x)
    assert list(half_of_the_heads(structure)) == ["attentions.1.to_q"]
    assert "attentions.0.to_v" in structure.left_out
    before = model(x)
    with pytest.raises(KeyError):
        structure.remove({"attentions.0.to_v": torch.tensor([0])})
    assert torch.equal(model(x), before)
    assert model.attentions[0].heads == 4  # type: ignore[union-attr]
