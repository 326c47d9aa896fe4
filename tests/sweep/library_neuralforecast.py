"""Forecasting networks of neuralforecast; each takes one dict of windows of series."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture
from torch import Tensor, nn
from torchvision_operators import import_torchvision

PACKAGES = (
    *("neuralforecast", "coreforecast", "utilsforecast", "pytorch-lightning", "lightning-utilities", "torchmetrics"),
    *("ray", "msgpack", "protobuf", "optuna", "colorlog", "alembic", "sqlalchemy", "tensorboardX", "torchvision"),
)
AHEAD, PAST, SERIES = 6, 24, 4
_UNITS: dict[str, Any] = {"mlp_units": 3 * [[32, 32]]}
_RECURRENT: dict[str, Any] = {"encoder_hidden_size": 16, "decoder_hidden_size": 24}
_ATTENTION: dict[str, Any] = {"hidden_size": 32, "n_head": 4, "conv_hidden_size": 24, "encoder_layers": 1}
_AVERAGE: dict[str, Any] = {"MovingAvg_window": 5}
_TOKENS: dict[str, Any] = {"hidden_size": 32, "n_heads": 4, "d_ff": 48, "e_layers": 2}
# Class -> its arguments; after a colon a second of the same class.
NETWORKS: dict[str, dict[str, Any]] = {
    "Autoformer": _ATTENTION | _AVERAGE,
    "BiTCN": {"hidden_size": 8},
    "DLinear": {"moving_avg_window": 5},
    "DeepAR": {"lstm_hidden_size": 16, "decoder_hidden_layers": 1, "decoder_hidden_size": 24},
    "DeepNPTS": {"hidden_size": 16},
    "DilatedRNN": {**_RECURRENT, "dilations": [[1, 2]], "context_size": 4},
    "GRU": _RECURRENT,
    "Informer": _ATTENTION,
    "KAN": {"hidden_size": 16},
    "LSTM": _RECURRENT,
    "MLP": {"hidden_size": 32},
    "NBEATS": _UNITS,
    "NBEATS:shared": _UNITS | {"n_blocks": [2, 2, 2], "shared_weights": True},
    "NBEATSx": _UNITS,
    "NHITS": _UNITS,
    "NLinear": {},
    "PatchTST": {"hidden_size": 32, "n_heads": 4, "linear_hidden_size": 48, "encoder_layers": 2, "patch_len": 8},
    "RNN": _RECURRENT,
    "TCN": {**_RECURRENT, "dilations": [1, 2], "context_size": 4},
    "TFT": {"hidden_size": 16},
    "TiDE": {"hidden_size": 24, "decoder_output_dim": 8, "temporal_decoder_dim": 16},
    "TimesNet": {"hidden_size": 16, "conv_hidden_size": 16, "top_k": 2, "num_kernels": 2, "encoder_layers": 1},
    "VanillaTransformer": _ATTENTION,
}
# The same of those that forecast several series together.
TOGETHER: dict[str, dict[str, Any]] = {
    "MLPMultivariate": {"hidden_size": 32},
    "RMoK": {},
    "SOFTS": {"hidden_size": 32, "d_core": 16, "d_ff": 48},
    "StemGNN": {"multi_layer": 2},
    "TSMixer": {"ff_dim": 16},
    "TSMixerx": {"ff_dim": 16},
    "TimeMixer": {"d_model": 16, "d_ff": 24, "e_layers": 1, "moving_avg": 5},
    "TimeXer": _TOKENS | {"patch_len": 8},
    "XLinear": {"hidden_size": 32, "temporal_ff": 24},
    "iTransformer": _TOKENS,
}


def _network(name: str) -> nn.Module:
    import_torchvision()
    from neuralforecast import models

    sizes = {"h": AHEAD, "input_size": PAST, "max_steps": 1}
    if name in TOGETHER:
        return getattr(models, name)(n_series=SERIES, **sizes, **TOGETHER[name])
    return getattr(models, name.partition(":")[0])(**sizes, **NETWORKS[name])


def _windows(series: int, batch: int, generator: torch.Generator) -> tuple[dict[str, Tensor | None]]:
    past = torch.randn(batch, PAST, series, generator=generator)
    others = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return ({"insample_y": past, "insample_mask": torch.ones_like(past), **others},)


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name in (*NETWORKS, *TOGETHER):
        inputs = functools.partial(_windows, SERIES if name in TOGETHER else 1)
        yield Architecture(name, functools.partial(_network, name), inputs)
