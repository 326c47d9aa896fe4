"""Directories as save_pretrained writes them, with data beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers


def llama_directory(folder: Path, **sizes: Any) -> Path:
    """A tiny Llama in ``folder``/llama, and 200 sequences of 8 tokens in ``folder``/data.jsonl."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**common | sizes)).save_pretrained(folder / "llama")
    generator = torch.Generator().manual_seed(0)
    lines = [json.dumps({"input_ids": torch.randint(20, (8,), generator=generator).tolist()}) for _ in range(200)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "llama"
