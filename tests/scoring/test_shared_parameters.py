"""Modules that share parameters: their uses of a parameter add up before the square, whatever else they share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity import error
from torch import Tensor, nn

import obc

WIDTH = 6


class Sharing(nn.Module):
    """Two layers and two norms; ``share`` makes some of their parameters one."""

    def __init__(self, share: Callable[[Sharing], None], norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before, self.after = norm(WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        share(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(self.before(x)))
        x = x + torch.tanh(self.second(self.after(x)))
        output: Tensor = self.head(x)
        return output


def norms(model: Sharing) -> None:
    model.after.weight, model.after.bias = model.before.weight, model.before.bias


def norm_weights(model: Sharing) -> None:
    model.after.weight = model.before.weight


def norm_biases(model: Sharing) -> None:
    model.after.bias = model.before.bias


def layers(model: Sharing) -> None:
    model.second.weight, model.second.bias = model.first.weight, model.first.bias


def layer_biases(model: Sharing) -> None:
    model.second.bias = model.first.bias


def everything(model: Sharing) -> None:
    norms(model)
    layers(model)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def losses_of(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch).square().mean(-1)
    return losses


def expected(
    model: Sharing, batches: list[Tensor], loss_fn: Callable[[nn.Module, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Per module the scores of its out channels, from gradients of each module's own use of its parameters."""
    totals = {name: torch.zeros(len(module.weight)) for name, module in model.named_children()}
    for batch in batches:
        for loss_index in range(len(batch) if loss_fn is losses_of else 1):
            grads = own_gradients(model, batch, loss_fn, loss_index)
            rows = {
                name: sum(
                    ((p.detach() * g).flatten(1).sum(1) if p.dim() > 1 else p.detach() * g)
                    for p, g in zip(module.parameters(), grads[name], strict=True)
                )
                for name, module in model.named_children()
            }
            for name, module in model.named_children():
                # The same weight is one group of parameters: all its uses count.
                users = [other for other, one in model.named_children() if one.weight is module.weight]
                totals[name] += sum(rows[other] for other in users).square()  # type: ignore[union-attr, operator]
    return totals


def own_gradients(
    model: Sharing, batch: Tensor, loss_fn: Callable[[nn.Module, Tensor], Tensor], index: int
) -> dict[str, tuple[Tensor, ...]]:
    """The gradient of every module's parameters through this module alone: each use reads a leaf of its own."""
    leaves = {
        f"{name}.{key}": parameter.detach().clone().requires_grad_()
        for name, module in model.named_children()
        for key, parameter in module.named_parameters()
    }
    output = torch.func.functional_call(model, leaves, (batch,), tie_weights=False)
    loss = output.square().mean() if loss_fn is loss_of else output.square().mean(-1)[index]
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return {
        name: tuple(grads[f"{name}.{key}"] for key, _ in module.named_parameters())
        for name, module in model.named_children()
    }


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize(
    ("share", "norm"),
    [
        (norms, nn.LayerNorm),
        (norm_weights, nn.LayerNorm),
        (norm_weights, nn.RMSNorm),
        (norm_biases, nn.LayerNorm),
        (layers, nn.LayerNorm),
        (layer_biases, nn.LayerNorm),
        (everything, nn.LayerNorm),
    ],
    ids=lambda one: one.__name__,
)
def test_scores_add_up_the_uses_of_each_weight(
    share: Callable[[Sharing], None], norm: type[nn.Module], rows: str
) -> None:
    torch.manual_seed(0)
    model = Sharing(share, norm)
    batches = [torch.randn(3, WIDTH) for _ in range(3)]
    loss_fn = loss_of if rows == "batch" else losses_of
    scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)  # type: ignore[arg-type]
    for name, total in expected(model, batches, loss_fn).items():
        assert error(scores[name].out_channels, total) <= 1e-4, name
    assert all(coverage.scored for coverage in scores.coverage.values())


def test_a_gate_that_no_gradient_can_check_says_so() -> None:
    """The gradient of a bias that two layers share does not tell the contribution of each use."""
    scores = obc.score(Sharing(layer_biases), [torch.randn(3, WIDTH)], loss_of, progress=False)
    assert scores.coverage["head"].checked
    assert not scores.coverage["first"].checked
    assert not scores.coverage["second"].checked


class OwnNorm(nn.Module):
    """Two vectors, combined with normalised channels by ``combine``."""

    def __init__(self, combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.combine = combine
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x / x.square().mean(-1, keepdim=True).sqrt(), self.weight, self.bias)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_norms_written_by_hand_that_share_a_bias_alone_are_read_by_gates(rows: str) -> None:
    torch.manual_seed(0)
    model = Sharing(norm_biases, lambda width: OwnNorm(lambda x, weight, bias: x * weight + bias))  # type: ignore[arg-type]
    batches = [torch.randn(3, WIDTH) for _ in range(3)]
    loss_fn = loss_of if rows == "batch" else losses_of
    scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)  # type: ignore[arg-type]
    for name, total in expected(model, batches, loss_fn).items():
        assert error(scores[name].out_channels, total) <= 1e-4, name


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize(
    "combine",
    [
        lambda x, weight, bias: x * (1 + weight) + bias,
        lambda x, weight, bias: x + (weight * x).sin().square() / (1 + bias.square()),
        lambda x, weight, bias: x * weight.softmax(0) + bias,
        lambda x, weight, bias: x * weight.sum() + bias,
        lambda x, weight, bias: (x * weight + bias).tanh(),
    ],
    ids=["one more", "snake", "softmax", "sum", "tanh"],
)
def test_what_no_gate_and_no_gradient_can_read_is_named(
    combine: Callable[[Tensor, Tensor, Tensor], Tensor], rows: str
) -> None:
    """y . dL/dy is the row of norms alone, and the gradient of a shared bias does not tell the share of each use."""
    torch.manual_seed(0)
    model = Sharing(norm_biases, lambda width: OwnNorm(combine))  # type: ignore[arg-type]
    batches = [torch.randn(3, WIDTH) for _ in range(3)]
    loss_fn = loss_of if rows == "batch" else losses_of
    scores = obc.score(model, batches, loss_fn, rows=rows, progress=False)  # type: ignore[arg-type]
    assert {name for name, coverage in scores.coverage.items() if not coverage.scored} == {"before", "after"}
    assert "do not scale and shift its output" in str(scores.coverage["after"])
    wanted = expected(model, batches, loss_fn)
    for name in ("first", "second", "head"):
        assert error(scores[name].out_channels, wanted[name]) <= 1e-4, name
