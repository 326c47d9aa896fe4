"""Many statistics in one run: ``python -m benchmarks.bench_statistics``.

One table a model: rows, Gram matrices, input moments and the similarity of blocks collected together, against a plain
forward and backward, against rows alone, and against one run for each. What the products x^T x take by themselves, on
inputs recorded beforehand, is added to rows alone: the target. The limit is forward and backward with nothing read.
After the tables: the bytes that the sums hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import obc
from benchmarks.bench_scoring import PLAIN, Subject, llama, vgg19, vit
from benchmarks.harness import Case, Provider, Target, main
from obc.statistics import memory_estimate

BATCHES = 4
TOGETHER, ROWS, ROWS_AND_PRODUCTS = "together", "rows alone", "rows alone + products"
# All statistics of one run may take so much longer than rows and the Gram matrices' own products.
TARGET = 1.15
# Sums of float32 products in another order.
AGREEMENT = 1e-4

MODELS: dict[str, Callable[[], Subject]] = {"VGG-19": vgg19, "ViT 2.7 M": vit, "Llama 16 M": llama}


def statistics_of(name: str) -> list[str]:
    """What is collected together: a VGG has no residual blocks."""
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


def one_run(name: str, batches: int = BATCHES) -> Case:
    """Everything together against everything by itself."""
    torch.manual_seed(0)
    subject = MODELS[name]()
    subject = replace(subject, batches=subject.batches[:batches])
    names = statistics_of(name)
    inputs = recorded(subject.model, subject.loss, subject.batches)
    expected = {layer: sum(x[layer].double().mT @ x[layer].double() for x in inputs) for layer in inputs[0]}

    def collect(statistics: Sequence[str]) -> obc.Statistics:
        return obc.collect(subject.model, subject.batches, subject.loss, statistics=list(statistics), progress=False)

    def plain() -> None:
        for batch in subject.batches:
            subject.model.zero_grad()
            subject.loss(subject.model, batch).backward()

    def products() -> None:
        totals: dict[str, Tensor] = {}
        for of_batch in inputs:
            for layer, x in of_batch.items():
                product = x.mT @ x
                totals[layer] = totals[layer].add_(product) if layer in totals else product

    def rows_and_products() -> obc.Statistics:
        products()
        return collect(["rows"])

    def separately() -> list[obc.Statistics]:
        return [collect([one]) for one in names]

    def check(result: Any) -> None:
        found = result if isinstance(result, obc.Statistics) else result[names.index("gram")]
        for layer, truth in expected.items():
            error = float((found.gram[layer].total - truth).abs().max() / truth.abs().max())
            assert error <= AGREEMENT, f"{layer}: relative error {error:.1e}"

    return Case(
        [
            Provider(PLAIN, plain),
            Provider(ROWS, lambda: collect(["rows"])),
            Provider(ROWS_AND_PRODUCTS, rows_and_products),
            Provider(TOGETHER, lambda: collect(names)),
            Provider("one run each", separately),
            Provider("forward only: all but rows", lambda: _forward_only(subject, names)),
        ],
        baseline=PLAIN,
        limit=Provider("products alone", products),
        bytes_moved=sum(4 * x.numel() for of_batch in inputs for x in of_batch.values()),
        check=check,
        unchecked=frozenset({PLAIN, ROWS, ROWS_AND_PRODUCTS}),
        targets=[Target(TOGETHER, ROWS_AND_PRODUCTS, TARGET)],
        flops=2 * sum(len(x) * x.shape[1] ** 2 for of_batch in inputs for x in of_batch.values()),
    )


def _forward_only(subject: Subject, names: Sequence[str]) -> obc.Statistics:
    forward = [one for one in names if one != "rows"]
    return obc.collect(subject.model, subject.batches, statistics=forward, forward_fn=subject.loss, progress=False)


CASES: dict[str, Callable[[], Case]] = {name: lambda name=name: one_run(name) for name in MODELS}  # type: ignore[misc]


def print_memory() -> None:
    """What the sums hold, whatever the number of batches."""
    for name, make in MODELS.items():
        sizes = memory_estimate(make().model, [one for one in statistics_of(name) if one != "rows"])
        parts = ", ".join(f"{statistic} {size / 2**20:.1f} MiB" for statistic, size in sizes.items())
        print(f"{name}: sums hold {parts}")


if __name__ == "__main__":
    status = main("bench_statistics", CASES)
    print_memory()
    sys.exit(status)
