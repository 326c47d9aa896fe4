"""Conformers for speech, which the sweep's tasks don't run: their heads, convolutions and feed-forward blocks."""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from sweep_configs import tiny_config  # noqa: E402
from sweep_model import difference, in_float64, tensors  # noqa: E402

from obc.structures.proof import prove  # noqa: E402
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned  # noqa: E402

# Class -> groups of each kind in its layers; all else of these is named.
FOUND = {
    "ParakeetForCTC": {"ffn": 4, "heads": 2, "mixer_channels": 2},
    "Wav2Vec2BertModel": {"ffn": 4, "heads": 2, "mixer_channels": 2},
    "LasrForCTC": {"ffn": 4, "heads": 2, "mixer_channels": 2},
    "GraniteSpeechCTCEncoder": {"ffn": 4, "heads": 2, "mixer_channels": 2},
}


def _encoder(name: str) -> tuple[type[Any], Any, int]:
    """Class, tiny config and number of features of a sound."""
    if name == "GraniteSpeechCTCEncoder":
        from transformers.models.granite_speech import modeling_granite_speech as granite

        config = tiny_config(transformers.GraniteSpeechEncoderConfig, "", "granite_speech_encoder")
        config.hidden_dim, config.num_heads, config.dim_head, config.context_size, config.num_layers = 32, 4, 8, 16, 2
        return granite.GraniteSpeechCTCEncoder, config, config.input_dim
    chosen = getattr(transformers, name)
    config = tiny_config(chosen.config_class, "", chosen.config_class.model_type)
    features = getattr(config, "feature_projection_input_dim", None)
    return chosen, config, features or config.encoder_config.num_mel_bins


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", FOUND)
def test_every_block_of_a_conformer_is_removed_exactly(name: str) -> None:
    chosen, config, features = _encoder(name)
    with in_float64(chosen):
        torch.manual_seed(0)
        model, sound = chosen(config).double().eval(), torch.randn(2, 32, features, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        structure = TransformersStructure(model)
        assert Counter(group.kind for group in structure.groups) == FOUND[name]
        assert not structure.left_out
        proof = prove(structure, lambda copied: copied(sound))
        assert len(proof.proved) == len(structure.groups)
        assert proof.error < 1e-11
        structure.remove({group.name: torch.arange(1, group.size, 2) for group in structure.groups})
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save_pruned(model, structure.plan, folder)
            loaded = load_pruned(folder, chosen).double().eval()
            assert difference(tensors(loaded(sound)), tensors(model(sound))) < 1e-11
