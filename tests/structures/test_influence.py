"""Channels that tracing loses: groups found by what each channel influences, and true reasons for the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from random_wirings import zero_inputs

from obc.structures import influence, influence_groups, probed_groups
from obc.structures.traced import TorchPruningStructure


class Net(nn.Module):
    """Modules and a forward."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.run = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def split_and_joined() -> Net:
    """YOLO's C2f: one half goes through a residual branch, and everything is put side by side."""

    def forward(net: Any, x: Tensor) -> Tensor:
        parts = list(F.silu(net.norm(net.first(x))).chunk(2, 1))
        parts.append(parts[-1] + F.silu(net.inner(parts[-1])))
        return net.head(F.silu(net.join(torch.cat(parts, 1))).mean((2, 3)))

    first, inner, join = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(18, 8, 1)
    return Net(forward, first=first, norm=nn.BatchNorm2d(12), inner=inner, join=join, head=nn.Linear(8, 3))


def state_space() -> Net:
    """Mamba: gates and inputs from one projection, a scan whose decay is a parameter outside layers."""

    def forward(net: Any, u: Tensor) -> Tensor:
        x, gate = net.first(u).chunk(2, -1)
        x = F.silu(net.conv(x.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
        rate, write, read = net.select(x).split([2, 3, 3], -1)
        rate, state, outputs = F.softplus(net.rate(rate)), 0.0, []
        for t in range(u.shape[1]):
            state = (
                state * torch.exp(-rate[:, t, :, None] * net.decay.exp())
                + (rate * x)[:, t, :, None] * write[:, t, None]
            )
            outputs.append((state * read[:, t, None]).sum(-1))
        return net.head(net.join((torch.stack(outputs, 1) + x * net.skip) * F.silu(gate)).mean(1))

    layers = {"first": nn.Linear(6, 16), "select": nn.Linear(8, 8), "rate": nn.Linear(2, 8), "join": nn.Linear(8, 6)}
    conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)
    parameters = {"decay": nn.Parameter(torch.randn(8, 3)), "skip": nn.Parameter(torch.randn(8))}
    return Net(forward, **layers, **parameters, conv=conv, head=nn.Linear(6, 3))


def heads(count: int = 4, width: int = 3) -> Net:
    """Attention written out, with a bias for each head."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, width)).transpose(1, 2) for layer in (net.first, net.keys, net.values))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width) + net.bias).softmax(-1)
        return net.head(net.join((weights @ v).transpose(1, 2).flatten(2)).mean(1))

    layers = {name: nn.Linear(6, count * width) for name in ("first", "keys", "values")}
    join, bias = nn.Linear(count * width, 6), nn.Parameter(torch.randn(count, 5, 5))
    return Net(forward, **layers, join=join, bias=bias, head=nn.Linear(6, 3))


# Name -> (model, input, units, channels of the first layer in each).
COUPLED: dict[str, tuple[Callable[[], Net], Callable[[], Tensor], int, int]] = {
    "split and joined": (split_and_joined, images, 6, 2),
    "state space": (state_space, tokens, 8, 2),
    "heads": (heads, tokens, 4, 3),
    "wide heads": (lambda: heads(6, 64), tokens, 6, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUPLED)
def test_channels_that_tracing_loses_are_pruned_exactly(name: str) -> None:
    """Truth: what a layer loses of its inputs is zero there in the unpruned model."""
    build, inputs, size, width = COUPLED[name]
    torch.manual_seed(0)
    net, x = build().double().eval(), inputs()
    structure = TorchPruningStructure(copy.deepcopy(net), x)
    group = next(group for group in structure.groups if group.name == "first")
    assert (group.size, next(one for one in group.slices if one.module == "first").channels.shape[1]) == (size, width)
    assert structure.proof is not None
    assert "first" in structure.proof.proved
    for units in ([size - 1, 1], [0]):
        structure.remove({"first": torch.tensor(units)})
    assert structure.plan["first"].out_channels is not None
    assert len(structure.plan["first"].out_channels) == (size - 3) * width
    for part, kept in structure.plan.items():
        if kept.in_columns is not None:
            layer: Any = net.get_submodule(part)
            if getattr(layer, "groups", 1) == 1:
                zero_inputs(layer, sorted(set(range(layer.weight.shape[1])) - set(kept.in_columns.tolist())))
    torch.testing.assert_close(structure.model(x), net(x), rtol=1e-9, atol=1e-9)


# What a reader of 480 channels reads of them; the last dimension of every result has as many entries.
WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "one to one, reversed": lambda y: y.flip(-1),
    "halves of a gated unit": lambda y: (y[..., :240] * y[..., 240:].sigmoid()).repeat(1, 1, 2),
    "neighbours": lambda y: y.unflatten(-1, (-1, 2)).prod(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(2),
    "heads one after the other": lambda y: y.unflatten(-1, (-1, 60)).cumsum(-1).flip(-1).cumsum(-1).flatten(2),
    "heads side by side": lambda y: y.unflatten(-1, (60, -1)).softmax(2).flatten(2),
    "heads of queries, keys and values": lambda y: (
        y.unflatten(-1, (3, 4, 40)).softmax(-1).prod(2, keepdim=True).expand(-1, -1, 3, -1, -1).flatten(2)
    ),
    "some alone, others by head": lambda y: torch.cat(
        [y[..., :240], y[..., 240:].unflatten(-1, (-1, 48)).softmax(-1).flatten(2)], -1
    ),
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", WIDE)
def test_what_many_channels_influence_is_found_in_few_passes(name: str) -> None:
    """Truth: the derivatives of what is read."""
    torch.manual_seed(0)
    read, x = WIDE[name], torch.randn(2, 3, 6, dtype=torch.float64)
    net = Net(lambda net, x: net.head(read(net.first(x))), first=nn.Linear(6, 480), head=nn.Linear(480, 3)).double()
    found, passes = influence.influences(net, lambda model: model(x), {"first": influence.Source("first", 480)})
    numbers = torch.rand(1, 1, 480, dtype=torch.float64) + 0.5
    jacobian = torch.autograd.functional.jacobian(lambda y: read(y)[0, 0], numbers)
    assert torch.equal(found["first"].inputs["head"], jacobian[:, 0, 0] != 0)
    assert passes < 480


def changes(net: Net, layer: str, channels: Any, x: Tensor, reader: str | None) -> Tensor:
    """Which entries of the last dimension that ``reader`` reads, or the model returns, differ with other channels."""
    seen: list[Tensor] = []
    handles = (
        [] if reader is None else [net.get_submodule(reader).register_forward_pre_hook(lambda m, a: seen.append(a[0]))]
    )

    def other(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor(channels), 7.0)

    returned = [net(x)]
    handles.append(net.get_submodule(layer).register_forward_hook(other))
    returned.append(net(x))
    for handle in handles:
        handle.remove()
    one, two = returned if reader is None else seen
    return (one != two).flatten(0, -2).any(0)


def before(reads: Callable[[Any, Tensor], Tensor], **members: Any) -> Net:
    """A layer, what reads it, and a head."""
    return Net(
        lambda net, x: net.head(reads(net, net.first(x))), first=nn.Linear(6, 8), head=nn.Linear(8, 3), **members
    )


def test_reasons_are_true_of_the_model() -> None:
    torch.manual_seed(0)
    x = tokens()

    def reason(net: Net, name: str = "first") -> str:
        return TorchPruningStructure(copy.deepcopy(net).double(), x).left_out[name]

    first_state = lambda net, y: net.cell(y, y[None, :, 0].contiguous())[0]  # noqa: E731
    recurrent = before(first_state, cell=nn.GRU(8, 8, batch_first=True)).double()
    assert reason(recurrent) == "'cell' (GRU) reads its channels"
    assert changes(recurrent, "first", [0], x, "cell").any()

    raw = before(lambda net, y: F.bilinear(y, y, net.matrix).relu(), matrix=nn.Parameter(torch.randn(8, 8, 8))).double()
    assert reason(raw) == "a product outside layers with 'matrix' reads its channels"
    assert isinstance(raw.matrix, nn.Parameter)

    gate = nn.Linear(1, 1)
    mixed = before(lambda net, y: y * net.gate(y.mean(-1, keepdim=True)).sigmoid(), gate=gate).double()
    assert reason(mixed) == "one channel changes most of what 'gate' reads: an operation between them mixes channels"
    assert changes(mixed, "first", [0], x, "gate").tolist() == [True]

    returned = before(lambda net, y: y).double()
    assert reason(returned, "head") == "the model returns its output"
    assert changes(returned, "head", [0], x, None).tolist() == [True, False, False]

    # A product with a buffer, which the model returns: the output's last dimension is not the layer's width.
    buffer = Net(lambda net, x: (net.head(net.first(x)), (net.first(x) @ net.table).sum(-1, keepdim=True)))
    buffer.first, buffer.head = nn.Linear(6, 8), nn.Linear(8, 3)
    buffer.register_buffer("table", torch.randn(8, 8))
    assert reason(buffer.double()) == "a product outside layers with 'table' reads its channels"

    summed = Net(
        lambda net, x: (net.head(net.first(x)), net.first(x).sum(-1)), first=nn.Linear(6, 8), head=nn.Linear(8, 3)
    )
    assert reason(summed.double()) == "the model's output reads its channels"


def test_a_search_that_would_take_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "_MOST_IN_ALL", 10)
    torch.manual_seed(0)
    structure = TorchPruningStructure(split_and_joined().double().eval(), images())
    assert "first" not in {group.name for group in structure.groups}
    assert structure.left_out["first"] == "running the model to find which channels go together takes up to 36 passes"


SIZE = 96
DRAWN = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).reshape(-1, 6)
# Operation between two layers -> whether its inputs are told apart in fewer passes than there are channels.
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "in order": (lambda y: y * 2, True),
    "gated halves": (lambda y: y[..., : SIZE // 2] * y[..., SIZE // 2 :].sigmoid(), True),
    "gated thirds": (lambda y: y.unflatten(-1, (3, -1)).prod(-2), True),
    "neighbours": (lambda y: y.unflatten(-1, (-1, 2)).sum(-1), True),
    "shuffled": (lambda y: y.unflatten(-1, (8, -1)).transpose(-1, -2).flatten(-2), True),
    "drawn sixes": (lambda y: y[..., DRAWN].sum(-1), False),
    "all mixed": (lambda y: y * y.mean(-1, keepdim=True), True),
    "half mixed": (lambda y: torch.cat([y[..., :48], y[..., 48:] * y[..., 48:].mean(-1, keepdim=True)], -1), False),
    "one sum beside": (lambda y: torch.cat([y[..., :-1], y.sum(-1, keepdim=True)], -1), True),
}


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("name", BETWEEN)
def test_inputs_depend_on_the_channels_that_their_derivative_depends_on(name: str) -> None:
    between, fast = BETWEEN[name]
    torch.manual_seed(0)
    point = torch.rand(SIZE, dtype=torch.float64) + 0.5
    expected = torch.autograd.functional.jacobian(between, point) != 0
    net = Net(lambda net, x: net.reader(between(net.first(x))))
    net.first, net.reader = nn.Linear(6, SIZE), nn.Linear(len(expected), 3)
    sources = {"first": influence.Source("first", SIZE)}
    found, passes = influence.influences(net.double().eval(), lambda model: model(tokens()), sources)
    assert torch.equal(found["first"].inputs["reader"], expected)
    assert (passes < SIZE) == fast


@pytest.mark.parametrize(("most", "pruned"), [(1500, True), (50, False)])
def test_many_wide_sums_are_told_apart_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, most: int, pruned: bool
) -> None:
    """Of 8 layers of 96 channels every single channel took 2 x 8 x 96 = 1536 passes; all at once take under 80."""
    monkeypatch.setattr(influence, "_MOST_IN_ALL", most)
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.reader(sum(layer(x).unflatten(-1, (8, -1)).transpose(-1, -2).flatten(-2) for layer in net.layers))

    net = Net(forward, layers=nn.ModuleList(nn.Linear(6, SIZE) for _ in range(8)), reader=nn.Linear(SIZE, 3))
    sources = {f"layers.{index}": influence.Source(f"layers.{index}", SIZE) for index in range(8)}
    found, passes = influence.influences(net.double().eval(), lambda model: model(tokens()), sources)
    if not pruned:
        said = "running the model to find which channels go together takes up to"
        assert all(one.unexamined.startswith(said) for one in found.values())
        return
    assert passes < 80
    for one in found.values():
        assert bool((one.inputs["reader"].sum(1) == 1).all())


def test_positions_that_all_channels_depend_on_take_few_passes() -> None:
    """Truth: a table of 40 positions adds channel c to channel c; each position adds to every channel."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    net = Net(lambda net, x: net.head(net.first(x) + net.places), first=nn.Linear(6, 24), head=nn.Linear(24, 3))
    net.places = nn.Parameter(torch.rand(40, 24))
    sources = {f"places:{dim}": influence.Source("places", (40, 24)[dim], "places", dim) for dim in (0, 1)}
    sources["first"] = influence.Source("first", 24)
    found, passes = influence.influences(net.double().eval(), lambda model: model(x), sources)
    for key in ("first", "places:1"):
        assert torch.equal(found[key].inputs["head"], torch.eye(24, dtype=torch.bool))
    assert bool(found["places:0"].inputs["head"].all())
    assert found["places:0"].mixed == {"head": True}
    assert passes < 60  # each position alone, with two kinds of numbers, takes 80 more


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize(
    "more", ["nothing", "a mix of tokens", "a parameter of every token", "a gate for all", "a diagonal"]
)
def test_what_is_added_to_a_stream_is_told_apart_at_once(more: str) -> None:
    """Truth: block after block adds channel c to channel c. Each layer alone takes 2 x 2 x log2(96) = 28 passes."""
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.first(x)
        if more == "a mix of tokens":
            y = y + net.mix(x.transpose(1, 2)).mT.repeat(1, 1, SIZE // 6)
        if more == "a parameter of every token":
            y = y + net.places
        if more == "a diagonal":
            y = y + net.table.diagonal()
        for up, down, scale in zip(net.ups, net.downs, net.scales, strict=True):
            y = y + scale * down(F.silu(up(y)))
            if more == "a gate for all":
                y = y * net.gate(y).sigmoid()
        return net.head(y)

    ups, downs = (nn.ModuleList(nn.Linear(*shape) for _ in range(10)) for shape in ((SIZE, 24), (24, SIZE)))
    scales = nn.ParameterList(torch.rand(SIZE) for _ in range(10))
    net = Net(forward, first=nn.Linear(6, SIZE), ups=ups, downs=downs, scales=scales, head=nn.Linear(SIZE, 3))
    net.mix, net.gate, net.places = nn.Linear(5, 5), nn.Linear(SIZE, 1), nn.Parameter(torch.rand(5, SIZE))
    net.table = nn.Parameter(torch.rand(SIZE, SIZE))
    sources = {name: influence.Source(name, SIZE) for name in ("first", *(f"downs.{index}" for index in range(10)))}
    sources |= {f"scales.{index}": influence.Source(f"scales.{index}", SIZE, f"scales.{index}") for index in range(10)}
    if more == "a diagonal":
        sources |= {f"table:{dim}": influence.Source("table", SIZE, "table", dim) for dim in (0, 1)}
    others = {
        "a mix of tokens": {"mix": influence.Source("mix", 5)},
        "a parameter of every token": {
            f"places:{dim}": influence.Source("places", (5, SIZE)[dim], "places", dim) for dim in (0, 1)
        },
        "a gate for all": {"gate": influence.Source("gate", 1)},
    }
    found, passes = influence.influences(
        net.double().eval(), lambda model: model(tokens()), sources | others.get(more, {})
    )
    for key in sources:
        assert torch.equal(found[key].inputs["head"], torch.eye(SIZE, dtype=torch.bool)), key
    assert passes < 160
    if more in others:
        assert bool(next(iter(found[key] for key in others[more])).inputs["head"].all())


def test_heads_are_settled_by_few_single_channels() -> None:
    """Attention over the channels of a head: each output depends on one query, and all keys and values of its head."""
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        query, key, value = net.first(x).unflatten(-1, (3, 4, 30)).permute(2, 0, 3, 4, 1)
        return net.head((F.softmax(query @ key.mT, -1) @ value).permute(0, 3, 1, 2).flatten(2))

    net = Net(forward, first=nn.Linear(6, 360), head=nn.Linear(120, 3)).double()
    found, passes = influence.influences(net, lambda model: model(tokens()), {"first": influence.Source("first", 360)})
    heads = torch.eye(4, dtype=torch.bool).repeat_interleave(30, 0).repeat_interleave(30, 1).repeat(1, 3)
    assert not bool((found["first"].inputs["head"] & ~heads).any())
    assert bool((found["first"].inputs["head"][:, 120:] == heads[:, 120:]).all())
    assert passes < 200


def test_where_all_would_take_too_long_layers_that_share_passes_are_still_examined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hidden layers of all blocks are examined at once; what adds to the stream would take passes of its own."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.first(x)
        for up, down in zip(net.ups, net.downs, strict=True):
            y = y + down(F.silu(up(y)))
        return net.head(y.mean(1)).argmax(1)  # nothing has a gradient: tracing comes upon nothing

    monkeypatch.setattr(influence, "_MOST_IN_ALL", 30)
    torch.manual_seed(0)
    ups = nn.ModuleList(nn.Linear(6, 10) for _ in range(3))
    downs = nn.ModuleList(nn.Linear(10, 6) for _ in range(3))
    net = Net(forward, first=nn.Linear(6, 6), ups=ups, downs=downs, head=nn.Linear(6, 3)).double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), tokens())
    assert {group.name: group.size for group in structure.groups} == {"ups.0": 10, "ups.1": 10, "ups.2": 10}
    for name in ("first", "downs.0", "downs.1", "downs.2"):
        assert "takes up to" in structure.left_out[name], structure.left_out
    structure.remove({"ups.1": torch.tensor([2, 7])})
    zero_inputs(net.get_submodule("downs.1"), [2, 7])
    logits = [[], []]
    for one, seen in zip((structure.model, net), logits, strict=True):
        one.get_submodule("head").register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        one(tokens())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)


def test_no_candidate_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both searches propose the channels of a layer whose width the model has written out, and none of them can go."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    prove = probed_groups.prove

    def recorded(structure: Any, run: Any, among: Any = (), **options: Any) -> Any:
        groups = [group for group in structure.groups if group.name in among]
        seen.extend((one.name, tuple(part.channels.tolist() for part in one.slices)) for one in groups)
        return prove(structure, run, among=among, **options)

    monkeypatch.setattr(probed_groups, "prove", recorded)
    torch.manual_seed(0)
    written = before(lambda net, y: F.silu(y).reshape(2, 5, 2, 4).transpose(2, 3).reshape(2, 5, 8)).double()
    structure = TorchPruningStructure(written, tokens())
    assert "first" in structure.left_out
    assert len(seen) > 3
    assert all(seen.count(one) == 1 for one in seen)


@pytest.mark.parametrize("name", ["all", "first", "to_qkv"])  # what the layers return is drawn by name
def test_heads_are_told_apart_where_a_softmax_saturates(name: str) -> None:
    """Where many channels of queries and keys change at once, what a head reads may stay as it is."""
    heads, size = 4, 6

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = getattr(net, name)(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return net.head(net.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)).relu())

    layers = {name: nn.Linear(6, 3 * heads * size), "out": nn.Linear(heads * size, 8), "head": nn.Linear(8, 3)}
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    found = influence_groups.coupled_channels(Net(forward, **layers).double(), lambda model: model(x), [name], {}, ())
    (heads_found,) = found.coupled
    columns = heads_found.members["out", "in"]
    assert heads_found.size == heads
    assert [columns[column] for column in range(heads * size)] == [column // size for column in range(heads * size)]
