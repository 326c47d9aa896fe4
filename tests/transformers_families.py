"""Tiny transformers models of every family whose groups are known, beside those of :mod:`models`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
from models import Case, case, token_losses, tokens
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "use_cache": False,
}


def language_model(name: str, **sizes: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**sizes)
    return case(lambda: getattr(transformers, f"{name}ForCausalLM")(config), tokens(31, 8), token_losses)


def opt() -> Case:
    sizes = {key: value for key, value in _SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")}
    return language_model("OPT", **sizes, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1)


def qwen2_moe() -> Case:
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    return language_model("Qwen2Moe", **_SIZES, **widths, num_experts=4, num_experts_per_tok=2)


# Keys are longer than values, so that no two sides of a head agree by chance.
_LATENT = _SIZES | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def deepseek_v2(**routing: Any) -> Case:
    return language_model("DeepseekV2", **_LATENT | routing, q_lora_rank=None, routed_scaling_factor=1.5)


def deepseek_v3(dense: int, **routing: Any) -> Case:
    """``dense``: how many layers come before those with experts."""
    ungrouped = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": dense}
    return language_model("DeepseekV3", **_LATENT | ungrouped | routing, q_lora_rank=10)


# Speech encoders: their convolution over positions has a weight that torch computes before every forward.
SPEECH = ("Wav2Vec2", "Hubert", "UniSpeech", "SEW", "WavLM")


def speech_encoder(name: str) -> nn.Module:
    """A tiny model of the class ``name`` + "ForCTC", in eval mode."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=20,
    )
    torch.manual_seed(0)
    found: nn.Module = getattr(transformers, f"{name}ForCTC")(config).eval()
    return found


FAMILIES: dict[str, Callable[[], Case]] = {
    "llama": models.llama,
    "llama-tied": models.llama_tied,
    "qwen2": lambda: language_model("Qwen2", **_SIZES),
    "qwen3": lambda: language_model("Qwen3", **_SIZES, head_dim=16),
    "mistral": lambda: language_model("Mistral", **_SIZES),
    "phi3": lambda: language_model("Phi3", **_SIZES, pad_token_id=0),
    "gemma": models.gemma,
    "opt": opt,
    "gpt2": models.gpt2,
    "bert": models.bert,
    "vit": models.vit,
    "mamba": models.mamba,
    "mixtral": lambda: language_model("Mixtral", **_SIZES, num_local_experts=4),
    "qwen2-moe": qwen2_moe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": lambda: deepseek_v3(dense=2),
}

# What is found in each layer: (kind, units), in the order of the modules.
FOUND: dict[str, list[tuple[str, int]]] = {
    "llama": [("heads", 2), ("ffn", 48)],
    "llama-tied": [("heads", 2), ("ffn", 24)],
    "qwen2": [("heads", 2), ("ffn", 48)],
    "qwen3": [("heads", 2), ("ffn", 48)],
    "mistral": [("heads", 2), ("ffn", 48)],
    "phi3": [("heads", 2), ("ffn", 48)],
    "gemma": [("query_heads", 2), ("ffn", 24)],
    "opt": [("heads", 4), ("ffn", 48)],
    "gpt2": [("heads", 2), ("ffn", 64)],
    "bert": [("heads", 4), ("ffn", 48)],
    "vit": [("heads", 4), ("ffn", 48)],
    "mamba": [("mamba", 48)],
    "mixtral": [("heads", 2), ("experts", 4), ("expert_ffn", 48)],
    "qwen2-moe": [("heads", 2), ("experts", 4), ("expert_ffn", 24), ("ffn", 40)],
    "deepseek-v2": [("heads", 4), ("expert_ffn", 16), ("experts", 4), ("ffn", 16)],
    "deepseek-v3": [("heads", 4), ("ffn", 48)],
}

# Families whose configs have no key for a number of heads other than hidden_size over the size of a head.
INEXPRESSIBLE_HEADS = {"opt", "gpt2", "bert"}


def output(case: Case, model: nn.Module) -> Tensor:
    """The logits of the case's first batch."""
    batch = case.batches[0]
    with torch.no_grad():
        if isinstance(batch, tuple):
            return model(pixel_values=batch[0].to(models.dtype_of(model))).logits
        return model(input_ids=batch).logits


def double(case: Case) -> nn.Module:
    """A float64 copy, so that slicing is compared without rounding."""
    model = copy.deepcopy(case.model).double()
    model.set_experts_implementation("eager")  # grouped products take no float64
    return model


def every_other(size: int, least: int = 1) -> Tensor:
    """Some units to remove: not the first, nor a stretch, and never too many."""
    return torch.arange(1, size, 2)[: size - least]
