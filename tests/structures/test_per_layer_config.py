"""Widths that differ from layer to layer, said by transformers' per_layer_config where the model's code reads it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from obc import PruningPlan
from obc.structures.transformers import TransformersStructure, save_pruned

TOKENS = torch.arange(3, 11)[None]


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=32, intermediate_size=48, head_dim=8, **sizes)
    ).eval()


class _LayerByLayer(modeling_llama.LlamaDecoderLayer):
    """Reads its own layer's config, as code that knows heterogeneous models does."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config.per_layer_config[layer_idx], layer_idx)


def _uneven(model: LlamaForCausalLM) -> TransformersStructure:
    structure = TransformersStructure(model, ["ffn"])
    structure.remove(
        {"model.layers.0.mlp.gate_proj": torch.arange(8), "model.layers.2.mlp.gate_proj": torch.arange(20)}
    )
    return structure


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def test_from_pretrained_alone_loads_what_the_models_code_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", _LayerByLayer)
    model = _llama()
    structure = _uneven(model)
    assert structure.config_refused is None
    assert not structure.warnings
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert {int(place): values["intermediate_size"] for place, values in said.items()} == {0: 40, 2: 28}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(loaded), _logits(model))
    again = TransformersStructure(loaded, ["ffn", "layers"])  # configs of single layers are read and moved
    assert [group.size for group in again.groups][:3] == [40, 48, 28]
    again.remove({"model.layers.1": torch.tensor([0])})
    again.compact()
    assert again.config_refused is None
    assert [loaded.config.per_layer_config[place].intermediate_size for place in range(2)] == [40, 28]
    loaded.save_pretrained(tmp_path / "fewer")
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(tmp_path / "fewer").eval()), _logits(loaded))


def test_equal_widths_undo_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", _LayerByLayer)
    model = _llama()
    structure = _uneven(model)
    sizes = {group.name: group.size for group in structure.groups}
    structure.remove({name: torch.arange(size - 28) for name, size in sizes.items()})
    assert structure.config_refused is None
    assert [layer.intermediate_size for layer in model.config.per_layer_config] == [28, 28, 28]


def test_code_that_does_not_read_it_keeps_the_unpruned_config_and_a_warning() -> None:
    model = _llama()
    before = model.config.to_dict()
    structure = _uneven(model)
    assert "layers keep different intermediate_size" in str(structure.config_refused)
    assert "does not read them layer by layer" in str(structure.config_refused)
    assert "save_pruned" in structure.warnings[0]
    assert model.config.to_dict() == before


def test_a_model_that_save_pruned_refuses_gets_another_remedy() -> None:
    model = _llama()
    model.config = SimpleNamespace(hidden_size=32, num_attention_heads=4)  # as other libraries' configs: no to_dict
    (warning,) = _uneven(model).warnings
    assert warning.endswith("; save state_dict and plan")
    with pytest.raises(ValueError, match="save its state_dict and plan"):
        save_pruned(model, PruningPlan(), "unused")
