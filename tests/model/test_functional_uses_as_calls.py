"""A function of torch that gets a layer's weight does what a call does: to hooks, statistics, costs, compensation."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import obc
from obc.model.functional_uses import LayerCalls, calling_layers
from obc.model.kept import Kept
from obc.recovery import compensate, equivalent_pruning
from obc.structures.traced import TorchPruningStructure

WIDTH, OUT = 8, 12
_READS = Kept(in_channels=torch.arange(6))


class Net(nn.Module):
    """``use(self, layer, x)`` computes what ``layer(x)`` is, for every layer of the model but the last one."""

    def __init__(self, use: Callable[[Any, Any, Tensor], Tensor], image: bool = False) -> None:
        super().__init__()
        self.image = image
        if image:
            self.first, self.middle = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, OUT, (3, 1), 2, (1, 0))
        else:
            self.first, self.middle = nn.Linear(6, WIDTH), nn.Linear(WIDTH, OUT)
        self.last, self.use = nn.Linear(OUT, 4), use

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self, self.middle, self.use(self, self.first, x).tanh()).tanh()
        output: Tensor = self.last(x.mean((2, 3)) if self.image else x)
        return output


class Other(nn.Module):
    """A linear layer as torch-geometric's, which is not torch's."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def called(net: Any, layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


def linear(net: Any, layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def by_keyword(net: Any, layer: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(bias=layer.bias, input=x, weight=layer.weight)


def other_bias(net: Any, layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias.clone())


def transposed(net: Any, layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.t() + layer.bias


def property_transposed(net: Any, layer: Any, x: Tensor) -> Tensor:
    return torch.matmul(x, layer.weight.mT) + layer.bias


def forward_alone(net: Any, layer: Any, x: Tensor) -> Tensor:
    """No hook runs."""
    result: Tensor = layer.forward(x)
    return result


def by_turns(net: Any, layer: Any, x: Tensor) -> Tensor:
    """Half by a call, half by a function: hooks would see half of it."""
    return (layer(x) + F.linear(x, layer.weight, layer.bias)) / 2


def twice(net: Any, layer: Any, x: Tensor) -> Tensor:
    return (layer(x) + layer(x)) / 2


def convolution(net: Any, layer: Any, x: Tensor) -> Tensor:
    stride = layer.stride[0] if layer is net.middle else 1
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=layer.padding)


PAIRS = {
    **{one.__name__: (one, called, False) for one in (linear, by_keyword, other_bias, transposed, property_transposed)},
    "by_turns": (by_turns, twice, False),
    "convolution": (convolution, called, True),
    "another class": (called, called, False),
    "another class in functions": (linear, called, False),
    "forward_alone": (forward_alone, called, False),
    "forward_alone of images": (forward_alone, called, True),
}


def pair(kind: str) -> tuple[Net, Net, Tensor, list[Any]]:
    """The model with functional uses, the same with calls, example inputs and batches."""
    use, reference, image = PAIRS[kind]
    torch.manual_seed(0)
    model = Net(use, image).eval()
    other = Net(reference, image).eval()
    other.load_state_dict(model.state_dict())
    if "another class" in kind:
        model.first, model.middle = Other(model.first), Other(model.middle)
    shape = (4, 3, 6, 6) if image else (16, 6)
    return model, other, torch.randn(shape), [(torch.randn(shape), torch.randint(4, shape[:1])) for _ in range(5)]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Block(nn.Module):
    """A residual block whose first layer is ``use``d."""

    def __init__(self, use: Callable[[Any, Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.use = nn.Linear(WIDTH, OUT), nn.Linear(OUT, WIDTH), use

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(self.use(self, self.up, x).tanh())
        return output


@pytest.mark.parametrize("use", [called, linear, by_turns])
def test_statistics_block_by_block_are_those_of_the_whole_model(use: Callable[[Any, Any, Tensor], Tensor]) -> None:
    """The last block alone uses a layer in a function: four batches of the others show none."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(called) for _ in range(3)), Block(use))
    batches = [torch.randn(5, WIDTH) for _ in range(4)]
    whole, by_block = (
        obc.collect(model, batches, statistics=["gram"], by_block=how, progress=False)
        for how in (False, obc.statistics.ByBlock(blocks=["0", "1", "2", "3"]))
    )
    for name in (f"{block}.{layer}" for block in range(4) for layer in ("up", "down")):
        torch.testing.assert_close(by_block.gram[name].total, whole.gram[name].total)
        # Sums over what the layer reads: twice as much where it is used twice.
        reads = 2 if name == "3.up" and use is by_turns else 1
        assert by_block.gram[name].count == whole.gram[name].count == 20 * reads
    assert by_block.coverage == whole.coverage


@pytest.mark.parametrize("kind", list(PAIRS))
def test_the_outputs_are_the_same_and_hooks_see_calls(kind: str) -> None:
    model, other, x, _ = pair(kind)
    seen: dict[str, list[Tensor]] = {}
    for name, one in (("functions", model), ("calls", other)):
        one.middle.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(name, []).extend([args[0], y]))
    plain = model(x)
    seen.clear()
    mode = LayerCalls([model])
    with mode:
        torch.testing.assert_close(model(x), plain)
    torch.testing.assert_close(other(x), plain)
    assert mode.seen == (PAIRS[kind][0] is not called)
    assert len(seen["functions"]) == len(seen["calls"])
    torch.testing.assert_close(seen["functions"][0], seen["calls"][0])
    assert torch.equal(model(x), plain)
    assert model.middle.bias is not None


def test_calls_and_what_is_no_use_of_a_layer_stay_as_they_are() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    table = nn.Embedding(5, 8)
    x, layer, dispatched = torch.randn(2, 3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    dispatched.forward = functools.partial(lambda forward, x: forward(x), dispatched.forward)  # as accelerate does
    uses: list[tuple[nn.Module, Callable[[], Any]]] = [
        (attention, lambda: attention(x, x, x)),
        (encoder.eval(), lambda: encoder(x)),
        (table, lambda: F.linear(x, table.weight)),
        (layer, lambda: layer(x)),
        (layer, lambda: F.linear(x, layer.weight[:4])),
        (layer, lambda: F.linear(x, layer.weight * 2)),
        (layer, lambda: x @ layer.weight),
        (dispatched, lambda: dispatched(x)),
    ]
    for model, run in uses:
        mode = LayerCalls([model])
        expected = run()
        with mode:
            result = run()
        torch.testing.assert_close(result, expected)
        assert not mode.seen


def test_autocast_decides_the_dtype() -> None:
    model, _, x, _ = pair("other_bias")
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with LayerCalls([model]) as mode:
            result = model(x)
    assert mode.seen
    assert result.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(result, plain, rtol=0.05, atol=0.02)


def test_other_geometry_is_no_call() -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 6, 6)
    for stride in (1, 2):
        mode = LayerCalls([layer])
        with mode:
            result = F.conv2d(x, layer.weight, layer.bias, stride, 1)
        assert mode.seen == (stride == 1)
        torch.testing.assert_close(result, F.conv2d(x, layer.weight, layer.bias, stride, 1))


def test_classes_are_restored_and_leave_no_trace() -> None:
    model = Net(by_einsum)
    inside: list[Any] = []

    def forward(model: Any, x: Tensor) -> Tensor:
        half = model.middle.weight[:2]
        inside.extend([copy.deepcopy(model.middle), type(model.middle.weight)(torch.ones(2)), half])
        result: Tensor = model(x)
        return result

    function = calling_layers(forward)
    assert calling_layers(function) is function
    assert calling_layers(None) is None
    function(model, torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="shapes"):
        function(model, torch.randn(2, 7))
    copied, made, half = inside[:3]
    assert {type(one) for one in (*model.parameters(), *copied.parameters(), made)} == {nn.Parameter}
    assert type(half) is Tensor
    assert not hasattr(half, "use")


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("kind", list(PAIRS))
def test_groups_and_costs_are_those_of_calls(kind: str) -> None:
    model, other, x, _ = pair(kind)
    structures = [TorchPruningStructure(one, x) for one in (model, other)]
    groups = [{group.name: group.size for group in one.groups} for one in structures]
    assert groups[0] == groups[1] == {"first": WIDTH, "middle": OUT}
    for unit in ("macs", "parameters"):
        assert structures[0].costs(unit).total() == structures[1].costs(unit).total()  # type: ignore[arg-type]
    assert structures[0].proof.proved == structures[1].proof.proved  # type: ignore[union-attr]
    for one in structures:
        one.remove({"first": torch.tensor([0, 3]), "middle": torch.tensor([5])})
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("kind", list(PAIRS))
def test_statistics_are_those_of_calls(kind: str) -> None:
    model, other, _, batches = pair(kind)
    found = [obc.collect(one, batches, statistics=["gram"], progress=False) for one in (model, other)]
    for name in ("first", "middle", "last"):
        torch.testing.assert_close(found[0].gram[name].total, found[1].gram[name].total)
    assert found[0].coverage == found[1].coverage


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("mode", ["correct", "ls", "seq"])
@pytest.mark.parametrize("kind", list(PAIRS))
def test_compensation_is_that_of_calls(kind: str, mode: Any) -> None:
    model, other, x, batches = pair(kind)
    reports = []
    for one in (model, other):
        original = copy.deepcopy(one)
        structure = TorchPruningStructure(one, x)
        structure.remove({"first": torch.tensor([0, 3, 4]), "middle": torch.tensor([5, 7])})
        reports.append(compensate(one, original, structure.plan, batches, mode=mode, progress=False))
    assert not reports[0].unreached
    assert reports[0].layers.keys() == reports[1].layers.keys() == {"middle", "last"}
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [name for name in PAIRS if name != "by_turns"])
def test_a_fold_is_trained_merged_and_counted_as_in_calls(kind: str) -> None:
    """A functional use of a folded layer gets the folded weight, and its gradient reaches the factors."""
    model, other, x, batches = pair(kind)
    original, results = copy.deepcopy(model.state_dict()), []
    for one in (model, other):
        structure = TorchPruningStructure(one, x)
        structure.remove({"first": torch.tensor([0, 3, 4]), "middle": torch.tensor([5, 7])})
        sliced = one(x)
        with pytest.warns(UserWarning, match="positions per step") as caught:
            equivalent = equivalent_pruning(one, original, structure.plan, example_inputs=x[:1])
        torch.testing.assert_close(one(x), sliced)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for batch in batches:
            optimizer.zero_grad()
            loss_of(one, batch).backward()
            optimizer.step()
        results.append((str(caught[0].message), one(x), equivalent.merge()(x)))
    (said, trained, merged), (expected, reference, _) = results
    assert said == expected
    torch.testing.assert_close(trained, reference)
    torch.testing.assert_close(merged, reference)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("kind", list(PAIRS))
def test_pruning_is_that_of_calls(kind: str) -> None:
    model, other, x, batches = pair(kind)
    results = [obc.prune(one, x, batches, loss_of, macs=0.6, progress=False) for one in (model, other)]
    plans = [{name: kept.out_channels for name, kept in result.plan.items()} for result in results]
    assert plans[0].keys() == plans[1].keys() >= {"first", "middle"}
    for name, channels in plans[0].items():
        if channels is not None:
            assert torch.equal(channels, plans[1][name])


def by_einsum(net: Any, layer: Any, x: Tensor) -> Tensor:
    return (layer(x) + torch.einsum("bi,oi->bo", x, layer.weight)) / 2


def by_halves(net: Any, layer: Any, x: Tensor) -> Tensor:
    half = len(layer.weight) // 2
    return (layer(x) + torch.cat([F.linear(x, layer.weight[:half]), F.linear(x, layer.weight[half:])], -1)) / 2


class Standardised(nn.Linear):
    """Its own forward may do with its weight what it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 1.0, self.bias)


@pytest.mark.parametrize(
    ("use", "function"), [(by_einsum, "einsum"), (by_halves, "__getitem__"), (called, None), (linear, None)]
)
def test_uses_that_no_call_stands_for_are_named(use: Any, function: str | None) -> None:
    torch.manual_seed(0)
    model, batches = Net(use).eval(), [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(5)]
    if function is None:
        model.first = Standardised(6, WIDTH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = obc.collect(model, batches, statistics=["gram"], progress=False).coverage["gram"]
        pruned, plan = copy.deepcopy(model), obc.PruningPlan({"first": Kept(torch.arange(6)), "middle": _READS})
        plan.apply(pruned)
        report = compensate(pruned, model, plan, batches, mode="ls", progress=False)
    said = [str(one.message) for one in caught]
    if function is None:
        assert found["middle"] == found["last"] == "input"
        assert not [one for one in [*said, *report.notes] if "also uses its weight" in one]
    else:
        assert found["middle"].scored
        assert f"{function} also uses its weight" in found["middle"]
        assert found["last"] == "input"
        assert len([one for one in said if f"{function} also uses its weight" in one]) == 2
        assert [one for one in report.notes if one.startswith(f"middle: {function} also uses its weight")]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_use_is_scored_right(reentrant: bool) -> None:
    """Autograd repeats it outside of the function, where no use becomes a call."""

    def use(net: Any, layer: Any, x: Tensor) -> Tensor:
        if layer is net.first:
            return called(net, layer, x)
        result: Tensor = checkpoint(lambda x: F.linear(x, layer.weight, layer.bias), x, use_reentrant=reentrant)
        return result

    torch.manual_seed(0)
    model, other = Net(use).eval(), Net(called).eval()
    other.load_state_dict(model.state_dict())
    batches = [(torch.randn(5, 6), torch.randint(4, (5,))) for _ in range(3)]
    scores, expected = (obc.score(one, batches, loss_of, progress=False) for one in (model, other))
    for name in expected:
        torch.testing.assert_close(scores[name].out_channels, expected[name].out_channels)
        torch.testing.assert_close(scores[name].in_channels, expected[name].in_channels)
