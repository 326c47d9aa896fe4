"""Groups of Torch-Pruning's graph: the slices and costs of a unit, and layers that can't be pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from prunable import RECIPES  # noqa: E402

from benchmarks.small_vgg import VGG  # noqa: E402
from obc.demo import models as demo_models  # noqa: E402
from obc.model.layouts import layout_of  # noqa: E402
from obc.recovery import PlanError  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402


class Dense(nn.Module):
    """Each layer reads all before it, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 4, 3, padding=1)
        self.second = nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.first(x))], 1)
        x = torch.cat([x, F.relu(self.second(x))], 1)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """One layer makes both halves of a gated unit: its channels go in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 12), nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        value, gate = self.up(x).chunk(2, -1)
        return self.head(x + self.down(value * gate.sigmoid()))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones, and a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(2, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.project = nn.Conv2d(12, 8, 1)
        self.group_norm = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.norm(self.expand(x))))
        return self.head(F.relu(self.group_norm(self.project(x))).mean((2, 3)))


class Scaled(nn.Module):
    """Parameters of no layer: a scale that multiplies channels, and a norm that Torch-Pruning does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.norm = nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.scale * self.down(F.gelu(self.up(self.norm(x)))))


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's own: its attention is one module with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(8, 2, 12, batch_first=True)


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values, each in heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = nn.Linear(3, 8), nn.Linear(8, 36), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        query, key, value = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return self.head((x + self.out((weights @ value).transpose(1, 2).flatten(2))).mean(1))


class Plain(nn.Module):
    """Norms without any tensor, whose widths are attributes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.instance = nn.Conv2d(2, 8, 3, padding=1), nn.InstanceNorm2d(8)
        self.second, self.group = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12, affine=False)
        self.third, self.layer = nn.Linear(12, 10), nn.LayerNorm(10, elementwise_affine=False)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.second(F.relu(self.instance(self.first(x)))))
        return self.head(F.relu(self.layer(self.third(x.mean((2, 3))))))


@dataclass
class Net:
    """A network, what goes in, what Torch-Pruning must be told, and whether a unit can be silenced instead."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    silencing: bool = True  # False for norms over the channels of a group: masked channels change their statistics

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(self.build()).double().eval()

    def inputs(self, count: int = 1) -> Tensor:
        return torch.randn(count, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


NETS = {
    "residual": Net(demo_models.ResidualCNN, (1, 8, 8)),
    "vgg": Net(VGG, (1, 8, 8)),
    "transformer": Net(
        demo_models.Transformer,
        (1, 8, 8),
        {"num_heads": {f"layers.{i}.attention.{p}": 4 for i in range(3) for p in ("query", "key", "value")}},
        silencing=False,
    ),
    "dense": Net(Dense, (2, 5, 5)),
    "gated": Net(Gated, (5,)),
    "inverted": Net(Inverted, (2, 5, 5), silencing=False),
    "fused": Net(Fused, (5, 3), {"num_heads": {"qkv": 3}}, silencing=False),
    "attention": Net(lambda: nn.Sequential(nn.Linear(3, 8), EncoderLayer(), nn.Linear(8, 2)), (5, 3), silencing=False),
    "scaled": Net(Scaled, (5,), silencing=False),
    "plain": Net(Plain, (2, 5, 5), silencing=False),
}
NETS |= {
    name: Net(recipe.build, recipe.shape, {"ignored_layers": recipe.ignored, "num_heads": recipe.heads})
    for name, recipe in RECIPES.items()
}


def structure_of(net: Net, model: nn.Module, **options: Any) -> TorchPruningStructure:
    example = net.inputs().requires_grad_()  # of residual networks that add to their input, see RECIPES
    return TorchPruningStructure(model, example, **(net.options | options))


def some_units(structure: TorchPruningStructure, seed: int) -> dict[str, Tensor]:
    """A quarter of every group, but at least one unit where two are left."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(group.size // 4, int(group.size > 1))]
        for group in structure.groups
    }


class Products(TorchFunctionMode):
    """Counts the multiplications of ``@`` and of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            self.total += result.numel() * args[0].shape[-1]
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.total += query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return result


def counted_macs(model: nn.Module, x: Tensor) -> int:
    """Multiplications of convolutions, linear layers and attention in one forward, from what runs."""
    total = 0

    def count(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.MultiheadAttention):
            tokens = args[0].numel() // module.embed_dim
            total += tokens * (module.in_proj_weight.numel() + module.out_proj.weight.numel())
            length = args[0].shape[1 if module.batch_first else 0]
            total += 2 * tokens * length * module.embed_dim  # queries with keys, weights with values
            return
        transposed = isinstance(module, nn.ConvTranspose2d)
        applied = (args[0] if transposed else output).numel()
        total += applied * module.weight[0].numel()

    counted = [m for m in model.modules() if layout_of(m) is not None or isinstance(m, nn.MultiheadAttention)]
    handles = [module.register_forward_hook(count) for module in counted]
    with Products() as products:
        model(x)
    for handle in handles:
        handle.remove()
    return total + products.total


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("name", NETS)
def test_removing_units_matches_slicing_and_counting(name: str) -> None:
    net = NETS[name]
    model, x = net.model(), net.inputs()
    original, shape = copy.deepcopy(model.state_dict()), model(x).shape
    structure = structure_of(net, model)
    names = [group.name for group in structure.groups]
    before = {unit: structure.costs(unit) for unit in ("macs", "parameters")}
    for step in range(3):
        structure.remove(some_units(structure, step))
        assert model(x).shape == shape
        structure.plan.verify(original, model)
        assert [group.name for group in structure.groups] == names
        widths = structure.costs("macs").widths
        for unit, count in (
            ("macs", counted_macs(model, x)),
            ("parameters", sum(p.numel() for p in model.parameters())),
        ):
            assert structure.costs(unit).total() == pytest.approx(count, rel=1e-12)
            assert before[unit].total(widths) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize("name", ["plain", "inverted", "scaled"])
def test_a_plan_cuts_the_unpruned_model_to_the_same(name: str) -> None:
    net = NETS[name]
    model, x = net.model(), net.inputs(3)
    structure = structure_of(net, model)
    structure.remove(some_units(structure, 0))
    torch.testing.assert_close(structure.plan.apply(net.model())(x), model(x), rtol=0, atol=0)
    sizes = ("num_features", "num_channels", "normalized_shape", "out_channels", "in_features")
    cut = structure.plan.apply(net.model())
    for module, other in zip(model.modules(), cut.modules(), strict=True):
        assert all(getattr(module, key, None) == getattr(other, key, None) for key in sizes)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.silencing])
def test_removing_a_unit_silences_what_its_consumers_read(name: str) -> None:
    """Without norms over channels between, a unit that is gone is one whose consumers multiply it by zero."""
    net = NETS[name]
    x = net.inputs(4)
    for name in [group.name for group in structure_of(net, net.model()).groups]:
        model = net.model()
        silenced = copy.deepcopy(model)
        structure = structure_of(net, model)
        group = next(group for group in structure.groups if group.name == name)
        units = torch.tensor([0, group.size - 1]).unique()[: group.size - 1]
        for part in group.consumers:
            layer: Any = silenced.get_submodule(part.module)
            layout = layout_of(layer)
            assert layout is not None
            channels = part.channels[units].flatten()
            with torch.no_grad():
                if layout.transposed:
                    layer.weight[channels] = 0
                elif layout.groups == 1:
                    layer.weight[:, channels] = 0
                else:
                    layer.weight[:, (channels % layer.weight.shape[1]).unique()] = 0
        structure.remove({group.name: units})
        torch.testing.assert_close(model(x), silenced(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_units_are_what_must_go_together() -> None:
    def group(name: str, producer: str) -> Any:
        net = NETS[name]
        return {g.name: g for g in structure_of(net, net.model()).groups}[producer]

    def channels(group_found: Any, module: str, side: str) -> list[list[int]]:
        return next(p.channels.tolist() for p in group_found.slices if (p.module, p.side) == (module, side))

    flatten = group("vgg", "features.17")
    assert channels(flatten, "classifier.0", "in")[1] == [4, 5, 6, 7]
    assert channels(group("dense", "first"), "head", "in") == [[6], [7], [8], [9]]
    gated = group("gated", "up")
    assert channels(gated, "up", "out") == [[i, i + 6] for i in range(6)]
    assert channels(gated, "down", "in") == [[i] for i in range(6)]
    norm = group("inverted", "project")
    assert channels(norm, "group_norm", "out") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    grouped = group("grouped", "stem")
    assert channels(grouped, "grouped", "in") == [[i, i + 4] for i in range(4)]
    fused = group("fused", "qkv")
    assert channels(fused, "qkv", "out")[1] == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    attention = group("attention", "0")
    assert channels(attention, "1.self_attn", "out")[1] == [1, 5, 9, 13, 17, 21]
    heads = group("transformer", "layers.0.attention.query")
    assert heads.kind == "heads"
    residual = group("transformer", "embed")
    assert (residual.kind, residual.size) == ("channels", 32)
    assert channels(heads, "layers.0.attention.out", "in") == [list(range(8 * h, 8 * h + 8)) for h in range(4)]


@pytest.mark.parametrize("name", ["residual", "vgg"])
def test_costs_match_torch_pruning(name: str) -> None:
    """Its own count also has biases, norms and activations: of its layers those without are compared."""
    net = NETS[name]
    model = net.model().float()
    structure = TorchPruningStructure(model, net.inputs().float())
    costs = structure.costs("macs")

    def theirs() -> float:
        _, _, by_layer, _ = tp.utils.count_ops_and_params(model, net.inputs().float(), layer_wise=True)
        return sum(flops for layer, flops in by_layer.items() if isinstance(layer, nn.Conv2d))

    def linear() -> int:
        return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))

    full = theirs() + linear()
    assert costs.total() == full
    structure.remove(some_units(structure, 0))
    assert structure.costs("macs").total() - full == theirs() + linear() - full
    assert costs.total(structure.costs("macs").widths) == theirs() + linear()


def test_marginal_costs_match_one_removal() -> None:
    net = NETS["dense"]
    for index in range(3):
        model = net.model()
        structure = structure_of(net, model)
        costs = structure.costs("macs")
        structure.remove({structure.groups[index].name: torch.tensor([1])})
        freed = costs.total() - structure.costs("macs").total()
        assert float(costs.marginal()[index]) == pytest.approx(freed, rel=1e-12)


def test_ignored_layers_and_outputs_are_left_out() -> None:
    net = NETS["residual"]
    model = net.model()
    by_name = structure_of(net, model, ignored_layers=["blocks.0", "stem.0"])
    by_module = structure_of(
        net, model, ignored_layers=[model.get_submodule("blocks.0"), model.get_submodule("stem.0")]
    )
    assert [g.name for g in by_name.groups] == [g.name for g in by_module.groups]
    assert {"stem.0", "blocks.0.conv1"}.isdisjoint(g.name for g in by_name.groups)
    assert "output" in by_name.left_out["head"]


def test_every_returned_tensor_is_an_output() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.first(x)
            return {"features": features, "logits": self.head(F.relu(self.hidden(features.relu())))}

    structure = TorchPruningStructure(TwoOutputs(), torch.zeros(1, 4))
    assert [group.name for group in structure.groups] == ["hidden"]
    assert set(structure.left_out) == {"first", "head"}


def test_what_tracing_misses_is_found_by_running() -> None:
    class AddsInput(nn.Module):
        """Torch-Pruning follows gradients: it does not see that ``same`` must stay as wide as the input."""

        def __init__(self) -> None:
            super().__init__()
            self.same, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(x + self.same(x))))

    structure = TorchPruningStructure(AddsInput(), torch.zeros(1, 4))
    assert [group.name for group in structure.groups] == ["hidden"]
    assert "does not run" in structure.left_out["same"]


@pytest.mark.slow
def test_whole_heads_of_attention_are_found_without_num_heads() -> None:
    structure = TorchPruningStructure(demo_models.Transformer(), torch.zeros(1, 1, 8, 8))
    groups = {group.name: group for group in structure.groups}
    for index in range(3):
        query = groups[f"layers.{index}.attention.query"]
        assert [part.module.rpartition(".")[2] for part in query.slices] == ["query", "key", "value", "out"]
        assert all(torch.equal(part.channels, torch.arange(32).view(4, 8)) for part in query.slices)


def test_flags_of_the_model_are_kept() -> None:
    net = NETS["residual"]
    model = net.model().train()
    model.stem[1].eval()
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    structure = structure_of(net, model)
    structure.remove(some_units(structure, 0))
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "stem.0.weight",
        "stem.1.weight",
        "stem.1.bias",
    }


def test_bad_arguments_are_named() -> None:
    net = NETS["transformer"]
    model, x = net.model(), net.inputs()
    with pytest.raises(ValueError, match=r"no layer is named 'layers\.9'"):
        TorchPruningStructure(model, x, ignored_layers=["layers.9"])
    with pytest.raises(ValueError, match="the model has no such Linear"):
        TorchPruningStructure(model, x, ignored_layers=[nn.Linear(2, 2)])
    names = [f"layers.0.attention.{projection}" for projection in ("query", "key", "value")]
    with pytest.raises(ValueError, match="5 heads don't divide the 32 channels"):
        TorchPruningStructure(model, x, num_heads=dict.fromkeys(names, 5))
    with pytest.raises(ValueError, match="no parameter 'nowhere'"):
        TorchPruningStructure(model, x, unwrapped_parameters={"nowhere": 0})
    with pytest.raises(PlanError, match="compiled"):
        TorchPruningStructure(torch.compile(model), x)


def test_bad_removals_are_refused() -> None:
    net = NETS["vgg"]
    structure = structure_of(net, net.model())
    with pytest.raises(KeyError, match="no group is named 'nothing'"):
        structure.remove({"nothing": torch.tensor([0])})
    with pytest.raises(IndexError, match="units 0 to 15"):
        structure.remove({"features.0": torch.tensor([16])})
    with pytest.raises(ValueError, match="at least 1 must stay"):
        structure.remove({"features.0": torch.arange(16)})
    with pytest.raises(ValueError, match="unit must be 'macs' or 'parameters', got 'bytes'"):
        structure.costs("bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["parameter", "buffer", "shared"])
def test_tensors_that_nothing_wrote_to_stop_no_group(where: str) -> None:
    """A parameter made by torch.empty may hold NaN, and NaN stays NaN: nothing was trained."""
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    unused = torch.full((5,), torch.nan, dtype=torch.float64)
    if where == "buffer":
        model.register_buffer("unused", unused)
    else:
        model.unused = nn.Parameter(unused)
    if where == "shared":
        model[1].other = model.unused
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, torch.randn(3, 4, dtype=torch.float64))
    assert [group.name for group in structure.groups] == ["0", "2"]
    structure.remove({"0": torch.tensor([1]), "2": torch.tensor([0, 3])})
    structure.plan.verify(original.state_dict(), model)
    applied = structure.plan.apply(original)
    assert torch.equal(applied[2].weight, model[2].weight)


def test_another_value_beside_nan_is_seen() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    model.unused = nn.Parameter(torch.tensor([torch.nan, 1.0], dtype=torch.float64))
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, torch.randn(3, 4, dtype=torch.float64))
    structure.remove({"0": torch.tensor([1])})
    model.unused.data[1] = 2.0
    with pytest.raises(PlanError, match=r"unused: .* other values"):
        structure.plan.verify(original.state_dict(), model)
