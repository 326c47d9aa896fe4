"""Frozen quantised linear layers, and layers with adapters beside them: read through their inputs and outputs."""

from __future__ import annotations

import copy
from typing import Any

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Case
from parity import assert_equal, assert_parity, error, expected_scores, score_in_a_loop
from test_scorer_precision import assert_as_good_as_eager, eager_scores
from torch import Tensor, nn

import obc


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, scale): each row's values in 15 steps, two of them in a byte, all bytes in one column."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    steps = ((weight / scale).round() + 8).to(torch.uint8)
    low, high = steps.flatten().view(-1, 2).unbind(1)
    return (low + 16 * high).unsqueeze(1), scale


def values(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight that ``four_bits`` stored."""
    steps = torch.stack([packed % 16, packed // 16], 1).flatten().to(scale.dtype) - 8
    return steps.view(len(scale), -1) * scale


class Product(torch.autograd.Function):
    """x times a dequantised weight, with a gradient for x alone, and the weight made anew for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return x @ values(packed, scale).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        packed, scale = ctx.saved_tensors
        return grads[0] @ values(packed, scale), None, None


class FourBitLinear(nn.Linear):
    """Like bitsandbytes' Linear4bit: a Linear whose weight is a frozen parameter of bytes, of another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        packed, scale = four_bits(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, self.weight, self.scale.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class PackedLinear(nn.Module):
    """Like GPTQ's and AWQ's layers: no Linear, no parameters, the weight in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, scale = four_bits(linear.weight.detach())
        self.register_buffer("qweight", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ values(self.qweight, self.scale.to(x.dtype)).T
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Opaque(nn.Module):
    """Like torch's own quantised layers: the weight is no tensor, and no gradient comes through."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed_params = (linear.weight.detach(), linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, *(part.to(x.dtype) for part in self._packed_params))


class FrozenEight(nn.Linear):
    """Integers whose product has no gradient at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter((linear.weight.detach() * 50).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, self.weight.to(x.dtype) / 50)


class LoRA(nn.Module):
    """Like peft's: a frozen layer, and a low-rank path beside it."""

    def __init__(self, base_layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(self.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, self.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + self.lora_B["default"](self.lora_A["default"](x)) * 0.5


class Block(nn.Module):
    """Two linear layers, the second behind an in-place activation, as both kinds of change meet in practice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True)))


def dequantised(linear: nn.Linear) -> nn.Linear:
    """A plain layer with the values that the quantised one stands for."""
    plain = copy.deepcopy(linear)
    with torch.no_grad():
        plain.weight.copy_(values(*four_bits(linear.weight)))
    return plain


def with_layers(change: Any) -> nn.Module:
    model = models.seeded(Block).eval()
    model.first, model.second = change(model.first), change(model.second)
    return model


def quantised(kind: Any) -> Case:
    return Case(with_layers(kind), models.floats(5, 6), losses, with_layers(dequantised))


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, target = batch
    return models.regression_losses(model(x.to(model.head.weight.dtype)), target)


QUANTISED = [FourBitLinear, PackedLinear]


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_are_scored_as_what_they_stand_for(kind: Any, rows: str) -> None:
    case = quantised(kind)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, keep_rows=True)
    assert_parity(scores, expected_scores(case, rows))
    assert str(scores.coverage["first"]).startswith("gate")
    assert "unchecked" in str(scores.coverage["first"])
    assert "unchecked" not in str(scores.coverage["head"])
    assert not any(how.startswith("unscored") for how in scores.coverage.values())


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_in_an_own_loop(kind: Any) -> None:
    """An in-place change after them is seen in the checking row, so that no later row is dropped."""
    case = quantised(kind)
    scorer = obc.JacobianScorer(case.model)
    assert_parity(score_in_a_loop(scorer, case), expected_scores(case))
    assert "on a copy" in str(scorer.scores().coverage["first"])


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_are_left_as_they_were(kind: Any) -> None:
    case = quantised(kind)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    frozen = [p.requires_grad for p in case.model.parameters()]
    obc.score(case.model, case.batches, case.loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert [p.requires_grad for p in case.model.parameters()] == frozen
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("kind", QUANTISED)
def test_scores_of_quantised_layers_are_of_their_model(kind: Any, tmp_path: Any) -> None:
    case = quantised(kind)
    scores = obc.score(case.model, case.batches, case.loss)
    scores.save(tmp_path / "scores.safetensors")
    assert_equal(obc.Scores.load(tmp_path / "scores.safetensors", case.model), scores)


@pytest.mark.parametrize("kind", QUANTISED)
def test_resuming_with_quantised_layers(kind: Any) -> None:
    case = quantised(kind)
    whole = score_in_a_loop(obc.JacobianScorer(case.model), case)
    first = obc.JacobianScorer(case.model)
    score_in_a_loop(first, case, case.batches[:1])
    rest = obc.JacobianScorer(case.model)
    rest.load_state_dict(first.state_dict())
    assert_equal(score_in_a_loop(rest, case, case.batches[1:]), whole)


def test_layers_without_a_weight_of_their_own_are_named_unscored() -> None:
    case = quantised(lambda linear: Opaque(linear) if linear.bias is not None else linear)
    scores = obc.score(case.model, case.batches, case.loss)
    assert scores.coverage["first"] == "unscored: Opaque is a linear layer without a weight tensor"
    assert "second" in scores


def test_layers_that_no_gradient_comes_through_are_named_unscored() -> None:
    case = quantised(lambda linear: FrozenEight(linear) if linear.bias is not None else linear)
    scores = obc.score(case.model, case.batches, case.loss)
    assert scores.coverage["first"] == "unscored: no gradient came through it in the checking row"
    assert "second" in scores


# --- adapters ------------------------------------------------------------------------------------------------------


def adapted(base: Any) -> Case:
    torch.manual_seed(1)
    adapters = [LoRA(nn.Linear(6, 8)), LoRA(nn.Linear(8, 8, bias=False))]

    def build(change: Any) -> nn.Module:
        model, given = models.seeded(Block).eval(), iter(copy.deepcopy(adapters))

        def wrap(linear: nn.Linear) -> nn.Module:
            adapter = next(given)
            adapter.base_layer = change(linear).requires_grad_(False)
            return adapter

        model.first, model.second = wrap(model.first), wrap(model.second)
        return model

    return Case(build(base), models.floats(5, 6), losses, build(dequantised if base in QUANTISED else lambda x: x))


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize(
    "base", [lambda linear: linear.requires_grad_(False), *QUANTISED], ids=["plain", "4bit", "packed"]
)
def test_adapted_layers_and_their_adapters_are_scored(base: Any, rows: str) -> None:
    """The base by its own input and output: the adapter's path does not count as its."""
    case = adapted(base)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    expected = expected_scores(case, rows)
    assert {"first.base_layer", "first.lora_A.default", "second.lora_B.default"} <= set(expected)
    assert_parity(scores, expected)
    assert "first" not in scores
    assert not any(how.startswith("unscored") for how in scores.coverage.values())
    assert all(p.grad is None for p in case.model.parameters())


# --- float16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["residual_cnn", "linears", "llama"])
def test_float16_weights_under_a_loss_scale(family: str) -> None:
    case = getattr(models, family)()
    half = copy.deepcopy(case.model).half()
    eager = eager_scores(case, half)
    scores = obc.score(half, case.batches, case.loss, loss_scale=2.0**8)
    rounded = Case(half.float(), case.batches, case.losses, half)  # the truth of the rounded weights
    assert_as_good_as_eager(scores, eager, expected_scores(rounded))


def test_a_loss_scale_saves_small_gradients_in_float16() -> None:
    case = models.linears()
    half = copy.deepcopy(case.model).half()

    def tiny(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(model, batch) * 2.0**-14

    truth = oracle.scores(copy.deepcopy(half).float(), case.batches, case.loss)
    name = next(iter(truth))
    out, _ = truth[name]
    expected = out * 2.0**-28
    assert error(obc.score(half, case.batches, tiny)[name].out_channels, expected) > 0.2
    assert error(obc.score(half, case.batches, tiny, loss_scale=2.0**14)[name].out_channels, expected) < 0.05


def test_grad_scaler_under_float16_autocast() -> None:
    """A row that overflows is left out and named; the others are as good as float16 lets them be."""
    case = models.linears()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scorer = obc.JacobianScorer(case.model)

    def row(batch: Any, factor: float) -> None:
        with scorer.row(loss_scale=grad_scaler.get_scale()), torch.autocast("cpu", torch.float16):
            grad_scaler.scale(case.loss(case.model, batch) * factor).backward()

    with scorer:
        for batch in case.batches:
            row(batch, 1.0)
        with pytest.warns(UserWarning, match=r"row 3 is not finite"):
            row(case.batches[0], 1e30)
    scores = scorer.scores()
    assert scores.num_rows == 3
    eager = eager_scores(case, case.model, lambda: torch.autocast("cpu", torch.float16))
    assert_as_good_as_eager(scores, eager, expected_scores(case))
