"""Whole blocks and residual branches: removed equals masked, files, caches, costs, rows, and what obc.prune does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from obc.criteria.depth_rows import DepthRows
from obc.structures.masking import masked_copy
from obc.structures.proof import prove
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_TEXT = _SIZES | {"vocab_size": 31, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 32,
    "init_std": 0.2,
}
_GPT2 = {key: value for key, value in _TEXT.items() if not key.startswith("i")}
_IMAGES = _SIZES | {"image_size": 16, "patch_size": 4, "num_labels": 5}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _built(config: str, model: str, **sizes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")  # grouped products of float64 don't exist
    return made.double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _built("LlamaConfig", "LlamaForCausalLM", **_TEXT, num_key_value_heads=2),
    "gpt2": lambda: _built("GPT2Config", "GPT2LMHeadModel", **_GPT2, n_inner=48),
    "opt": lambda: _built(
        "OPTConfig", "OPTForCausalLM", **_TEXT | {"intermediate_size": None}, ffn_dim=48, word_embed_proj_dim=32
    ),
    "bert": lambda: _built("BertConfig", "BertForMaskedLM", **_TEXT),
    "vit": lambda: _built("ViTConfig", "ViTForImageClassification", **_IMAGES),
    "gemma2": lambda: _built(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        **_TEXT,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=_LAYER_TYPES,
    ),
    # Their blocks return tensors, though annotated as tuples.
    "gemma3": lambda: _built(
        "Gemma3TextConfig", "Gemma3ForCausalLM", **_TEXT, num_key_value_heads=2, head_dim=8, layer_types=_LAYER_TYPES
    ),
    "glm4": lambda: _built("Glm4Config", "Glm4ForCausalLM", **_TEXT, num_key_value_heads=2, head_dim=8, pad_token_id=0),
    "qwen2_moe": lambda: _built(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        **_TEXT,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "bart": lambda: _built("BartConfig", "BartForConditionalGeneration", **_ENCODER_DECODER),
    "mamba": lambda: _built(
        "MambaConfig", "MambaForCausalLM", vocab_size=31, hidden_size=32, num_hidden_layers=4, state_size=4
    ),
}
CAUSAL = ("llama", "gpt2", "opt", "gemma2", "gemma3", "glm4", "qwen2_moe", "mamba")


def _batch(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size") and "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, 31, (3, 9), generator=generator)}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def _of_kind(structure: TransformersStructure, kind: str) -> list[str]:
    return [group.name for group in structure.groups if group.kind == kind]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_and_branch_is_proved(name: str) -> None:
    model = MODELS[name]()
    structure = TransformersStructure(model, ["layers", "sublayers", "ffn", "heads"])
    proof = prove(structure, lambda copied: copied(**_batch(model)).logits)
    assert not proof.left_out
    assert not proof.unproved
    blocks = 2 + 3 if name == "bart" else 3
    branches = {"bart": 3 * 2 + 4 * 3, "mamba": 4}.get(name, 8)
    assert len(_of_kind(structure, "layers")) == blocks
    assert len(_of_kind(structure, "sublayers")) == branches
    assert proof.error < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_removed_blocks_equal_masked_ones_and_load_by_from_pretrained(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before, batch = dict(model.state_dict()), _batch(model)
    structure = TransformersStructure(model, ["layers"])
    gone = {block: torch.tensor([0]) for block in _of_kind(structure, "layers")[::2]}
    expected = _logits(masked_copy(model, structure.groups, gone), batch)
    structure.remove(gone)
    stood_in = _logits(model, batch)
    structure.compact()
    assert structure.config_refused is None
    assert torch.equal(stood_in, _logits(model, batch))
    torch.testing.assert_close(stood_in, expected, rtol=1e-12, atol=1e-12)
    structure.plan.verify(before, model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    torch.testing.assert_close(_logits(loaded, batch), stood_in, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("name", MODELS)
def test_removed_branches_and_blocks_go_through_files(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before, batch = dict(model.state_dict()), _batch(model)
    structure = TransformersStructure(model, ["layers", "sublayers", "ffn"])
    branches, widths = _of_kind(structure, "sublayers"), _of_kind(structure, "ffn")
    gone = {branch: torch.tensor([0]) for branch in (branches[0], branches[-1])}
    gone |= {_of_kind(structure, "layers")[0]: torch.tensor([0])}
    gone |= {one: torch.arange(index + 1) for index, one in enumerate(widths)}
    structure.remove(gone)
    structure.compact()
    structure.plan.verify(before, model)
    with pytest.raises(obc.PlanError, match="fresh weights"):
        model.save_pretrained(tmp_path)
    save_pruned(model, structure.plan, tmp_path)
    loaded: Any = load_pruned(tmp_path)
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    torch.testing.assert_close(_logits(loaded.double(), batch), _logits(model, batch), rtol=1e-4, atol=1e-5)
    assert list(loaded.state_dict()) == list(model.state_dict())
    applied = structure.plan.apply(MODELS[name]()) if name not in ("mamba",) else model
    assert {key: value.shape for key, value in applied.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("kind", ["layers", "sublayers"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_cache_equals_without(name: str, kind: str) -> None:
    model: Any = MODELS[name]()
    structure = TransformersStructure(model, [kind])
    names = _of_kind(structure, kind)
    structure.remove({one: torch.tensor([0]) for one in (names[0], names[-1])})  # also the first attention
    structure.compact()
    prompt = _batch(model)["input_ids"][:1]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **how)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **how))


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", ["llama", "bert", "qwen2_moe", "bart"])
def test_costs_are_those_of_what_is_left(name: str) -> None:
    model = MODELS[name]()
    structure = TransformersStructure(model, ["layers", "sublayers", "ffn", "heads", "expert_ffn"])
    for one in (*_of_kind(structure, "sublayers")[-1:], *_of_kind(structure, "layers")[:1], "", *structure.blocks):
        costs = structure.costs("parameters")
        assert costs.total() == sum(parameter.numel() for parameter in model.parameters())
        if one not in costs.names:
            continue
        freed = float(costs.marginal()[costs.names.index(one)])
        structure.remove({one: torch.tensor([0])})
        assert costs.total() - freed == structure.costs("parameters").total()
    structure.compact()
    assert structure.costs("parameters").total() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_rows_are_the_derivative_by_a_gate_on_what_is_added(name: str, per_sample: bool) -> None:
    model = MODELS[name]()
    structure = TransformersStructure(model, ["layers", "sublayers"])

    def losses(found: nn.Module, batch: Any) -> Tensor:
        values: Tensor = found(**batch).logits.square().flatten(1).mean(1)
        return values if per_sample else values.mean()

    reader = DepthRows(structure.groups, losses, per_sample)
    for index in range(2):
        reader.seek(index, 0)
        reader(model, _batch(model, index)).sum().backward()
    rows = reader.rows()
    for group in structure.groups:
        expected = []
        for index in range(2):
            batch = _batch(model, index)
            gate = torch.ones(3 if per_sample else 1, dtype=torch.float64, requires_grad=True)
            with _Gated(model, group.name, group.kind == "layers", gate):
                losses(model, batch).sum().backward()
            assert gate.grad is not None
            expected.append(gate.grad)
        got = rows[group.name].out_channels
        assert got is not None
        torch.testing.assert_close(got[:, 0], torch.cat(expected).float(), rtol=1e-5, atol=1e-8)


class _Gated:
    """A module whose output, or what it adds to its input, is multiplied by a gate."""

    def __init__(self, model: nn.Module, name: str, whole: bool, gate: Tensor) -> None:
        self.module, self.whole, self.gate = model.get_submodule(name), whole, gate
        self.forward = self.module.forward

    def __enter__(self) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            output = self.forward(*args, **kwargs)
            y = output[0] if isinstance(output, tuple) else output
            gate = self.gate.reshape(-1, *[1] * (y.dim() - 1))
            changed = x + gate * (y - x) if self.whole else gate * y
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        self.module.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *exception: object) -> None:
        self.module.forward = self.forward  # type: ignore[method-assign]


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (["layers"], {"params": 0.7}),
        (["sublayers"], {"blocks": 0.6, "steps": 2}),
        (["layers", "sublayers", "ffn", "heads"], {"macs": 0.6, "steps": 3}),
        (["layers", "ffn"], {"macs": 0.6, "steps": 2, "compensate": "ls", "recalibrate": False}),
        (["layers"], {"blocks": 0.7, "steps": 1, "criterion": "masked"}),
        (["layers"], {"blocks": 0.5, "steps": 2, "criterion": "block_influence"}),
        (["layers"], {"blocks": 0.5, "steps": 1, "allocation": "tail"}),
    ],
    ids=lambda value: "-".join(map(str, value if isinstance(value, list) else value.values())),
)
def test_prune_meets_its_budget(kinds: list[str], options: dict[str, Any]) -> None:
    model: Any = MODELS["llama"]()
    batches = [_batch(model, seed) for seed in range(8)]
    structure = TransformersStructure(model, kinds)
    result = obc.prune(model, None, batches, _loss, structure=structure, progress=False, **options)
    report = result.report
    assert report.error is not None
    assert report.error < 1e-12
    last = report.steps[-1]
    unit = "macs" if "macs" in options else "params" if "params" in options else "blocks"
    if unit != "blocks":
        assert (last.macs if unit == "macs" else last.parameters) <= options[unit]
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.macs_measured == pytest.approx(report.macs_after / report.macs_before, abs=1e-6)
    assert len(model.model.layers) == model.config.num_hidden_layers
    if options.get("allocation") == "tail":
        assert result.plan.depth.lists["model.layers"].removed == (2, 3)


def test_the_window_with_the_lowest_score_goes() -> None:
    model = MODELS["llama"]()
    batches = [_batch(model, seed) for seed in range(4)]
    structure = TransformersStructure(model, ["layers"])
    statistics = obc.collect(model, batches, statistics="blocks")
    influence = [
        1 - statistics.blocks[f"model.layers.{i}"].cosine / statistics.blocks[f"model.layers.{i}"].count
        for i in (1, 2, 3)
    ]
    cheapest = (1, 2) if influence[0] + influence[1] < influence[1] + influence[2] else (2, 3)
    result = obc.prune(
        model, None, batches, _loss, structure=structure, criterion="block_influence", allocation="window",
        blocks=0.5, steps=1, progress=False,
    )  # fmt: skip
    assert result.plan.depth.lists["model.layers"].removed == cheapest


def test_pruning_goes_on_from_a_plan(tmp_path: Path) -> None:
    model: Any = MODELS["gemma2"]()
    before, batch = dict(model.state_dict()), _batch(model)
    first = TransformersStructure(model, ["layers"])
    first.remove({"model.layers.1": torch.tensor([0])})
    first.compact()
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"plan=structure\.plan"):
        first.remove({"model.layers.2": torch.tensor([0])})
    second = TransformersStructure(model, ["layers", "ffn"], plan=first.plan)
    second.remove({"model.layers.3": torch.tensor([0]), "model.layers.2.mlp.gate_proj": torch.arange(8)})
    second.compact()
    second.plan.verify(before, model)
    assert model.config.layer_types == ["sliding_attention", "sliding_attention"]
    second.plan.save(tmp_path / "plan.json")
    plan = obc.PruningPlan.load(tmp_path / "plan.json")
    assert plan.depth == second.plan.depth
    plan.verify(before, model)
    save_pruned(model, plan, tmp_path)
    loaded = _logits(load_pruned(tmp_path).double(), batch)
    torch.testing.assert_close(loaded, _logits(model, batch), rtol=1e-4, atol=1e-5)  # tables of angles in float32


def test_a_model_whose_blocks_depend_on_their_place_is_refused_and_restored() -> None:
    model: Any = MODELS["llama"]()
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, args, output: (output[0] * (1 + module.layer_idx), None))
    before, batch = _logits(model, _batch(model)), _batch(model)
    later = ["model.layers.2", "model.layers.3"]
    structure = TransformersStructure(model, ["layers"], ignored_layers=later)
    with pytest.raises(obc.PruningError, match="depends on its place"):
        obc.prune(model, None, [batch] * 4, _loss, structure=structure, params=0.8, steps=1, progress=False)
    assert torch.equal(_logits(model, batch), before)


def test_a_config_that_would_give_blocks_other_constants_is_refused(tmp_path: Path) -> None:
    model = _built("GPT2Config", "GPT2LMHeadModel", **_GPT2, scale_attn_by_inverse_layer_idx=True)
    structure = TransformersStructure(model, ["layers"])
    structure.remove({"transformer.h.1": torch.tensor([0])})
    structure.compact()
    assert "scaling" in str(structure.config_refused)
    with pytest.raises(obc.PlanError, match="fresh weights"):
        model.save_pretrained(tmp_path)
    save_pruned(model, structure.plan, tmp_path)
    loaded = _logits(load_pruned(tmp_path).double(), _batch(model))
    torch.testing.assert_close(loaded, _logits(model, _batch(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_block_of_every_list_stays_and_is_named(name: str) -> None:
    structure = TransformersStructure(MODELS[name](), ["layers"])
    named = [block for block, why in structure.left_out.items() if "the first block of a list stays" in why]
    assert len(named) == (2 if name == "bart" else 1)
    assert not {group.name for group in structure.groups} & set(named)


def test_what_is_no_branch_is_named() -> None:
    model = _built("BloomConfig", "BloomForCausalLM", vocab_size=31, hidden_size=32, n_layer=2, n_head=4)
    left_out = TransformersStructure(model, ["sublayers"]).left_out
    assert "residual" in left_out["transformer.h.0.self_attention"]


@pytest.mark.parametrize(
    ("kinds", "uniform", "message"),
    [
        (["layers", "embedding"], False, "change the same weights"),
        (["layers", "ffn"], True, "prune by one"),
        (["blocks"], False, "'layers', 'sublayers'"),
    ],
)
def test_kinds_that_do_not_go_together(kinds: list[str], uniform: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersStructure(MODELS["llama"](), kinds, uniform=uniform)
