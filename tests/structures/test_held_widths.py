"""Integers of a model's own modules that hold widths or counts of heads change with what they count."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

DOUBLE = torch.float64


class Norm(nn.Module):
    """A LayerNorm that says its width twice: one integer is read, the other is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.width_of_old = width, width
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias)


class Attention(nn.Module):
    """As in nanoGPT: the fused projection is split by ``n_embd``, the width of the stream into heads."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_embd, self.n_head = n_embd, n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, self.n_head, width // self.n_head)
        q, k, v = (one.view(heads).transpose(1, 2) for one in self.c_attn(x).split(self.n_embd, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class GPT(nn.Module):
    def __init__(self, n_embd: int = 24, n_head: int = 4) -> None:
        super().__init__()
        self.block_size = 24  # equals the width by chance
        self.wte, self.wpe = nn.Embedding(50, n_embd), nn.Embedding(self.block_size, n_embd)
        self.attn = nn.ModuleList(Attention(n_embd, n_head) for _ in range(2))
        self.norms = nn.ModuleList(Norm(n_embd) for _ in range(3))
        self.lm_head = nn.Linear(n_embd, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))[: self.block_size]
        for norm, attention in zip(self.norms[:2], self.attn, strict=True):
            x = x + attention(norm(x))
        return self.lm_head(self.norms[2](x))


class Flattened(nn.Module):
    """The model itself says how many channels its convolution has."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.hidden, self.other = hidden, 8
        self.conv, self.head = nn.Conv2d(3, hidden, 3), nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)).view(-1, self.hidden))


class Recurrent(nn.Module):
    """The first state is as wide as the model says."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.hidden, self.layers = hidden, 2
        self.rnn, self.head = nn.GRU(5, hidden, self.layers, batch_first=True), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(self.layers, len(x), self.hidden, dtype=x.dtype)
        return self.head(self.rnn(x, state)[0][:, -1])


class Llama(nn.Module):
    """Attention as in Meta's Llama."""

    def __init__(self, width: int = 24, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads, self.n_rep, self.head_dim = heads, shared, heads // shared, 6
        self.wq, self.wo = nn.Linear(width, heads * 6, bias=False), nn.Linear(heads * 6, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, shared * 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.wq(x).view(batch, time, self.n_local_heads, self.head_dim).transpose(1, 2)
        k, v = (
            layer(x).view(batch, time, self.n_local_kv_heads, self.head_dim).transpose(1, 2)
            for layer in (self.wk, self.wv)
        )
        k, v = k.repeat_interleave(self.n_rep, 1), v.repeat_interleave(self.n_rep, 1)
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, -1))


class GPTFast(nn.Module):
    """Attention as in gpt-fast: one projection; ``n_local_heads`` are those of keys and values."""

    def __init__(self, width: int = 24, heads: int = 4, shared: int = 4) -> None:
        super().__init__()
        self.n_head, self.n_local_heads, self.head_dim, self.dim = heads, shared, 6, heads * 6
        self.wqkv, self.wo = nn.Linear(width, (heads + 2 * shared) * 6), nn.Linear(heads * 6, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        shared = self.n_local_heads * self.head_dim
        q, k, v = self.wqkv(x).split([self.dim, shared, shared], -1)
        q, k, v = (one.view(batch, time, -1, self.head_dim).transpose(1, 2) for one in (q, k, v))
        k, v = (one.repeat_interleave(self.n_head // self.n_local_heads, 1) for one in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, self.dim))


class Annotated(nn.Module):
    """Attention as in The Annotated Transformer: all projections in one list."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.d_k, self.h = width // heads, heads
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(len(x), -1, self.h, self.d_k).transpose(1, 2)
            for layer in self.linears[:3]  # type: ignore[union-attr]
        )
        weights = torch.matmul(q, k.transpose(-2, -1)).div(self.d_k**0.5).softmax(-1)
        return self.linears[3](torch.matmul(weights, v).transpose(1, 2).reshape(len(x), -1, self.h * self.d_k))


class Dive(nn.Module):
    """Attention as in Dive into Deep Learning."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one.reshape(*x.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)
            for one in (self.W_q(x), self.W_k(x), self.W_v(x))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.W_o(y.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1))


# The attention, its output projection, its units, the channels of a unit, what counts before, and without one unit.
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], str, int, int, dict[str, int], dict[str, int]]] = {
    "Llama": (
        *(Llama, "wo", 2, 12),
        *(
            {"n_local_heads": 4, "n_local_kv_heads": 2, "n_rep": 2},
            {"n_local_heads": 2, "n_local_kv_heads": 1, "n_rep": 2},
        ),
    ),
    "Llama, one key for each query": (
        *(lambda: Llama(shared=4), "wo", 4, 6),
        *({"n_local_heads": 4, "n_local_kv_heads": 4}, {"n_local_heads": 3, "n_local_kv_heads": 3}),
    ),
    "gpt-fast": (
        *(GPTFast, "wo", 4, 6),
        *({"n_head": 4, "n_local_heads": 4, "dim": 24}, {"n_head": 3, "n_local_heads": 3, "dim": 18}),
    ),
    "gpt-fast, shared": (
        *(lambda: GPTFast(shared=2), "wo", 2, 12),
        *({"n_head": 4, "n_local_heads": 2, "dim": 24}, {"n_head": 2, "n_local_heads": 1, "dim": 12}),
    ),
    "Annotated Transformer": (Annotated, "linears.3", 4, 6, {"h": 4, "d_k": 6}, {"h": 3, "d_k": 6}),
    "Dive into Deep Learning": (Dive, "W_o", 4, 6, {"num_heads": 4}, {"num_heads": 3}),
}


def attributes(module: Any, names: Any) -> dict[str, int]:
    return {name: getattr(module, name) for name in names}


def saved_and_loaded(plan: obc.PruningPlan, folder: Path) -> obc.PruningPlan:
    plan.save(folder / "plan.json")
    return obc.PruningPlan.load(folder / "plan.json")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_of_common_code_go_with_their_counts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, output, units, width, before, after = ATTENTIONS[name]
    model = nn.Sequential(nn.Linear(5, 24), make(), nn.Linear(24, 3)).double()
    original, x = copy.deepcopy(model), torch.randn(2, 7, 5, dtype=DOUBLE)
    structure = TorchPruningStructure(model, x)
    (group,) = (group for group in structure.groups if group.kind == "heads")
    assert group.size == units
    assert attributes(model[1], before) == before
    structure.remove({group.name: torch.tensor([1])})
    assert attributes(model[1], after) == after

    masked = copy.deepcopy(original)

    def without(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0].index_fill(-1, torch.arange(width, 2 * width), 0)

    masked[1].get_submodule(output).register_forward_pre_hook(without)
    for inputs in (x, torch.randn(3, 4, 5, dtype=DOUBLE)):
        torch.testing.assert_close(model(inputs), masked(inputs), rtol=1e-12, atol=1e-12)
    again = saved_and_loaded(structure.plan, tmp_path).apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_stream_goes_with_the_integers_that_are_its_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = GPT().double(), torch.randint(50, (2, 12))
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, ids)
    (group,) = structure.groups
    assert (group.kind, group.size) == ("heads", 4)
    structure.remove({group.name: torch.tensor([0, 3])})
    assert model.block_size == 24
    assert attributes(model.attn[1], ["n_embd", "n_head"]) == {"n_embd": 12, "n_head": 2}
    assert attributes(model.norms[2], ["width", "width_of_old"]) == {"width": 12, "width_of_old": 24}

    narrow = GPT(n_embd=12, n_head=2).double()  # the same class, made narrow
    narrow.load_state_dict(model.state_dict())
    assert torch.equal(narrow(ids), model(ids))
    again = saved_and_loaded(structure.plan, tmp_path).apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids))


def test_an_integer_of_the_model_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Flattened().double(), torch.randn(2, 3, 5, 5, dtype=DOUBLE)
    original = copy.deepcopy(model)
    result = obc.prune(model, x, [x], lambda net, batch: net(batch).square().mean(), macs=0.5, progress=False)
    assert (model.hidden, model.other) == (4, 8)
    stay = result.plan["conv"].out_channels
    hidden = F.relu(F.conv2d(x, original.conv.weight[stay], original.conv.bias[stay])).mean((2, 3))  # type: ignore[index]
    expected = F.linear(hidden, original.head.weight[:, stay], original.head.bias)  # type: ignore[index]
    result.plan.put_slices(original.state_dict(), model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)

    plan = saved_and_loaded(result.plan, tmp_path)
    assert plan.counts == {"": {"hidden": 4}}
    second = TorchPruningStructure(plan.apply(copy.deepcopy(original)), x)
    second.remove({"conv": torch.tensor([0])})
    assert second.plan.after(plan).counts == {"": {"hidden": 3}}
    assert second.plan.after(plan).apply(copy.deepcopy(original)).hidden == 3


def test_a_recurrent_layer_goes_with_the_width_of_its_first_state() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(2, 6, 5, dtype=DOUBLE)
    structure = TorchPruningStructure(model, x)
    structure.remove({"rnn": torch.tensor([1, 4, 11])})
    assert (model.hidden, model.layers) == (9, 2)
    narrow = Recurrent(hidden=9).double()  # the same class, made narrow
    narrow.load_state_dict(model.state_dict())
    assert torch.equal(narrow(x), model(x))


def test_a_plan_that_sets_what_a_model_lacks_or_no_number_is_refused(tmp_path: Path) -> None:
    plan = obc.PruningPlan(counts={"": {"hidden": 3}})
    with pytest.raises(obc.PlanError, match="the plan sets the number 'hidden', which the model lacks; pass the plan"):
        plan.apply(nn.Sequential(nn.Linear(3, 3)))
    plan.save(path := tmp_path / "plan.json")
    for counts in ([3], {"": 3}, {"": {"hidden": -1}}, {"": {"hidden": True}}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "counts": counts}))
        with pytest.raises(obc.PlanError, match="damaged pruning plan: counts must be modules with attributes and num"):
            obc.PruningPlan.load(path)
