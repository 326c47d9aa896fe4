"""Seconds until a language model of 30 layers can be pruned: ``python -m benchmarks.bench_structure``.

The sizes are those of SmolLM2-135M, the weights random. Built is :class:`TransformersStructure`, with widths, and with
whole blocks and branches too. Its groups are proved on a batch of ``--tokens`` tokens, which ``obc.prune`` does once;
its costs are counted, which every step asks for. Medians of ``--repeats`` calls, after one that warms up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import chosen, parser_of, provenance, update
from obc.model.timing import median_seconds
from obc.structures.proof import prove
from obc.structures.transformers import TransformersStructure

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LAYERS, VOCABULARY = 30, 49152
_WIDTHS, _ALL = ("ffn", "heads"), ("ffn", "heads", "layers", "sublayers")


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, tie_word_embeddings=True, **SIZES)
    return LlamaForCausalLM(config).eval()


def cases(model: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    batch = torch.randint(VOCABULARY, (1, tokens))
    structure = TransformersStructure(model, _WIDTHS)
    return {
        "build, widths": lambda: TransformersStructure(model, _WIDTHS),
        "build, widths, blocks and branches": lambda: TransformersStructure(model, _ALL),
        "costs in MACs": lambda: structure.costs("macs"),
        "prove every group": lambda: prove(structure, lambda one: one(input_ids=batch, use_cache=False).logits),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_structure", repeats=5)
    parser.add_argument("--tokens", type=int, default=64, help="of the proof's batch (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(arguments.repeats, arguments.threads)
    model = language_model()
    found = cases(model, arguments.tokens)
    for title in chosen(list(found), arguments, parser):
        (seconds,) = median_seconds([found[title]], torch.device("cpu"), arguments.repeats, warm_ups=1)
        print(f"{LAYERS} layers: {title:36}{seconds:9.3f} s", flush=True)
        if arguments.out is not None:
            update(arguments.out, facts, [{"name": title, "layers": LAYERS, "seconds": seconds}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
