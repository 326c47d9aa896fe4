"""Networks of DeepCTR-Torch, which predict clicks: embeddings of fields, their products, and linear layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from sweep_networks import Architecture
from torch import Tensor, nn

PACKAGES = ("deepctr-torch", "scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals")
WORDS, WIDTH, FIELDS, NUMBERS, LENGTH = 11, 8, 4, 3, 5
_DEEP: dict[str, Any] = {"dnn_hidden_units": (32, 16)}
_TOWERS: dict[str, Any] = {"tower_dnn_hidden_units": (16,)}
_EXPERTS: dict[str, Any] = {"expert_dnn_hidden_units": (32, 16), "gate_dnn_hidden_units": (16,), **_TOWERS}
# Class -> its arguments; after a colon a second of the same class.
NETWORKS: dict[str, dict[str, Any]] = {
    "AFM": {},
    "AFN": {"ltl_hidden_size": 16, "afn_dnn_hidden_units": (32, 16)},
    "AutoInt": _DEEP,
    "CCPM": {"conv_kernel_width": (3, 2), **_DEEP},
    "DCN": _DEEP,
    "DCN:matrix": {"cross_parameterization": "matrix", **_DEEP},
    "DCNMix": {"low_rank": 8, "num_experts": 2, **_DEEP},
    "DeepFM": _DEEP,
    "DeepFM:norms": {"dnn_use_bn": True, "dnn_activation": "prelu", **_DEEP},
    "DIEN": {"att_hidden_units": (16, 8), **_DEEP},
    "DIEN:AUGRU": {"gru_type": "AUGRU", "att_hidden_units": (16, 8), **_DEEP},
    "DIFM": _DEEP,
    "DIN": {"att_hidden_size": (16, 8), **_DEEP},
    "ESMM": _TOWERS,
    "FiBiNET": _DEEP,
    "FiBiNET:each": {"bilinear_type": "each", **_DEEP},
    "IFM": _DEEP,
    "MLR": {},
    "MMOE": _EXPERTS,
    "NFM": _DEEP,
    "ONN": _DEEP,
    "PLE": _EXPERTS,
    "PNN": _DEEP,
    "PNN:outer": {"use_outter": True, **_DEEP},
    "SharedBottom": {"bottom_dnn_hidden_units": (32, 16), **_TOWERS},
    "WDL": _DEEP,
    "xDeepFM": {"cin_layer_size": (16, 8), **_DEEP},
}
_ONE_LIST = ("ESMM", "MMOE", "PLE", "PNN", "SharedBottom")  # they take the columns once
_OF_HISTORY = ("DIN", "DIEN")
_OF_WORDS = ("AFM", "CCPM")  # they refuse columns of numbers


def _network(name: str) -> nn.Module:
    with mock.patch("threading.Thread.start"):  # importing it asks the network for its newest version
        from deepctr_torch import inputs, models
    words = [inputs.SparseFeat(f"word{n}", WORDS, embedding_dim=WIDTH) for n in range(FIELDS)]
    kind = name.partition(":")[0]
    numbers = range(0 if kind in _OF_WORDS else NUMBERS)
    columns: list[Any] = [*words, *(inputs.DenseFeat(f"number{n}", 1) for n in numbers)]
    if kind in _OF_HISTORY:
        past = inputs.SparseFeat("hist_word0", WORDS, embedding_dim=WIDTH, embedding_name="word0")
        columns.append(inputs.VarLenSparseFeat(past, maxlen=LENGTH, length_name="length"))
        return getattr(models, kind)(columns, ["word0"], **NETWORKS[name])
    given = (columns,) if kind in _ONE_LIST else (columns, columns)
    return getattr(models, kind)(*given, **NETWORKS[name])


def _fields(history: bool, batch: int, generator: torch.Generator) -> Tensor:
    """Numbers of words, numbers, and for networks of a history the words of it and its length, in one matrix."""
    words = torch.randint(WORDS, (batch, FIELDS), generator=generator)
    numbers = torch.rand(batch, NUMBERS, generator=generator)
    past = torch.randint(1, WORDS, (batch, LENGTH), generator=generator)
    length = torch.randint(1, LENGTH + 1, (batch, 1), generator=generator)
    return torch.cat([words, numbers, *((past, length) if history else ())], 1)


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name in NETWORKS:
        inputs = functools.partial(_fields, name.partition(":")[0] in _OF_HISTORY)
        yield Architecture(name, functools.partial(_network, name), inputs)
