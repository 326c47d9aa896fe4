"""torch's attention whose width running the model finds, where tracing does not: exact, or left out with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import class_loss
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

WIDTH, HEADS = 12, 3


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[0] ** 0.5)


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


class Image(nn.Module):
    """As CLIP's: patches and a class token, projected by a parameter, which tracing does not follow."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patches, self.token, self.places = nn.Conv2d(3, WIDTH, 4, 4, bias=False), drawn(WIDTH), drawn(5, WIDTH)
        self.before, self.block, self.after = nn.LayerNorm(WIDTH), Block(**options), nn.LayerNorm(WIDTH)
        self.projection = drawn(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.places
        return self.after(self.block(self.before(x)))[:, 0] @ self.projection


class Queries(nn.Module):
    """As DETR's decoder: learned queries read themselves, then what an encoder returns, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.block, self.queries = nn.Linear(6, WIDTH), Block(), nn.Embedding(4, WIDTH)
        self.own = nn.MultiheadAttention(WIDTH, HEADS)  # positions first
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.projection = nn.LayerNorm(WIDTH), drawn(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.block(self.inputs(x))
        places = self.queries.weight[:, None].expand(-1, len(x), -1)
        found = self.own(places, places, torch.zeros_like(places) + places)[0].transpose(0, 1)
        found = self.norm(found + self.cross(query=found, key=memory, value=memory)[0])
        return (found @ self.projection).mean(1)


class Sequences(nn.Module):
    """torch's encoder and decoder, whose ``forward`` checks its ``d_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.targets = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.both = nn.Transformer(WIDTH, 2, 1, 1, 20, dropout=0.0, batch_first=True)
        self.projection = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.both(self.inputs(x), self.targets(x[:, :4]))).mean(1)


class Masked(nn.Module):
    """The mask is made of features, so that every entry depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attention = nn.Linear(6, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.projection = drawn(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        mask = (x @ x.mT).repeat_interleave(HEADS, 0)
        return (self.attention(x, x, x, attn_mask=mask)[0] @ self.projection).mean(1)


class OfData(nn.Module):
    """The attention reads the data, whose channels stay, so what it returns stays as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.projection = nn.MultiheadAttention(6, 2, batch_first=True), drawn(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.attention(x, x, x)[0] @ self.projection).mean(1)


class Apart(nn.Module):
    """Keys of another width have a weight of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attention = nn.Linear(6, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, kdim=6, batch_first=True)
        self.projection = drawn(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inputs(x)
        return (self.attention(y, x, y)[0] @ self.projection).mean(1)


class ToItself(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class OwnForward(nn.Module):
    """What a subclass reads and returns is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attention = nn.Linear(6, WIDTH), ToItself(WIDTH, HEADS, batch_first=True)
        self.projection = drawn(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.attention(self.inputs(x)) @ self.projection).mean(1)


class KeptNorm(nn.LayerNorm):
    """A LayerNorm over some of its channels; the others are zero."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__(WIDTH, dtype=norm.weight.dtype)
        self.weight, self.bias, self.kept = norm.weight, norm.bias, kept

    def forward(self, x: Tensor) -> Tensor:
        own = F.layer_norm(x[..., self.kept], (len(self.kept),), self.weight[self.kept], self.bias[self.kept])
        return torch.zeros_like(x).index_copy(-1, self.kept, own)


def masked(model: nn.Module, gone: Tensor) -> nn.Module:
    """The unpruned model without these channels of all that is as wide as the stream, by torch's documented layout."""
    model = copy.deepcopy(model)
    kept = torch.tensor([channel for channel in range(WIDTH) if channel not in gone.tolist()])
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.LayerNorm):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, KeptNorm(module, kept))
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) == WIDTH:
            module.weight.data[gone] = 0
            if module.bias is not None:
                module.bias.data[gone] = 0
        elif isinstance(module, nn.Embedding):
            module.weight.data[:, gone] = 0
        elif isinstance(module, nn.MultiheadAttention):
            width = WIDTH // module.num_heads
            left = len(kept) // module.num_heads
            for tensor in (module.in_proj_weight, module.in_proj_bias):
                parts = tensor.data.view(3, WIDTH, -1)
                parts[:, gone] = 0
                parts[0] *= (width / left) ** 0.5  # products are divided by the root of the width of a head
            for extra in (module.bias_k, module.bias_v):
                if extra is not None:
                    extra.data[..., gone] = 0
    for name, parameter in model.named_parameters(recurse=False):
        parameter.data[(slice(None), gone) if name == "places" else gone] = 0
    return model


def data(model: nn.Module, count: int = 2, seed: int = 0) -> Tensor:
    shape = (count, 3, 8, 8) if isinstance(model, Image) else (count, 7, 6)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)


EXACT = {
    "patches": (Image, {}, 4),
    "patches, a key of its own": (Image, {"add_bias_kv": True}, 4),
    "queries": (Queries, {}, 2),  # the heads of both attentions: three of 4 channels, and two of 6
    "sequences": (Sequences, {}, 6),
}


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", EXACT)
def test_the_width_of_attentions_is_pruned_exactly(name: str) -> None:
    kind, options, units = EXACT[name]
    torch.manual_seed(0)
    model = kind(**options).double().eval()
    x = data(model)
    structure = TorchPruningStructure(copy.deepcopy(model), x)
    stream = next(group for group in structure.groups if any(p.channels.numel() == 3 * WIDTH for p in group.slices))
    assert stream.size == units, structure.left_out
    if isinstance(model, Image):
        assert structure.left_out["projection"].endswith("no channels are found along its other dimensions")
    gone = stream.slices[0].channels[1]
    want = masked(model, gone)(x)
    parameters = structure.costs("parameters")
    structure.remove({stream.name: torch.tensor([1])})
    torch.testing.assert_close(structure.model(x), want, rtol=1e-11, atol=1e-11)
    widths = torch.tensor([group.size for group in structure.groups])
    assert parameters.total(widths) == sum(parameter.numel() for parameter in structure.model.parameters())
    applied = structure.plan.apply(copy.deepcopy(model))
    applied.load_state_dict(structure.model.state_dict())
    torch.testing.assert_close(applied(x), structure.model(x), rtol=0, atol=0)


def test_obc_prune_reaches_what_feed_forward_layers_alone_would_not() -> None:
    torch.manual_seed(0)
    model = Image().eval()
    batches = [(data(model, 4, number), torch.arange(4)) for number in range(8)]
    result = obc.prune(model, batches[0][0], batches, class_loss, macs=0.3, progress=False)
    assert result.model.block.attention.embed_dim < WIDTH
    assert result.report.macs_after <= 0.3 * result.report.macs_before
    assert len(result.plan["patches"].out_channels) == result.model.block.attention.embed_dim


LEFT_OUT = {
    Masked: ("inputs", "'attention' (MultiheadAttention) reads its channels"),
    OfData: ("attention", "which of its channels go together is not found by running the model"),
    Apart: ("inputs", "'attention' (MultiheadAttention) reads its channels"),
    OwnForward: ("inputs", "'attention' (ToItself) reads its channels"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_stays_is_left_out_with_the_reason(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    structure = TorchPruningStructure(model, data(model))
    name, reason = LEFT_OUT[kind]
    assert not structure.groups
    assert reason in structure.left_out[name]
