"""Models of several parts: the language part alone is pruned, or both, and the config of each part says its widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import obc
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_IMAGE = 60
TOKENS = torch.tensor([[5, 7, *[_IMAGE] * 4, 9, 11]])


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=_IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=_VISION,
        image_token_id=_IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=_IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 24, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    config = transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope}, vision_config=vision, image_token_id=_IMAGE
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS = {"llava": llava, "smolvlm": smolvlm, "gemma3": gemma3, "qwen2-vl": qwen2_vl}
TOWERS = {
    "llava": "model.vision_tower",
    "smolvlm": "model.vision_model",
    "gemma3": "model.vision_tower",
    "qwen2-vl": "model.visual",
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def outputs(model: Any, name: str) -> Tensor:
    torch.manual_seed(1)
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if name in ("llava", "gemma3"):
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16)
    else:
        inputs["input_ids"] = TOKENS[TOKENS != _IMAGE][None]
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def half(structure: TransformersStructure) -> None:
    structure.remove(
        {group.name: torch.arange(1 if group.kind == "heads" else group.size // 2) for group in structure.groups}
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_language_part_alone_is_pruned_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = built(name)
    vision = {key: value.clone() for key, value in model.get_submodule(TOWERS[name]).state_dict().items()}
    # The config of Qwen2-VL has no word for the size of a head, so that it can't say fewer of them.
    kinds = ["ffn"] if name == "qwen2-vl" else ["ffn", "heads"]
    structure = TransformersStructure(model, kinds, uniform=True, ignored_layers=[TOWERS[name]])
    assert {group.kind for group in structure.groups} == set(kinds)
    assert not any(group.name.startswith(TOWERS[name]) for group in structure.groups)
    half(structure)
    assert structure.config_refused is None
    assert model.config.text_config.intermediate_size == 24
    after = model.get_submodule(TOWERS[name]).state_dict()
    assert all(torch.equal(after[key], value) for key, value in vision.items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded, name), outputs(model, name))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_both_parts_are_pruned_and_the_config_says_both(name: str, tmp_path: Path) -> None:
    """Keys of the same name belong to their part: 48 inner channels of the language, 40 of the vision tower."""
    model = built(name)
    structure = TransformersStructure(model, ["ffn"], uniform=True)
    half(structure)
    assert structure.config_refused is None
    assert model.config.text_config.intermediate_size == 24
    assert model.config.vision_config.intermediate_size == 20
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), name), outputs(model, name))


@pytest.mark.parametrize("name", MODELS)
def test_uneven_widths_of_a_part_keep_the_unpruned_config_and_a_warning(name: str, tmp_path: Path) -> None:
    model = built(name)
    before = model.config.to_dict()
    structure = TransformersStructure(model, ["ffn"], ignored_layers=[TOWERS[name]])
    structure.remove({structure.groups[0].name: torch.arange(8)})
    assert "layers keep different intermediate_size" in str(structure.config_refused)
    assert model.config.to_dict() == before
    save_pruned(model, structure.plan, tmp_path)
    assert torch.equal(outputs(load_pruned(tmp_path), name), outputs(model, name))


def test_obc_prune_on_images_and_text() -> None:
    model = built("llava")
    batch = {"input_ids": TOKENS, "labels": TOKENS, "pixel_values": torch.randn(1, 3, 16, 16)}

    def loss(model: Any, batch: Any) -> Tensor:
        found: Tensor = model(**batch).loss
        return found

    result = obc.prune(model, batches=[batch], loss_fn=loss, macs=0.8, ignored_layers=["model.vision_tower"], steps=1)
    assert result.plan
    assert all(layer.startswith("model.language_model.") for layer in result.plan)
