"""Mode "correct" of compensation: the points of layers, chains of modules, and the regression against formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import obc
from obc.model.absorbing import norms_behind
from obc.model.evaluation import without_cache
from obc.model.layouts import layout_of
from obc.recovery import Kept, PruningPlan, compensate
from obc.recovery.layer_rows import columns_of, input_rows, output_rows
from obc.recovery.normal_equations import NormalEquations, smallest
from obc.recovery.segments import find_chain, replays
from obc.recovery.stream_points import observe


def prune_inputs(model: nn.Module, kept: dict[str, Tensor], producers: dict[str, str]) -> tuple[nn.Module, PruningPlan]:
    """A copy whose layers keep these inputs, and whose producers these outputs."""
    pruned, plan = copy.deepcopy(model), {}
    for name, channels in kept.items():
        consumer, producer = pruned.get_submodule(name), pruned.get_submodule(producers[name])
        consumer.weight = nn.Parameter(consumer.weight[:, channels].detach().clone())
        producer.weight = nn.Parameter(producer.weight[channels].detach().clone())
        producer.bias = nn.Parameter(producer.bias[channels].detach().clone())
        plan[name] = Kept(None, channels)
        plan[producers[name]] = Kept(channels)
    return pruned, PruningPlan(plan)


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))), a residual branch; ``scale`` multiplies it."""

    def __init__(self, width: int, hidden: int, scale: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(F.gelu(self.up(self.norm(x))))
        return x + (branch if self.scale is None else branch * self.scale)


class Stack(nn.Module):
    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, 16, scale) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def pruned_stack(scale: bool = False) -> tuple[Stack, nn.Module, PruningPlan, list[Tensor]]:
    torch.manual_seed(0)
    original = Stack(scale).double()
    names = [f"blocks.{i}.down" for i in range(3)]
    kept = {name: torch.randperm(16)[:8].sort().values for name in names}
    pruned, plan = prune_inputs(original, kept, {name: name.replace("down", "up") for name in names})
    return original, pruned, plan, [torch.randn(8, 5, 6, dtype=torch.float64) for _ in range(5)]


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled-branch"])
def test_weights_are_those_of_the_formula(scale: bool) -> None:
    """Block by block by hand: lstsq of the stream's error, relative to it, on what arrives; by the branch's factors."""
    original, pruned, plan, batches = pruned_stack(scale)
    expected = copy.deepcopy(pruned)
    report = compensate(pruned, original, plan, batches, mode="correct", ridge=0.0)
    full = corrected = torch.cat(batches[:4]).flatten(0, 1)
    with torch.no_grad():
        for block, kept in zip(original.blocks, expected.blocks, strict=True):
            full, z = block(full), F.gelu(kept.up(kept.norm(corrected)))
            error = (full - kept(corrected)) / (1 if block.scale is None else block.scale)
            size = full.square().mean(1, keepdim=True).sqrt()
            design = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
            change = torch.linalg.lstsq(design / size, error / size).solution.T
            kept.down.weight += change[:, :-1]
            kept.down.bias += change[:, -1]
            corrected = kept(corrected)
    for got, wanted in zip(pruned.blocks, expected.blocks, strict=True):
        assert_close(got.down.weight, wanted.down.weight, rtol=1e-7, atol=1e-9)
        assert_close(got.down.bias, wanted.down.bias, rtol=1e-7, atol=1e-9)
    assert all(layer.on_stream and layer.applied for layer in report.layers.values())
    assert not report.notes
    assert report.stream_bytes == 2 * 5 * batches[0].nbytes
    with torch.no_grad():
        wanted = original(batches[4])
        error = (pruned(batches[4]) - wanted).square()
    assert report.final_error == pytest.approx(float(error.sum() / wanted.square().sum()))
    relative = (error.sum(-1) / wanted.square().sum(-1)).mean()
    assert report.layers["blocks.2.down"].error_after == pytest.approx(float(relative))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gptj"])
def test_nothing_is_left_where_consumers_are_free_enough(name: str) -> None:
    """Every layer can attain its target with fewer positions than kept inputs; then so must the model, exactly.

    BERT has its norms after the sums (the stream that enters a sum is a normalised one), GPT-J writes one sum twice.
    """
    model, _ = tiny(name)
    model = model.double().eval()
    tokens = torch.randint(50, (1, 6))
    forward = lambda m, batch: m(input_ids=batch)[0]  # noqa: E731
    result = obc.prune(
        copy.deepcopy(model), None, [tokens], forward, labels=False, criterion="random", blocks=0.6, steps=1
    )
    with pytest.warns(UserWarning, match="fewer calibration positions than kept channels"):
        report = compensate(result.model, model, result.plan, [tokens, tokens], forward, mode="correct", ridge=1e-12)
    assert report.naive_error > 1e-5
    assert report.final_error < 1e-8 * report.naive_error


def test_a_few_large_positions_do_not_decide() -> None:
    """One position in ten has a stream a hundred times larger, as special tokens have: the others count as much."""
    errors = {}
    for factor in (1.0, 100.0):
        original, pruned, plan, batches = pruned_stack()
        for batch in batches:
            batch[:, 0] *= factor
        compensate(pruned, original, plan, batches, mode="correct")
        with torch.no_grad():
            error = (pruned(batches[4]) - original(batches[4]))[:, 1:].square().sum()
        errors[factor] = float(error)
    assert errors[100.0] < 1.5 * errors[1.0]


def test_it_beats_least_squares_where_errors_add_up() -> None:
    errors = {}
    for mode in ("ls", "seq", "correct"):
        original, pruned, plan, batches = pruned_stack()
        errors[mode] = compensate(pruned, original, plan, batches, mode=mode).final_error
    assert errors["correct"] < 0.9 * min(errors["ls"], errors["seq"])


def test_a_plain_chain_gets_what_mode_seq_gives_it() -> None:
    """Without a stream the target is the layer's own output: W D of mode "seq", with the same ridge."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    kept = {"2": torch.arange(5), "4": torch.arange(8)}
    plan = PruningPlan({"0": Kept(kept["2"]), "2": Kept(kept["4"], kept["2"]), "4": Kept(None, kept["4"])})
    models = []
    for mode in ("seq", "correct"):
        pruned = copy.deepcopy(original)
        for name, kept_of in plan.items():
            layer = pruned.get_submodule(name)
            if kept_of.out_channels is not None:
                layer.weight = nn.Parameter(layer.weight[kept_of.out_channels].detach())
                layer.bias = nn.Parameter(layer.bias[kept_of.out_channels].detach())
            if kept_of.in_channels is not None:
                layer.weight = nn.Parameter(layer.weight[:, kept_of.in_channels].detach())
        data = [torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(10)]
        report = compensate(pruned, original, plan, data, mode=mode, ridge=1e-4)
        assert all(layer.applied for layer in report.layers.values())
        models.append(pruned)
    for expected, got in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(got, expected, rtol=1e-9, atol=1e-10)


def tiny(name: str) -> tuple[nn.Module, dict[str, bool]]:
    """A model of the transformers library, and per consumer whether its output enters a residual stream."""
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config), {"self_attn.o_proj": True, "mlp.down_proj": True, "mlp.up_proj": False}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=32)), {
            "attn.c_proj": True,
            "mlp.c_proj": True,
            "mlp.c_fc": False,
        }
    if name == "gptj":
        config = GPTJConfig(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=32, rotary_dim=4)
        return GPTJForCausalLM(config), {"attn.out_proj": True, "mlp.fc_out": True, "mlp.fc_in": False}
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return BertModel(config), {"attention.output.dense": True, "output.dense": True, "intermediate.dense": False}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bert"])
def test_layers_of_transformers_have_their_points_and_chains(name: str) -> None:
    """Attention and feed-forward write one sum in GPT-J; elsewhere each has its own."""
    model, ends = tiny(name)
    model.eval()
    tokens = torch.randint(50, (2, 8))
    modules = {n: m for n, m in model.named_modules() if any(n.endswith(f".{end}") for end in ends)}
    run = lambda: model(input_ids=tokens)  # noqa: E731
    with without_cache(model):
        seen = observe(run, modules, set(), whole=model).calls
        expected = {n: any(summed and n.endswith(f".{end}") for end, summed in ends.items()) for n in modules}
        assert {n: calls[0].summed for n, calls in seen.items()} == expected
        points = [calls[0].point for calls in seen.values() if calls[0].summed]
        distinct = {tuple(point.flatten().tolist()) for point in points}
        assert len(points) == 4
        assert len(distinct) == (2 if name == "gptj" else 4)
        scopes = {n: calls[0].scope if calls[0].summed else n for n, calls in seen.items()}
        chain = find_chain(model, run, scopes, list(modules))
        layers = {"llama": "model.layers", "gpt2": "transformer.h", "gptj": "transformer.h", "bert": "encoder.layer"}
        assert [n for n in chain if any(s.startswith(n) for s in scopes.values())] == [
            f"{layers[name]}.{i}" for i in (0, 1)
        ]
        assert replays(model, chain, run) is None


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bert"])
def test_pruned_transformers_come_closer_than_by_least_squares(name: str) -> None:
    model, _ = tiny(name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 5
    model.eval()
    batches = [{"input_ids": torch.randint(50, (8, 16))} for _ in range(10)]
    forward = lambda m, batch: m(**batch)[0]  # noqa: E731
    pruned = obc.prune(
        copy.deepcopy(model), None, batches, forward, labels=False, criterion="random", params=0.7, steps=1
    )
    reports = {}
    for mode in ("ls", "correct"):
        copied = copy.deepcopy(pruned.model)
        reports[mode] = compensate(copied, model, pruned.plan, batches, forward, mode=mode)
    assert reports["correct"].final_error < reports["ls"].final_error < reports["ls"].naive_error
    assert not reports["correct"].notes


class Residual(nn.Module):
    """A residual block of convolutions, its sum rectified in place."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        out += self.skip(x)
        return F.relu(out, inplace=True)


def test_the_point_of_a_convolution_is_the_sum_behind_its_norm() -> None:
    torch.manual_seed(0)
    block = Residual(6).eval()
    block.norm2.running_var.uniform_(0.5, 2)
    block.norm2.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 6, 5, 5)
    seen = observe(lambda: block(x), {"conv2": block.conv2}, set(), whole=block).calls["conv2"]
    inside = F.relu(block.norm1(block.conv1(x)))
    assert seen[0].summed
    assert_close(seen[0].point, block.norm2(block.conv2(inside)) + x)  # before the rectifier, which works in place
    assert_close(seen[0].scale, block.norm2.weight / (block.norm2.running_var + block.norm2.eps).sqrt())


class Narrow(nn.Module):
    """Two convolutions without biases; the second one's output goes into a norm, and perhaps past it too."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.past = past

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.norm1(self.first(x))))
        z = F.relu(self.norm2(y))
        return z + y.sum((2, 3), keepdim=True) if self.past else z


def constant_channel(past: bool) -> tuple[nn.Module, nn.Module, PruningPlan]:
    """A model that lost a channel that is 2 everywhere: a mean is all that is missing; without padding that shows."""
    torch.manual_seed(0)
    model = Narrow(past).eval()
    model.second = nn.Conv2d(8, 4, 3, bias=False)
    model.first.weight.data[5] = 0.0
    model.norm1.bias.data[5] = 2.0
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    plan = PruningPlan({"first": Kept(kept), "norm1": Kept(kept), "second": Kept(None, kept)})
    return model, plan.apply(copy.deepcopy(model)), plan


def test_the_norm_behind_a_layer_without_a_bias_takes_its_intercept() -> None:
    model, pruned, plan = constant_channel(past=False)
    weight = pruned.second.weight.detach().clone()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(5)]
    report = compensate(pruned, model, plan, batches, lambda m, x: m(x), mode="correct", ridge=1e-3)
    assert_close(pruned.second.weight, weight, atol=1e-5, rtol=1e-4)
    assert report.naive_error > 1e-3
    assert report.final_error < 1e-8 * report.naive_error


@pytest.mark.parametrize("past", [False, True])
def test_a_norm_that_is_not_alone_takes_no_intercept(past: bool) -> None:
    model = Narrow(past).eval()
    absorbed = norms_behind(model, {"second": model.second}, lambda: model(torch.randn(2, 3, 5, 5)))
    assert absorbed == ({} if past else {"second": ["norm2"]})


def test_norms_keep_their_means_where_they_are_not_to_be_recalibrated() -> None:
    model, pruned, plan = constant_channel(past=False)
    before = pruned.norm2.running_mean.clone()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(5)]
    compensate(pruned, model, plan, batches, lambda m, x: m(x), mode="correct", recalibrate_norms=False)
    assert_close(pruned.norm2.running_mean, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"groups": 2},
        {"padding_mode": "reflect", "padding": 1},
    ],
    ids=["plain", "stride", "dilation", "groups", "reflect"],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rows_times_the_weight_are_the_convolution(options: dict, dims: int) -> None:
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{dims}d")(4, 6, 3, **options).double()
    if options.get("padding_mode") == "reflect" and dims == 3:
        conv.padding_mode = "circular"
    x = torch.randn(2, 4, *[7, 6, 5][:dims], dtype=torch.float64)
    layout = layout_of(conv)
    rows = input_rows(conv, layout, x, slice(None))
    blocks, columns, outputs = columns_of(conv, layout)
    weight = conv.weight.reshape(blocks, outputs, columns)
    product = rows @ weight.mT + conv.bias.reshape(blocks, 1, outputs)
    assert_close(product, output_rows(layout, conv(x), slice(None)))


@pytest.mark.parametrize("intercept", [False, True])
def test_normal_equations_solve_weighted_ridge_regression(intercept: bool) -> None:
    """Against lstsq with the ridge and the weights as extra rows and factors, about the weighted means."""
    torch.manual_seed(0)
    z, e, w = torch.randn(50, 4).double(), torch.randn(50, 3).double(), torch.rand(50).double()
    equations = NormalEquations(1, 4, 3, torch.device("cpu"))
    for rows in (slice(0, 20), slice(20, 50)):
        equations.add(z[None, rows], e[None, rows], w[rows])
    ridge = 0.1
    (change,) = equations.changes([ridge], intercept)
    assert equations.total == pytest.approx(float(w.sum()))
    assert equations.rows == 50
    unshifted = e
    if intercept:
        means = [(w[:, None] * values).sum(0) / w.sum() for values in (z, e)]
        z, e = z - means[0], e - means[1]
        assert_close(change.bias[0], means[1] - change.weight[0] @ means[0])
    lam = ridge * (z.square() * w[:, None]).sum(0).mean()
    design = torch.cat([z * w.sqrt()[:, None], lam.sqrt() * torch.eye(4).double()])
    target = torch.cat([e * w.sqrt()[:, None], torch.zeros(4, 3).double()])
    assert_close(change.weight[0], torch.linalg.lstsq(design, target).solution.T)
    error = (w[:, None] * (e - z @ change.weight[0].T).square()).sum(0)
    assert_close(equations.error(change)[0], error)
    assert_close(equations.error(None)[0], (w[:, None] * unshifted.square()).sum(0))


def test_held_out_batches_choose_the_ridge_or_nothing() -> None:
    """Calibration rows show a relation that held-out rows reverse: the layer stays as it was."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    pruned = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    pruned[0].weight = nn.Parameter(original[0].weight[:, :3].detach().clone())
    plan = PruningPlan({"0": Kept(None, torch.arange(3))})
    x = torch.randn(64, 4, dtype=torch.float64)
    x[:, 3] = x[:, 0]
    run = lambda model, batch: model[0](batch[:, : model[0].weight.shape[1]])  # noqa: E731
    turned = x * torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)
    for data, applied in (([x, x, x], True), ([x, x, turned], False)):
        model = copy.deepcopy(pruned)
        report = compensate(model, original, plan, data, run, mode="correct")
        assert report.layers["0"].applied is applied
        assert (report.layers["0"].ridge == 1e-5) is applied
        assert torch.equal(model[0].weight, pruned[0].weight) is not applied


def test_every_channel_counts_alike_in_the_choice_of_the_ridge() -> None:
    """One channel a thousand times larger than the others would profit from a small ridge, all others from a large."""
    naive = torch.tensor([[1e6, 1.0, 1.0, 1.0]], dtype=torch.float64)
    large = naive * torch.tensor([0.9, 0.5, 0.5, 0.5])
    small = naive * torch.tensor([0.8, 0.7, 0.7, 0.7])
    assert smallest([naive, large, small]) == 1
    assert smallest([naive, small]) == 1
    assert smallest([naive, 1.1 * naive]) == 0
    exact = torch.zeros(1, 4, dtype=torch.float64)
    assert smallest([exact, exact + 1e-9]) == 0  # nothing was wrong: nothing is changed


def test_padding_does_not_count() -> None:
    """The result does not depend on the values at padded positions."""
    model, _ = tiny("bert")
    model.eval()
    forward = lambda m, batch: m(**batch)[0][batch["attention_mask"].bool()]  # noqa: E731
    mask = torch.ones(8, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    tokens = [torch.randint(50, (8, 12)) for _ in range(6)]
    plans = obc.prune(
        copy.deepcopy(model),
        None,
        [{"input_ids": t, "attention_mask": mask} for t in tokens],
        forward,
        labels=False,
        criterion="random",
        params=0.7,
        steps=1,
    )
    models = []
    for fill in (1, 2):
        batches = [{"input_ids": t.masked_fill(mask == 0, fill), "attention_mask": mask} for t in tokens]
        copied = copy.deepcopy(plans.model)
        compensate(copied, model, plans.plan, batches, forward, mode="correct", ridge=1e-3)
        models.append(copied)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_streams_give_the_same(offload: bool) -> None:
    original, pruned, plan, batches = pruned_stack()
    again = copy.deepcopy(pruned)
    compensate(pruned, original, plan, batches, mode="correct")
    compensate(again, original, plan, batches, mode="correct", offload=offload)
    assert_close(again.state_dict(), pruned.state_dict(), rtol=0, atol=0)


def test_a_model_whose_modules_form_no_chain_is_corrected_all_the_same() -> None:
    """The blocks pass on another tensor than they return; the result is the same as with a chain."""

    class Woven(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) * 1.0
            return x

    original, pruned, plan, batches = pruned_stack()
    chained = copy.deepcopy(pruned)
    compensate(chained, original, plan, batches, mode="correct")
    original.__class__ = pruned.__class__ = Woven
    report = compensate(pruned, original, plan, batches, mode="correct")
    assert report.stream_bytes <= 2 * 5 * batches[0].nbytes
    assert_close(pruned.state_dict(), chained.state_dict(), rtol=1e-7, atol=1e-9)


def test_prune_takes_it_where_compensate_is_true() -> None:
    model, _ = tiny("llama")
    batches = [torch.randint(50, (4, 16)) for _ in range(6)]
    forward = lambda m, batch: m(input_ids=batch).logits  # noqa: E731
    results = [
        obc.prune(
            copy.deepcopy(model), None, batches, forward, labels=False, params=0.8, steps=1, compensate=compensate
        )
        for compensate in (True, "correct")
    ]
    for a, b in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert results[0].report.compensation.layers
