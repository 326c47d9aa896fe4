"""Statistics, pruning and compensation on a GPU: what bench_gpu's section ``pruning`` measures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import obc
from benchmarks import gpu_timing as timing
from benchmarks.gpu_models import half_b_llama
from obc.scoring import label_free_loss

BATCHES = 10


def pruning_section() -> Iterator[dict[str, Any]]:
    """Whole runs on a Llama of half a billion weights, 10 x 2048 tokens: time, in forward passes, and peak memory."""
    model = half_b_llama(timing.device(), small=timing.is_dry())
    vocabulary, shape = model.get_input_embeddings().weight.shape[0], timing.sized((1, 2048))  # type: ignore[operator]
    batches = [torch.randint(vocabulary, shape, device=timing.device()) for _ in range(BATCHES)]
    found: list[obc.PruningResult] = []

    def forward(row: dict[str, Any]) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def statistics(row: dict[str, Any]) -> None:
        collected = obc.collect(model, batches, statistics=["moments", "gram"], progress=False)
        row["left_out"] = len(collected.left_out)

    def prune(row: dict[str, Any]) -> None:
        loss, copied = label_free_loss(metric="kl"), copy.deepcopy(model)
        found.append(obc.prune(copied, batches=batches, loss_fn=loss, params=0.75, steps=1, progress=False))
        row["kept"] = _weights(found[0].model) / _weights(model)

    def compensate(mode: Any) -> Callable[[dict[str, Any]], None]:
        def measure(row: dict[str, Any]) -> None:
            result = found[0]
            report = obc.compensate(copy.deepcopy(result.model), model, result.plan, batches, mode=mode, progress=False)
            row |= {"layers": len(report.layers), "applied": sum(layer.applied for layer in report.layers.values())}

        return measure

    runs = {
        "forward passes": forward,
        "obc.collect of moments and Gram matrices": statistics,
        "obc.prune by KL rows": prune,
        "obc.compensate, correct": compensate("correct"),
        "obc.compensate, ls": compensate("ls"),
    }
    forward({})  # loads the matrix library's kernels
    base = 0.0
    for name, run in runs.items():
        row: dict[str, Any] = {"run": name}
        timing.attempt(row, lambda row: _cost(row, run))  # noqa: B023 - called at once
        base = base or row.get("seconds", 0.0)
        if base and "seconds" in row:
            row["forward_passes"] = row["seconds"] / base
        yield row


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cost(row: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
    """Wall time of one run, since much of it is the host's, and its peak of memory above what was there."""
    before = 0
    if not timing.is_dry():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    run(row)
    timing.synchronize()
    row["seconds"] = time.perf_counter() - begun
    if not timing.is_dry():
        row["peak_MiB_above"] = round((torch.cuda.max_memory_allocated() - before) / timing.MIB)
