"""State-space networks of mambapy: Mamba for tokens and images, Jamba with attention and experts, language models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, drawn
from torch import Tensor, nn

PACKAGES = ("mambapy",)
WIDTH, TOKENS, VOCABULARY = 16, 8, 32
_LAYERS: dict[str, Any] = {"d_model": WIDTH, "n_layers": 2, "d_state": 4}
_JAMBA: dict[str, Any] = _LAYERS | {
    "mlp_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "vocab_size": VOCABULARY,
}
# Module, class and its config -> the config's arguments; after a colon a second of the same.
NETWORKS: dict[str, dict[str, Any]] = {
    "mamba.Mamba": _LAYERS,
    "mamba.Mamba:sequential": _LAYERS | {"pscan": False, "bias": True, "inner_layernorms": True},
    "vim.VMamba": _LAYERS,
    "vim.VMamba:one_way": _LAYERS | {"bidirectional": False, "inner_layernorms": True},
    "jamba.JambaLM": _JAMBA,
    "jamba.JambaLM:untied": _JAMBA | {"tie_lm_weights": False, "inner_layernorms": False, "num_experts_per_tok": 1},
}
CONFIGS = {"mamba.Mamba": "MambaConfig", "vim.VMamba": "MambaConfig", "jamba.JambaLM": "JambaLMConfig"}


def _network(name: str) -> nn.Module:
    from mambapy import jamba, mamba, vim

    path = name.partition(":")[0]
    folder, kind = path.split(".")
    module: Any = {"mamba": mamba, "vim": vim, "jamba": jamba}[folder]
    return getattr(module, kind)(getattr(module, CONFIGS[path])(**NETWORKS[name]))


def _text(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, TOKENS), generator=generator)


def architectures() -> Iterator[Architecture]:
    """Every network; Jamba takes tokens, the others embeddings."""
    for name in NETWORKS:
        inputs = _text if name.startswith("jamba") else drawn(TOKENS, WIDTH)
        yield Architecture(name, functools.partial(_network, name), inputs)
