"""Layers that can't be sliced are refused by name with the remedy, or leave out what they read with a true reason."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.masking import masked_copy
from obc.structures.traced import TorchPruningStructure

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self.b(self.a(x).relu()).relu().mean((2, 3))).relu())


def checkpointed(model: Any) -> None:
    model.b = checkpoint_wrapper(model.b)


def compiled_part(model: Any) -> None:
    model.b = torch.compile(model.b, backend="eager")


def compiled_in_place(model: Any) -> None:
    model.b.compile(backend="eager")


def compiled_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 16, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.to(torch.complex64)).real


def complex_layer(model: Any) -> None:
    model.f = Complex()


def dynamic(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def static(model: Any) -> Any:
    wrapped = torch.ao.quantization.QuantWrapper(model)
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = torch.ao.quantization.prepare(wrapped)
    prepared(X)
    return torch.ao.quantization.convert(prepared)


def training_aware(model: Any) -> Any:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    prepared = torch.ao.quantization.prepare_qat(model.train())
    prepared(X)
    return prepared.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (checkpointed, r"Net: b is a CheckpointWrapper, which renames.*with the module that it wraps.*wrap it again"),
        (compiled_part, r"Net: b is compiled; prune the model with the module.*compile again"),
        (compiled_in_place, r"Net: b is compiled"),
        (compiled_forward, r"Net: its forward is compiled"),
        (complex_layer, r"Net: f\.mix is a Linear of torch\.complex64.*real weights alone"),
        (dynamic, r"f is a quantised Linear of torch\.ao; prune the model that was quantised"),
        (static, r"module\.a is a quantised Conv2d of torch\.ao"),
        (
            training_aware,
            r"a is a Conv2d of torch\.ao, prepared for quantisation-aware training.*prune the model first",
        ),
    ],
)
def test_a_layer_that_cannot_be_sliced_is_named(change: Callable[[Any], Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net().eval()
        model = change(model) or model
    with pytest.raises(obc.PlanError, match=message):
        TorchPruningStructure(model, X)
    with pytest.raises(obc.PlanError, match=message):
        obc.prune(model, X, [X] * 4, lambda one, x: one(x).square().mean(), progress=False)


class Integers(nn.Module):
    """A linear layer of another's making: integers in a buffer, and a scale for each output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.register_buffer("numbers", (weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("numbers").float() * self.scale, self.bias)


@pytest.mark.parametrize(
    ("layer", "left", "reason"),
    [
        ("f", "b", r"does not run without 6 of the 12 units in 'f'"),
        ("head", "f", r"the model's output reads its channels"),
    ],
)
def test_what_an_unknown_layer_reads_keeps_its_width_and_the_layer_is_found(layer: str, left: str, reason: str) -> None:
    model = Net().eval()
    setattr(model, layer, Integers(getattr(model, layer)))
    structure = TorchPruningStructure(model, X)
    assert re.search(reason, structure.left_out[left])
    assert "a" in {group.name for group in structure.groups}


class Words(nn.Module):
    def __init__(self, kind: type[nn.Embedding] | type[nn.EmbeddingBag], max_norm: float | None) -> None:
        super().__init__()
        self.words, self.up, self.down = kind(20, 12, max_norm=max_norm), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x.mean(1) if x.dim() == 3 else x
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_scaled_down_by_the_norm_of_all_channels_keep_all_channels(kind: Any) -> None:
    torch.manual_seed(0)
    seen, unseen = torch.arange(10).view(2, 5), torch.arange(10, 20).view(2, 5)
    model = Words(kind, 1.0).eval()
    structure = TorchPruningStructure(copy.deepcopy(model), seen)
    assert "'words' scales rows down to max_norm=1.0" in structure.left_out["down"]
    with torch.no_grad():
        model.words.weight.renorm_(2, 0, 1.0)
    before, model.words.max_norm = model(unseen), None
    torch.testing.assert_close(model(unseen), before)
    structure = TorchPruningStructure(model, seen)
    assert {group.name for group in structure.groups} == {"up", "down"}
    # Each row is as short as it must be, so a slice of it is not scaled again.
    gone = {"down": torch.arange(6)}
    expected = masked_copy(model, structure.groups, gone)(unseen)
    structure.remove(gone)
    torch.testing.assert_close(model(unseen), expected)
    assert model.words.embedding_dim == model.words.weight.shape[1] == 6


class Gated(nn.Module):
    """Attention over positions, from the mean and the maximum over all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.b, self.head = nn.Conv2d(8, 10, 3), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y * self.gate(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head(self.b(y).relu().mean((2, 3)))


def test_a_group_that_can_only_go_as_a_whole_is_left_out_with_the_reason() -> None:
    structure = TorchPruningStructure(Gated().eval(), X)
    assert {group.name for group in structure.groups} == {"b"}
    assert structure.left_out["a"].startswith("one channel changes most of what 'gate' reads")


class Lost(nn.Module):
    """A linear layer, an operation in which Torch-Pruning loses track of its 12 channels, and what reads the result."""

    def __init__(self, operation: Callable[[Lost, Tensor], Tensor], outputs: int) -> None:
        super().__init__()
        self.first, self.norm, self.table = nn.Linear(6, 12), nn.RMSNorm(4), nn.Parameter(torch.randn(7, 3))
        self.raw, self.qk = nn.Parameter(torch.randn(8, 12)), nn.Linear(12, 16)
        self.operation, self.reader, self.head = operation, nn.Linear(outputs, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.reader(self.operation(self, F.gelu(self.first(x))))))


@pytest.mark.parametrize(
    ("operation", "outputs", "reason"),
    [
        (
            lambda net, x: F.bilinear(x, x, net.raw.view(8, 12, 1).expand(-1, -1, 12)),
            *(8, "a product outside layers with 'raw' reads its channels"),
        ),
        (lambda net, x: torch.tensordot(x, net.raw, ([2], [1])), 8, "a product outside layers with 'raw' reads its"),
        (
            lambda net, x: net.norm(x.unflatten(-1, (3, 4))).flatten(-2),
            12,
            r"does not run.*sizes \[3, 4\] don't multiply",
        ),
    ],
)
def test_layers_whose_channels_tracing_loses_are_left_out_with_the_place(
    operation: Callable[[Lost, Tensor], Tensor], outputs: int, reason: str
) -> None:
    structure = TorchPruningStructure(Lost(operation, outputs), torch.randn(2, 7, 6))
    names = {group.name for group in structure.groups}
    assert "reader" in names
    assert "first" not in names
    assert re.search(reason, structure.left_out["first"])
