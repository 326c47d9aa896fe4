"""Scoring as models grow: ``python -m benchmarks.bench_large``.

Peak memory and time per row on Llama-like models from configuration, random weights, batch of one sequence: plain
inference, a plain fine-tuning step (SGD, so that no optimizer state hides the gradients), the paper's way (every
weight gradient kept, contracted at the end), weight gradients contracted at once, and obc by batch and by sample rows,
whose first row also checks; "obc rows after the first" leaves the checking row out.
Every case runs in a process of its own; its memory is what came on top of the weights. A way that needs more than
``--limit`` GiB together with the weights is not started, and is listed as such.

After the tables: the slope, MiB of memory per MiB of weights, by least squares over depth and over width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks import isolated
from benchmarks.bench_scoring import contracting
from benchmarks.harness import RESULTS, provenance, update

# name -> (hidden size, feed-forward size, layers); a vocabulary of 8192 keeps the head from ruling the small ones.
DEPTH = {
    "width 1024, 6 layers": (1024, 2816, 6),
    "width 1024, 12 layers": (1024, 2816, 12),
    "width 1024, 24 layers": (1024, 2816, 24),
    "width 1024, 48 layers": (1024, 2816, 48),
}
WIDTH = {
    "width 1024, 8 layers": (1024, 2816, 8),
    "width 1536, 8 layers": (1536, 4096, 8),
    "width 2048, 8 layers": (2048, 5632, 8),
    "width 3072, 8 layers": (3072, 8192, 8),
}
SIZES = DEPTH | WIDTH
WAYS = (
    "inference",
    "fine-tuning step",
    "authors' way",
    "contracted at once",
    "obc batch rows",
    "obc sample rows",
    "obc rows after the first",
)
VOCABULARY, HEAD = 8192, 64
ROWS = 4  # enough that what grows with rows shows
GRADIENTS = {"fine-tuning step": 1, "authors' way": ROWS + 2}  # memory in weights, at least: to refuse what can't fit


def llama(hidden: int, inner: int, layers: int) -> nn.Module:
    """A Llama with grouped queries and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // 4,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
        for name, module in model.named_modules():
            if name.endswith("rotary_emb"):
                module.__init__(config)  # its buffers are computed, not loaded
    return model.eval()


def parameters(size: str) -> int:
    hidden, inner, layers = SIZES[size]
    attention = hidden * hidden * 2 + hidden * hidden // 4 * 2
    return layers * (attention + 3 * hidden * inner + 2 * hidden) + 2 * VOCABULARY * hidden + hidden


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return losses(model, tokens).mean()


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def way_of(name: str, model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], object]:
    """A run over all batches."""

    def inference() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def step() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    def authors() -> list[Tensor]:
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        stored: list[list[Tensor]] = [[] for _ in weights]
        for batch in batches:
            model.zero_grad()
            loss(model, batch).backward()
            for kept, weight in zip(stored, weights, strict=True):
                assert weight.grad is not None
                kept.append(weight.grad.clone())
        return [
            sum((grad * weight.detach()).sum(1).square() for grad in kept)
            for kept, weight in zip(stored, weights, strict=True)
        ]

    def at_once() -> None:
        for batch in batches:
            model.zero_grad()
            loss(watched, batch).backward()

    def later_rows() -> None:
        for batch in batches:
            with scorer.row():
                loss(model, batch).backward()

    if name == "obc rows after the first":
        scorer = obc.JacobianScorer(model)
        scorer.__enter__()  # the process ends with the case
        with scorer.row():
            loss(model, batches[0]).backward()
    watched = contracting(model) if name == "contracted at once" else model
    return {
        "inference": inference,
        "fine-tuning step": step,
        "authors' way": authors,
        "contracted at once": at_once,
        "obc batch rows": lambda: obc.score(model, batches, loss, progress=False),
        "obc sample rows": lambda: obc.score(model, batches, losses, rows="sample", progress=False),
        "obc rows after the first": later_rows,
    }[name]


def child(size: str, way: str, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = llama(*SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(size)
    batches = [torch.randint(VOCABULARY, (1, tokens)) for _ in range(ROWS)]
    with torch.no_grad():
        model(batches[0][:, :8])  # thread pools and library buffers, which no provider owns
    found = isolated.measure(way_of(way, model, batches), repeats)
    return found | {"seconds_per_row": found["seconds"] / ROWS}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through the points, by least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def slopes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """MiB of memory per MiB of weights for every way, over depth and over width."""
    lines = []
    for growth, sizes in (("depth", DEPTH), ("width", WIDTH)):
        for way in WAYS:
            points = [
                (row["weights_mib"], row["peak_mib"])
                for row in rows
                if row["size"] in sizes and row["way"] == way and "peak_mib" in row
            ]
            if len(points) > 1:
                lines.append(f"growing {growth}, {way}: {slope(points):.2f} MiB per MiB of weights")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_large")
    parser.add_argument("--sizes", default="", help="those whose name contains this; several after semicolons")
    parser.add_argument("--ways", default="", help="those whose name contains this; several after semicolons")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of a case (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=18.0, help="GiB of memory there is (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the smallest size and 64 tokens: to see that it runs")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=RESULTS / "bench_large.json", help="write each case as it ends"
    )
    parser.add_argument("--child", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.tokens, arguments.repeats, arguments.threads)))
        return 0
    if arguments.quick:
        arguments.sizes, arguments.tokens = next(iter(SIZES)), 64
    sizes = [size for size in SIZES if any(part in size for part in arguments.sizes.split(";"))]
    ways = [way for way in WAYS if any(part in way for part in arguments.ways.split(";"))]
    if not sizes or not ways:
        parser.error(f"no size contains {arguments.sizes!r} or no way contains {arguments.ways!r}")
    facts = provenance(arguments.repeats, arguments.threads) | {"tokens": arguments.tokens, "rows": ROWS}
    print(f"{facts['cpu']}, {arguments.threads} threads, {arguments.tokens} tokens, {ROWS} rows, float32")
    print(f"{'size':24} {'weights':>10} {'way':20} {'above weights':>14} {'s per row':>10}")
    rows: list[dict[str, Any]] = []
    for size in sizes:
        weights = parameters(size) * 4 / 2**20
        for way in ways:
            row = {"name": f"{size}, {way}", "size": size, "way": way, "weights_mib": weights}
            if weights * (1 + GRADIENTS.get(way, 0)) > arguments.limit * 1024:
                row["failed"] = f"needs more than {arguments.limit:g} GiB"
            else:
                options = ["--tokens", arguments.tokens, "--repeats", arguments.repeats, "--threads", arguments.threads]
                row |= isolated.run("bench_large", ["--child", size, way, *options])
            rows.append(row)
            said = row.get("failed") or f"{row['peak_mib']:10.0f} MiB {row['seconds_per_row']:10.2f}"
            print(f"{size:24} {weights:6.0f} MiB {way:20} {said}", flush=True)
            if arguments.out:
                update(arguments.out, facts, [row])
    print("\n".join(slopes(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
