"""Networks of torchaudio for sound: recognition, separation, synthesis, features, and measures of quality."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, Inputs, drawn
from torch import Tensor, nn
from torchaudio_extension import import_torchaudio

PACKAGES = ("torchaudio",)
FRAMES, FEATURES, SYMBOLS, SOUND = 16, 20, 12, 400
_CONFORMER: dict[str, Any] = {"input_dim": FEATURES, "num_heads": 4, "ffn_dim": 48, "num_layers": 2}
_EMFORMER: dict[str, Any] = {"input_dim": FEATURES, "num_heads": 4, "ffn_dim": 48, "num_layers": 2, "segment_length": 4}
_TASNET: dict[str, Any] = {
    "enc_num_feats": 32,
    "msk_num_feats": 16,
    "msk_num_hidden_feats": 32,
    "msk_num_layers": 2,
    "msk_num_stacks": 2,
}
_DEMUCS: dict[str, Any] = {"sources": ["a", "b"], "audio_channels": 1, "channels": 16, "nfft": 256, "depth": 4}
_DROPS: tuple[str, ...] = (
    *("encoder_projection_dropout", "encoder_attention_dropout", "encoder_ff_interm_dropout", "encoder_dropout"),
    "encoder_layer_drop",
)
_SPEECH: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(24, 10, 5), (24, 3, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 7,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 4,
    "encoder_ff_interm_features": 48,
    "encoder_layer_norm_first": False,
    "aux_num_out": SYMBOLS,
    **dict.fromkeys(_DROPS, 0.0),
}
_TRANSDUCER: dict[str, Any] = {
    "input_dim": FEATURES,
    "encoding_dim": 24,
    "num_symbols": SYMBOLS,
    "segment_length": 8,
    "right_context_length": 4,
    "time_reduction_input_dim": 16,
    "time_reduction_stride": 2,
    "transformer_num_heads": 4,
    "transformer_ffn_dim": 48,
    "transformer_num_layers": 2,
    "transformer_dropout": 0.0,
    "transformer_activation": "gelu",
    "transformer_left_context_length": 4,
    "transformer_max_memory_size": 0,
    "transformer_weight_init_scale_strategy": "depthwise",
    "transformer_tanh_on_mem": True,
    "symbol_embedding_dim": 16,
    "num_lstm_layers": 1,
    "lstm_layer_norm": True,
    "lstm_layer_norm_epsilon": 1e-3,
    "lstm_dropout": 0.0,
}
_SYNTHESIS: dict[str, Any] = {
    "n_mels": FEATURES,
    "n_symbol": SYMBOLS,
    "symbol_embedding_dim": 24,
    "encoder_embedding_dim": 24,
    "encoder_n_convolution": 2,
    "decoder_rnn_dim": 16,
    "attention_rnn_dim": 16,
    "attention_hidden_dim": 12,
    "attention_location_n_filter": 4,
    "attention_location_kernel_size": 5,
    "prenet_dim": 16,
    "postnet_n_convolution": 3,
    "postnet_embedding_dim": 24,
}
_SAMPLES: dict[str, Any] = {
    "upsample_scales": [2, 2],
    "n_classes": 8,
    "hop_length": 4,
    "n_res_block": 2,
    "n_rnn": 16,
    "n_fc": 24,
    "n_freq": FEATURES,
    "n_hidden": 16,
    "n_output": 16,
}
_QUALITY: dict[str, Any] = {
    "feat_dim": 32,
    "win_len": 16,
    "d_model": 16,
    "nhead": 4,
    "hidden_dim": 12,
    "num_blocks": 1,
    "rnn_type": "LSTM",
    "chunk_size": 10,
}
# Class or function of torchaudio.models -> its arguments; after a colon a second of the same.
NETWORKS: dict[str, dict[str, Any]] = {
    "Conformer": _CONFORMER | {"depthwise_conv_kernel_size": 5},
    "Conformer:convolution_first": _CONFORMER
    | {"depthwise_conv_kernel_size": 5, "use_group_norm": True, "convolution_first": True},
    "ConvTasNet": _TASNET,
    "ConvTasNet:relu": _TASNET | {"msk_activate": "relu", "num_sources": 3},
    "DeepSpeech": {"n_feature": FEATURES, "n_hidden": 32, "n_class": SYMBOLS},
    "Emformer": _EMFORMER,
    "Emformer:memory": _EMFORMER | {"left_context_length": 4, "right_context_length": 2, "max_memory_size": 1},
    "HDemucs": _DEMUCS,
    "Tacotron2": _SYNTHESIS,
    "Wav2Letter": {"num_classes": SYMBOLS, "input_type": "mfcc", "num_features": FEATURES},
    "WaveRNN": _SAMPLES,
    "emformer_rnnt_model": _TRANSDUCER,
    "squim_objective_model": _QUALITY,
    "squim_objective_model:gru": _QUALITY | {"rnn_type": "GRU", "num_blocks": 2},
    "wav2vec2_model": _SPEECH,
    "wav2vec2_model:layer_norm": _SPEECH
    | {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True},
    "wavlm_model": _SPEECH | {"encoder_num_buckets": 8, "encoder_max_distance": 16},
}


def _network(name: str) -> nn.Module:
    import_torchaudio()
    from torchaudio import models

    return getattr(models, name.partition(":")[0])(**NETWORKS[name])


def _frames(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, FRAMES, FEATURES, generator=generator), torch.full((batch,), FRAMES)


def _frames_and_context(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, FRAMES + 2, FEATURES, generator=generator), torch.full((batch,), FRAMES)


def _transduced(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    frames = torch.randn(batch, FRAMES + 4, FEATURES, generator=generator)
    targets = torch.randint(SYMBOLS, (batch, 5), generator=generator, dtype=torch.int32)
    return frames, torch.full((batch,), FRAMES), targets, torch.full((batch,), 5)


def _spoken(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    symbols = torch.randint(SYMBOLS, (batch, 6), generator=generator)
    spectrum = torch.randn(batch, FEATURES, 8, generator=generator)
    return symbols, torch.full((batch,), 6), spectrum, torch.full((batch,), 8)


def _wave_and_spectrum(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    spectrum = torch.randn(batch, 1, FEATURES, 10, generator=generator)
    return torch.randn(batch, 1, (10 - 5 + 1) * 4, generator=generator), spectrum


INPUTS: dict[str, Inputs] = {
    "Conformer": _frames,
    "ConvTasNet": drawn(1, SOUND),
    "DeepSpeech": drawn(1, FRAMES, FEATURES),
    "Emformer": _frames,
    "Emformer:memory": _frames_and_context,
    "HDemucs": drawn(1, 2048),
    "Tacotron2": _spoken,
    "Wav2Letter": drawn(FEATURES, 64),
    "WaveRNN": _wave_and_spectrum,
    "emformer_rnnt_model": _transduced,
}


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name in NETWORKS:
        inputs = INPUTS.get(name) or INPUTS.get(name.partition(":")[0]) or drawn(SOUND)
        yield Architecture(name, functools.partial(_network, name), inputs)
