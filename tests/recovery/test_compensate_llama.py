"""Compensation and folding of a Hugging Face Llama whose queries share keys and values, sliced by hand."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from prunable import Pruned
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from obc.recovery import Kept, PruningPlan, chain_parts, compensate, equivalent_pruning

HEADS, KV_HEADS, HEAD_WIDTH, LAYERS = 4, 2, 8, 2
KEPT_WIDTH = 20  # of 48

# Query heads kept: one of each pair that shares a key and value head, or one whole pair.
KEPT_HEADS = {"query-heads": ([1, 2], [0, 1]), "kv-heads": ([2, 3], [1])}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=HEADS * HEAD_WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double().eval()


def tokens(seed: int, count: int = 12) -> Tensor:
    return torch.randint(40, (count, 16), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, use_cache=False).logits


def channels(heads: list[int]) -> Tensor:
    return (torch.tensor(heads)[:, None] * HEAD_WIDTH + torch.arange(HEAD_WIDTH)).flatten()


def shrink(linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[rows]
    linear.weight = nn.Parameter((weight if columns is None else weight[:, columns]).clone())
    linear.out_features, linear.in_features = linear.weight.shape


def sliced(which: str) -> Pruned:
    """Feed-forward widths and heads of every layer, by hand: Torch-Pruning never ends tracing grouped queries."""
    original = llama()
    pruned, plan = copy.deepcopy(original), {}
    queries, keys = (channels(heads) for heads in KEPT_HEADS[which])
    for index in range(LAYERS):
        layer, prefix = pruned.model.layers[index], f"model.layers.{index}"
        width = torch.randperm(48, generator=torch.Generator().manual_seed(index))[:KEPT_WIDTH].sort().values
        for part, rows, columns in (
            ("self_attn.q_proj", queries, None),
            ("self_attn.k_proj", keys, None),
            ("self_attn.v_proj", keys, None),
            ("self_attn.o_proj", None, queries),
            ("mlp.gate_proj", width, None),
            ("mlp.up_proj", width, None),
            ("mlp.down_proj", None, width),
        ):
            if len(keys) == KV_HEADS * HEAD_WIDTH and part in ("self_attn.k_proj", "self_attn.v_proj"):
                continue
            shrink(layer.get_submodule(part), rows, columns)
            plan[f"{prefix}.{part}"] = Kept(rows, columns)
        layer.self_attn.num_key_value_groups = len(queries) // len(keys)
    return Pruned(original, pruned, PruningPlan(plan))


def error(model: nn.Module, original: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(logits(model, batch), logits(original, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize("which", KEPT_HEADS)
def test_plan_is_found_again_from_values(which: str) -> None:
    pruned = sliced(which)
    pruned.plan.verify(pruned.state_dict, pruned.model)
    found = PruningPlan.from_models(pruned.state_dict, pruned.model)
    assert set(found) == set(pruned.plan)
    for name, kept in pruned.plan.items():
        for side in ("out_channels", "in_channels"):
            expected, got = getattr(kept, side), getattr(found[name], side)
            assert got is expected or torch.equal(got, expected), (name, side)


@pytest.mark.parametrize("mode", ["ls", "seq"])
@pytest.mark.parametrize("which", KEPT_HEADS)
def test_compensation_reaches_feed_forward_and_attention_outputs(which: str, mode: str) -> None:
    pruned = sliced(which)
    fresh = [tokens(seed) for seed in (900, 901)]
    before = error(pruned.model, pruned.original, fresh)
    names = list(pruned.model.state_dict())
    report = compensate(pruned.model, pruned.original, pruned.plan, [tokens(s) for s in range(12)], logits, mode=mode)
    parts = ("self_attn.o_proj", "mlp.down_proj")
    assert list(report.layers) == [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in parts]
    for layer in report.layers.values():
        assert layer.input_error_after < layer.input_error_before
    assert any(layer.applied for name, layer in report.layers.items() if name.endswith("o_proj"))
    assert report.final_error < report.naive_error
    assert error(pruned.model, pruned.original, fresh) < 0.95 * before
    assert list(pruned.model.state_dict()) == names


@pytest.mark.slow
def test_seq_runs_each_module_alone_and_gives_what_whole_runs_give(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 6)
    data, calls, found = [tokens(seed, 3) for seed in range(6)], [], {}
    for way in ("by module", "from the start"):
        pruned, calls[:] = sliced("kv-heads"), []
        handles = [
            layer.register_forward_hook(lambda *_: calls.append(1))
            for model in (pruned.model, pruned.original)
            for layer in model.model.layers
        ]
        if way == "from the start":
            monkeypatch.setattr(chain_parts, "agreed_chain", lambda *_: ([], "a test says so"))
        report = compensate(pruned.model, pruned.original, pruned.plan, data, logits, mode="seq")
        for handle in handles:
            handle.remove()
        found[way] = report.tried["layer by layer"], pruned.model.state_dict(), len(calls)
    (alone, alone_state, few), (whole, whole_state, many) = found.values()
    assert alone == pytest.approx(whole, rel=1e-9)
    for name, tensor in alone_state.items():
        torch.testing.assert_close(tensor, whole_state[name], rtol=1e-8, atol=1e-10)
    # Of each of two models, a layer runs on a batch for its two consumers and once to go on; from the start, for every
    # consumer of the model. Finding the chain takes the fewer runs more.
    by_module, from_start = (2 * len(data) * LAYERS * runs for runs in (2 + 1, 2 * LAYERS))
    assert 0.8 * (from_start - by_module) < many - few < from_start - by_module
    assert "mode 'seq' takes about 24 forward passes over the calibration data" in caplog.text
    assert "a test says so" in caplog.text


@pytest.mark.parametrize("factors", ["full", "reduced"])
def test_folds_and_merges_into_the_sliced_model(factors: str) -> None:
    pruned = sliced("kv-heads")
    equivalent = equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan, factors=factors)
    batch = tokens(0)
    assert (logits(equivalent.model, batch) - logits(pruned.model, batch)).abs().max() < 1e-10
    optimizer = torch.optim.SGD(equivalent.param_groups(0.05, 0.0), momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        logits(equivalent.model, batch).square().mean().backward()
        optimizer.step()
    expected = logits(equivalent.model, batch)
    merged = equivalent.merge()
    assert torch.equal(logits(merged, batch), expected)
    pruned.model.load_state_dict(merged.state_dict(), strict=True)
