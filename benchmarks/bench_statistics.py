"""Many statistics in one run: ``python -m benchmarks.bench_statistics``.

One table a model: rows, Gram matrices, input moments and the similarity of blocks collected together, against a plain
forward and backward and against one run for each. The target adds to a run for rows alone what the products x^T x take
by themselves, on inputs recorded beforehand. The limit is those products alone.
After the tables, for each model: by how much resident memory rises in a process of its own, and the bytes that the sums
hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

import obc
from benchmarks import isolated
from benchmarks.bench_scoring import PLAIN, Subject, llama, vgg19
from benchmarks.harness import Case, Provider, Target, main
from obc.statistics import memory_estimate

BATCHES = 2
TOGETHER, ROWS_AND_PRODUCTS, SEPARATELY = "together", "rows alone + products", "one run each"
# All statistics of one run may take so much longer than rows and the Gram matrices' own products.
TARGET = 1.15
# Sums of float32 products in another order.
AGREEMENT = 1e-4


def class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")


def vit_small() -> Subject:
    """ViT-S, 21 million parameters, on 2 images of 145 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=192,
        patch_size=16,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_labels=10,
    )
    batches = [(torch.randn(2, 3, 192, 192), torch.randint(10, (2,))) for _ in range(BATCHES)]
    return Subject(ViTForImageClassification(config).eval(), batches, class_losses)


MODELS: dict[str, Callable[[], Subject]] = {"VGG-19": vgg19, "ViT-S": vit_small, "Llama 16 M": llama}


def statistics_of(name: str) -> list[str]:
    """The statistics to collect together: a VGG has no residual blocks."""
    return ["rows", "gram", "moments", *([] if name == "VGG-19" else ["blocks"])]


def consumers(model: nn.Module) -> list[str]:
    """The layers whose inputs are read."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]


def recorded(model: nn.Module, loss: Callable[..., Tensor], batches: Sequence[Any]) -> list[dict[str, Tensor]]:
    """(positions, channels) of every layer's input, batch by batch."""
    found: list[dict[str, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x.movedim(1, -1) if isinstance(module, _ConvNd) else x
            found[-1][name] = x.reshape(-1, x.shape[-1]).contiguous()

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in consumers(model)]
    with torch.no_grad():
        for batch in batches:
            found.append({})
            loss(model, batch)
    for handle in handles:
        handle.remove()
    return found


def collect(subject: Subject, statistics: Sequence[str]) -> obc.Statistics:
    return obc.collect(subject.model, subject.batches, subject.loss, statistics=list(statistics), progress=False)


def plain(subject: Subject) -> None:
    """Forward and backward with weight gradients."""
    for batch in subject.batches:
        subject.model.zero_grad()
        subject.loss(subject.model, batch).backward()


def one_run(name: str, batches: int = BATCHES) -> Case:
    """All statistics together, compared with each one alone."""
    torch.manual_seed(0)
    subject = MODELS[name]()
    subject = replace(subject, batches=subject.batches[:batches])
    names = statistics_of(name)
    inputs = recorded(subject.model, subject.loss, subject.batches)
    expected = {layer: sum(x[layer].double().mT @ x[layer].double() for x in inputs) for layer in inputs[0]}

    def products() -> None:
        totals: dict[str, Tensor] = {}
        for batch_inputs in inputs:
            for layer, x in batch_inputs.items():
                product = x.mT @ x
                totals[layer] = totals[layer].add_(product) if layer in totals else product

    def rows_and_products() -> obc.Statistics:
        products()
        return collect(subject, ["rows"])

    def check(result: Any) -> None:
        found = result if isinstance(result, obc.Statistics) else result[names.index("gram")]
        for layer, truth in expected.items():
            error = float((found.gram[layer].total - truth).abs().max() / truth.abs().max())
            assert error <= AGREEMENT, f"{layer}: relative error {error:.1e}"

    return Case(
        [
            Provider(PLAIN, lambda: plain(subject)),
            Provider(ROWS_AND_PRODUCTS, rows_and_products),
            Provider(TOGETHER, lambda: collect(subject, names)),
            Provider(SEPARATELY, lambda: [collect(subject, [one]) for one in names]),
        ],
        baseline=PLAIN,
        limit=Provider("products alone", products),
        bytes_moved=sum(4 * x.numel() for batch_inputs in inputs for x in batch_inputs.values()),
        check=check,
        unchecked=frozenset({PLAIN, ROWS_AND_PRODUCTS}),
        targets=[Target(TOGETHER, ROWS_AND_PRODUCTS, TARGET)],
        flops=2 * sum(len(x) * x.shape[1] ** 2 for batch_inputs in inputs for x in batch_inputs.values()),
    )


CASES: dict[str, Callable[[], Case]] = {name: lambda name=name: one_run(name) for name in MODELS}  # type: ignore[misc]

# --- memory --------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Subject, Sequence[str]], object]] = {
    PLAIN: lambda subject, names: plain(subject),
    TOGETHER: lambda subject, names: collect(subject, names),
}


def print_peak(name: str, way: str) -> None:
    """One run in this process: its peak above what was resident before, as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    subject = MODELS[name]()
    subject = replace(subject, batches=subject.batches[:BATCHES])
    print(json.dumps(isolated.measure(lambda: WAYS[way](subject, statistics_of(name)))))


def print_memory() -> None:
    """Print peaks, and the bytes of the sums, which do not grow with the number of batches."""
    for name, make in MODELS.items():
        peaks = {way: isolated.run("bench_statistics", ["--peak-of", name, way])["peak_mib"] for way in WAYS}
        print(f"{name}: peak above the model: " + ", ".join(f"{way} {peak:.0f} MiB" for way, peak in peaks.items()))
        sizes = memory_estimate(make().model, [one for one in statistics_of(name) if one != "rows"])
        parts = ", ".join(f"{statistic} {size / 2**20:.1f} MiB" for statistic, size in sizes.items())
        print(f"{name}: of that the sums hold {parts}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print_peak(*sys.argv[2:4])
        sys.exit()
    status = main("bench_statistics", CASES)
    print_memory()
    sys.exit(status)
