"""The cost of the proof compared with a whole ``obc.prune``: ``python -m benchmarks.bench_proof``.

Counted: forward passes. Of the proof: those of the tries of all groups (two models each, and one of the model as it
is), and three at the end. Of the whole: those of the proof, and every call of the loss.

Timed: the proof and the whole call, in seconds, from the report. ``--rows`` batches a step are far fewer
than pruning wants (as many as the widest layer has channels), so that the share is larger here than in use.

Weights are random; the networks are as deep as the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from benchmarks.gpu_models import resnet50_model
from benchmarks.harness import chosen, parser_of, provenance, update

# At the end of obc.prune: the masked model twice, whether it repeats itself, and the pruned one.
FINAL = 3
Network = tuple[nn.Module, Any, list[Any]]


def _images(model: nn.Module, rows: int, batch: int) -> Network:
    batches = [(torch.randn(batch, 3, 64, 64), torch.randint(1000, (batch,))) for _ in range(rows)]
    return model.eval(), batches[0][0][:1], batches


def resnet50(rows: int, batch: int) -> Network:
    return _images(resnet50_model(), rows, batch)


def vit_s(rows: int, batch: int) -> Network:
    """Pruned by its own blocks, without being traced."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    model = ViTForImageClassification(ViTConfig(image_size=64, num_labels=1000, **sizes))
    network, _, batches = _images(model, rows, batch)
    return network, None, batches


def llama(rows: int, batch: int) -> Network:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=30, use_cache=False, **sizes)).eval()
    return model, None, [(tokens, tokens) for tokens in torch.randint(512, (rows, batch, 64)).unbind()]


NETWORKS: dict[str, Callable[[int, int], Network]] = {
    "ResNet-50, 64 x 64": resnet50,
    "ViT-S, 64 x 64": vit_s,
    "Llama, 30 layers of 128": llama,
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    logits = getattr(output, "logits", output)
    if logits.dim() == 3:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())
    return F.cross_entropy(logits, batch[1])


def cost(build: Callable[[int, int], Network], rows: int, batch: int, steps: int) -> dict[str, Any]:
    """Passes and seconds of the proof, and of the whole call."""
    torch.manual_seed(0)
    model, example, batches = build(rows, batch)
    calls = 0

    def counting(network: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(network, inputs)

    report = obc.prune(model, example, batches, counting, macs=0.7, steps=steps, progress=False).report
    proof = report.proof
    assert proof is not None
    assert report.error is not None
    passes = proof.passes + FINAL
    seconds = proof.seconds + report.seconds["verify"]
    # On example inputs the tries are no calls of the loss.
    whole = calls + (proof.passes if example is not None else 0)
    return {
        "groups": len(proof.proved),
        "passes": passes,
        "all_passes": whole,
        "seconds": seconds,
        "all_seconds": sum(report.seconds.values()),
        "error": report.error,
        "tolerance": report.tolerance,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_proof", repeats=1)
    parser.add_argument("--rows", type=int, default=32, help="batches that score each step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of obc.prune (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(arguments.repeats, arguments.threads)
    print(f"{'':28}{'groups':>8}{'passes':>16}{'share':>8}{'seconds':>18}{'share':>8}{'error':>10}")
    for title in chosen(list(NETWORKS), arguments, parser):
        found = cost(NETWORKS[title], arguments.rows, arguments.batch, arguments.steps)
        passes, seconds = found["passes"] / found["all_passes"], found["seconds"] / found["all_seconds"]
        print(
            f"{title:28}{found['groups']:8}{found['passes']:8} of {found['all_passes']:4}{passes:8.1%}"
            f"{found['seconds']:8.2f} of {found['all_seconds']:6.1f}{seconds:8.1%}{found['error']:10.1e}",
            flush=True,
        )
        if arguments.out is not None:
            update(arguments.out, facts, [{"name": title, **found}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
