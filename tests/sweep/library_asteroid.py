"""Networks of Asteroid, which separate sounds: filters around masks that convolutions or recurrent layers give."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = (
    *("asteroid", "asteroid-filterbanks", "soundfile", "cffi", "pycparser", "torch-optimizer", "pytorch-ranger"),
    *("julius", "pb-bss-eval", "pystoi", "pesq", "pytorch-lightning", "lightning-utilities", "torchmetrics"),
    *("torchaudio", "torchvision"),
)
LENGTH = 400
_FILTERS: dict[str, Any] = {"n_src": 2, "n_filters": 32, "kernel_size": 16, "stride": 8}
_CONVOLUTIONS: dict[str, Any] = _FILTERS | {
    "n_blocks": 2,
    "n_repeats": 2,
    "bn_chan": 16,
    "hid_chan": 32,
    "skip_chan": 16,
}
_CHUNKS: dict[str, Any] = _FILTERS | {"chunk_size": 10, "n_repeats": 2}
_SPECTRUM: dict[str, Any] = {"stft_n_filters": 64, "stft_kernel_size": 64, "stft_stride": 16}
# Class -> its arguments; after a colon a second of the same class.
NETWORKS: dict[str, dict[str, Any]] = {
    "ConvTasNet": _CONVOLUTIONS,
    "ConvTasNet:causal": _CONVOLUTIONS | {"norm_type": "cLN", "causal": True},
    "ConvTasNet:batch_norm": _CONVOLUTIONS | {"norm_type": "bN", "skip_chan": 0, "mask_act": "relu"},
    "ConvTasNet:stft": _CONVOLUTIONS | {"fb_name": "stft"},
    "DCUNet": {"architecture": "mini", "fix_length_mode": "pad", **_SPECTRUM},
    "DPRNNTasNet": _CHUNKS | {"bn_chan": 16, "hid_size": 8},
    "DPRNNTasNet:gru": _CHUNKS | {"bn_chan": 16, "hid_size": 8, "rnn_type": "GRU", "bidirectional": False},
    "DPRNNTasNet:mulcat": _CHUNKS | {"bn_chan": 16, "hid_size": 8, "use_mulcat": True},
    "DPTNet": _CHUNKS | {"n_heads": 4, "ff_hid": 24},
    "DeMask": {"hidden_dims": (32, 16), "n_filters": 64, "kernel_size": 64, "stride": 32},
    "DeMask:both": {
        "input_type": "cat",
        "output_type": "reim",
        "hidden_dims": (32,),
        "n_filters": 64,
        "kernel_size": 64,
        "stride": 32,
    },
    "LSTMTasNet": _FILTERS | {"n_layers": 2, "hid_size": 16, "dropout": 0.0},
    "SuDORMRFImprovedNet": _FILTERS
    | {"kernel_size": 21, "stride": None, "bn_chan": 16, "num_blocks": 2, "upsampling_depth": 2},
    "SuDORMRFNet": _FILTERS
    | {"kernel_size": 21, "stride": None, "bn_chan": 16, "num_blocks": 2, "upsampling_depth": 2},
}


def _network(name: str) -> nn.Module:
    import_torchvision()
    from asteroid import models

    return getattr(models, name.partition(":")[0])(**NETWORKS[name])


def architectures() -> Iterator[Architecture]:
    """Every network, on one channel of sound."""
    for name in NETWORKS:
        yield Architecture(name, functools.partial(_network, name), drawn(1, LENGTH))
