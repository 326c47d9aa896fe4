"""Prune a language model of the transformers library, recover it against the unpruned one, and save it.

python examples/prune_llm.py MODEL_DIR TEXT_FILE OUT_DIR    a directory that save_pretrained wrote
python examples/prune_llm.py --tiny OUT_DIR                 a tiny Llama with random weights, to see it run
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import obc
from obc.structures.transformers import TransformersStructure


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the next token."""
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def tiny() -> tuple[Any, Tensor]:
    """(model, tokens): random ones."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), torch.randint(0, 64, (4096,))


def loaded(directory: Path, text: Path) -> tuple[Any, Tensor]:
    """(model, tokens): a local directory's model, and a text in its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model, tokenizer(text.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]


def main() -> None:
    """Prune to 80 % of the multiply-accumulates, distil for some steps, save with equal widths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--macs", type=float, default=0.8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of recovery")
    arguments = parser.parse_args()

    model, tokens = tiny() if arguments.tiny else loaded(arguments.paths[0], arguments.paths[1])
    model.eval()
    length = arguments.seq_len
    sequences = tokens[: len(tokens) // length * length].reshape(-1, length)
    held_out = sequences[-len(sequences) // 5 :]
    calibration = [{"input_ids": batch} for batch in sequences[: -len(held_out)].split(2)]
    original = copy.deepcopy(model)

    def perplexity() -> str:
        return str(obc.quality.perplexity(model, held_out.flatten(), length=length))

    print("unpruned:", perplexity())
    # Equal widths in all layers: the config alone says them, and from_pretrained loads the result.
    structure = TransformersStructure(model, uniform=True)
    result = obc.prune(
        model, None, calibration, loss_fn, macs=arguments.macs, steps=2, structure=structure, compensate="ls"
    )
    print(result.report)
    print("pruned:", perplexity())
    print(obc.recover(model, original, calibration, steps=arguments.steps, lr=1e-3))
    print("recovered:", perplexity())
    model.save_pretrained(arguments.paths[-1])


if __name__ == "__main__":
    main()
