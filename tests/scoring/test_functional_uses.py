"""Layers whose weights functions use, with or without calling the layers: scored right, or named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import obc

IN, WIDTH, OUT, TOKENS = 6, 8, 12, 20


class Net(nn.Module):
    """``used`` says what reads the layer in the middle: a call, a function, or both."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor] | None, called: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(IN, WIDTH), nn.Linear(WIDTH, OUT), nn.Linear(OUT, 4)
        self.function, self.called = function, called

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        y = self.middle(x) if self.called else torch.zeros(())
        if self.function is not None:
            y = y + self.function(x.sin(), self.middle)
        output: Tensor = self.last(y.tanh())
        return output


class Images(nn.Module):
    def __init__(self, called: bool) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, OUT, 3, padding=1)
        self.last, self.called = nn.Linear(OUT, 4), called

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.view(-1, 3, 4, 4)).tanh()
        y = F.conv2d(x, self.middle.weight, self.middle.bias, stride=2, padding=1).mean((2, 3))
        y = y + self.middle(x).mean((2, 3)) if self.called else y
        output: Tensor = self.last(y.tanh())
        return output


class Tied(nn.Module):
    """A small language model whose head is a function of the embedding's weight."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, OUT), nn.Linear(OUT, WIDTH)
        self.norm, self.called = nn.LayerNorm(WIDTH), called

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) if self.called else F.embedding(tokens, self.table.weight)
        x = x + self.down(self.up(x).tanh())
        return F.linear(self.norm(x), self.table.weight)


class Merged(Net):
    """LoRA, merged in every forward."""

    def __init__(self) -> None:
        super().__init__(self.merged)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, OUT, bias=False)

    def merged(self, x: Tensor, layer: Any) -> Tensor:
        return F.linear(x, layer.weight + self.b.weight @ self.a.weight, layer.bias)


class Twins(Net):
    """Two layers with one bias."""

    def __init__(self, function: Any) -> None:
        super().__init__(self.both, called=False)
        self.twin, self.more = nn.Linear(WIDTH, OUT), function
        self.twin.bias = self.middle.bias

    def both(self, x: Tensor, layer: Any) -> Tensor:
        y: Tensor = self.middle(x) + self.twin(x.sin())
        return y if self.more is None else y + self.more(x.cos(), layer)


def linear(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def other_bias(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight, layer.bias * torch.linspace(0, 2, OUT))


def product(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.t() + layer.bias


def half(x: Tensor, layer: Any) -> Tensor:
    return F.pad(F.linear(x, layer.weight[: OUT // 2]), (0, OUT // 2))


FUNCTIONS = [linear, other_bias, product, half]
KINDS: dict[str, Callable[[], nn.Module]] = {
    **{f"{one.__name__}, {called=}": (lambda one=one, called=called: Net(one, called))  # type: ignore[misc]
       for one in FUNCTIONS for called in (False, True)},
    "convolution": lambda: Images(False),
    "convolution, called": lambda: Images(True),
    "tied": lambda: Tied(True),
    "tied, never called": lambda: Tied(False),
    "merged": Merged,
}  # fmt: skip


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


def masked(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "masked": masked,
}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return losses_of(model, batch).mean()


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(inputs), -1).mean(1)


def batches_for(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    if isinstance(model, Tied):
        return [(torch.randint(TOKENS, (3, 7)), torch.randint(TOKENS, (3, 7))) for _ in range(3)]
    size = 48 if isinstance(model, Images) else IN
    return [(torch.randn(4, size), torch.randint(4, (4,))) for _ in range(3)]


def explicit(model: nn.Module, batches: Sequence[Any], rows: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> scores of out and in channels, of weights' gradients in float64."""
    model = copy.deepcopy(model).double()
    layers = {name: one for name, one in model.named_modules() if isinstance(getattr(one, "weight", None), Tensor)}
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for inputs, targets in batches:
        losses = losses_of(model, (inputs.double() if inputs.is_floating_point() else inputs, targets))
        for loss in losses if rows == "sample" else [losses.mean()]:
            for name, layer in layers.items():
                values = [value for value in (layer.weight, getattr(layer, "bias", None)) if value is not None]
                grads = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
                changes = [
                    torch.zeros_like(value) if grad is None else (value * grad).detach()
                    for value, grad in zip(values, grads, strict=True)
                ]
                over = 0 if isinstance(layer, nn.Embedding) else 1
                changes[0] = changes[0] if changes[0].dim() > 1 else changes[0][:, None]
                out = changes[0].transpose(0, 1 - over).flatten(1).sum(1) + (changes[1] if len(changes) > 1 else 0)
                into = changes[0].transpose(0, over).flatten(1).sum(1)
                before = total.get(name, (torch.zeros(()), torch.zeros(())))
                total[name] = (before[0] + out.square(), before[1] + into.square())
    return total


def assert_scores(scores: Any, truth: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert set(truth) == set(scores)
    for name, (out, into) in truth.items():
        assert error(scores[name].out_channels, out) <= 1e-4, (name, scores.coverage[name])
        if scores[name].in_channels is not None:
            assert error(scores[name].in_channels, into) <= 1e-4, (name, scores.coverage[name])


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_weight_that_functions_use(kind: str, rows: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    batches = batches_for(model)
    scores = obc.score(model, batches, loss_of if rows == "batch" else losses_of, rows=rows, progress=False)  # type: ignore[arg-type]
    assert_scores(scores, explicit(model, batches, rows))


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_own_loop_reads_such_weights_from_their_gradient(kind: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    batches = batches_for(model)
    scorer = obc.JacobianScorer(model)
    with scorer:
        for batch in batches:
            with scorer.row():
                loss_of(model, batch).backward()
    scores = scorer.scores()
    assert_scores(scores, explicit(model, batches, "batch"))
    assert [how for how in scores.coverage.values() if how.startswith("weight gradient")]


class ByTurns(Net):
    """A function uses the weight in some batches only, or in batches of several samples."""

    def __init__(self, uses: Callable[[Tensor], bool]) -> None:
        super().__init__(None, called=True)
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        self.function = linear if self.uses(x) else None
        return super().forward(x)


@pytest.mark.parametrize("uses", [lambda x: len(x) > 1, lambda x: bool(x[0, 0] > 0)], ids=["batches", "some batches"])
def test_a_use_after_the_check_is_read(uses: Any) -> None:
    torch.manual_seed(0)
    model = ByTurns(uses).eval()
    batches = batches_for(model)
    assert len({uses(x) for x, _ in [*batches, (batches[0][0][:1], None)]}) == 2
    scores = obc.score(model, batches, loss_of, progress=False)
    assert_scores(scores, explicit(model, batches, "batch"))


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize(
    "use",
    [(None, True), (linear, False), (linear, True), (product, True)],
    ids=["call", "function", "call and function", "call and product"],
)
@pytest.mark.parametrize("kind", list(COMPUTED))
def test_a_computed_weight_that_functions_use(kind: str, use: Any, rows: str) -> None:
    """The same scores as of a plain layer with the weight that is computed."""
    torch.manual_seed(0)
    plain = Net(*use).eval()
    model = copy.deepcopy(plain)
    COMPUTED[kind](model.middle)
    with torch.no_grad():
        plain.middle.weight.copy_(model.middle.weight)
    batches = batches_for(model)
    loss_fn: Any = loss_of if rows == "batch" else losses_of
    computed = model.middle.weight
    scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)  # type: ignore[arg-type]
    for name, (out, into) in explicit(plain, batches, rows).items():
        assert error(scores[name].out_channels, out) <= 1e-4, (name, scores.coverage[name])
        assert error(scores[name].in_channels, into) <= 1e-4, (name, scores.coverage[name])
    assert scores.coverage["middle"].checked
    if not use[1]:  # calls compute it anew
        assert torch.equal(model.middle.weight, computed)
        assert model.middle.weight.requires_grad
        assert not model.middle.weight.is_leaf


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_shared_bias_hides_no_use(rows: str) -> None:
    """Weight gradients can't replace gates where layers share a bias alone, but they show what gates don't see."""
    torch.manual_seed(0)
    loss_fn: Any = loss_of if rows == "batch" else losses_of
    functions: list[tuple[Any, bool]] = [
        (None, True),
        (lambda x, layer: F.linear(x, layer.weight), True),
        (lambda x, layer: torch.einsum("bi,oi->bo", x, layer.weight), False),
    ]
    for function, scored in functions:
        model = Twins(function).eval()
        batches = batches_for(model)
        scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)  # type: ignore[arg-type]
        assert scores.coverage["middle"].scored == scored
        assert ("middle" in scores) == scored
        assert scores.coverage["twin"].scored
        if scored:
            assert error(scores["middle"].in_channels, explicit(model, batches, rows)["middle"][1]) <= 1e-4
        else:
            assert "gate and weight gradient differ" in scores.coverage["middle"]
            assert "others share its bias" in scores.coverage["middle"]
