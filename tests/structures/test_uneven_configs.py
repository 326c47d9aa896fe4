"""Uneven widths of several families: from_pretrained loads them as they are, or not at all, and save_pruned does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

TOKENS = torch.arange(3, 11)[None]
_SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen3": {},
    "Gemma2": {},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48},
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    sizes = _SIZES | FAMILIES[name]
    if name in ("OPT", "GPT2"):
        sizes = {key: value for key, value in sizes.items() if key in ("vocab_size", *FAMILIES[name])}
        if name == "OPT":
            sizes |= {key: _SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    if name in ("Phi3", "Olmo2", "Granite", "Mixtral"):
        sizes.pop("head_dim")
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_config_loads_with_other_shapes_in_silence(name: str, kind: str, tmp_path: Path) -> None:
    kinds = {"ffn": ["ffn", "expert_ffn"], "heads": ["heads"]}[kind]
    model = built(name)
    before = model.config.to_dict()
    structure = TransformersStructure(model, kinds)
    assert structure.groups
    structure.remove({structure.groups[0].name: torch.arange(structure.groups[0].size // 2)})
    expected, after = logits(model), model.config.to_dict()
    model.save_pretrained(tmp_path / "saved")
    if structure.config_refused is None:
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved").eval()), expected)
        return
    assert "save_pruned" in structure.warnings[0]
    assert after == before
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # never fresh weights in silence
        type(model).from_pretrained(tmp_path / "saved")
    save_pruned(model, structure.plan, tmp_path / "pruned")
    assert torch.equal(logits(load_pruned(tmp_path / "pruned")), expected)
