"""Models and layers that Torch-Pruning can't trace are pruned by what running them shows: exactly, naming the cause."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from random_wirings import zero_inputs

import obc
from obc.structures.traced import TorchPruningStructure


class Net(nn.Module):
    """Layers and a forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Shuffled(nn.Module):
    """A block of ShuffleNetV2: half of the channels pass, or both halves are computed; then they are interleaved."""

    def __init__(self, width: int, passing: bool) -> None:
        super().__init__()
        self.passing, read = passing, width // 2 if passing else width
        self.other = nn.Identity() if passing else nn.Sequential(*self.layers(width, width)[3:])
        self.first = nn.Sequential(*self.layers(read, 6))

    @staticmethod
    def layers(read: int, width: int) -> list[nn.Module]:
        inner = [nn.Conv2d(read, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        each = [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)]
        return [*inner, *each, nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1) if self.passing else (x, x)
        joined = torch.cat([self.other(one), self.first(two)], 1)
        n, channels, height, width = joined.shape
        return joined.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(joined.shape)


def shuffle() -> Net:
    blocks = nn.Sequential(Shuffled(8, passing=False), Shuffled(16, passing=True), Shuffled(16, passing=True))
    layers = {"stem": nn.Conv2d(3, 8, 3), "blocks": blocks, "join": nn.Conv2d(16, 10, 1), "head": nn.Linear(10, 3)}
    return Net(lambda net, x: net.head(F.relu(net.join(net.blocks(net.stem(x)))).mean((2, 3))), **layers)


def split() -> Net:
    """One half of a list of parts has a residual branch."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = list(net.b(F.relu(net.a(x))).split((6, 6), 1))
        y.append(net.m(y[-1]) + y[-1])
        return net.head(F.relu(net.c(torch.cat(y, 1))).mean((2, 3)))

    convolutions = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 12, 3), "c": nn.Conv2d(18, 12, 1)}
    return Net(forward, **convolutions, m=nn.Conv2d(6, 6, 3, padding=1), head=nn.Linear(12, 3))


def grouped_queries() -> Net:
    """Two query heads share a head of keys and values; Torch-Pruning's search has no end."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).reshape(q.shape) for t in (k, v))
        x = x + net.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return net.head((x + net.down(F.silu(net.up(x)))).mean(1))

    attention = {"q": nn.Linear(6, 12), "k": nn.Linear(6, 6), "v": nn.Linear(6, 6), "o": nn.Linear(12, 6)}
    return Net(forward, **attention, up=nn.Linear(6, 10), down=nn.Linear(10, 6), head=nn.Linear(6, 3))


def frozen() -> Net:
    """The first layers run without gradients, so tracing does not come upon them."""

    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(net.b(F.relu(net.a(x))))
        return net.head(F.relu(net.c(y)).mean((2, 3)))

    convolutions = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "c": nn.Conv2d(6, 5, 1)}
    return Net(forward, **convolutions, head=nn.Linear(5, 3))


def decided() -> Net:
    """It returns classes, not logits, so nothing has a gradient."""
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "head": nn.Linear(6, 3)}
    return Net(lambda net, x: net.head(F.relu(net.b(F.relu(net.a(x)))).mean((2, 3))).argmax(1), **layers)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# Name -> (model, inputs, group -> units, part of the warning).
UNTRACEABLE: dict[str, tuple[Callable[[], Net], Callable[[], Tensor], dict[str, int], str]] = {
    "channel shuffle": (
        shuffle,
        images,
        {"stem": 8, "blocks.0.first.0": 6, "blocks.1.first.0": 6},
        "ZeroDivisionError",
    ),
    "split and joined": (split, images, {"a": 8, "c": 12}, "IndexError"),
    "grouped queries": (grouped_queries, tokens, {"q": 2, "up": 10}, ""),
    "no gradient": (frozen, images, {"a": 8, "b": 6, "c": 5}, ""),
    "no gradient anywhere": (decided, images, {"a": 8, "b": 6}, ""),
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_tracing_misses_is_pruned_exactly(name: str) -> None:
    """Truth: what a layer loses of its inputs is zero there in the unpruned model."""
    build, inputs, sizes, cause = UNTRACEABLE[name]
    torch.manual_seed(0)
    net, x = build().double().eval(), inputs()
    structure = TorchPruningStructure(copy.deepcopy(net), x)
    found = {group.name: group.size for group in structure.groups}
    assert {key: found.get(key) for key in sizes} == sizes, structure.left_out
    structure.remove({group: torch.tensor([0, size - 1][: size - 1]) for group, size in found.items() if size > 1})
    for part, kept in structure.plan.items():
        layer: Any = net.get_submodule(part)
        if kept.in_columns is not None and getattr(layer, "groups", 1) == 1:
            zero_inputs(layer, sorted(set(range(layer.weight.shape[1])) - set(kept.in_columns.tolist())))
    torch.testing.assert_close(structure.model(x), net(x), rtol=1e-9, atol=1e-9)
    layers = {part for part, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    pruned = {part.module for group in structure.groups for part in group.slices if part.side == "out"}
    assert "head" in layers - pruned
    assert set(structure.left_out) >= {"head"}
    said = [warning for warning in structure.warnings if "found by running" in warning]
    assert (cause in said[0]) if cause else True


@pytest.mark.slow
def test_the_report_says_that_tracing_failed() -> None:
    torch.manual_seed(0)
    batches = [(images().float(), torch.tensor([0, 1]))]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    result = obc.prune(shuffle(), batches[0][0], batches, loss, macs=0.8, steps=1)
    assert result.report.macs_after <= 0.8 * result.report.macs_before
    said = [warning for warning in result.report.warnings if "Torch-Pruning failed in 'blocks." in warning]
    assert len(said) == 1
    assert "found by running the model" in said[0]
    assert result.report.left_out["head"]


def test_without_the_proof_nothing_is_found_by_running() -> None:
    with pytest.raises(
        obc.PruningError, match=r"tracing it with Torch-Pruning failed in 'blocks\.0.*ZeroDivisionError"
    ):
        TorchPruningStructure(shuffle(), images().float(), check=False)


def test_a_model_in_which_running_finds_nothing_names_the_cause() -> None:
    """Every layer is ignored, so no group is left for running to find."""
    net = shuffle()
    with pytest.raises(obc.PruningError, match="ZeroDivisionError"):
        TorchPruningStructure(net, images().float(), ignored_layers=["stem", "blocks", "join", "head"])


def test_heads_of_layers_that_tracing_misses_are_left_out() -> None:
    net = frozen()
    structure = TorchPruningStructure(net, images().float(), num_heads={"a": 2})
    assert structure.left_out["a"] == "its heads, set by num_heads, are joined in tracing, which does not come upon it"


@pytest.mark.parametrize("raises", ["the model", "the search"])
def test_a_fault_of_the_search_is_not_taken_for_one_of_the_model(raises: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(model: nn.Module, run: Callable[[nn.Module], Any], *others: Any) -> None:
        if raises == "the model":
            run(nn.Module())
        raise KeyError("a fault")

    monkeypatch.setattr("obc.structures.probed_groups.coupled_channels", searched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(obc.PruningError, match="ZeroDivisionError"):
            TorchPruningStructure(shuffle(), images().float())
    said = [str(one.message) for one in caught if "search for further groups" in str(one.message)]
    assert len(said) == (raises == "the search")
    assert not said or "KeyError: 'a fault'" in said[0]
