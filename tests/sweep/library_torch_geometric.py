"""Graph networks of PyTorch Geometric: convolutions, attentions and isomorphism layers on a graph that stays fixed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, drawn
from torch import Tensor, nn

PACKAGES = ("torch-geometric", "xxhash", "aiohttp", "psutil", "pyparsing")
NODES, FEATURES = 10, 12
_SIZES: dict[str, Any] = {"in_channels": FEATURES, "hidden_channels": 16, "num_layers": 3, "out_channels": 5}
# Class -> its arguments; after a colon a second of the same.
NETWORKS: dict[str, dict[str, Any]] = {
    "GCN": _SIZES,
    "GCN:batch_norm": _SIZES | {"norm": "batch_norm", "jk": "cat"},
    "GraphSAGE": _SIZES,
    "GraphSAGE:project": _SIZES | {"project": True, "aggr": "max"},
    "GIN": _SIZES,
    "GIN:jump": _SIZES | {"jk": "max", "train_eps": True},
    "GAT": _SIZES | {"heads": 4},
    "GAT:v2": _SIZES | {"heads": 4, "v2": True, "norm": "layer_norm"},
    "EdgeCNN": _SIZES,
    "PNA": _SIZES | {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 2, 8])},
    "MLP": {"channel_list": [FEATURES, 16, 24, 5], "dropout": 0.0},
}
# Layers, stacked: GCN2Conv and others take the same number of features as they give.
LAYERS: dict[str, dict[str, Any]] = {
    "TransformerConv": {"heads": 2, "concat": False},
    "GraphConv": {},
    "ChebConv": {"K": 2},
    "TAGConv": {"K": 2},
    "SGConv": {"K": 2},
    "ARMAConv": {"num_stacks": 2, "num_layers": 2},
    "FeaStConv": {"heads": 2},
    "LEConv": {},
    "ClusterGCNConv": {},
    "ResGatedGraphConv": {},
    "GENConv": {},
    "MFConv": {},
}


def _edges() -> Tensor:
    """A ring in both directions."""
    nodes = torch.arange(NODES)
    following = (nodes + 1) % NODES
    return torch.stack([torch.cat([nodes, following]), torch.cat([following, nodes])])


class OnAGraph(nn.Module):
    """Layers of which each takes features of nodes and the edges; a batch of graphs becomes one graph."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("edges", _edges())

    def forward(self, x: Tensor) -> Tensor:
        batch = torch.arange(len(x), device=x.device).repeat_interleave(self.edges.shape[1])
        edges = self.edges.repeat(1, len(x)) + NODES * batch
        nodes = x.flatten(0, 1)
        for place, layer in enumerate(self.layers):
            nodes = layer(nodes.relu() if place else nodes, edges)
        return nodes.unflatten(0, x.shape[:2])


def _network(name: str) -> nn.Module:
    from torch_geometric import nn as geometric

    kind = name.partition(":")[0]
    if name in NETWORKS:
        return OnAGraph([getattr(geometric, kind)(**NETWORKS[name])])
    layer = functools.partial(getattr(geometric, kind), **LAYERS[name])
    return OnAGraph([layer(FEATURES, 16), layer(16, 24), layer(24, 5)])


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name in (*NETWORKS, *LAYERS):
        yield Architecture(name, functools.partial(_network, name), drawn(NODES, FEATURES))
