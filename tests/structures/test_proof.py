"""The proof that removing equals masking: faults that it must see, cases that it must accept, its cost."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers_families import FAMILIES

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import random_wirings as wirings
from random_wirings import Stage, Wired, without

from obc.structures import proof as proofs
from obc.structures import traced_graph
from obc.structures.comparison import observe
from obc.structures.proof import prove
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure

SIZE = 8


def wired(moves: Callable[[Tensor], Tensor], channels: int = 12, between: nn.Module | None = None) -> Wired:
    """conv, moves, and a 1x1 convolution (or a linear layer behind a flatten) that reads what they make."""
    torch.manual_seed(0)
    parts: list[Any] = [("between", between)] if between is not None else []
    stage = Stage([*parts, ("moves", moves)])
    places = len(stage.sources(channels, SIZE))
    flat = moves(torch.zeros(1, channels, SIZE, SIZE)).dim() == 2
    reader: nn.Module = nn.Linear(places, 8) if flat else nn.Conv2d(places, 8, 1)
    return Wired([nn.Conv2d(3, channels, 3, padding=1), reader], [stage], nn.Linear(8, 5)).double().eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "flattened with channels first": wirings.channels_first,
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "halves exchanged twice":  # where Torch-Pruning itself fails, and which is right for even widths only
    lambda x: torch.cat(torch.cat(x.chunk(2, 1)[::-1], 1).chunk(2, 1)[::-1], 1),
    "flattened with channels last": wirings.channels_last,
    "patches with channels last": lambda x: x.permute(0, 2, 3, 1).unfold(1, 4, 4).unfold(2, 4, 4).flatten(1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(5, 1),
    "roll by half": lambda x: x.roll(6, 1),
    "index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1]).roll(1)),
    "gather": lambda x: x.gather(1, torch.arange(x.shape[1]).roll(3)[None, :, None, None].expand_as(x)),
    "every second first": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "stack before the channels": lambda x: torch.stack((x, x), 1).flatten(1, 2),
    "shuffle by view": lambda x: x.view(len(x), 3, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "transposed with einsum": lambda x: torch.einsum("nchw->nhwc", x).flatten(1),
    "unbind by view": lambda x: torch.cat(x.view(len(x), 2, -1, *x.shape[2:]).unbind(1)[::-1], 1),
}


# Not single channels: (units, channels of one). A roll by 5 of 12 channels leaves the last five where they are.
JOINED = {
    "halves exchanged twice": (6, 2),
    "roll": (7, 1),
    "roll by half": (6, 1),
    "index_select": (11, 1),
    "gather": (9, 1),
    "every second first": (6, 2),
    "shuffle by view": (4, 3),
    "unbind by view": (6, 2),
}


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("name", [*RIGHT, *OTHER])
def test_channels_in_any_order_are_pruned_exactly(name: str) -> None:
    """The true order is found by running the model if tracing sees another."""
    net = wired({**RIGHT, **OTHER}[name])
    for units in ([1], [0, 3], [1, 2, 5]):
        structure = TorchPruningStructure(copy.deepcopy(net), images())
        assert structure.proof is not None
        assert {"layers.0", "layers.1"} == set(structure.proof.proved)
        assert structure.proof.probed == ([] if name in RIGHT else ["layers.0"])
        assert set(structure.left_out) == set(structure.proof.left_out) | {"head"} == {"head"}
        group = structure.groups[0]
        assert (group.size, group.slices[0].channels.shape[1]) == JOINED.get(name, (12, 1))
        least = structure.limits.min_units.get("layers.0", 1)
        removed = torch.tensor([min(unit, group.size - 1) for unit in units[: group.size - least]])
        structure.remove({"layers.0": removed, "layers.1": torch.tensor([2, 3])})
        torch.testing.assert_close(structure.model(images()), without(net, structure.plan, SIZE)(images()))


@pytest.mark.parametrize("seed", range(3))
def test_an_order_of_fixed_places_is_left_out(seed: int) -> None:
    """Channels that are read at hard-coded positions can't be removed."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    structure = TorchPruningStructure(wired(lambda x: x[:, order]), images())
    assert [group.name for group in structure.groups] == ["layers.1"]
    assert "layers.0" in structure.left_out
    assert structure.proof is not None
    assert structure.proof.probed == []


def test_a_search_without_end_is_given_up() -> None:
    """Torch-Pruning follows ever more channels here, in a circle, until the memory is full."""

    def moves(x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return wirings.channels_last(torch.stack([x, x], 2).flatten(1, 2))

    between = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
    structure = TorchPruningStructure(wired(moves, between=between), images(), check=False)
    assert "its search does not end" in structure.left_out["layers.0"]
    assert [group.name for group in structure.groups] == ["layers.1"]


class Circle(nn.Module):
    """Torch-Pruning's search of the channels that this reads has no end."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.join = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(x).unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return self.join(wirings.channels_last(torch.stack([x, x], 2).flatten(1, 2)))[:, :, None, None]


def circles() -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(8, 12, 1), Circle(), nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(5)]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Flatten(), nn.Linear(8, 2))
    return net.double().eval()


def test_after_several_searches_without_end_the_other_groups_are_still_found() -> None:
    """Three of them ended the tracing of torchvision's Swin, though each took less than a second."""
    structure = TorchPruningStructure(circles(), images(), check=False)
    inner = [name for block in range(1, 6) for name in (f"{block}.1.join", f"{block}.2")]
    assert [group.name for group in structure.groups] == ["0", *inner]
    assert all("its search does not end" in structure.left_out[f"{block}.0"] for block in range(1, 6))


def test_after_searches_that_took_long_tracing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_graph, "_MOST_FOLLOWED", 2000)
    structure = TorchPruningStructure(circles(), images(), check=False)
    assert 0 < len(structure.groups) < 11
    assert "its search does not end" in structure.left_out["1.2"]


@pytest.mark.parametrize("most_compared", [1e8, 1e2])
def test_steps_along_edges_that_map_no_channels_count(monkeypatch: pytest.MonkeyPatch, most_compared: float) -> None:
    """Truth: a stream through eight blocks takes more than ten steps, and each search inside a block fewer."""
    blocks = [nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(8)]

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList(blocks), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    monkeypatch.setattr(traced_graph, "_STEPS", 10)
    monkeypatch.setattr(traced_graph, "_STEPS_PER_EDGE", 0)
    monkeypatch.setattr(traced_graph, "_MOST_COMPARED", most_compared)
    structure = TorchPruningStructure(Stream(), torch.randn(3, 4), check=False)
    assert "its search does not end (after 11 steps" in structure.left_out["first"]
    assert [group.name for group in structure.groups] == [
        f"blocks.{number}.0" for number in range(8 * (most_compared > 1e3))
    ]


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", ["depthwise", "norm", "slopes"])
@pytest.mark.parametrize("order", ["as it is", "flip"])
def test_layers_between_do_not_hide_the_order(name: str, order: str) -> None:
    between: dict[str, nn.Module] = {
        "depthwise": nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        "norm": nn.BatchNorm2d(12, affine=False),
        "slopes": nn.PReLU(12),
    }
    net = wired({**RIGHT, **OTHER}[order], between=between[name])
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    assert structure.proof is not None
    assert structure.proof.probed == (["layers.0"] if order == "flip" else [])
    structure.remove({"layers.0": torch.tensor([0, 4, 5])})
    torch.testing.assert_close(structure.model(images()), without(net, structure.plan, SIZE)(images()))


class Maxout(nn.Module):
    """Something is done to parts of the channels, which a view makes."""

    def __init__(self, parts: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.parts = parts
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c, self.head = nn.Conv2d(channels, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(F.relu(self.b(F.relu(self.a(x)))))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "neighbours": (lambda x: x.view(len(x), -1, 2, *x.shape[2:]).amax(2), 6),
    "halves": (lambda x: x.view(len(x), 2, -1, *x.shape[2:]).amax(1), 6),
    "thirds": (lambda x: (lambda p, q, r: p * q + r)(*x.view(len(x), 3, -1, *x.shape[2:]).unbind(1)), 4),
    "means of neighbours": (lambda x: x.unflatten(1, (-1, 3)).mean(2), 4),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_made_by_a_view_are_pruned_exactly_or_left_out(name: str) -> None:
    """Truth: whatever the consumer loses reads zero there, in the unpruned model."""
    torch.manual_seed(0)
    net = Maxout(*PARTS[name]).double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    for _ in range(3):
        structure.remove({group.name: torch.tensor([group.size // 2]) for group in structure.groups})
    for group, reader in (("a", net.b), ("b", net.c), ("c", net.head)):
        kept = structure.plan[group].out_channels if group in structure.plan else None
        columns = structure.plan[{"a": "b", "b": "c", "c": "head"}[group]].in_channels if kept is not None else None
        if columns is not None:
            wirings.zero_inputs(reader, sorted(set(range(reader.weight.shape[1])) - set(columns.tolist())))
    torch.testing.assert_close(structure.model(images()), net(images()))
    assert {"a", "c"} <= {group.name for group in structure.groups}


class ShuffleNet(nn.Module):
    """A grouped convolution, a shuffle by view, a depthwise and another grouped convolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.g1 = nn.Conv2d(2 * groups, channels, 1, groups=groups)
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.g2, self.head = nn.Conv2d(channels, 3 * groups, 1, groups=groups), nn.Linear(3 * groups, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.g1(x))
        y = y.view(len(y), self.groups, -1, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return self.head(self.g2(self.dw(y)).mean((2, 3)))


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize(("channels", "groups", "units"), [(12, 3, 1), (27, 3, 3), (24, 2, 6), (20, 2, 5), (68, 4, 4)])
def test_shuffles_between_grouped_convolutions_are_pruned_exactly(channels: int, groups: int, units: int) -> None:
    """A unit has one channel of every group that goes to every group; the rest of uneven groups always stays."""
    torch.manual_seed(0)
    net = ShuffleNet(channels, groups).double()
    structure = TorchPruningStructure(copy.deepcopy(net), x := torch.randn(2, 2 * groups, 5, 5).double())
    group = structure.groups[0]
    assert (group.name, group.size, group.slices[0].channels.shape[1]) == ("g1", units, groups**2)
    assert ("g1" in structure.limits.min_units) == (channels > units * groups**2)
    for _ in range(units - (channels == units * groups**2)):
        structure.remove({"g1": torch.tensor([structure.groups[0].size // 2])})
        gone = set(range(channels)) - set(structure.plan["g1"].out_channels.tolist())  # type: ignore[union-attr]
        masked = copy.deepcopy(net)
        masked.g1.register_forward_hook(lambda module, args, y, gone=gone: y.index_fill(1, torch.tensor([*gone]), 0.0))
        torch.testing.assert_close(structure.model(x), masked(x))
    left = channels - units * groups**2 or groups**2  # all units may go where channels that are in none stay
    assert len(structure.plan["g1"].out_channels) == left  # type: ignore[arg-type]


# --- what must not hide a fault -----------------------------------------------------------------------------------


# Operations over channels that change the example's activations less than rounding does.
FAINT: dict[str, Callable[[Tensor], Tensor]] = {
    "local response norm": nn.LocalResponseNorm(5, alpha=1e-6),
    "the older one": nn.CrossMapLRN2d(5, alpha=1e-6),
    "clipped by norm": lambda x: x * (500 / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=500)),
    "divided by 1e6 plus norm": lambda x: x / (1e6 + x.norm(dim=1, keepdim=True)),
    "scaled by the variance": lambda x: x * torch.rsqrt(1 + 1e-7 * x.var(1, keepdim=True)),
    "gated by the mean square": lambda x: x * torch.sigmoid(20 - 1e-6 * x.square().mean((1, 2, 3), keepdim=True)),
    "only if none is large": lambda x: x * (x.abs().amax() < 500),
    "a branch on the norm": lambda x: x if x.norm() < 1e3 else 2 * x,
    "softmax behind a threshold": lambda x: x + F.threshold(x, 100, 0).softmax(1) - 1 / x.shape[1],
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "exp": torch.exp,
    "exp of squares": lambda x: torch.exp(x.square()),
    "never clipped": lambda x: torch.minimum(x, 1 + x.amax(1, keepdim=True)),
    "max pool": lambda x: F.max_pool2d(x, 3, 1, 1),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "no norm": nn.Identity,
    "batch norm": lambda: nn.BatchNorm2d(12),
    "instance norm": lambda: nn.InstanceNorm2d(12),
    "group norm": lambda: nn.GroupNorm(3, 12),
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*FAINT, *ALONE])
def test_operations_over_channels_show_on_large_ones(name: str, norm: str) -> None:
    """Faint as they are here, larger activations would make them wrong; what treats each channel alone is accepted."""
    torch.manual_seed(0)
    net = wired({**FAINT, **ALONE}[name], between=NORMS[norm]()).float()
    structure = TorchPruningStructure(net, images(4).float())
    assert "layers.1" in {group.name for group in structure.groups}
    assert ("layers.0" in {group.name for group in structure.groups}) == (name in ALONE)
    assert structure.proof is not None
    assert not structure.proof.unproved


class Branch(nn.Module):
    """A residual branch whose wiring is wrong, behind something that hides it in the output."""

    def __init__(self, hide: str) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 1e-9 if hide == "tiny scale" else 1.0))
        if hide == "zero gamma":
            nn.init.zeros_(self.norm.weight)
        if hide == "zero weight":
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.b.bias)
        if hide == "equal weights":
            nn.init.constant_(self.a.weight, 0.1)
        if hide == "zero weights everywhere":
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.norm(self.b(F.relu(self.a(x)).flip(1)))
        return self.head(x.mean((2, 3)))


HIDDEN = ("nothing", "zero gamma", "zero weight", "tiny scale", "equal weights", "zero weights everywhere")


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("hide", HIDDEN)
@pytest.mark.parametrize("example", ["images", "zeros"])
def test_a_fault_is_seen_where_the_output_hides_it(hide: str, example: str) -> None:
    torch.manual_seed(0)
    x = images().float() if example == "images" else torch.zeros(1, 3, SIZE, SIZE)
    structure = TorchPruningStructure(Branch(hide), x)
    assert structure.proof is not None
    assert "a" in structure.proof.probed


def test_what_the_batch_does_not_show_is_called_unproved() -> None:
    class Dead(nn.Module):
        """Units that no input wakes, and a layer that is not used on this input."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(4, 3)
            with torch.no_grad():
                self.a.bias[2:] -= 100

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(F.relu(self.a(x)))))

    torch.manual_seed(0)
    structure = TorchPruningStructure(Dead(), torch.randn(4, 6))
    assert structure.proof is not None
    assert structure.proof.proved == ["b"]
    assert "zero, or the same" in structure.proof.unproved["a"]
    assert {group.name for group in structure.groups} == {"a", "b"}


class Block(nn.Module):
    """A feed-forward block that calls its layers, or uses their weights alone."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls, self.fc1, self.fc2 = calls, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.calls:
            return x + self.fc2(self.fc1(x).tanh())
        return x + F.linear(F.linear(x, self.fc1.weight).tanh(), self.fc2.weight)


class Tower(nn.Module):
    """Of its 11 blocks only the first two run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(calls=place != 1) for place in range(11))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_what_lies_beside_something_that_runs_is_not_proved_by_that() -> None:
    """Names say what holds a layer, "blocks.1" does not hold those of "blocks.10"."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Tower()), torch.randn(3, 6)
    proof = prove(TransformersStructure(model), lambda copied: copied(x))
    assert proof.proved == ["0.blocks.0.fc1", "0.blocks.1.fc1"]
    assert proof.unproved == {f"0.blocks.{n}.fc1": f"0.blocks.{n}.fc2 did not run" for n in range(2, 11)}


def test_a_model_that_returns_something_else_every_time_is_called_unproved() -> None:
    calls = iter(range(10**6))

    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x + next(calls))))

    structure = TorchPruningStructure(Restless(), torch.randn(4, 6))
    assert structure.proof is not None
    assert "something else at every call" in structure.proof.unproved["a"]


def test_random_numbers_inside_the_model_are_the_same_for_both() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x + torch.randn_like(x))))

    structure = TorchPruningStructure(Noisy(), torch.ones(4, 6))
    assert structure.proof is not None
    assert structure.proof.proved == ["a"]
    state = torch.get_rng_state()
    observe(structure.model, lambda model: model(torch.ones(4, 6)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "drawn", [torch.randn_like, F.dropout, torch.bernoulli, None], ids=["normal", "dropout", "bernoulli", "none"]
)
def test_random_numbers_for_each_channel_are_named(drawn: Callable[[Tensor], Tensor] | None) -> None:
    """Fewer channels get other ones, which no order of channels explains."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).sigmoid()
            return self.b(h / h.mean(1, keepdim=True) if drawn is None else h + drawn(h))

    reason = TorchPruningStructure(Noisy(), torch.randn(4, 6)).left_out["a"]
    assert ("; the model draws random numbers, other ones for fewer channels" in reason) == (drawn is not None)


# --- which groups are at fault, and what it costs -----------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{*range(16)}, {*range(0, 16, 2)}, {*range(8, 16)}])
def test_where_many_groups_fail_few_are_tried_more_than_once(wrong: set[int]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.readers = (nn.ModuleList(nn.Linear(8, 8) for _ in range(16)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = (layer(x) for layer in self.layers)
            hidden = (one.flip(1) if number in wrong else one for number, one in enumerate(hidden))
            return sum(reader(one) for reader, one in zip(self.readers, hidden, strict=True))

    torch.manual_seed(0)
    x = torch.randn(8, 8)
    found = prove(TorchPruningStructure(Wide(), x, check=False), lambda model: model(x))
    assert set(found.left_out) == {f"layers.{number}" for number in wrong}
    assert len(found.proved) == 16 - len(wrong)
    assert found.tries <= 16 + 8  # by halves alone all of them take 31


@pytest.mark.slow
def test_one_wrong_group_among_many_is_found_in_few_passes() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(16))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x).tanh()
                x = x.flip(1) if index in (5, 11) else x
            return self.head(x)

    torch.manual_seed(0)
    net = Deep()
    x = torch.randn(8, 16)
    found = prove(TorchPruningStructure(net, x, check=False), lambda model: model(x))
    assert set(found.left_out) == {"layers.5", "layers.11"}
    # Twice down a tree of sixteen, two models each; one by one would take 64 and more.
    assert found.passes <= 48
    structure = TorchPruningStructure(net, x)
    assert set(structure.left_out) == {"head"}
    assert structure.proof is not None
    assert structure.proof.probed == ["layers.5", "layers.11"]
    # Each of 16 channels alone with two kinds of numbers, of both layers at once, and a few more; then
    # five tries of both, and once more all groups together.
    assert structure.proof.passes - found.passes <= (2 * 16 + 13) + (1 + 2 * 5) + (1 + 2 * 2)
    good = TorchPruningStructure(net, torch.randn(8, 16), ignored_layers=["layers.5", "layers.11"])
    assert good.proof is not None
    assert good.proof.passes == 1 + 2 * 2
    assert len(good.proof.proved) == 14


def test_the_model_is_left_as_it_was() -> None:
    net = wired(OTHER["flip"]).float().train()
    net.layers[0].weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    values = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    TorchPruningStructure(net, images().float())
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert tensor is values[name][0]
        assert torch.equal(tensor, values[name][1])
    assert net.training
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["layers.0.weight"]
    assert not any(module._forward_hooks for module in net.modules())
    assert net.head.weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_are_traced(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
            self.block = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + checkpoint(self.block, x, use_reentrant=reentrant))

    structure = TorchPruningStructure(Checkpointed(), torch.randn(4, 6))
    assert [group.name for group in structure.groups] == ["stem", "block.0"]
    assert [part.module for part in structure.groups[0].slices] == ["stem", "block.0", "block.2", "head"]


def test_two_tries_tell_all_units_of_small_groups_apart() -> None:
    """Any exchange of two of four channels shows in one of the tries."""
    for one in range(4):
        for other in range(one):
            order = list(range(4))
            order[one], order[other] = other, one
            net = wired(lambda x, order=order: x[:, order[: x.shape[1]]], 4)
            structure = TorchPruningStructure(net, images(), check=False)
            found = prove(structure, lambda model: model(images()))
            assert "layers.0" in found.left_out, (one, other)
    assert proofs._TRIES == 2


# --- masking is not slicing: exact counterparts ---------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("kinds", [("ffn", "heads", "experts", "expert_ffn", "mamba"), ("embedding",)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_transformers_are_proved(family: str, kinds: tuple[str, ...]) -> None:
    """Norms over the residual stream, routers and scan included."""
    case = FAMILIES[family]()
    structure = TransformersStructure(case.model, kinds)
    if not structure.groups:
        pytest.skip(f"{family} has no groups of {kinds}")
    batch = case.batches[0]
    inputs = {"pixel_values": batch[0]} if isinstance(batch, tuple) else {"input_ids": batch}
    found = prove(structure, lambda model: model(**inputs))
    assert found.proved == [group.name for group in structure.groups]
    assert not found.left_out
    assert not found.unproved
    assert found.error < found.tolerance < 1e-3
    assert found.passes == 5
    assert len(structure.plan) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_proved_by_what_layers_read(dtype: torch.dtype) -> None:
    case = FAMILIES["llama"]()
    model = case.model.to(dtype)
    right = TransformersStructure(model, example_inputs={"input_ids": case.batches[0]})
    assert right.proof is not None
    assert len(right.proof.proved) == len(right.groups) == 4
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, Flipped())
    wrong = TransformersStructure(model, example_inputs={"input_ids": case.batches[0]})
    assert [group.kind for group in wrong.groups] == ["heads", "heads"]


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


@pytest.mark.parametrize("shift", [0, 3, 11])
def test_groups_that_share_a_consumers_channels_are_not_proved_together(shift: int) -> None:
    """Two groups of the same channels: what one removes, the other still counts with. It ended in an IndexError."""
    structure = TorchPruningStructure(wired(lambda x: x), images(), check=False)
    name = next(iter(structure._groups))
    group = structure._groups[name]
    slices = tuple(replace(part, channels=part.channels.roll(shift, 0)) for part in group.slices)
    structure._groups["again"] = replace(group, name="again", slices=slices)
    reader = group.consumers[0].module
    proof = prove(structure, lambda model: model(images()))
    said = rf"together with again: input channel \d+ of {reader} is in several groups"
    assert re.search(said, proof.left_out[name]), proof
    assert "again" in proof.proved
