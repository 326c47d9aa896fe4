"""Weights that products use and no layer is called for: parameters outside layers, and kernels made of several."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.criteria.rows import read_rows
from obc.criteria.subject import Subject
from obc.model.evaluation import call_on_batch
from obc.model.usable_batches import UsableBatches
from obc.structures.counted_macs import counted_macs
from obc.structures.traced import TorchPruningStructure

DOUBLE = torch.float64


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=DOUBLE) / shape[-1] ** 0.5)


class Heads(nn.Module):
    """Queries, keys, values and outputs as one tensor each, (heads, width, width of a head) and the reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = drawn(4, 8, 3), drawn(4, 8, 3), drawn(4, 8, 3), drawn(4, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,hdk->bhnk", x, one) for one in (self.wq, self.wk, self.wv))
        return torch.einsum("bhnk,hkd->bnd", (q @ k.mT / 3**0.5).softmax(-1) @ v, self.wo)


class HeadsOfLayers(nn.Module):
    """One linear layer for queries, keys and values; every head has an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.wo = nn.Linear(8, 36), drawn(4, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.ask(x).view(*x.shape[:2], 3, -1, 3).unbind(2)
        weights = torch.einsum("bihk,bjhk->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhk,hkd->bid", weights, v, self.wo)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 3), drawn(3, 8, 6), drawn(3, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(torch.einsum("bnd,edf->benf", x, self.up))
        return torch.einsum("benf,efd,bne->bnd", inner, self.down, self.gate(x).softmax(-1))


class Batched(Experts):
    """The same by batched matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        each = F.relu(x.flatten(0, 1).expand(3, -1, -1) @ self.up) @ self.down
        return (each.unflatten(1, x.shape[:2]).movedim(0, -1) * self.gate(x).softmax(-1)[:, :, None]).sum(-1)


class Spline(nn.Module):
    """A layer of a Kolmogorov-Arnold network: a linear part, and radial functions of every input."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.base, self.spline = drawn(outputs, features), drawn(outputs, features, 4)
        self.register_buffer("knots", torch.linspace(-1, 1, 4, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        near = torch.exp(-((x[..., None] - self.knots) ** 2))
        return F.linear(F.silu(x), self.base) + F.linear(near.flatten(-2), self.spline.flatten(1))


class Kernels(nn.Module):
    """A convolution whose kernel is computed from those of two layers that are never called."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.small = nn.Conv2d(width, outputs, 3), nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.wide.weight + F.pad(self.small.weight, [1, 1, 1, 1])
        return F.conv2d(x, kernel, self.wide.bias + self.small.bias, padding=1)


class Masked(nn.Module):
    """A convolution whose kernel is masked, with a mask as large as the kernel."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, outputs, 3)
        self.register_buffer("mask", (torch.rand(outputs, width, 3, 3) > 0.3).to(DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight * self.mask, self.conv.bias, padding=1)


class Mixed(nn.Module):
    """A convolution whose kernel is another mix of stacked kernels for every sample."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.kernels, self.mix = drawn(3, outputs, width, 3, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mix(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("bk,koihw->boihw", weights, self.kernels).flatten(0, 1)
        return F.conv2d(x.flatten(0, 1)[None], kernels, padding=1, groups=len(x))[0].unflatten(0, (len(x), -1))


class Chosen(Mixed):
    """The kernels of layers, mixed for the whole batch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        del self.kernels
        self.convs = nn.ModuleList(nn.Conv2d(width, outputs, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mix(x.mean((0, 2, 3))).sigmoid()
        return F.conv2d(x, sum(one * conv.weight for one, conv in zip(weights, self.convs, strict=True)), padding=1)  # type: ignore[arg-type]


class Plain(nn.Module):
    """Matrices and biases, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2, self.w3 = drawn(5, 8), drawn(8), drawn(6, 8), drawn(6), drawn(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.addmm(self.b2, F.relu(x @ self.w1 + self.b1), self.w2.t())) @ self.w3


class Part(nn.Module):
    """Some rows of a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight[:6])


class Between(nn.Module):
    """A residual branch between linear layers."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(5, 8), branch, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.branch(x))


def images(kind: Callable[[int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        kind(3, 8), nn.ReLU(), kind(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


# The model, the shape of an input, and the units of its groups by name.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Mapping[str, int]]] = {
    "einsum heads": (lambda: Between(Heads()), (5, 5), {"stem": 8, "branch.wq": 4}),
    "heads of a layer": (lambda: Between(HeadsOfLayers()), (5, 5), {"stem": 8, "branch.ask": 4}),
    "experts": (lambda: Between(Experts()), (5, 5), {"stem": 8, "branch.up": 6}),
    "batched experts": (lambda: Between(Batched()), (5, 5), {"stem": 8, "branch.up": 6}),
    "splines": (lambda: nn.Sequential(Spline(5, 8), Spline(8, 6), Spline(6, 3)), (5,), {"0.base": 8, "1.base": 6}),
    "sums": (functools.partial(images, Kernels), (3, 5, 5), {"0.wide": 8, "2.wide": 6}),
    "masked": (functools.partial(images, Masked), (3, 5, 5), {"0.conv": 8, "2.conv": 6}),
    "mixed": (functools.partial(images, Mixed), (3, 5, 5), {"0.kernels": 8, "2.kernels": 6}),
    "chosen": (functools.partial(images, Chosen), (3, 5, 5), {"0.convs.0": 8, "2.convs.0": 6}),
    "part": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Part(), nn.Linear(6, 3)), (5,), {"0": 8}),
    "matrices": (Plain, (5,), {"w1": 8, "w2": 6}),
}


def with_zeros(model: nn.Module, plan: obc.PruningPlan) -> nn.Module:
    """The unpruned model, with zeros for what the plan does not keep of any tensor."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    for name, kept in plan.items():
        raw = name in tensors
        parts = {name: tensors[name]} if raw else dict(masked.get_submodule(name).named_parameters(recurse=False))
        for key, tensor in parts.items():
            dims = (kept.dim, kept.in_dim) if raw else (0, 1 if key == "weight" else None)
            for dim, stays in zip(dims, (kept.out_channels, kept.in_channels), strict=True):
                if dim is not None and stays is not None:
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill(0, stays, False)
                    tensor.data.index_fill_(dim, gone.nonzero()[:, 0], 0)
    return masked


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", KINDS)
def test_channels_of_weights_outside_calls_go(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape, units = KINDS[name]
    model, x = make().double(), torch.randn(4, *shape, dtype=DOUBLE)
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    assert {group.name: group.size for group in structure.groups} == units
    costs = structure.costs("macs")
    half = {one: torch.randperm(size)[: size // 2] for one, size in units.items()}
    left = torch.tensor([float(size - size // 2) for size in units.values()], dtype=DOUBLE)
    structure.remove(half)
    if name != "mixed":  # the mix of kernels costs a product of two widths
        expected = sum(counted_macs(model, lambda net: net(x)).values())
        assert float(costs.total(left)) == pytest.approx(expected, rel=1e-9)

    masked = with_zeros(original, structure.plan)
    for inputs in (x, torch.randn(3, *shape, dtype=DOUBLE)):
        torch.testing.assert_close(model(inputs), masked(inputs), rtol=1e-10, atol=1e-12)
    structure.plan.save(tmp_path / "plan.json")
    again = obc.PruningPlan.load(tmp_path / "plan.json").apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


# Group -> the weights that read its channels, with the dimension along which they do.
READING: dict[str, dict[str, list[tuple[str, int]]]] = {
    "einsum heads": {
        "stem": [("head.weight", 1), ("branch.wq", 1), ("branch.wk", 1), ("branch.wv", 1)],
        "branch.wq": [("branch.wo", 0)],
    },
    "heads of a layer": {"stem": [("head.weight", 1), ("branch.ask.weight", 1)], "branch.ask": [("branch.wo", 0)]},
    "experts": {
        "stem": [("head.weight", 1), ("branch.gate.weight", 1), ("branch.up", 1)],
        "branch.up": [("branch.down", 1)],
    },
    "splines": {"0.base": [("1.base", 1), ("1.spline", 1)], "1.base": [("2.base", 1), ("2.spline", 1)]},
    "sums": {"0.wide": [("2.wide.weight", 1), ("2.small.weight", 1)], "2.wide": [("6.weight", 1)]},
    "mixed": {"0.kernels": [("2.kernels", 2), ("2.mix.weight", 1)], "2.kernels": [("6.weight", 1)]},
    "matrices": {"w1": [("w2", 1)], "w2": [("w3", 0)]},
}


def losses_of(model: nn.Module, batch: Tensor) -> Tensor:
    """(samples,) of a batch."""
    return model(batch).flatten(1).square().sum(1)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("name", READING)
def test_rows_are_the_derivative_by_what_reads_the_channels(name: str, rows: Literal["batch", "sample"]) -> None:
    torch.manual_seed(0)
    make, shape, _ = KINDS[name]
    model = make().double().eval()
    batches = [torch.randn(3, *shape, dtype=DOUBLE) for _ in range(2)]
    truth = copy.deepcopy(model)
    losses = [loss for batch in batches for loss in losses_of(truth, batch)]
    if rows == "batch":
        losses = [sum(losses[:3]), sum(losses[3:])]  # type: ignore[list-item]
    parameters, weights = dict(model.named_parameters()), dict(truth.named_parameters())
    flags = {one: parameter.requires_grad_(one != "w2").requires_grad for one, parameter in parameters.items()}
    structure = TorchPruningStructure(model, batches[0], forward_fn=lambda net, x: net(x))
    loss = losses_of if rows == "sample" else (lambda net, batch: losses_of(net, batch).sum())
    subject = Subject(model, structure.groups, UsableBatches(batches), loss, call_on_batch, rows=rows)
    found = read_rows(subject)
    assert flags == {one: parameter.requires_grad for one, parameter in parameters.items()}
    assert all(
        parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in parameters.values()
    )
    for group in structure.groups:
        expected = []
        for one in losses:
            reading = [(weights[key], dim) for key, dim in READING[name][group.name]]
            grads = torch.autograd.grad(one, [weight for weight, _ in reading], retain_graph=True)
            products = [
                (weight * grad).movedim(dim, 0).flatten(1).sum(1)
                for (weight, dim), grad in zip(reading, grads, strict=True)
            ]
            expected.append(torch.stack(products).sum(0))
        actual = group.gate_rows(found.rows)
        assert actual is not None
        torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", READING)
def test_obc_prune_scores_and_removes_them(name: str) -> None:
    torch.manual_seed(0)
    make, shape, units = KINDS[name]
    model, batches = make(), [torch.randn(3, *shape) for _ in range(3)]
    result = obc.prune(
        model.float(), batches[0], batches, lambda net, batch: losses_of(net, batch).mean(), macs=0.7, steps=2
    )
    assert result.report.macs_after <= 0.7 * result.report.macs_before
    assert result.report.left_out.keys().isdisjoint(units)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("criterion", ["l2", "taylor"])
def test_the_report_names_parameters_that_a_criterion_does_not_read(criterion: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 5, 5) for _ in range(2)]
    net = KINDS["einsum heads"][0]().float()
    result = obc.prune(
        net,
        batches[0],
        batches,
        lambda net, batch: losses_of(net, batch).mean(),
        macs=0.8,
        steps=1,
        criterion=criterion,
    )
    said = f"{criterion!r} does not read weights for which no layer is called; 'jacobian' does"
    assert result.report.unscored == {f"branch.{name}": said for name in ("wq", "wk", "wv", "wo")}
    assert result.report.left_out["branch.wq"] == f"the criterion {criterion!r} has nothing to score in it"


def test_collect_names_parameters_without_rows() -> None:
    torch.manual_seed(0)
    net, batches = KINDS["einsum heads"][0]().float(), [torch.randn(3, 5, 5) for _ in range(2)]
    groups = TorchPruningStructure(net, batches[0]).groups
    with pytest.warns(UserWarning, match=r"no rows of 'branch\.wq' \(no layer is called for this weight"):
        found = obc.collect(net, batches, lambda net, x: losses_of(net, x).mean(), statistics="rows", groups=groups)
    unread = {name for name, how in found.coverage["rows"].items() if not how.scored}
    assert unread == {"branch.wq", "branch.wk", "branch.wv", "branch.wo"}
