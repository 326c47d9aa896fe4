"""Families with a mechanism of their own: every block of a tiny model is found, and removed exactly, by the sweep's
own examination in float64: sliced against masked, saved and loaded, scores against explicit autograd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from sweep_configs import OVERRIDES  # noqa: E402
from sweep_inputs import inputs_of  # noqa: E402
from sweep_model import built, examine, in_float64, model_class  # noqa: E402

import obc  # noqa: E402
from obc.structures.transformers import TransformersStructure  # noqa: E402

ONE_LAYER = {"num_hidden_layers": 1}
PARTS_OF_BLT = ("patcher", "encoder", "decoder", "global")
SMALL = ONE_LAYER | {"image_size": [32, 32], "patch_size": [8, 8]}
# Task, model type, sizes of its config -> groups of each kind. All of the model is in one of them.
WHOLE: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [
    ("causal", "blt", {f"{part}_config": ONE_LAYER for part in PARTS_OF_BLT}, {"heads": 6, "ffn": 4}),
    ("causal", "diffllama", ONE_LAYER, {"heads": 1, "ffn": 1}),
    ("causal", "doge", ONE_LAYER, {"heads": 1, "ffn": 1}),
    ("causal", "granitemoeshared", {}, {"heads": 2, "experts": 2, "expert_ffn": 2, "ffn": 2}),
    ("causal", "granitemoehybrid", {"num_local_experts": 0}, {"mixer_heads": 2, "ffn": 2}),  # Granite 4's dense models
    ("causal", "lfm2_moe", {}, {"mixer_channels": 1, "heads": 1, "experts": 1, "expert_ffn": 1, "ffn": 1}),
    ("masked", "convbert", {}, {"heads": 2, "ffn": 2}),
    ("image", "hiera", {"num_heads": [2, 4]}, {"heads": 2, "ffn": 2}),
    ("image-text", "exaone4_5", {"vision_config": {"depth": 1}}, {"heads": 3, "ffn": 3}),
    ("image-text", "internvl", {"vision_config": SMALL | {"use_qk_norm": True}}, {"heads": 3, "ffn": 3}),
    (
        "image-text",
        "kosmos-2.5",
        {"text_config": {"layers": 1}, "vision_config": ONE_LAYER, "latent_query_num": 8},
        {"heads": 3, "ffn": 2},
    ),
    ("image-text", "lfm3_vl", {}, {"mixer_channels": 2, "heads": 3, "ffn": 5}),
    ("image-text", "pix2struct", {}, {"heads": 4, "ffn": 4}),
    ("image-text", "qwen2_5_omni_thinker", {"vision_config": {"depth": 1}}, {"heads": 5, "ffn": 5}),
    # with a merger of patches behind the first layer, and one at the end
    (
        "image-text",
        "qwen3_vl",
        {"vision_config": {"depth": 1, "deepstack_visual_indexes": [0]}},
        {"heads": 3, "ffn": 5},
    ),
]


SLOW = ("internvl", "lfm3_vl")  # others here have the same mechanisms


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize(
    ("task", "model_type", "sizes", "kinds"),
    [pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=[pytest.mark.slow] if one[1] in SLOW else []) for one in WHOLE],
)
def test_every_block_is_found_and_removed_exactly(
    task: str, model_type: str, sizes: dict[str, Any], kinds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OVERRIDES, model_type, OVERRIDES.get(model_type, {}) | sizes)
    found = examine(task, model_type)
    assert found is not None
    assert (found.built, found.wrong, found.left_out) == ("", "", {})
    assert found.kinds == kinds


def test_a_norm_of_responses_is_scored_and_loses_its_entries() -> None:
    """ConvNeXt V2: weight and bias of shape (1, 1, 1, channels), and a mean over the channels that stay."""
    found = examine("image", "convnextv2")
    assert found is not None
    assert not found.wrong
    assert found.kinds == {"ffn": 2}
    with in_float64(model_class("image", "convnextv2")[1]):
        model = built("image", "convnextv2")
        name, batch = "convnextv2.encoder.stages.1.layers.0.grn", inputs_of("image", model)
        norm = model.get_submodule(name)
        scores = obc.score(model, [batch], _loss, progress=False)
        weight, bias = torch.autograd.grad(_loss(model, batch), [norm.weight, norm.bias])
    expected = (norm.weight * weight + norm.bias * bias).flatten().square()
    torch.testing.assert_close(scores[name].out_channels.double(), expected, rtol=1e-5, atol=0)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).logits.square().mean()
    return loss


def test_an_attention_that_keeps_its_only_head_says_so() -> None:
    with in_float64(model_class("image", "segformer")[1]):
        model = built("image", "segformer")
    assert "SegformerAttention has a single head" in TransformersStructure(model).left_out.values()


@pytest.mark.parametrize(
    ("model_type", "place", "key"),
    [
        ("gemma3n_text", ".laurel.", "laurel_rank"),
        ("granitemoehybrid", ".shared_", "shared_intermediate_size"),
        ("nemotron_h", ".shared_", "moe_shared_expert_intermediate_size"),
        ("qwen2_moe", ".shared_", "shared_expert_intermediate_size"),
    ],
)
def test_the_config_counts_the_channels_of_blocks_beside_the_usual_ones(model_type: str, place: str, key: str) -> None:
    with in_float64(model_class("causal", model_type)[1]):
        model = built("causal", model_type)
    structure = TransformersStructure(model, ["ffn"])
    counted = [name for name in structure.blocks if place in name]
    assert counted
    before = getattr(model.config, key)
    structure.remove({name: torch.arange(before // 4) for name in counted})
    assert structure.config_refused is None
    assert getattr(model.config, key) == before - before // 4


def test_a_config_that_computes_a_width_of_its_own_says_the_one_left(tmp_path: Path) -> None:
    """LFM2 rounds two thirds of the config's width up to a multiple of 256, unless it is told not to."""
    with in_float64(model_class("causal", "lfm2")[1]):
        model = built("causal", "lfm2")
    structure = TransformersStructure(model, ["ffn"])
    structure.remove({group.name: torch.arange(100) for group in structure.groups})
    assert structure.config_refused is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    batch = inputs_of("causal", model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
