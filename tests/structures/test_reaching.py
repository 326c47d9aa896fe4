"""Layers that the example inputs do not reach: heads of the train mode, branches on data, a layer of one rare batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import class_loss as loss
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.reaching import in_train_mode
from obc.structures.traced import TorchPruningStructure


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def top(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class LinearHead(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        return (self.top(x), self.auxiliary(x.mean((2, 3)))) if self.training else self.top(x)


class ConvHead(Trunk):
    """With everything that is random or keeps statistics in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.auxiliary = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.drop = nn.Dropout(0.4)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        if not self.training:
            return self.top(x)
        self.calls += 1
        y = F.dropout(F.relu(self.norm(self.conv(F.dropout(x, 0.3, self.training)))), 0.5, self.training)
        return {"main": self.top(x), "auxiliary": self.auxiliary(self.drop(y.mean((2, 3))))}


class Shifted(Trunk):
    """The head of the train mode reads the channels in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        return (self.top(x), self.auxiliary(x.flip(1).mean((2, 3)))) if self.training else self.top(x)


class Branch(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.top(y) if x.mean() > 0 else self.head(F.relu(self.other(y)).mean((2, 3)))


class Rare(Trunk):
    """One batch of all has a fourth layer."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(10, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        if x[0, 0, 0, 0] > 5:
            y = F.relu(self.extra(y))
        return self.head(y.mean((2, 3)))


class EarlyExit(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.exit = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.exit(y.mean((2, 3))) if x.mean() < 0 else self.top(y)


MODELS: list[type[Trunk]] = [LinearHead, ConvHead, Shifted, Branch, Rare, EarlyExit]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 6, 6, generator=generator).double() for _ in range(16)]
    images[0] = images[0].abs()  # the example: every branch has another batch
    for image in images:
        image[0, 0, 0, 0] = 0.0
    images[11][0, 0, 0, 0] = 6.0
    return [(image, torch.randint(0, 5, (4,), generator=generator)) for image in images]


def without(model: nn.Module, plan: obc.PruningPlan) -> nn.Module:
    """A copy of the unpruned model whose layers read zeros in place of the channels that the plan dropped."""
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    for name, kept in plan.items():
        layer: Any = modules[name]
        if kept.in_channels is None:
            continue
        size = layer.weight.shape[1]
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        mask = torch.zeros(size, dtype=torch.float64).index_fill(0, kept.in_channels, 1.0).view(shape)
        layer.register_forward_pre_hook(lambda module, args, mask=mask: args[0] * mask)
    return masked


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = model(x)
    return list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2, "compensate": None}], ids=["one step", "two steps"])
def test_every_layer_fits_afterwards_in_train_mode_and_on_every_batch(kind: type[Trunk], options: Any) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    batches, pruned = data(), copy.deepcopy(model)
    result = obc.prune(pruned, batches[0][0], batches, loss, macs=0.6, recalibrate=False, progress=False, **options)
    assert result.report.widths["a"][1] < 12 or result.report.widths["b"][1] < 10
    expected = without(model, result.plan)
    for name, buffer in pruned.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    for training in (False, True):
        for one in (pruned, expected):
            one.train(training)
            for layer in one.modules():
                if isinstance(layer, (nn.Dropout, nn.BatchNorm2d)):
                    layer.eval()
        for image, _ in batches:
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "dropout", lambda x, *args: x)
                for got, wanted in zip(outputs(pruned, image), outputs(expected, image), strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [LinearHead, ConvHead])
def test_what_the_train_mode_adds_is_found_without_batches_and_leaves_no_trace(kind: type[Trunk]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    model.b.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags, numbers = [module.training for module in model.modules()], torch.get_rng_state()
    structure = TorchPruningStructure(model, data()[0][0])
    assert torch.equal(numbers, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    consumers = {part.module for group in structure.groups if group.name == "a" for part in group.consumers}
    assert consumers == {"b", "auxiliary" if kind is LinearHead else "conv"}


class NeedsTargets(Trunk):
    """Its train mode can't be run on the inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.unrelated = nn.Linear(12, 5), nn.Linear(7, 5)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        y = F.relu(self.a(x))
        assert self.auxiliary.weight.shape == (5, 12)  # reading a shape is not using the layer
        if not self.training:
            return self.top(y)
        assert targets is not None
        return F.cross_entropy(self.top(y), targets) + F.cross_entropy(self.auxiliary(y.mean((2, 3))), targets)


class ByFunction(Trunk):
    """A layer is never called, but its weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(10, 10)

    def top(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(x)).mean((2, 3))
        return self.head(F.linear(y, self.between.weight, self.between.bias))


class Plain(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.top(F.relu(self.a(x)))


class FunctionPlain(ByFunction, Plain):
    pass


def test_layers_that_no_run_reaches_are_named_where_they_may_read_what_was_pruned() -> None:
    torch.manual_seed(0)
    batches = data()
    model = NeedsTargets().double()
    result = obc.prune(model, batches[0][0], batches, loss, macs=0.6, steps=1, progress=False)
    warned = [warning for warning in result.report.warnings if "auxiliary" in warning]
    assert len(warned) == 1
    assert "unrelated" not in warned[0]
    with pytest.raises(RuntimeError):
        model.train()(*batches[0])
    kept = NeedsTargets().double()
    result = obc.prune(kept, batches[0][0], batches, loss, macs=0.8, steps=1, ignored_layers=["a"], progress=False)
    assert not [warning for warning in result.report.warnings if "auxiliary" in warning]
    kept.train()(*batches[0])


def test_a_layer_whose_weight_is_used_by_a_function_is_not_looked_for() -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    structure = TorchPruningStructure(
        FunctionPlain().double(), data()[0][0], other_runs=[made.append, made.append], check=False
    )
    assert not structure.unreached
    assert not structure.more_runs
    assert not made


class RandomAttention(Trunk):
    """Attention of its own that drops in train mode, before a head of the train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.auxiliary = nn.Linear(12, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        q, k, v = self.qkv(y.flatten(2).mT).chunk(3, -1)
        z = F.scaled_dot_product_attention(q, k, v, None, 0.5 if self.training else 0.0)
        z = z + F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return (self.top(y), self.auxiliary(z.mean(1))) if self.training else self.top(y)


def test_attention_drops_nothing_in_train_mode() -> None:
    torch.manual_seed(0)
    model, x = RandomAttention().double(), data()[0][0]
    run = in_train_mode(lambda one: one(x))
    first, second = run(model), run(model)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(model.train()(x)[1], first[1])


class Measured(Rare):
    """Notes how many samples it gets with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.samples.append(len(x))
        return super().forward(x)


class OwnNorm(nn.BatchNorm2d):
    """In train mode, its statistics would change what a later run in eval mode returns."""


class Averages(Trunk):
    """Averages its outputs in train mode, with their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = OwnNorm(12), nn.Linear(12, 5)
        self.register_buffer("replaced", torch.zeros(5))
        self.register_buffer("in_place", torch.zeros(5))
        self.replaced: Tensor
        self.in_place: Tensor

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.norm(self.a(x)))
        if not self.training:
            return self.top(y)
        found = self.top(y), self.auxiliary(y.mean((2, 3)))
        self.replaced = 0.9 * self.replaced + 0.1 * found[0].mean(0)
        self.in_place.mul_(0.9).add_(0.1 * found[1].mean(0))
        return found


def test_buffers_that_the_train_mode_writes_with_a_graph_are_restored_without_one() -> None:
    torch.manual_seed(0)
    model = Averages().double().eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    structure = TorchPruningStructure(model, data()[0][0])
    assert "auxiliary" in {part.module for group in structure.groups for part in group.consumers}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert not buffer.requires_grad, name
    result = obc.prune(model, data()[0][0], data(), loss, macs=0.6, steps=1, progress=False)
    assert result.report.widths["a"][1] < 12
    assert not result.report.unproved
    assert model.auxiliary.in_features == result.report.widths["a"][1]


class Views(Trunk):
    """Buffers that are views: flattened, expanded, and parts of one that the train mode changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 5)
        both = torch.zeros(2, 5)
        for name, buffer in {
            "flat": torch.arange(4).view(2, 2).flatten(),
            "transposed": torch.ones(5, 3).T,
            "expanded": torch.ones(1, 1).expand(1, 5),
            "part": both[0],
            "both": both,
            "sparse": torch.eye(5).to_sparse(),
        }.items():
            self.register_buffer(name, buffer)
        self.part: Tensor
        self.expanded: Tensor

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        if not self.training:
            return self.top(x) * self.expanded
        found = self.top(x) * self.expanded, self.auxiliary(x.mean((2, 3)))
        self.part.add_(found[1].mean(0))
        return found


def test_buffers_that_are_views_are_restored_too() -> None:
    torch.manual_seed(0)
    model = Views().double().eval()
    model.both, model.part = (both := torch.zeros(2, 5, dtype=torch.float64)), both[0]
    model.flat, model.expanded = torch.arange(4).view(2, 2).flatten(), torch.ones(1, 1).double().expand(1, 5)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = obc.prune(model, data()[0][0], data(), loss, macs=0.6, steps=1, progress=False)
    assert result.report.widths["a"][1] < 12
    assert model.auxiliary.in_features == result.report.widths["a"][1]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.to_dense(), before[name].to_dense()), name
        assert not buffer.requires_grad, name


UNUSUAL = {
    "sparse": torch.eye(5, dtype=torch.float64).to_sparse(),
    "sparse rows": torch.eye(5, dtype=torch.float64).to_sparse_csr(),
    "sparse vector": torch.ones(5, dtype=torch.float64).to_sparse(),
    "expanded vector": torch.ones(1, dtype=torch.float64).expand(5),
    "expanded": torch.ones(1, 5, dtype=torch.float64).expand(3, 5),
}


class Unusual(Trunk):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("unusual", buffer)
        self.unusual: Tensor

    def forward(self, x: Tensor) -> Any:
        return self.top(F.relu(self.a(x))) * self.unusual.to_dense().sum()


@pytest.mark.parametrize("kind", UNUSUAL)
def test_sparse_and_expanded_buffers_hinder_neither_proof_nor_restoring(kind: str) -> None:
    """Before, the model was pruned without a proof, and an error after the first step became one of the restoring."""
    torch.manual_seed(0)
    model = Unusual(UNUSUAL[kind].clone() if "sparse" in kind else UNUSUAL[kind]).double().eval()
    before = {name: tensor.to_dense().clone() for name, tensor in model.state_dict().items()}

    def stop(result: obc.PruningResult) -> None:
        raise InterruptedError("after the first step")

    with pytest.raises(InterruptedError, match="after the first step"):
        obc.prune(model, data()[0][0], data(), loss, macs=0.6, steps=1, progress=False, on_step=stop)
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to_dense(), before[name]), name
    report = obc.prune(model, data()[0][0], data(), loss, macs=0.6, steps=1, progress=False).report
    assert report.unproved == {}
    assert report.proof is not None
    assert report.proof.proved == ["a", "b"]


def test_other_batches_are_traced_in_parts_as_large_as_micro_batch() -> None:
    torch.manual_seed(0)
    model, batches = Measured().double(), data()
    result = obc.prune(
        model, batches[0][0][:1], batches, loss, macs=0.6, steps=1, micro_batch=2, recalibrate=False, progress=False
    )
    assert result.report.widths["b"][1] < 10
    assert model.extra.weight.shape[1] == result.report.widths["b"][1]
    assert set(model.samples) == {1, 2}


def test_other_runs_are_made_only_as_long_as_layers_are_missing() -> None:
    torch.manual_seed(0)
    made: list[int] = []

    def run(number: int) -> Callable[[nn.Module], Any]:
        def call(model: nn.Module) -> Any:
            made.append(number)
            return model(data()[number][0])

        return call

    every = TorchPruningStructure(Plain().double(), data()[0][0], other_runs=map(run, range(16)))
    assert not every.more_runs
    assert not made
    found = TorchPruningStructure(Branch().double(), data()[0][0], other_runs=map(run, range(16)), check=False)
    assert len(found.more_runs) == 1
    assert max(made) < 15


class Repeated(Trunk):
    """Its forward differentiates something itself, if it is asked to."""

    def __init__(self, differentiates: bool = False) -> None:
        super().__init__()
        self.auxiliary, self.differentiates = nn.Linear(12, 5), differentiates

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        if self.differentiates and torch.is_grad_enabled():
            y = x.detach().requires_grad_()
            x = x + torch.autograd.grad((y**3).sum(), y)[0] / 100
        elif self.differentiates:
            x = x + 3 * x**2 / 100
        return (self.top(x), self.auxiliary(x.mean((2, 3)))) if self.training else self.top(x)


def saved(structure: TorchPruningStructure) -> list[Tensor]:
    """The tensors that the graph's nodes keep for a backward pass."""
    functions = [node.grad_fn for node in structure._graph._graph.module2node.values()]
    keys = [(function, key) for function in functions for key in dir(function) if key.startswith("_saved_")]
    return [value for function, key in keys if isinstance(value := getattr(function, key), Tensor)]


@pytest.mark.parametrize("build", [Repeated, lambda: Repeated(True), ConvHead])
def test_a_traced_structure_keeps_no_activations_of_any_run(build: Callable[[], Any]) -> None:
    model = build().eval()
    structure = TorchPruningStructure(model, torch.randn(2, 3, 8, 8))
    assert len(structure.more_runs) == 1
    assert "a" in {group.name for group in structure.groups}
    kept = {tensor.device.type for tensor in saved(structure)}
    # A model that differentiates something itself needs its graph.
    assert kept == {"cpu"} if getattr(model, "differentiates", False) else kept == {"meta"}
