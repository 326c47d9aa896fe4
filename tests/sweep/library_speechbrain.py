"""Networks of SpeechBrain: speaker embeddings, recognition, separation and synthesis, encoders, recurrent layers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, Inputs, drawn
from torch import nn
from torchaudio_extension import import_torchaudio
from torchvision_operators import import_torchvision

PACKAGES = ("speechbrain", "hyperpyyaml", "ruamel.yaml", "torchaudio", "soundfile", "cffi", "sentencepiece", "joblib")
FRAMES, FEATURES, WIDTH = 16, 20, 32
_SPEAKERS: dict[str, Any] = {
    "input_size": FEATURES,
    "channels": [16, 16, 16, 48],
    "kernel_sizes": [3, 3, 3, 1],
    "dilations": [1, 2, 3, 1],
    "groups": [1, 1, 1, 1],
    "attention_channels": 8,
    "res2net_scale": 4,
    "se_channels": 8,
    "lin_neurons": 12,
}
_TDNN: dict[str, Any] = {
    "tdnn_blocks": 3,
    "tdnn_channels": [16, 16, 24],
    "tdnn_kernel_sizes": [3, 3, 1],
    "tdnn_dilations": [1, 2, 1],
    "lin_neurons": 12,
    "in_channels": FEATURES,
}
_RECOGNITION: dict[str, Any] = {
    "input_shape": [None, None, FEATURES],
    "dropout": 0.0,
    "cnn_channels": [8, 12],
    "rnn_layers": 2,
    "rnn_neurons": 16,
    "dnn_neurons": 24,
}
_ENCODER: dict[str, Any] = {"num_layers": 2, "d_model": WIDTH, "nhead": 4}
_SYNTHESIS: dict[str, Any] = {
    "in_channels": FEATURES,
    "out_channels": 1,
    "resblock_type": "1",
    "resblock_dilation_sizes": [[1, 3, 1], [1, 3, 1]],
    "resblock_kernel_sizes": [3, 5],
    "upsample_kernel_sizes": [4, 4],
    "upsample_initial_channel": 32,
    "upsample_factors": [2, 2],
}
_MASKS: dict[str, Any] = {"N": FEATURES, "B": 16, "H": 24, "P": 3, "X": 2, "R": 2, "C": 2}
_RECURRENT: dict[str, Any] = {"hidden_size": 16, "input_shape": [None, None, FEATURES], "num_layers": 2}
# Module and class -> its arguments; after a colon a second of the same.
NETWORKS: dict[str, dict[str, Any]] = {
    "lobes.models.ECAPA_TDNN.ECAPA_TDNN": _SPEAKERS,
    "lobes.models.ECAPA_TDNN.ECAPA_TDNN:local": _SPEAKERS | {"global_context": False},
    "lobes.models.Xvector.Xvector": _TDNN,
    "lobes.models.CRDNN.CRDNN": _RECOGNITION,
    "lobes.models.CRDNN.CRDNN:projection": _RECOGNITION | {"projection_dim": 12, "time_pooling": True},
    "lobes.models.ContextNet.ContextNet": {
        "input_shape": [None, None, FEATURES],
        "out_channels": 24,
        "conv_channels": [16, 16],
        "strides": [1, 1],
        "residuals": [True, True],
        "num_blocks": 2,
        "num_layers": 2,
        "inner_dim": 4,
        "dropout": 0.0,
    },
    "lobes.models.ResNet.ResNet": {
        "input_size": FEATURES,
        "channels": [8, 8, 16, 16],
        "block_sizes": [1, 1, 1, 1],
        "lin_neurons": 12,
    },
    "lobes.models.conv_tasnet.MaskNet": _MASKS,
    "lobes.models.conv_tasnet.MaskNet:causal": _MASKS | {"norm_type": "cLN", "causal": True},
    "lobes.models.VanillaNN.VanillaNN": {"input_shape": [None, None, FEATURES], "dnn_blocks": 3, "dnn_neurons": 24},
    "lobes.models.HifiGAN.HifiganGenerator": _SYNTHESIS,
    "lobes.models.convolution.ConvolutionFrontEnd": {
        "input_shape": [None, None, FEATURES],
        "num_blocks": 2,
        "num_layers_per_block": 2,
        "out_channels": [8, 12],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "dilations": [1, 1],
        "residuals": [True, True],
        "dropout": 0.0,
    },
    "lobes.models.transformer.Transformer.TransformerEncoder": _ENCODER | {"d_ffn": 48},
    "lobes.models.transformer.Transformer.TransformerEncoder:before": _ENCODER
    | {"d_ffn": 48, "normalize_before": True, "ffn_type": "1dcnn"},
    "lobes.models.transformer.Conformer.ConformerEncoder": _ENCODER
    | {"d_ffn": 48, "kernel_size": 5, "attention_type": "regularMHA"},
    "lobes.models.transformer.Branchformer.BranchformerEncoder": _ENCODER
    | {"kernel_size": 5, "attention_type": "regularMHA", "csgu_linear_units": 48},
    **{f"nnet.RNN.{kind}": _RECURRENT for kind in ("RNN", "LSTM", "GRU", "LiGRU", "SLiGRU", "QuasiRNN")},
    "nnet.RNN.LiGRU:both_ways": _RECURRENT | {"bidirectional": True},
}
INPUTS: dict[str, Inputs] = {
    "MaskNet": drawn(FEATURES, FRAMES),
    "HifiganGenerator": drawn(FEATURES, FRAMES),
    **dict.fromkeys(("TransformerEncoder", "ConformerEncoder", "BranchformerEncoder"), drawn(FRAMES, WIDTH)),
}


class _Behind(nn.Module):
    """A recurrent layer between linear ones, which gives its outputs without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(FEATURES, FEATURES), layer, nn.LazyLinear(5)

    def forward(self, x: Any) -> Any:
        return self.last(self.layer(self.first(x))[0])


def _network(name: str) -> nn.Module:
    import_torchvision()
    import_torchaudio()
    path, _, kind = name.partition(":")[0].rpartition(".")
    layer = getattr(importlib.import_module(f"speechbrain.{path}"), kind)(**NETWORKS[name])
    if path != "nnet.RNN":
        return layer
    model = _Behind(layer)
    model(drawn(FRAMES, FEATURES)(2, None))  # type: ignore[arg-type]
    return model


def architectures() -> Iterator[Architecture]:
    """Every network, on frames of features."""
    for name in NETWORKS:
        inputs = INPUTS.get(name.partition(":")[0].rpartition(".")[2], drawn(FRAMES, FEATURES))
        yield Architecture(name, functools.partial(_network, name), inputs)
