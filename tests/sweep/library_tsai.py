"""Networks of tsai for time series, one or two of each of its modules."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, drawn
from torch import Tensor, nn
from torchvision_operators import import_torchvision

# The newest versions of fastai's libraries import a web framework.
PACKAGES = (
    *("tsai", "fastai==2.7.19", "fastcore==1.7.29", "fastprogress==1.0.3", "fastdownload", "plum-dispatch", "beartype"),
    *("fasttransform", "imbalanced-learn", "sklearn-compat", "pyts", "torchvision", "pillow", "scikit-learn", "pandas"),
)
SERIES, LENGTH, CLASSES = 3, 24, 4
_SIZE: dict[str, Any] = {"seq_len": LENGTH}
_ENCODER: dict[str, Any] = _SIZE | {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
_DEEP: dict[str, Any] = _SIZE | {"d_model": 32, "depth": 2}
_TABLE: dict[str, Any] = {
    "classes": {"a": list(range(5)), "b": list(range(3))},
    "cont_names": ["c", "d"],
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
}
# module.class -> its arguments; after a colon a second of the same class.
NETWORKS: dict[str, dict[str, Any]] = {
    "ConvTranPlus.ConvTranPlus": _SIZE | {"d_model": 16, "n_heads": 8, "dim_ff": 32},
    "FCN.FCN": {"layers": [16, 32, 16]},
    "FCNPlus.FCNPlus": {"layers": [16, 32, 16], "residual": True, "separable": True},
    "InceptionTime.InceptionTime": {"nf": 8},
    "InceptionTimePlus.InceptionTimePlus": {"nf": 8, "bn": True, "concat_pool": True},
    "MLP.MLP": _SIZE | {"layers": [32, 32], "ps": [0.0, 0.0], "use_bn": True},
    "OmniScaleCNN.OmniScaleCNN": _SIZE | {"layers": [64, 2048]},
    "PatchTST.PatchTST": _ENCODER | {"patch_len": 8, "stride": 4, "pred_dim": 6},
    "PatchTST.PatchTST:individual": _ENCODER | {"patch_len": 8, "stride": 4, "pred_dim": 6, "individual": True},
    "PatchTST.PatchTST:decomposition": _ENCODER
    | {"patch_len": 8, "stride": 4, "pred_dim": 6, "decomposition": True, "kernel_size": 5},
    "RNN.LSTM": {"hidden_size": 16, "n_layers": 2, "bidirectional": True},
    "RNNAttention.LSTMAttention": _SIZE
    | {"hidden_size": 32, "encoder_layers": 2, "n_heads": 4, "d_ff": 48, "bidirectional": False},
    "RNNPlus.GRUPlus": _SIZE | {"hidden_size": [16, 24], "last_step": False},
    "RNN_FCN.LSTM_FCN": _SIZE | {"hidden_size": 16, "conv_layers": [16, 32, 16]},
    "RNN_FCN.MGRU_FCN": _SIZE | {"hidden_size": 16, "conv_layers": [16, 32, 16], "se": 4},
    "ResCNN.ResCNN": {},
    "ResCNN.ResCNN:coordinates": {"coord": True},
    "ResNet.ResNet": {},
    "ResNetPlus.ResNetPlus": {"nf": 16, "ks": [7, 5, 3]},
    "TCN.TCN": {"layers": [16, 16, 24], "ks": 3},
    "TSPerceiver.TSPerceiver": _SIZE
    | {"n_latents": 8, "d_latent": 16, "n_layers": 2, "cross_n_heads": 2, "self_n_heads": 4},
    "TSSequencerPlus.TSSequencerPlus": _DEEP,
    "TST.TST": _ENCODER,
    "TSTPlus.TSTPlus": _ENCODER,
    "TSTPlus.TSTPlus:pre_norm": _ENCODER | {"pre_norm": True, "res_attention": False, "norm": "LayerNorm"},
    "TSiTPlus.TSiTPlus": _DEEP | {"n_heads": 4},
    "TSiTPlus.TSiTPlus:local": _DEEP | {"n_heads": 4, "lsa": True, "use_token": True},
    "TransformerModel.TransformerModel": {"d_model": 32, "n_head": 4, "d_ffn": 48, "n_layers": 2},
    "TransformerRNNPlus.TransformerGRUPlus": _SIZE | {"d_model": 32, "nhead": 4, "dim_feedforward": 48},
    "XCM.XCM": _SIZE | {"nf": 16},
    "XceptionTime.XceptionTime": {"nf": 4, "adaptive_size": 10},
    "XceptionTimePlus.XceptionTimePlus": {"nf": 4, "adaptive_size": 10},
    "gMLP.gMLP": _SIZE | {"d_model": 32, "d_ffn": 48, "depth": 2},
    "mWDN.mWDN": _SIZE | {"levels": 2, "nf": 8},
    "GatedTabTransformer.GatedTabTransformer": _TABLE | {"mlp_d_model": 16, "mlp_d_ffn": 24, "mlp_layers": 2},
    "TabFusionTransformer.TabFusionTransformer": _TABLE,
    "TabModel.TabModel": {"emb_szs": [(5, 8), (3, 8)], "n_cont": 2, "layers": [32, 16]},
    "TabTransformer.TabTransformer": _TABLE,
}


def _network(name: str) -> nn.Module:
    import_torchvision()
    module, _, kind = name.partition(":")[0].partition(".")
    made = getattr(importlib.import_module(f"tsai.models.{module}"), kind)
    given = NETWORKS[name]
    if module.endswith(("TabTransformer", "TabFusionTransformer", "TabModel")):
        return made(c_out=CLASSES, **given)
    return made(SERIES, CLASSES, **given)


def _table(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    kinds = [torch.randint(kind, (batch,), generator=generator) for kind in (5, 3)]
    return torch.stack(kinds, 1), torch.randn(batch, 2, generator=generator)


def architectures() -> Iterator[Architecture]:
    """Every network, on series or on rows of a table."""
    for name in NETWORKS:
        inputs = _table if "Tab" in name else drawn(SERIES, LENGTH)
        yield Architecture(name, functools.partial(_network, name), inputs)
