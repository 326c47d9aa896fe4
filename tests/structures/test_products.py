"""MACs of products outside layers, in the widths of the groups: against torch's counter, and counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.counted_macs import counted_macs
from obc.structures.traced import TorchPruningStructure

B, T = 2, 5


class HandWritten(nn.Module):
    """Attention as in many implementations of vision transformers; heads are counted from the width that is left."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 24), nn.LayerNorm(24)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 7)
        self.write, self.size = write, 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (one(y).unflatten(2, (-1, self.size)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.out(self.write(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def with_at(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def with_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class ChannelAttention(nn.Module):
    """Attention among channels: (C, T) times (T, C), then (C, C) times (C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(6, 16, 1), nn.Conv1d(16, 12, 3, padding=1)
        self.last = nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2)).relu()
        y = y + (y @ y.transpose(1, 2) / T) @ y
        return self.last(self.out(y).relu()).mean(2)


class BilinearPooling(nn.Module):
    """The products of two branches' channels, summed over positions; only one branch's can be traced further."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.weights = nn.Conv1d(6, 12, 1), nn.Conv1d(6, 10, 1)
        self.mix = nn.Conv1d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        maps = self.weights(x).softmax(-1)
        pooled = torch.bmm(self.values(x), maps.transpose(1, 2))  # (B, 12, 10)
        return self.head(self.mix(pooled).relu().mean(2))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 24), nn.MultiheadAttention(24, 3, batch_first=True)
        self.norm, self.up, self.head = nn.LayerNorm(24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.up(x).relu().mean(1))


class FunctionalWeight(nn.Module):
    """A layer whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(6, 20), nn.Linear(20, 12)
        self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(self.first(x).relu()).relu()
        y = torch.einsum("bti,oi->bto", y, self.second.weight).relu()
        return self.head(y).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Linear(6, 12), nn.Linear(12, 6)
        self.lstm, self.up, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.mid(self.embed(x).relu()))
        return self.head(self.up(y).relu().mean(1))


class DynamicKernel(nn.Module):
    """A convolution of every input channel with a kernel that is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kernel, self.head = nn.Conv1d(6, 12, 1), nn.Linear(6, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x.mean((0, 1)))
        y = F.conv1d(x.transpose(1, 2).flatten(0, 1)[:, None], kernel[None, None]).reshape(len(x), 6, -1)
        return self.head(self.conv(y).relu().mean(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "at": lambda: HandWritten(with_at),
    "einsum": lambda: HandWritten(with_einsum),
    "sdpa": lambda: HandWritten(with_sdpa),
    "channel attention": ChannelAttention,
    "bilinear pooling": BilinearPooling,
    "torch's attention": TorchAttention,
    "functional weight": FunctionalWeight,
    "recurrent": Recurrent,
    "dynamic kernel": DynamicKernel,
}
# By hand, without the layers: attention's two products; 2 C^2 T; C K T; attention with its projections; and so on.
BY_HAND = {
    "at": B * 2 * T * T * 24,
    "einsum": B * 2 * T * T * 24,
    "sdpa": B * 2 * T * T * 24,
    "channel attention": B * 2 * 16 * 16 * T,
    "bilinear pooling": B * 12 * 10 * T,
    "torch's attention": B * (4 * T * 24 * 24 + 2 * T * T * 24),
    "functional weight": B * T * 12 * 12,
    "recurrent": B * T * 4 * 8 * (6 + 8),
    "dynamic kernel": B * 6 * (T - 2) * 3,
}


def counted(model: nn.Module, x: Tensor) -> float:
    """By torch's counter alone, in train mode, where torch's own fused kernels are not used."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as c:
        model.train()(x)
    model.eval()
    return c.get_total_flops() / 2


def built(name: str, check: bool = True) -> tuple[nn.Module, Tensor, TorchPruningStructure]:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(B, T, 6)
    heads = dict.fromkeys(("q", "k", "v"), 3) if hasattr(model, "q") else None
    return model, x, TorchPruningStructure(model, x, num_heads=heads, check=check)


@pytest.mark.sampled(members=4)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", MODELS)
def test_costs_count_what_torch_counts_at_every_width(name: str) -> None:
    # Masking can't express channels that are mixed with each other, so the proof would leave them out.
    model, x, structure = built(name, check=name != "channel attention")
    by_name = dict(model.named_modules())
    in_layers = sum(
        structure._usage.positions[name] * layer.weight.numel()
        for name, layer in by_name.items()
        if isinstance(layer, (nn.Linear, nn.Conv1d)) and name in structure._usage.positions and "attention" not in name
    )
    assert structure.costs("macs").total() == counted(model, x) == in_layers + BY_HAND[name]
    assert structure.groups
    if name == "channel attention":
        assert structure.costs("macs").quadratic.diagonal().tolist() == [B * 2 * T, 0]
    for removed in (1, 2, 1):
        for group in structure.groups:
            if group.size <= removed:
                continue
            costs = structure.costs("macs")
            predicted = costs.freed({group.name: removed})
            structure.remove({group.name: torch.arange(removed)})
            assert structure.costs("macs").total() == pytest.approx(costs.total() - predicted, rel=1e-12)
            assert structure.costs("macs").total() == pytest.approx(counted(model, x), rel=1e-12), group.name


@pytest.mark.parametrize("name", ["at", "channel attention", "torch's attention"])
def test_half_of_the_macs_is_half_of_what_the_model_executes(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(B, T, 6, generator=generator) for _ in range(24)]

    def loss(one: nn.Module, x: Tensor) -> Tensor:
        return one(x).square().mean()

    heads: Any = dict.fromkeys(("q", "k", "v"), 3) if hasattr(model, "q") else None
    result = obc.prune(model, batches[0], batches, loss, macs=0.6, steps=3, num_heads=heads, progress=False)
    report = result.report
    assert report.macs_measured == pytest.approx(report.macs_after / report.macs_before, abs=1e-3)
    assert report.macs_after <= 0.6 * report.macs_before
    assert not [warning for warning in report.warnings if "were predicted" in warning]


def test_what_torch_fuses_is_counted() -> None:
    x = torch.randn(B, T, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert counted_macs(layer, lambda model: model(x))["self_attn"] == B * (4 * T * 16 * 16 + 2 * T * T * 16)
    for module, gates in ((nn.RNN(16, 8), 1), (nn.GRU(16, 8), 3), (nn.LSTM(16, 8), 4)):
        assert counted_macs(module, lambda model: model(x)) == {"": B * T * gates * 8 * (16 + 8)}
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_group_whose_products_cannot_be_followed_is_named() -> None:
    class Odd(nn.Module):
        """One product more where the width is odd."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            products = y.transpose(1, 2) @ y / T
            if y.shape[-1] % 2:
                products = products @ torch.eye(y.shape[-1])
            return self.second(y @ products)

    structure = TorchPruningStructure(Odd().eval(), torch.randn(B, T, 6), check=False)
    assert [group.name for group in structure.groups] == ["first"]
    assert any("first is not known" in one and "3 products instead of 2" in one for one in structure.warnings)
