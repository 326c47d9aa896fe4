"""Compensation of the kinds of models and batches that come: each gets the right value, or a clear error."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import obc
from obc.recovery import Kept, PruningPlan, compensate

MODES = ["ls", "seq", "correct"]
KEPT = torch.arange(0, 16, 2)


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))), with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Three blocks; ``skip`` of them don't run."""

    def __init__(self, skip: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks, self.skip = nn.ModuleList(Block(dropout) for _ in range(3)), skip

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks[: 3 - self.skip]:
            x = block(x)
        return x


def stack(**options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(**options)


def pruned(original: Stack) -> tuple[Any, PruningPlan]:
    """A copy whose feed-forward blocks keep half of their channels."""
    model, plan = copy.deepcopy(original), {}
    for i, block in enumerate(model.blocks):
        block.down.weight = nn.Parameter(block.down.weight[:, KEPT].detach().clone())
        block.up.weight = nn.Parameter(block.up.weight[KEPT].detach().clone())
        block.up.bias = nn.Parameter(block.up.bias[KEPT].detach().clone())
        plan |= {f"blocks.{i}.up": Kept(KEPT), f"blocks.{i}.down": Kept(None, KEPT)}
    return model, PruningPlan(plan)


def data(count: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, 6, generator=generator) for _ in range(count)]


def error(model: nn.Module, original: nn.Module, inputs: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model.eval()(x).float(), original.eval()(x).float()) for x in inputs]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def run(mode: str, batches: Any, original: Stack | None = None, **options: Any) -> tuple[nn.Module, Any]:
    original = original or stack()
    model, plan = pruned(original)
    return model, compensate(model, original, plan, batches, mode=mode, progress=False, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_mode_is_that_of_prune_unless_decompressors_are_asked_for() -> None:
    original = stack()
    (model, plan), (corrected, _) = pruned(original), run("correct", data())
    obc.compensate(model, original, plan, data(), progress=False)
    assert same(model, corrected)
    model, plan = pruned(original)
    report = obc.compensate(model, original, plan, data(), keep_decompressors=True, progress=False)
    assert set(report.decompressors) == {f"blocks.{i}.down" for i in range(3)}
    assert same(model, run("ls", data())[0])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_and_training_mode_change_nothing(mode: str) -> None:
    model, _ = run(mode, data(), stack(dropout=0.3).train())
    assert model.training
    assert same(model, run(mode, data())[0])


class Shuffled:
    """A data loader that gives its batches in another order each time."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def __iter__(self) -> Iterator[Tensor]:
        batches = data()
        self.chance.shuffle(batches)
        return iter(batches)


@pytest.mark.parametrize("mode", MODES)
def test_both_models_see_the_same_batches(mode: str) -> None:
    assert same(run(mode, Shuffled(3))[0], run(mode, list(Shuffled(3)))[0])
    assert same(run(mode, iter(data()))[0], run(mode, data())[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labelled", [False, True], ids=["mapping", "mapping-and-labels"])
def test_padding_changes_nothing(mode: str, labelled: bool) -> None:
    """Neither the weights nor the held-out errors depend on the values at padding positions."""

    def batches(padding: float) -> list[Any]:
        found: list[Any] = []
        for x in data():
            mask = torch.ones(8, 5, dtype=torch.int64)
            mask[:4, 3:] = 0
            inputs = {"x": torch.where(mask[..., None] == 1, x, padding * x), "attention_mask": mask}
            found.append((inputs, torch.zeros(8)) if labelled else inputs)
        return found

    (model, report), (padded, padded_report) = (run(mode, batches(padding)) for padding in (0.0, 30.0))
    assert same(model, padded)
    assert report.naive_error == pytest.approx(padded_report.naive_error, rel=1e-6)
    assert report.final_error == pytest.approx(padded_report.final_error, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_no_batch_reached_stays_naive_and_is_named(mode: str) -> None:
    original = stack(skip=1)
    with pytest.warns(UserWarning, match=r"no calibration batch reached blocks\.2\.down, which stay"):
        model, report = run(mode, data(), original)
    assert report.unreached == ["blocks.2.down"]
    assert set(report.layers) == {"blocks.0.down", "blocks.1.down"}
    assert "blocks.2.down" in str(report)
    naive, _ = pruned(original)
    assert_close(model.blocks[2].state_dict(), naive.blocks[2].state_dict(), rtol=0, atol=0)
    assert error(model, original, data(3, 9)) < 0.3 * error(naive, original, data(3, 9))


@pytest.mark.parametrize("mode", MODES)
def test_too_few_positions_without_a_ridge_are_an_error(mode: str) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.down: its Gram matrix is singular .* it saw 2 positions for 8"):
        run(mode, [x[:1, :1] for x in data(3)], ridge=0.0)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, (RuntimeError, obc.PruningError))],
    ids=["interrupted", "failing"],
)
def test_after_an_exception_the_model_is_as_it_was(mode: str, failure: type[BaseException], raised: Any) -> None:
    """Stopped at every fifth call of a pruned layer, from the first to the last."""
    original = stack()
    calls, stop = 0, -1

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise failure

    def compensated() -> nn.Module:
        nonlocal calls
        calls = 0
        model, plan = pruned(original)
        handles = [block.down.register_forward_pre_hook(count) for block in model.blocks]
        if stop == -1:
            compensate(model, original, plan, data(), mode=mode, progress=False)
        else:
            with pytest.raises(raised):
                compensate(model, original, plan, data(), mode=mode, progress=False)
        for handle in handles:
            handle.remove()
        return model

    naive, _ = pruned(original)
    assert not same(compensated(), naive)
    for stop in range(1, calls + 1, 5):
        model = compensated()
        assert same(model, naive), stop
        assert not any(m._forward_hooks or m._forward_pre_hooks for x in (model, original) for m in x.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_loses_no_more_than_rounding(mode: str, dtype: torch.dtype) -> None:
    """The result is as good as the float32 model's, rounded; sums and solutions are float64."""
    original = stack().to(dtype)
    batches, held = [x.to(dtype) for x in data()], [x.to(dtype) for x in data(3, 9)]
    model, _ = run(mode, batches, original)
    exact, _ = run(mode, [x.float() for x in batches], copy.deepcopy(original).float())
    naive, _ = pruned(original)
    assert error(model, original, held) < 1.05 * error(exact.to(dtype), original, held)
    assert error(model, original, held) < 0.3 * error(naive, original, held)


class TwoProducers(nn.Module):
    """x + c(cat(relu(a(x)), gelu(b(x)))): the consumer reads two groups of channels, and has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(6, 12), nn.Linear(22, 6, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.a(x)), F.gelu(self.b(x))], -1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(self.hidden(x))


@pytest.mark.parametrize("mode", ["ls", "correct"])
def test_a_consumer_of_two_groups_without_a_bias_gets_the_regression_on_both(mode: str) -> None:
    torch.manual_seed(0)
    original = TwoProducers().double()
    model = copy.deepcopy(original)
    kept = {"a": torch.arange(0, 10, 2), "b": torch.arange(0, 12, 3)}
    for name, channels in kept.items():
        layer = model.get_submodule(name)
        layer.weight, layer.bias = (nn.Parameter(p[channels].detach()) for p in (layer.weight, layer.bias))
    channels = torch.cat([kept["a"], 10 + kept["b"]])
    model.c.weight = nn.Parameter(model.c.weight[:, channels].detach())
    plan = PruningPlan({"a": Kept(kept["a"]), "b": Kept(kept["b"]), "c": Kept(None, channels)})
    batches = [x.double() for x in data()]
    compensate(model, original, plan, batches, mode=mode, ridge=1e-9, progress=False)
    rows = torch.cat(batches[:4]).flatten(0, 1)  # the fifth is held out
    with torch.no_grad():
        full = original.hidden(rows)
        target = full @ original.c.weight.T
        weigh = (rows + target).square().mean(1, keepdim=True).rsqrt()  # by the stream
        wanted = torch.linalg.lstsq(weigh * full[:, channels], weigh * target).solution.T
    assert_close(model.c.weight, wanted, rtol=1e-5, atol=1e-6)


def tie(model: Any) -> None:
    model.blocks[2].down.weight = model.blocks[0].down.weight


@pytest.mark.parametrize("mode", MODES)
def test_tied_weights_stay_tied_and_gain(mode: str) -> None:
    original = stack()
    tie(original)
    model, plan = pruned(original)
    tie(model)
    naive = copy.deepcopy(model)
    compensate(model, original, plan, data(), mode=mode, progress=False)
    assert model.blocks[2].down.weight is model.blocks[0].down.weight
    assert error(model, original, data(3, 9)) < 0.4 * error(naive, original, data(3, 9))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [grouped], ids=["depthwise-and-grouped"])
def test_convolutions_with_groups_come_closer(mode: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    original = make()
    images = [torch.randn(4, 3, 8, 8) for _ in range(8)]
    options = {"macs": 0.6, "steps": 1, "criterion": "l2", "progress": False}
    result = obc.prune(copy.deepcopy(original), images[0], images, lambda m, x: m(x).square().mean(), **options)
    held = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    before = error(result.model, original, held)
    report = compensate(result.model, original, result.plan, images, mode=mode, progress=False)
    assert "2" not in report.layers  # a depthwise layer mixes no channels
    assert error(result.model, original, held) < 0.9 * before


# --- transformers: whole blocks gone --------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def text(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (8, 16), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("mode", [*MODES, "mean"])
def test_blocks_that_are_gone_leave_the_others_their_layers(mode: str) -> None:
    """The result equals that of the model in which stand-ins replace removed blocks, layer by layer."""
    transformers = pytest.importorskip("transformers")
    from obc.integrations.transformers import TransformersStructure
    from obc.model.depth import compact
    from obc.recovery.mean_bias import absorb_means

    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=4)).eval()
    model = copy.deepcopy(original)
    structure = TransformersStructure(model, ["layers", "ffn"])
    names = {group.name: group.size for group in structure.groups}
    half = {name: torch.arange(0, size, 2) for name, size in names.items() if size > 1 and ".1." not in name}
    structure.remove({**half, "model.layers.1": torch.tensor([0])})
    found = []
    for out in (False, True):
        copied = copy.deepcopy(model)
        if out:
            compact(copied, structure.plan.depth)
            assert len(copied.model.layers) == 3
        if mode == "mean":
            report: Any = absorb_means(copied, original, structure.plan, text(5, 0), logits)
            layers = report.absorbed
        else:
            report = compensate(copied, original, structure.plan, text(5, 0), logits, mode=mode, progress=False)
            layers = list(report.layers)
        assert layers == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2, 3)]
        assert len(copied.model.layers) == (3 if out else 4)
        found.append(copied(text(1, 9)[0]).logits)
    assert_close(*found, rtol=1e-5, atol=1e-5)
