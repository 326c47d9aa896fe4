"""LSTM, GRU and RNN: the inputs and hidden units that pruning removes, exactly, and what stays, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.memory import MemoryUse
from obc.structures.traced import TorchPruningStructure

Run = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers and a forward."""

    def __init__(self, run: Run, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def tokens(inputs: int = 5) -> Tensor:
    return torch.randn(3, 7, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def whole(net: Any, x: Tensor) -> Tensor:
    """Every output, behind a convolution with a BatchNorm."""
    return net.head(net.tried(F.relu(net.norm(net.first(x))).transpose(1, 2))[0])


def states(net: Any, x: Tensor) -> Tensor:
    """The last states of all layers and directions; the time comes first."""
    state = net.tried(F.relu(net.first(x)).transpose(0, 1))[1]
    state = state[0] if isinstance(state, tuple) else state
    return net.head(state.transpose(0, 1).flatten(1))


def packed(net: Any, x: Tensor) -> Tensor:
    read = pack_padded_sequence(F.relu(net.first(x)), torch.tensor([7, 5, 4]), batch_first=True)
    return net.head(pad_packed_sequence(net.tried(read)[0], batch_first=True)[0])


OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "both directions": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


def recurrent(kind: type[nn.RNNBase], run: Run, **options: Any) -> Net:
    torch.manual_seed(0)
    tried = kind(8, 6, batch_first=run is not states, **options)
    read = 6 * (2 if tried.bidirectional else 1) * (tried.num_layers if run is states else 1)
    first: dict[str, nn.Module] = {"first": nn.Linear(5, 8)}
    if run is whole:
        first = {"first": nn.Conv1d(7, 8, 3, padding=1), "norm": nn.BatchNorm1d(8)}
    return Net(run, **first, tried=tried, head=nn.Linear(read, 4)).double().eval()


def masked(net: nn.Module, structure: TorchPruningStructure, removed: dict[str, Tensor]) -> nn.Module:
    """The unpruned model whose weights for what is removed are zero, by the layout that torch documents."""
    copied = copy.deepcopy(net)
    for group in structure.groups:
        for part in group.slices:
            lost = part.channels[removed[group.name]].flatten()
            module: Any = copied.get_submodule(part.module)
            for name, weight in module.named_parameters():
                if not isinstance(module, nn.RNNBase):
                    columns = [lost] if part.side == "in" and name == "weight" else []
                elif part.side == "in":
                    columns = [lost] if name in ("weight_ih_l0", "weight_ih_l0_reverse") else []
                elif name.startswith("weight_hh"):
                    columns = [lost]
                else:
                    deeper = name.startswith("weight_ih") and "_l0" not in name
                    columns = [lost, lost + module.hidden_size][: 1 + module.bidirectional] if deeper else []
                for one in columns:
                    weight.data[:, one] = 0
    return copied


def assert_exact(net: nn.Module, x: Tensor, sizes: dict[str, int]) -> nn.Module:
    structure = TorchPruningStructure(copy.deepcopy(net), x)
    assert {group.name: group.size for group in structure.groups} == sizes, structure.left_out
    assert structure.proof is not None
    assert not structure.proof.unproved
    removed = {name: torch.tensor([0, size - 2]) for name, size in sizes.items()}
    want = masked(net, structure, removed)(x)
    parameters, macs, memory = structure.costs("parameters"), structure.costs("macs"), structure.memory(MemoryUse())
    structure.remove({name: units[:1] for name, units in removed.items()})
    structure.remove({name: units[1:] - 1 for name, units in removed.items()})
    pruned = structure.model
    torch.testing.assert_close(pruned(x), want, rtol=1e-12, atol=1e-12)
    widths = torch.tensor([group.size for group in structure.groups])
    assert parameters.total(widths) == sum(parameter.numel() for parameter in pruned.parameters())
    saved = pruned.state_dict().values()
    assert memory.total(widths) == sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert macs.total(widths) == TorchPruningStructure(copy.deepcopy(pruned), x, check=False).costs("macs").total()
    structure.plan.verify(net.state_dict(), pruned)
    applied = structure.plan.apply(copy.deepcopy(net))
    applied.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(applied(x), pruned(x), rtol=0, atol=0)
    return pruned


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("run", [whole, states, packed])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_inputs_and_hidden_units_are_removed_exactly(kind: type[nn.RNNBase], run: Run, options: str) -> None:
    net = recurrent(kind, run, **OPTIONS[options])
    pruned: Any = assert_exact(net, tokens(), {"first": 8, "tried": 6})
    assert (pruned.tried.input_size, pruned.tried.hidden_size) == (6, 4)


def stacked() -> Net:
    run = lambda net, x: net.head(net.b(net.a(net.first(x).relu())[0])[0])  # noqa: E731
    layers = {"a": nn.LSTM(8, 6, batch_first=True, bidirectional=True), "b": nn.GRU(12, 7, batch_first=True)}
    return Net(run, first=nn.Linear(5, 8), **layers, head=nn.Linear(7, 3))


def residual() -> Net:
    """The hidden units are added to the inputs, so both go together."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.head(y + net.a(y)[0])

    return Net(run, first=nn.Linear(5, 8), a=nn.LSTM(8, 8, batch_first=True), head=nn.Linear(8, 3))


def attended() -> Net:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)[0]
        return net.head((net.weigh(y).softmax(1) * y).sum(1))

    layers = {"weigh": nn.Linear(12, 1), "head": nn.Linear(12, 3)}
    return Net(run, a=nn.GRU(5, 6, batch_first=True, bidirectional=True), **layers)


def started() -> Net:
    """The first state is made of the layer's present width."""
    run = lambda net, x: net.head(net.a(x, x.new_zeros(1, 3, net.a.hidden_size))[0])  # noqa: E731
    return Net(run, a=nn.GRU(5, 6, batch_first=True), head=nn.Linear(6, 3))


def summed() -> Net:
    run = lambda net, x: net.head(net.a(x)[0].unflatten(-1, (2, -1)).sum(-2))  # noqa: E731
    return Net(run, a=nn.LSTM(5, 8, batch_first=True, bidirectional=True), head=nn.Linear(8, 3))


def flattened() -> Net:
    """Each channel has one input for every row of the image."""
    run = lambda net, x: net.head(net.a(net.first(x[:, None]).relu().permute(0, 3, 1, 2).flatten(2))[0])  # noqa: E731
    return Net(run, first=nn.Conv2d(1, 4, 3, padding=1), a=nn.LSTM(28, 8, batch_first=True), head=nn.Linear(8, 3))


WIRED: dict[str, tuple[Callable[[], Net], dict[str, int]]] = {
    "stacked": (stacked, {"first": 8, "a": 6, "b": 7}),
    "residual": (residual, {"first": 8}),
    "attended": (attended, {"a": 6}),
    "started": (started, {"a": 6}),
    "directions summed": (summed, {"a": 8}),
    "flattened": (flattened, {"first": 4, "a": 8}),
}


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", WIRED)
def test_channels_around_recurrent_layers(name: str) -> None:
    build, sizes = WIRED[name]
    torch.manual_seed(0)
    assert_exact(build().double().eval(), tokens(), sizes)


def translated() -> Net:
    """The state of one layer starts another."""
    run = lambda net, x: net.head(net.b(net.second(x), net.a(net.first(x))[1])[0])  # noqa: E731
    layers = {"a": nn.LSTM(8, 6, batch_first=True), "b": nn.LSTM(9, 6, batch_first=True)}
    return Net(run, first=nn.Linear(5, 8), second=nn.Linear(5, 9), **layers, head=nn.Linear(6, 3))


def captioned() -> Net:
    run = lambda net, x: net.head(net.a(x, hx=net.first(x[:, 0])[None])[0])  # noqa: E731
    return Net(run, first=nn.Linear(5, 6), a=nn.GRU(5, 6, batch_first=True), head=nn.Linear(6, 3))


def fixed() -> Net:
    run = lambda net, x: net.head(net.a(x, x.new_zeros(1, 3, 6))[0])  # noqa: E731
    return Net(run, a=nn.GRU(5, 6, batch_first=True), head=nn.Linear(6, 3))


def projected() -> Net:
    run = lambda net, x: net.head(net.a(net.first(x))[0])  # noqa: E731
    tried = nn.LSTM(8, 6, batch_first=True, proj_size=4)
    return Net(run, first=nn.Linear(5, 8), a=tried, head=nn.Linear(4, 3))


def normalised() -> Net:
    run = lambda net, x: net.head(F.normalize(net.a(x)[0], dim=-1))  # noqa: E731
    return Net(run, a=nn.LSTM(5, 8, batch_first=True), head=nn.Linear(8, 3))


def clipped() -> Net:
    """All units are scaled down where their norm exceeds 1000: only large ones show it."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)[0]
        return net.head(y * (1000 / y.norm(dim=-1, keepdim=True)).clamp(max=1))

    return Net(run, a=nn.GRU(5, 8, batch_first=True), head=nn.Linear(8, 3))


# Name -> (model, group -> units, left out -> a part of the reason).
STAYING: dict[str, tuple[Callable[[], Net], dict[str, int], dict[str, str]]] = {
    "a state given by another layer": (
        translated,
        {"first": 8, "second": 9},
        {"a": "'b' (LSTM) reads its channels", "b": "Expected hidden[0] size"},
    ),
    "a state computed by a layer": (
        captioned,
        {},
        {"first": "'a' (GRU) reads its channels", "a": "Expected hidden size"},
    ),
    "a state of fixed width": (fixed, {}, {"a": "Expected hidden size"}),
    "projections": (projected, {}, {"first": "'a' (LSTM) reads", "a": "a plan can't describe its projections"}),
    "normalised": (normalised, {}, {"a": "an operation between them mixes channels"}),
    "clipped": (clipped, {}, {"a": "made large, change what others do"}),
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_named_with_the_reason(name: str) -> None:
    build, sizes, reasons = STAYING[name]
    torch.manual_seed(0)
    structure = TorchPruningStructure(build().double().eval(), tokens())
    assert {group.name: group.size for group in structure.groups} == sizes
    for part, reason in reasons.items():
        assert reason in structure.left_out[part]


def test_a_pruned_recurrent_model_is_compensated_around_the_recurrent_layer_and_trains() -> None:
    torch.manual_seed(0)
    net = recurrent(nn.LSTM, packed, bidirectional=True).float()
    original = copy.deepcopy(net)
    batches = [(torch.randn(3, 7, 5), torch.randint(4, (3, 7))) for _ in range(8)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    result = obc.prune(net, batches[0][0], batches, loss, macs=0.6)
    assert not result.report.unscored
    assert result.model.tried.input_size < 8 or result.model.tried.hidden_size < 6
    inputs = [batch for batch, _ in batches]
    trained = copy.deepcopy(result.model)
    obc.recover(trained, original, inputs, steps=2, lr=1e-3, train="folded", plan=result.plan)
    before, after = result.model.state_dict(), trained.state_dict()
    assert {key: one.shape for key, one in after.items()} == {key: one.shape for key, one in before.items()}
    assert not torch.equal(after["tried.weight_hh_l0"], before["tried.weight_hh_l0"])
    report = obc.compensate(result.model, original, result.plan, inputs)
    assert report.notes == ["tried: what this recurrent layer lost is not compensated in its own weights"]
