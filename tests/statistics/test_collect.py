"""obc.collect against float64 definitions written out over every position."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from collected import CASES, assert_same, close, double, forward, input_layers, seen_inputs, statistics_of
from torch import Tensor, nn

from obc.statistics import Blocks, Experts, Gram, StatisticsError, residual_blocks
from obc.statistics.run import collect


@pytest.mark.parametrize("name", CASES)
def test_moments_and_gram_are_sums_over_every_position(name: str) -> None:
    case = CASES[name]()
    got = collect(case.model, case.batches, statistics=["moments", "gram"], forward_fn=forward)
    expected = dict(seen_inputs(double(case), case))
    assert set(got.moments) == set(got.gram) == set(expected)
    for layer, batches in expected.items():
        x = torch.cat([batch.flatten(0, 1) for batch in batches])
        moments, gram = got.moments[layer], got.gram[layer]
        assert moments.count == gram.count == len(x)
        assert moments.samples == sum(map(len, batches))
        close(moments.sum, x.sum(0))
        close(moments.square, x.square().sum(0))
        close(moments.absolute, x.abs().sum(0))
        close(moments.mean_absolute_square, sum(batch.abs().mean(1).square().sum(0) for batch in batches))
        close(moments.variance, x.var(0, correction=0), 1e-4)
        close(gram.total, x.mT @ x)
        close(gram.sum, x.sum(0))
        centred = x - x.mean(0)
        close(gram.centred(), centred.mT @ centred, 1e-4)


@pytest.mark.parametrize("name", ["vit", "llama", "mixtral"])
def test_blocks_compare_input_and_output_of_every_token(name: str) -> None:
    case = CASES[name]()
    model = double(case)
    blocks = residual_blocks(model)
    assert len(blocks) == 2
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}
    for block in blocks:
        model.get_submodule(block).register_forward_hook(
            lambda m, args, y, block=block: pairs[block].append((args[0], y[0] if isinstance(y, tuple) else y))
        )
    with torch.no_grad():
        for batch in case.batches:
            forward(model, batch)
    whole = collect(case.model, case.batches, statistics="blocks", forward_fn=forward)
    last = collect(case.model, case.batches, statistics=[Blocks(tokens="last")], forward_fn=forward)
    window = collect(case.model, case.batches, statistics=[Blocks(span=2)], forward_fn=forward)
    assert list(window.blocks) == blocks[:1]
    both = [(x, y) for (x, _), (_, y) in zip(pairs[blocks[0]], pairs[blocks[1]], strict=True)]
    checked = [(whole.blocks[block], pairs[block], slice(None)) for block in blocks]
    checked += [(last.blocks[block], pairs[block], slice(-1, None)) for block in blocks]
    for got, block_pairs, tokens in [*checked, (window.blocks[blocks[0]], both, slice(None))]:
        x, y = (torch.cat([pair[side][:, tokens].flatten(0, 1) for pair in block_pairs]) for side in (0, 1))
        cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        assert got.count == len(x)
        close(got.cosine, cosine.sum())
        close(got.angle, (cosine.clamp(-1, 1).arccos() / math.pi).sum(), 1e-4)
        close(got.difference, (y - x).square().sum())
        close((got.input, got.output), torch.stack([x.square().sum(), y.square().sum()]))


@pytest.mark.parametrize("gates", ["routed", "softmax"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "deepseek-v2"])
def test_experts_are_computed_one_by_one(name: str, gates: Any) -> None:
    case = families.FAMILIES[name]()
    got = collect(case.model, case.batches, statistics=[Experts(gates)]).experts
    model: Any = double(case)
    calls: dict[str, list[Any]] = {layer: [] for layer in got}
    assert calls
    for layer, seen in calls.items():
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args))
    with torch.no_grad():
        for batch in case.batches:
            model(batch)
    for layer, seen in calls.items():
        experts = model.get_submodule(layer)
        router = model.get_submodule(layer.removesuffix("experts") + "gate")
        sums = torch.zeros(4, len(experts.down_proj), dtype=torch.float64)
        for hidden, indices, weights in seen:
            for token, slot in itertools.product(range(len(hidden)), range(indices.shape[1])):
                expert = int(indices[token, slot])
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                norm = (experts.down_proj[expert] @ (experts.act_fn(gate) * up)).norm()
                g = weights[token, slot] if gates == "routed" else (router.weight @ hidden[token]).softmax(0)[expert]
                sums[:, expert] += torch.stack([torch.ones(()).double(), g.double(), norm, g * norm]).detach()
        close(torch.stack([got[layer].count, got[layer].gate, got[layer].norm, got[layer].gate_norm]), sums)


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("name", ["cnn", "vit", "llama", "gpt2"])
def test_gradient_moments_are_of_gradients_through_the_layer_alone(name: str, rows: Any) -> None:
    case = CASES[name]()
    got = collect(case.model, case.batches, case.loss_fn(rows), statistics=["gradient_moments"], rows=rows)
    model = double(case)
    found: dict[str, list[Tensor]] = {}
    taps: list[tuple[str, Tensor, int]] = []

    def tap(layer: str, module: nn.Module) -> Callable[..., Any]:
        dim = -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1

        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            zero = torch.zeros_like(args[0], requires_grad=True)
            taps.append((layer, zero, dim))
            return (args[0] + zero,)

        return hook

    for layer, module in input_layers(model).items():
        module.register_forward_pre_hook(tap(layer, module))
    for batch in case.batches:
        taps.clear()
        case.loss_fn(rows)(model, batch).sum().backward()
        for layer, zero, dim in taps:
            if zero.grad is not None:
                grad = zero.grad.movedim(dim, -1)
                found.setdefault(layer, []).append(grad.reshape(-1, grad.shape[-1]))
    assert set(got.gradient_moments) == set(found)
    for layer, grads in found.items():
        g = torch.cat(grads)
        assert got.gradient_moments[layer].count == len(g)
        close(got.gradient_moments[layer].absolute, g.abs().sum(0), 1e-4)
        close(got.gradient_moments[layer].square, g.square().sum(0), 1e-4)


def test_gram_weights_samples_and_tokens() -> None:
    case = models.llama()
    batches = [
        {"input_ids": tokens, "omega": torch.rand(len(tokens)), "each": torch.rand(tokens.shape)}
        for tokens in case.batches
    ]

    def run(model: nn.Module, batch: Any) -> Any:
        return model(batch["input_ids"])

    expected = dict(seen_inputs(double(case), case))
    for key in ("omega", "each"):
        got = collect(case.model, batches, statistics=[Gram(weight=lambda b, key=key: b[key])], forward_fn=run)
        for layer, inputs in expected.items():
            weights = [(b[key] if key == "each" else b[key][:, None].expand(b["each"].shape)).double() for b in batches]
            pairs = list(zip(weights, inputs, strict=True))
            close(got.gram[layer].total, sum(torch.einsum("bt,bti,btj->ij", w, x, x) for w, x in pairs))
            close(got.gram[layer].count, sum(w.sum() for w in weights))
    with pytest.raises(StatisticsError, match=r"gave shape \(3,\)"):
        collect(case.model, batches, statistics=[Gram(weight=lambda b: torch.ones(3))], forward_fn=run)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", CASES)
def test_together_equals_each_alone(name: str) -> None:
    """Also together with rows and gradients, and in any order."""
    case = CASES[name]()
    names = [*statistics_of(name), "gradient_moments", "rows"]
    together = collect(case.model, case.batches, case.loss, statistics=names)
    for one in names:
        alone = collect(case.model, case.batches, case.loss, statistics=one)
        if one == "rows":
            for module in alone.rows:
                for a, b in zip(vars(alone.rows[module]).values(), vars(together.rows[module]).values(), strict=True):
                    assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7)
        else:
            assert_same(alone, together, one, exact=one != "gradient_moments")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in case.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in case.model.modules())


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("name", ["cnn", "llama"])
def test_micro_batches_add_up_to_the_batch(name: str, rows: Any) -> None:
    case = CASES[name]()
    names = [*statistics_of(name), "gradient_moments", "rows"]
    whole, parts = (
        collect(case.model, case.batches, case.loss_fn(rows), statistics=names, rows=rows, micro_batch=size)
        for size in (None, 3)
    )
    for one in names[:-1]:
        assert_same(parts, whole, one, exact=False)
    only = collect(case.model, case.batches, statistics=names[:-2], forward_fn=forward, micro_batch=3)
    for one in names[:-2]:
        assert_same(only, whole, one, exact=False)


@pytest.mark.parametrize("statistic", ["moments", "gram", "experts", "blocks", "last", "gradient_moments"])
def test_padding_is_left_out(statistic: str) -> None:
    """Right-padded batches give what their sequences give one by one."""
    case = families.FAMILIES["mixtral"]()
    lengths = [3, 8, 5, 1]
    tokens = case.batches[0]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    padded = {"input_ids": tokens.where(mask, 7), "attention_mask": mask.long()}
    alone = [{"input_ids": tokens[i : i + 1, :n]} for i, n in enumerate(lengths)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(**batch).logits
        return (logits.sin().mean(-1) * batch.get("attention_mask", 1)).sum()

    options = [Blocks(tokens="last")] if statistic == "last" else [statistic]
    one = collect(case.model, [padded], loss, statistics=options)
    other = collect(case.model, alone, loss, statistics=options)
    name = "blocks" if statistic == "last" else statistic
    assert_same(one, other, name, exact=False)
    assert all(how in ("input", "input and output", "calls") for how in one.coverage[name].values())


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_masks_that_are_added_or_for_all_heads_leave_out_padding(shape: tuple[int, ...], added: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 5, 3)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    mask = torch.zeros(2, 5).masked_fill(~keep, -torch.inf) if added else keep
    got = collect(model, [{"x": x, "attention_mask": mask.view(shape)}], lambda m, b: m(b["x"]), statistics="gram")
    rows = x[keep].double()
    torch.testing.assert_close(got.gram["0"].total, rows.T @ rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 5, 5)], ids=str)
def test_a_mask_that_fits_no_input_is_named(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.ones(shape)}
    got = collect(model, [batch], lambda m, b: m(b["x"]), statistics="moments")
    assert "padding counts" in got.coverage["moments"]["0"]


@pytest.mark.parametrize("name", ["cnn", "llama"])
def test_bf16_accumulates_in_float32(name: str) -> None:
    case = CASES[name]()
    model = copy.deepcopy(case.model).bfloat16()
    got = collect(model, case.batches, statistics=["moments", "gram"], forward_fn=forward)
    for layer, batches in seen_inputs(model, case):
        x = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
        close(got.moments[layer].square, x.square().sum(0))
        close(got.gram[layer].total, x.mT @ x)


def test_checkpointed_activations_are_read_once() -> None:
    case = models.llama()
    plain = collect(case.model, case.batches, case.loss, statistics=["moments", "blocks", "gradient_moments"])
    for reentrant in (False, True):
        model: Any = copy.deepcopy(case.model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = collect(model, case.batches, case.loss, statistics=["moments", "blocks", "gradient_moments"])
        for one in again.collected:
            assert_same(again, plain, one, exact=False)


class InPlace(nn.Module):
    """The second convolution's input is changed in place from the second batch on, which costs a row its first try."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.calls = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        y = self.two(hidden)
        self.calls += 1
        if self.calls > 2:  # the first is the check on a sample
            hidden.mul_(2)
        return y.sin() + hidden.mean(1, keepdim=True).sin()


def test_a_repeated_row_counts_once() -> None:
    torch.manual_seed(0)
    model, batches = InPlace(), [torch.randn(3, 2, 4, 4) for _ in range(3)]
    got = collect(model, batches, lambda m, x: m(x).square().mean(), statistics=["rows", "moments", "gradient_moments"])
    assert model.calls == 5, "the second row was read at once: this model no longer shows what the test is about"
    assert {moments.count for moments in got.moments.values()} == {3 * 3 * 16}
    assert {moments.count for moments in got.gradient_moments.values()} == {3 * 3 * 16}
    close(got.moments["one"].square, torch.cat(batches).double().square().sum((0, 2, 3)))
