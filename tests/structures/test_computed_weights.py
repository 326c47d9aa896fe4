"""Layers whose weights torch computes before every forward keep their widths; the rest of the model is pruned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers_families import FAMILIES, SPEECH, every_other, output, speech_encoder

import obc
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

WAVES = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def masked(model: Any, heads: Tensor, inner: Tensor) -> Tensor:
    """The logits with these heads and feed-forward channels of every layer at zero where they are read."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in copied.base_model.encoder.layers:
            layer.attention.out_proj.weight.unflatten(1, (4, 8))[:, heads] = 0.0
            layer.feed_forward.output_dense.weight[:, inner] = 0.0
        return copied(WAVES).logits


@pytest.mark.parametrize("name", SPEECH)
def test_speech_encoders_are_pruned_beside_their_convolution_over_positions(name: str) -> None:
    model: Any = speech_encoder(name).double()
    structure = TransformersStructure(model)
    groups = {group.name: group for group in structure.groups}
    kinds = [group.kind for group in structure.groups]
    gates_positions = name == "WavLM"  # its heads are left out
    assert kinds.count("ffn") == 2
    assert kinds.count("heads") == (0 if gates_positions else 2)
    heads = every_other(4)[:0] if gates_positions else every_other(4)
    expected = masked(model, heads, every_other(48))
    structure.remove({name: heads if groups[name].kind == "heads" else every_other(48) for name in groups})
    with torch.no_grad():
        found = model(WAVES).logits
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
def test_a_pruned_speech_encoder_is_saved_and_loaded(tmp_path: Any) -> None:
    model: Any = speech_encoder("Wav2Vec2")
    batches = [wave[None].float() for wave in WAVES]
    result = obc.prune(model, None, batches, lambda model, x: model(x).logits.square().mean(), params=0.8, steps=1)
    save_pruned(model, result.plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path).eval()(batches[0]).logits, model(batches[0]).logits)


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def weight_norm_by_hook(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", [weight_norm, weight_norm_by_hook])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.down_proj"])
def test_groups_with_a_computed_weight_are_left_out_by_name(layer: str, compute: Any) -> None:
    case = FAMILIES["llama"]()
    compute(case.model.get_submodule(f"model.layers.0.{layer}"))
    before = output(case, case.model)
    structure = TransformersStructure(case.model)
    (name,) = (name for name, reason in structure.left_out.items() if f"model.layers.0.{layer} " in reason)
    assert name.startswith(f"model.layers.0.{layer.split('.')[0]}")
    assert "obc.plain_layers(model, example_inputs) makes it a parameter" in structure.left_out[name]
    assert len(structure.groups) == 3
    assert not any(group.name.startswith(f"model.layers.0.{layer.split('.')[0]}") for group in structure.groups)
    torch.testing.assert_close(output(case, case.model), before)
