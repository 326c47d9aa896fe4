"""A vision-language model of which the language part alone is pruned: the vision part stays, and images are used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

import obc  # noqa: E402
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned  # noqa: E402

IMAGE_TOKEN = 36
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**SIZES, vocab_size=37, num_key_value_heads=2, pad_token_id=0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model.double().eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, IMAGE_TOKEN, (2, 12), generator=generator)
    ids[:, 1:5] = IMAGE_TOKEN  # of 2 x 2 patches
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator).double()}


def test_the_language_part_alone_is_pruned_with_images(tmp_path: Any) -> None:
    model = llava()
    structure = TransformersStructure(model, ignored_layers=["model.vision_tower"], example_inputs=batch())
    assert structure.proof is not None
    assert structure.proof.proved == [group.name for group in structure.groups]
    assert [(group.kind, group.size) for group in structure.groups] == [("heads", 2), ("ffn", 48)] * 2
    assert all(group.name.startswith("model.language_model.") for group in structure.groups)
    masked = copy.deepcopy(model)
    for layer in masked.model.language_model.layers:
        layer.self_attn.o_proj.weight.data[:, :16] = 0
        layer.mlp.down_proj.weight.data[:, 5:20] = 0
    units = {"heads": torch.tensor([0]), "ffn": torch.arange(5, 20)}
    structure.remove({group.name: units[group.kind] for group in structure.groups})
    with torch.no_grad():
        expected = masked(**batch()).logits
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-6, atol=1e-6)
        save_pruned(model, structure.plan, tmp_path)
        torch.testing.assert_close(load_pruned(tmp_path).double()(**batch()).logits, model(**batch()).logits)


def test_obc_prune_leaves_the_vision_part_as_it_is() -> None:
    model = llava().float()
    batches = [{key: x.float() if x.is_floating_point() else x for key, x in batch(seed).items()} for seed in range(4)]
    before = {name: tuple(p.shape) for name, p in model.model.vision_tower.named_parameters()}

    def loss(model: Any, inputs: Any) -> torch.Tensor:
        return model(**inputs).logits.float().square().mean()

    structure = TransformersStructure(model, ignored_layers=["model.vision_tower"])
    result = obc.prune(
        model, None, batches, loss, structure=structure, params=0.9, steps=1, progress=False, compensate=None
    )
    assert {name: tuple(p.shape) for name, p in model.model.vision_tower.named_parameters()} == before
    assert any("language_model" in name for name in result.report.widths)
