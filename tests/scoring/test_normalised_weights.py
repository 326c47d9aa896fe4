"""Layers whose forward normalises their weight: w . dL/dw is zero, so they are scored by the weight that acts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity
from torch import Tensor, nn

import obc

Normalise = Callable[[Tensor], Tensor]


def standardised(weight: Tensor) -> Tensor:
    """Zero mean and unit variance per out channel, as in weight standardisation (arXiv 1903.10520)."""
    dims = tuple(range(1, weight.dim()))
    return (weight - weight.mean(dims, keepdim=True)) / weight.std(dims, keepdim=True)


def scaled(weight: Tensor) -> Tensor:
    """By a batch norm of the weight with an epsilon, as timm's NFNets and BiT do: nearly free of scale."""
    rows = weight.reshape(1, len(weight), -1)
    gain = torch.linspace(0.5, 2, len(weight), dtype=weight.dtype)
    return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


def unit_rows(weight: Tensor) -> Tensor:
    return weight / weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


def unit_columns(weight: Tensor) -> Tensor:
    return F.normalize(weight.transpose(0, 1), dim=tuple(range(1, weight.dim()))).transpose(0, 1)  # type: ignore[arg-type]


class NormalisedConv(nn.Conv2d):
    normalise: Normalise

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalise(self.weight), self.bias)


class NormalisedTransposed(nn.ConvTranspose2d):
    normalise: Normalise

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(x, self.normalise(self.weight), self.bias)


class NormalisedLinear(nn.Linear):
    normalise: Normalise

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalise(self.weight), self.bias)


class BoundedLinear(NormalisedLinear):
    """No layer with the normalised weight computes this."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def network(layer: nn.Module, normalise: Normalise) -> nn.Sequential:
    layer.normalise = normalise  # type: ignore[assignment]
    model: list[nn.Module] = [layer, nn.ReLU(), nn.Flatten()]
    if isinstance(layer, nn.Linear):
        model = [nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), *model]
    return nn.Sequential(*model, nn.LazyLinear(5))


def plain(model: nn.Sequential) -> nn.Sequential:
    """The network in float64 with a plain layer that has the normalised weight."""
    model = copy.deepcopy(model).double()
    for layer in model:
        if hasattr(layer, "normalise"):
            layer.weight = nn.Parameter(layer.normalise(layer.weight).detach())  # type: ignore[operator]
            layer.normalise = lambda weight: weight  # type: ignore[assignment]
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 4, 6, 6), torch.randint(5, (4,))) for _ in range(3)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "normalise"),
    [
        (lambda bias: NormalisedConv(4, 8, 3, bias=bias), standardised),
        (lambda bias: NormalisedConv(4, 8, 3, bias=bias), scaled),
        (lambda bias: NormalisedConv(4, 8, 3, bias=bias), unit_columns),
        (lambda bias: NormalisedConv(4, 8, 3, groups=2, padding=1, padding_mode="circular", bias=bias), unit_rows),
        (lambda bias: NormalisedTransposed(4, 8, 3, bias=bias), unit_columns),
        (lambda bias: NormalisedTransposed(4, 8, 3, bias=bias), unit_rows),
        (lambda bias: NormalisedLinear(24, 8, bias=bias), unit_rows),
        (lambda bias: NormalisedLinear(24, 8, bias=bias), scaled),
    ],
    ids=["standardised", "scaled", "in-channels", "grouped", "transposed", "transposed-in", "linear", "linear-scaled"],
)
def test_they_are_scored_as_a_layer_with_the_normalised_weight(
    layer: Callable[[bool], nn.Module], normalise: Normalise, bias: bool, rows: str
) -> None:
    torch.manual_seed(0)
    model, batches = network(layer(bias), normalise), data()
    model(batches[0][0])
    loss_fn = loss_of if rows == "batch" else losses_of

    scores = obc.score(model, batches, loss_fn, rows=rows)

    assert_parity(scores, oracle.scores(plain(model), batches, loss_fn, rows=rows))


def test_a_weight_normalised_as_a_whole_keeps_its_own_rows() -> None:
    """Without a channel the others grow, which is part of what removing it does."""
    torch.manual_seed(0)
    model, batches = network(NormalisedLinear(24, 8), lambda weight: weight / weight.norm()), data()
    model(batches[0][0])

    scores = obc.score(model, batches, loss_of)

    assert scores.coverage["2"].how == "weight gradient"
    assert_parity(scores, oracle.scores(model, batches, loss_of))


class DetachedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach(), self.bias)


def test_a_weight_without_a_gradient_is_not_taken_for_a_normalised_one() -> None:
    torch.manual_seed(0)
    model, batches = network(DetachedLinear(24, 8), unit_rows), data()
    model(batches[0][0])

    scores = obc.score(model, batches, loss_of)

    assert scores.coverage["2"].how == "weight gradient"
    assert_parity(scores, oracle.scores(model, batches, loss_of))


@pytest.mark.parametrize(
    ("layer", "modules"),
    [(BoundedLinear, None), (NormalisedLinear, {"2": ["out"], "5": ["in"]})],
    ids=["more-than-linear", "one-side"],
)
def test_scores_that_are_rounding_errors_are_named(
    layer: type[NormalisedLinear], modules: dict[str, list[str]] | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, batches = network(layer(24, 8), unit_rows), data()
    model(batches[0][0])

    with caplog.at_level(logging.WARNING, "obc"):
        scores = obc.score(model, batches, loss_of, modules=modules)

    assert scores.coverage["2"].how == "weight gradient"
    assert [one.getMessage() for one in caplog.records] == [
        f"scores of 2 are rounding errors: {scores.coverage['2'].reason}; obc.plain_layers makes a plain layer with "
        "that weight of it"
    ]


@pytest.mark.parametrize("seed", [30, 89, 109, 170])
def test_another_layer_is_not_taken_for_a_normalised_one_by_chance(seed: int) -> None:
    """With these weights one sample, or one batch, has the same sum over both sides' gates, as if tanh were not there:
    a single unit may be active, where tanh is nearly linear, or the sums meet by chance."""
    torch.manual_seed(seed)
    model, batches = network(BoundedLinear(24, 8), unit_rows), data()
    model(batches[0][0])

    assert obc.score(model.eval(), batches, loss_of).coverage["2"].how == "weight gradient"
