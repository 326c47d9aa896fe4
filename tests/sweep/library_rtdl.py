"""Networks for tables: rtdl's MLP, ResNet and FT-Transformer with embeddings of numbers, and TabNet."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, Inputs, drawn
from torch import Tensor, nn

PACKAGES = ("rtdl_revisiting_models", "rtdl_num_embeddings", "pytorch-tabnet", "scikit-learn", "joblib")
NUMBERS, KINDS, CLASSES = 6, [3, 5, 4], 3
_BLOCKS: dict[str, Any] = {"n_blocks": 2, "d_block": 32, "d_out": CLASSES}
_RESIDUAL: dict[str, Any] = _BLOCKS | {"d_hidden_multiplier": 2.0, "dropout1": 0.0, "dropout2": 0.0}
_TRANSFORMER: dict[str, Any] = _BLOCKS | {
    "attention_n_heads": 4,
    "ffn_d_hidden_multiplier": 1.5,
    **dict.fromkeys(("attention_dropout", "ffn_dropout", "residual_dropout"), 0.0),
}
_TABLE: dict[str, Any] = {"cat_cardinalities": KINDS, "n_cont_features": NUMBERS, **_TRANSFORMER}
_NUMERIC: dict[str, Any] = {"cat_cardinalities": [], "n_cont_features": NUMBERS, **_TRANSFORMER}
# Name -> the arguments of FTTransformer.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "FTTransformer": _TABLE,
    "FTTransformer:relu": _TABLE | {"ffn_activation": "ReLU"},
    "FTTransformer:numbers": _NUMERIC,
    "FTTransformer:linformer": _TABLE
    | {"linformer_kv_compression_ratio": 0.5, "linformer_kv_compression_sharing": "headwise"},
    "FTTransformer:linformer_shared": _TABLE
    | {"linformer_kv_compression_ratio": 0.5, "linformer_kv_compression_sharing": "key-value"},
}
# Name -> the arguments of TabNet; every mask is a sparse softmax over features.
TABNETS: dict[str, dict[str, Any]] = {
    "TabNet": {},
    "TabNet:entmax": {"mask_type": "entmax"},
    "TabNet:one_step": {"n_steps": 1, "n_independent": 1, "n_shared": 0},
    "TabNetPretraining": {"pretraining_ratio": 0.0},
}


def _embedded(embeddings: nn.Module, width: int) -> nn.Module:
    """Embeddings of numbers under an MLP, as their documentation joins them."""
    from rtdl_revisiting_models import MLP

    mlp = MLP(d_in=NUMBERS * width, dropout=0.0, **_BLOCKS)
    return nn.Sequential(embeddings, nn.Flatten(), mlp)


def _network(name: str) -> nn.Module:
    import rtdl_num_embeddings as numbers
    import rtdl_revisiting_models as rtdl

    if name in TRANSFORMERS:
        return rtdl.FTTransformer(**TRANSFORMERS[name])
    bins = [torch.linspace(-2, 2, 5) for _ in range(NUMBERS)]
    made = {
        "MLP": lambda: rtdl.MLP(d_in=NUMBERS, dropout=0.0, **_BLOCKS),
        "ResNet": lambda: rtdl.ResNet(d_in=NUMBERS, **_RESIDUAL),
        "LinearReLUEmbeddings": lambda: _embedded(numbers.LinearReLUEmbeddings(NUMBERS, 8), 8),
        "PeriodicEmbeddings": lambda: _embedded(numbers.PeriodicEmbeddings(NUMBERS, 8, n_frequencies=6, lite=False), 8),
        "PeriodicEmbeddings:lite": lambda: _embedded(
            numbers.PeriodicEmbeddings(NUMBERS, 8, n_frequencies=6, lite=True), 8
        ),
        "PiecewiseLinearEncoding": lambda: _embedded(numbers.PiecewiseLinearEncoding(bins), 4),
        "PiecewiseLinearEmbeddings": lambda: _embedded(
            numbers.PiecewiseLinearEmbeddings(bins, 8, activation=True, version="B"), 8
        ),
    }
    return made[name]()


def _tabnet(name: str) -> nn.Module:
    from pytorch_tabnet import tab_network

    columns: dict[str, Any] = {"cat_idxs": [0], "cat_dims": [KINDS[0]], "cat_emb_dim": [4]}
    widths: dict[str, Any] = {"n_d": 8, "n_a": 8, "group_attention_matrix": torch.eye(NUMBERS)}
    kind = name.partition(":")[0]
    given = columns | widths | TABNETS[name] | ({"output_dim": CLASSES} if kind == "TabNet" else {})
    return getattr(tab_network, kind)(input_dim=NUMBERS, **given)


def _table(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    kinds = [torch.randint(kind, (batch,), generator=generator) for kind in KINDS]
    return torch.randn(batch, NUMBERS, generator=generator), torch.stack(kinds, 1)


def _numbers_alone(batch: int, generator: torch.Generator) -> tuple[Tensor, None]:
    return torch.randn(batch, NUMBERS, generator=generator), None


def _first_is_a_kind(batch: int, generator: torch.Generator) -> Tensor:
    kinds = torch.randint(KINDS[0], (batch, 1), generator=generator)
    return torch.cat([kinds, torch.randn(batch, NUMBERS - 1, generator=generator)], 1)


def architectures() -> Iterator[Architecture]:
    """Every network."""
    inputs: dict[str, Inputs] = dict.fromkeys(TRANSFORMERS, _table) | {"FTTransformer:numbers": _numbers_alone}
    plain = ("MLP", "ResNet", "LinearReLUEmbeddings", "PeriodicEmbeddings", "PeriodicEmbeddings:lite")
    for name in (*plain, "PiecewiseLinearEncoding", "PiecewiseLinearEmbeddings", *TRANSFORMERS):
        yield Architecture(name, functools.partial(_network, name), inputs.get(name, drawn(NUMBERS)))
    for name in TABNETS:
        yield Architecture(name, functools.partial(_tabnet, name), _first_is_a_kind)
