"""Temporal convolutional networks of pytorch-tcn."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn

PACKAGES = ("pytorch-tcn", "tqdm")
CHANNELS, LENGTH = 6, 20
_BLOCKS: dict[str, Any] = {"num_inputs": CHANNELS, "num_channels": (16, 24, 16), "dropout": 0.0}
# Name -> the arguments of TCN.
NETWORKS: dict[str, dict[str, Any]] = {
    "TCN": _BLOCKS,
    "TCN:batch_norm": _BLOCKS | {"use_norm": "batch_norm", "output_projection": 5},
    "TCN:layer_norm": _BLOCKS | {"use_norm": "layer_norm", "activation": "gelu"},
    "TCN:no_norm": _BLOCKS | {"use_norm": None, "causal": False},
    "TCN:gate": _BLOCKS | {"use_norm": "batch_norm", "use_gate": True},
    "TCN:skip": _BLOCKS | {"use_skip_connections": True, "output_projection": 5},
    "TCN:last_axis": _BLOCKS | {"input_shape": "NLC", "use_norm": "layer_norm", "use_skip_connections": True},
}


def _network(name: str) -> nn.Module:
    from pytorch_tcn import TCN

    return TCN(**NETWORKS[name])


def architectures() -> Iterator[Architecture]:
    """Every network, on channels first unless it takes them last."""
    for name, given in NETWORKS.items():
        shape = (LENGTH, CHANNELS) if given.get("input_shape") == "NLC" else (CHANNELS, LENGTH)
        yield Architecture(name, functools.partial(_network, name), drawn(*shape))
