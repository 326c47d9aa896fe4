"""obc.collect against float64 definitions written out over every position, and its promises about runs."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from models import Case
from torch import Tensor, nn
from torch import distributed as dist

import obc
from obc.statistics import Blocks, Experts, Gram, StatisticsError, memory, residual_blocks, sums
from obc.statistics.run import collect

CASES: dict[str, Callable[[], Case]] = {
    "cnn": models.residual_cnn,
    "conv2d": lambda: models.convolutions(2),
    "vit": models.vit,
    "llama": models.llama,
    "gpt2": models.gpt2,
    "mixtral": families.FAMILIES["mixtral"],
}
FORWARD = ("moments", "gram", "blocks", "experts")


def inputs_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple) else batch


def forward(model: nn.Module, batch: Any) -> Any:
    x = inputs_of(batch)
    return model(x.to(models.dtype_of(model)) if x.is_floating_point() else x)


def statistics_of(name: str) -> list[str]:
    absent = {"cnn": ("experts", "blocks"), "conv2d": ("experts", "blocks"), "mixtral": ()}
    return [one for one in FORWARD if one not in absent.get(name, ("experts",))]


def double(case: Case) -> nn.Module:
    model = copy.deepcopy(case.model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def input_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}


def seen_inputs(model: nn.Module, case: Case) -> Iterator[tuple[str, list[Tensor]]]:
    """Layer name -> its inputs (samples, positions, channels), batch by batch."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        dim = -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1

        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().movedim(dim, -1)
            seen.setdefault(name, []).append(x.reshape(len(x), -1, x.shape[-1]))

        return hook

    handles = [module.register_forward_pre_hook(note(name, module)) for name, module in input_layers(model).items()]
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, name=name: note_experts(seen, name, m, *args))
            )
    with torch.no_grad():
        for batch in case.batches:
            forward(model, batch)
    for handle in handles:
        handle.remove()
    yield from seen.items()


def note_experts(seen: dict[str, list[Tensor]], name: str, experts: Any, hidden: Any, indices: Any, _: Any) -> None:
    """What every expert's down projection reads, token by token, each a sample of its own."""
    rows: dict[int, list[Tensor]] = {}
    for token, chosen in enumerate(indices.tolist()):
        for expert in chosen:
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            rows.setdefault(expert, []).append((experts.act_fn(gate) * up).detach())
    for expert, found in rows.items():
        seen.setdefault(f"{name}[{expert}]", []).append(torch.stack(found)[:, None])


def close(got: Any, expected: Any, rtol: float = 2e-5) -> None:
    got, expected = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_same(one: obc.Statistics, other: obc.Statistics, statistic: str, exact: bool = True) -> None:
    mine, yours = getattr(one, statistic), getattr(other, statistic)
    assert list(mine) == list(yours)
    for module in mine:
        for field in fields(mine[module]):
            a, b = getattr(mine[module], field.name), getattr(yours[module], field.name)
            if isinstance(a, Tensor):
                assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
            elif a is not None and b is not None:
                assert a == b if exact else math.isclose(a, b, rel_tol=1e-5)


# --- definitions -------------------------------------------------------------------------------------------------


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
    for got, of_block, tokens in [*checked, (window.blocks[blocks[0]], both, slice(None))]:
        x, y = (torch.cat([pair[side][:, tokens].flatten(0, 1) for pair in of_block]) for side in (0, 1))
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


# --- together, in parts, padded, in other precision ----------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_together_equals_each_alone(name: str) -> None:
    """With rows and gradients beside them too, and in any order."""
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


def test_a_mask_that_fits_no_input_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.ones(2, 4)}
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


# --- runs ----------------------------------------------------------------------------------------------------------


ALL = ["rows", "moments", "gram", "gradient_moments", "blocks"]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(place: int, tmp_path: Path) -> None:
    case = models.llama()
    batches = case.batches * 2

    def until(count: int) -> Iterator[Any]:
        yield from itertools.islice(batches, count)
        raise KilledError

    def run(of: Any, **options: Any) -> obc.Statistics:
        return collect(case.model, of, case.loss, statistics=ALL, **options)

    path = tmp_path / "state"
    with pytest.raises(KilledError):
        run(until(place), checkpoint=path, every=2)
    assert path.exists() == (place > 1)
    resumed, whole = run(iter(batches), checkpoint=path, every=2), run(iter(batches))
    assert not path.exists()
    assert resumed.num_batches == whole.num_batches == 6
    for one in ALL[1:]:
        assert_same(resumed, whole, one)
    for module in whole.rows:
        for a, b in zip(vars(whole.rows[module]).values(), vars(resumed.rows[module]).values(), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert resumed.coverage == whole.coverage


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    case, path = models.llama(), tmp_path / "state"

    def stopped() -> Iterator[Any]:
        yield from case.batches
        raise KilledError

    with pytest.raises(KilledError):
        collect(case.model, stopped(), statistics="moments", checkpoint=path, every=1)
    with pytest.raises(obc.scoring.CheckpointError, match="of another run"):
        collect(case.model, iter(case.batches), statistics=["gram"], checkpoint=path)
    other = models.seeded(lambda: copy.deepcopy(case.model), seed=5)
    with pytest.raises(obc.scoring.CheckpointError, match="other weights"):
        collect(other, iter(case.batches), statistics="moments", checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(obc.scoring.CheckpointError, match="damaged"):
        collect(case.model, iter(case.batches), statistics="moments", checkpoint=path)


def test_files_give_back_what_was_saved(tmp_path: Path) -> None:
    case = families.FAMILIES["mixtral"]()
    got = collect(case.model, case.batches, case.loss, statistics=[*ALL, "experts"])
    got.save(tmp_path / "file")
    back = obc.Statistics.load(tmp_path / "file")
    assert back.collected == got.collected
    for one in (*ALL[1:], "experts"):
        assert_same(back, got, one)
    assert torch.equal(back.rows["lm_head"].in_channels, got.rows["lm_head"].in_channels)
    assert (back.coverage, back.num_batches, back.report) == (got.coverage, got.num_batches, got.report)
    (tmp_path / "bad").write_bytes((tmp_path / "file").read_bytes()[:-8])
    obc.score(case.model, case.batches[:1], case.loss).save(tmp_path / "scores")
    for name in ("bad", "scores"):
        with pytest.raises(StatisticsError, match="not a file of statistics"):
            obc.Statistics.load(tmp_path / name)


def _process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    case = families.FAMILIES["mixtral"]()
    mine = case.batches[rank::2]
    got = collect(case.model, mine, case.loss, statistics=[*ALL, "experts"], process_group=dist.group.WORLD)
    got.save(Path(folder) / f"{rank}")
    forward_only = [one for one in FORWARD if one != "experts"]
    by_block = collect(
        case.model, mine, statistics=forward_only, process_group=dist.group.WORLD, by_block=True, progress=False
    )
    by_block.save(Path(folder) / f"{rank}-by-block")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    case = families.FAMILIES["mixtral"]()
    order = case.batches[::2] + case.batches[1::2]
    whole = collect(case.model, order, case.loss, statistics=[*ALL, "experts"])
    for rank in range(2):
        got = obc.Statistics.load(tmp_path / f"{rank}")
        by_block = obc.Statistics.load(tmp_path / f"{rank}-by-block")
        assert got.num_batches == by_block.num_batches == 3
        for one in by_block.collected:
            assert_same(by_block, whole, one, exact=False)
        for one in (*ALL[1:], "experts"):
            assert_same(got, whole, one, exact=False)
        for module in whole.rows:
            for a, b in zip(vars(whole.rows[module]).values(), vars(got.rows[module]).values(), strict=True):
                assert a is b is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)


# --- only what is needed, and bad input ----------------------------------------------------------------------------


def test_groups_limit_what_is_read_to_their_consumers() -> None:
    case = models.llama()
    groups = obc.transformer_groups(case.model, ["ffn"])
    got = collect(case.model, case.batches, case.loss, statistics=["moments", "rows"], groups=groups)
    consumers = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(got.moments) == set(got.rows) == consumers
    whole = collect(case.model, case.batches, case.loss, statistics="moments")
    for name in consumers:
        assert torch.equal(got.moments[name].sum, whole.moments[name].sum)
    with pytest.raises(KeyError, match="not among the modules"):
        got.moments["lm_head"]


def test_a_batch_that_is_not_finite_is_left_out_and_named() -> None:
    case = models.residual_cnn()
    bad = (case.batches[0][0].clone(), case.batches[0][1])
    bad[0][1, 0, 0, 0] = float("nan")
    batches = [case.batches[0], bad, case.batches[1]]
    for statistics in (["moments", "gram"], ["moments", "gram", "gradient_moments", "rows"]):
        with pytest.warns(UserWarning, match="batch 1: moments of .* not finite"):
            got = collect(case.model, batches, case.loss, statistics=statistics)
        good = collect(case.model, [batches[0], batches[2]], case.loss, statistics=statistics)
        for one in ("moments", "gram"):
            assert_same(got, good, one)
        assert any("batch 1: gram" in line for line in got.left_out)
    with pytest.raises(StatisticsError, match=r"batch 0: moments of .* is not finite"):
        collect(case.model, [bad], case.loss, statistics="moments")


@pytest.mark.parametrize("backward", [False, True])
def test_a_device_that_is_not_waited_for_leaves_the_same_batches_out(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is not finite becomes zero without being read, and is named at the end."""
    case = models.residual_cnn()
    bad = (case.batches[0][0].clone().index_fill(0, torch.tensor([1]), float("inf")), case.batches[0][1])
    batches = [case.batches[0], bad, case.batches[1]]
    names = ["moments", "gram", *(["gradient_moments"] if backward else [])]
    loss = case.loss if backward else None

    def run(of: list[Any]) -> obc.Statistics:
        return collect(case.model, of, loss, statistics=names, forward_fn=forward)

    with pytest.warns(UserWarning, match="not finite"):
        at_once = run(batches)
    monkeypatch.setattr(sums, "reads_at_once", lambda device: False)
    with pytest.warns(UserWarning, match="not finite"):
        later = run(batches)
    assert later.left_out == at_once.left_out
    for name in names:
        assert_same(later, at_once, name)
    with pytest.raises(StatisticsError, match=r"batch 0: moments of .* is not finite"):
        run([bad])


def run_until_killed(folder: Path) -> None:
    """Collect in a process that kills itself in the middle of the fourth batch."""

    def batches() -> Iterator[Any]:
        for index, batch in enumerate(models.residual_cnn().batches * 2):
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    case = models.residual_cnn()
    collect(case.model, batches(), case.loss, statistics=["rows", "moments"], checkpoint=folder / "state", every=2)


def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    process = torch.multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    case = models.residual_cnn()
    options: dict[str, Any] = {"statistics": ["rows", "moments"]}
    assert (tmp_path / "state").exists()
    resumed = collect(case.model, iter(case.batches * 2), case.loss, checkpoint=tmp_path / "state", **options)
    whole = collect(case.model, iter(case.batches * 2), case.loss, **options)
    assert_same(resumed, whole, "moments")
    assert torch.equal(resumed.rows["head"].in_channels, whole.rows["head"].in_channels)


def test_modules_that_are_never_called_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.borrowed = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.borrowed.weight)

    with pytest.warns(UserWarning, match=r"no moments of 'borrowed' \(never called"):
        got = collect(Net(), [torch.randn(2, 3)], statistics="moments")
    assert got.coverage["moments"]["borrowed"].startswith("unread")
    with pytest.raises(KeyError, match="never called"):
        got.moments["borrowed"]


def test_a_gram_matrix_too_large_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.llama()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    with pytest.raises(StatisticsError, match=r"take .* KiB on cpu, where 9\.8 KiB are free .*Gram\(to='host'\)"):
        collect(case.model, case.batches, statistics="gram")


def test_products_outside_the_blocks_count_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(32, 2))
    needed = 8 * (3 * 4**2 + 32**2) + 4 * 32**2  # all sums, and the products of the last layer
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(StatisticsError, match="the largest, of '1' with 32 channels"):
        collect(model, [torch.zeros(2, 4)], statistics="gram", by_block=True)


def test_bytes_are_known_before_the_run() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(6, 2, 1, groups=2))
    assert memory.memory_estimate(model, ["rows", "gram", "moments"]) == {
        "gram": 12 * (5 * 5 + 6 * 6),
        "moments": 4 * 12 * (5 + 6),
    }


def test_gram_on_the_host_is_the_same() -> None:
    case = models.llama()
    one, other = (collect(case.model, case.batches, statistics=[Gram(to=to)]) for to in ("host", "device"))
    assert_same(one, other, "gram")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"statistics": "grams"}, "statistics are 'rows', 'moments', 'gram'"),
    "twice": ({"statistics": ["gram", Gram()]}, "asked for twice"),
    "empty": ({"statistics": []}, "statistics is empty"),
    "no loss": ({"statistics": "rows"}, "pass loss_fn"),
    "no loss for gradients": ({"statistics": "gradient_moments"}, "pass loss_fn"),
    "no experts": ({"statistics": "experts"}, "nothing to read 'experts'"),
    "rows": ({"statistics": "gram", "rows": "token"}, "rows must be"),
    "every": ({"statistics": "gram", "every": 0}, "at least 1"),
    "span": ({"statistics": [Blocks(span=3)]}, "1 to 2"),
    "block": ({"statistics": [Blocks(modules=["x"])]}, "no module 'x'"),
    "object": ({"statistics": [object()]}, "a statistic is a name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str) -> None:
    case = models.llama()
    options, message = REFUSED[name]
    with pytest.raises(StatisticsError, match=message):
        collect(case.model, case.batches, **options)


def test_no_batches_and_what_was_not_collected() -> None:
    case = models.llama()
    with pytest.raises(StatisticsError, match="batches is empty"):
        collect(case.model, [], statistics="gram")
    got = collect(case.model, case.batches, statistics="moments")
    with pytest.raises(StatisticsError, match=r"'gram' was not collected \(there are moments\)"):
        _ = got.gram
    with pytest.raises(StatisticsError, match="obs needs the statistic 'gram'"):
        got.require(["gram"], "obs")
    with pytest.raises(StatisticsError, match="compiled"):
        collect(torch.compile(case.model), case.batches, statistics="moments")
    with pytest.raises(StatisticsError, match=r"returned \(4,\)"):
        collect(case.model, case.batches, case.losses, statistics="gradient_moments")
