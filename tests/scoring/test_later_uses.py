"""Functions that get a layer's weight for the first time long after the first rows: nothing is missed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_functional_uses import assert_scores
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import obc
from obc.scoring.errors import RowError

IN, WIDTH, OUT, ROWS, LATE = 6, 8, 12, 8, 5


class Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


# What is added to the model's result in late rows; ``net.middle(x)`` is called in all.
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda net, x: F.linear(x, net.middle.weight, net.middle.bias),
    "without bias": lambda net, x: F.linear(x, net.middle.weight),
    "product": lambda net, x: x @ net.middle.weight.t(),
    "einsum": lambda net, x: torch.einsum("bi,oi->bo", x, net.middle.weight),
    "half": lambda net, x: F.pad(F.linear(x, net.middle.weight[: OUT // 2]), (0, OUT // 2)),
    "cast": lambda net, x: F.linear(x, net.middle.weight.to(x.dtype).clone(), net.middle.bias),
    "merged": lambda net, x: F.linear(x, net.middle.weight + net.other.weight * 0.5),
    "bias alone": lambda net, x: x.mean(-1, keepdim=True) * net.middle.bias,
    "penalty": lambda net, x: net.middle.weight.square().sum().expand(len(x), OUT) * 0.1,
    "checkpoint": lambda net, x: checkpoint(lambda x: F.linear(x, net.middle.weight), x, use_reentrant=False),
    "reentrant": lambda net, x: checkpoint(lambda x: F.linear(x, net.middle.weight), x, use_reentrant=True),
    "autograd function": lambda net, x: Multiplied.apply(x, net.middle.weight),
    "detached": lambda net, x: F.linear(x, net.middle.weight.detach()),
    "decoder": lambda net, x: F.linear(F.linear(x, net.middle.weight).tanh(), net.middle.weight.t()) @ net.to_out,
}  # fmt: skip
# Where the late use shows.
LATER: dict[str, Callable[[Any, Tensor], bool]] = {
    "step": lambda net, x: net.step > LATE,
    "size": lambda net, x: len(x) > 4,
    "content": lambda net, x: bool(x[0, 0] > 5),
}


class Net(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor], later: Callable[[Any, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(IN, WIDTH), nn.Linear(WIDTH, OUT), nn.Linear(OUT, 4)
        self.other = nn.Linear(WIDTH, OUT)
        self.register_buffer("to_out", torch.randn(WIDTH, OUT))
        self.use, self.later, self.step = use, later, 0

    def forward(self, x: Tensor) -> Tensor:
        later = self.later(self, x)
        x = self.first(x).tanh()
        y = self.middle(x) + self.other(x)
        y = y + self.use(self, x.sin()) if later else y
        output: Tensor = self.last(y.tanh())
        return output


class Experts(nn.Module):
    """An expert that a function computes, and that one batch alone is routed to."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.use = nn.Linear(IN, WIDTH), use
        self.middle, self.other, self.last = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT), nn.Linear(OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        rare = (x[:, :1] > 5).float()
        x = self.first(x).tanh()
        y = self.other(x)
        if bool(rare.any()):
            y = y * (1 - rare) + self.use(self, x) * rare
        output: Tensor = self.last(y.tanh())
        return output


class Images(Net):
    """Convolutions."""

    def __init__(self) -> None:
        super().__init__(lambda net, x: F.conv2d(x, net.middle.weight, stride=2, padding=1), LATER["content"])
        self.first, self.middle = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, OUT, 3, padding=1)
        del self.other

    def forward(self, x: Tensor) -> Tensor:
        later = self.later(self, x)
        x = self.first(x[:, :, None, None].repeat(1, 1, 4, 4)[:, :3]).tanh()
        y = self.middle(x).mean((2, 3))
        y = y + self.use(self, x).mean((2, 3)) if later else y
        output: Tensor = self.last(y.tanh())
        return output


class Tied(nn.Module):
    """A model whose head reads the embedding's weight from some row on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.last = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        later = bool(x[0, 0] > 5)
        x = self.table((x.abs() * 3).long().clamp(0, 19)).mean(1)
        y = F.linear(self.middle(x).tanh(), self.table.weight) if later else x.sum(-1, keepdim=True).expand(-1, 20)
        output: Tensor = self.last(y.tanh())
        return output


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"{name} by {where}": (lambda use=use, later=later: Net(use, later))  # type: ignore[misc]
       for name, use in USES.items() for where, later in LATER.items()
       if name in ("linear", "einsum") or where == "content"},
    "expert": lambda: Experts(USES["linear"]),
    "expert by einsum": lambda: Experts(USES["einsum"]),
    "convolution": Images,
    "tied": Tied,
}  # fmt: skip


def masked(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


def batches_for() -> list[tuple[Tensor, Tensor]]:
    batches = [(torch.randn(7 if row > LATE else 4, IN), torch.randint(4, (7 if row > LATE else 4,)))
               for row in range(ROWS)]  # fmt: skip
    for x, _ in batches[LATE + 1 :]:
        x[:, 0] = 6.0
    return batches


def losses_of(model: Any, batch: Any) -> Tensor:
    model.step = batch[2] if len(batch) > 2 else 0
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss_of(model: Any, batch: Any) -> Tensor:
    return losses_of(model, batch).mean()


def numbered(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, int]]:
    return [(*batch, row) for row, batch in enumerate(batches)]


def explicit(model: nn.Module, batches: list[Any], rows: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> scores of out and in channels, from its parameters' gradients in float64."""
    model = copy.deepcopy(model).double()
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for x, targets, row in batches:
        losses = losses_of(model, (x.double(), targets, row))
        for loss in losses if rows == "sample" else [losses.mean()]:
            for name, layer in model.named_children():
                values = list(layer.parameters())
                model.zero_grad()
                loss.backward(retain_graph=True)  # reentrant checkpoints can't run in autograd.grad
                grads = [value.grad for value in values]
                changes = [
                    torch.zeros_like(value) if grad is None else (value * grad).detach()
                    for value, grad in zip(values, grads, strict=True)
                ]
                rows_of, columns = changes[0].flatten(2).sum(2) if changes[0].dim() > 2 else changes[0], 1
                out = rows_of.sum(1) + (changes[1] if len(changes) > 1 else 0)
                into = rows_of.sum(1 - columns)
                out, into = (into, out) if isinstance(layer, nn.Embedding) else (out, into)
                before = total.get(name, (torch.zeros(()), torch.zeros(())))
                total[name] = (before[0] + out.square(), before[1] + into.square())
    return total


# A use that depends on the batch's size has no rows of samples, unless gates read all samples at once.
@pytest.mark.sampled(members=8)
@pytest.mark.parametrize(
    ("kind", "rows"),
    [(kind, rows) for kind in MODELS for rows in ("batch", "sample") if (kind, rows) != ("einsum by size", "sample")],
)
def test_a_use_in_a_late_row_is_read(kind: str, rows: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    batches = numbered(batches_for())
    loss_fn: Any = loss_of if rows == "batch" else losses_of
    scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)
    assert scores.num_rows == (ROWS if rows == "batch" else sum(len(x) for x, *_ in batches))
    assert_scores(scores, explicit(model, batches, rows))


@pytest.mark.parametrize("kind", list(MODELS))
def test_an_own_loop_is_told_to_repeat_the_row(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    batches, said = numbered(batches_for()), list[str]()
    with (scorer := obc.JacobianScorer(model)):
        for batch in batches:
            try:
                with scorer.row():
                    loss_of(model, batch).backward()
            except RowError as found:
                said.append(str(found))
                with scorer.row():
                    loss_of(model, batch).backward()
    assert all("also uses its weight or bias, without calling it" in one for one in said)
    # No gradient reached the expert before, so that no gate reads it; what is detached has none.
    assert len(said) == (not kind.startswith(("expert", "detached")))
    assert_scores(scorer.scores(), explicit(model, batches, "batch"))


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masked": masked,
}


@pytest.mark.parametrize("use", ["linear", "einsum"])
@pytest.mark.parametrize("kind", list(COMPUTED))
def test_a_late_use_of_a_computed_weight_is_read(kind: str, use: str) -> None:
    """The same scores as of a plain layer with the weight that is computed."""
    torch.manual_seed(0)
    plain = Net(USES[use], LATER["content"]).eval()
    model = copy.deepcopy(plain)
    COMPUTED[kind](model.middle)
    model.eval()
    with torch.no_grad():
        plain.middle.weight.copy_(model.middle.weight)
    batches = numbered(batches_for())
    truth = explicit(plain, batches, "batch")
    assert_scores(obc.score(model, batches, loss_of, modules=list(truth), progress=False), truth)


@pytest.mark.parametrize(
    "asks",
    [
        lambda net, x: x.to(net.middle.weight.dtype).to(net.middle.weight.device),
        lambda net, x: x.type_as(net.middle.weight).to(net.middle.weight),
        lambda net, x: x * (net.middle.weight.shape[0] / net.middle.weight.size(0)) + net.middle.weight.new_zeros(()),
        lambda net, x: x + torch.zeros_like(net.middle.weight).sum() if net.middle.weight.requires_grad else x,
    ],
)
def test_questions_about_a_weight_are_no_uses(asks: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.middle(asks(net, x)), LATER["content"]).eval()
    batches = numbered(batches_for())
    scores = obc.score(model, batches, loss_of, progress=False)
    assert scores.coverage["middle"].startswith("gate")
    assert not scores.metadata.get("left_out")
    assert_scores(scores, explicit(model, batches, "batch"))
