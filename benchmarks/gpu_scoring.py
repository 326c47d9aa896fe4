"""Whole scoring runs on a GPU: what bench_gpu's sections ``scoring`` and ``rows`` measure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks import gpu_timing as timing
from benchmarks.gpu_models import Workload, llama_8b, resnet50, resnet56, vit_b
from obc import ops
from obc.scoring import label_free_loss

ROWS = 4


def plain(work: Workload) -> None:
    """Forward and backward with weight gradients."""
    for _ in range(ROWS):
        work.model.zero_grad(set_to_none=True)
        work.loss(work.model, work.batch).backward()
    work.model.zero_grad(set_to_none=True)


def floor(work: Workload) -> None:
    """Frozen weights, no gates: what any method that reads activations and gradients pays at least."""
    work.model.requires_grad_(False)
    try:
        for _ in range(ROWS):
            work.loss_from_entry(work.model, work.entry.detach().requires_grad_()).backward()
    finally:
        work.model.requires_grad_(True)


def scored(work: Workload) -> None:
    obc.score(work.model, [work.batch] * ROWS, work.loss, progress=False)


def scored_without_labels(work: Workload) -> None:
    """The KL divergence of the probabilities, projected: its random numbers are drawn on the device."""
    loss = label_free_loss(metric="kl")
    obc.score(work.model, [work.batch] * ROWS, loss, progress=False)


def _weighted(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def stored(work: Workload) -> None:
    """The authors' way: every row's weight gradients stored, contracted at the end."""
    weights = _weighted(work.model)
    rows: list[list[Tensor]] = []
    for _ in range(ROWS):
        work.model.zero_grad(set_to_none=True)
        work.loss(work.model, work.batch).backward()
        rows.append([weight.grad.detach().clone() for weight in weights if weight.grad is not None])
    work.model.zero_grad(set_to_none=True)
    for index, weight in enumerate(weights):
        stacked = torch.stack([row[index] for row in rows])
        products = (stacked * weight.detach()).flatten(3) if stacked.dim() > 3 else stacked * weight.detach()
        spread = products.sum(3) if products.dim() > 3 else products
        spread.sum(2).square().sum(0), spread.sum(1).square().sum(0)


def contracted(work: Workload) -> None:
    """Weight gradients contracted at once, a whole model by one weight_dot_list, and dropped."""
    weights = _weighted(work.model)
    scores: list[Tensor] | None = None
    for _ in range(ROWS):
        work.model.zero_grad(set_to_none=True)
        work.loss(work.model, work.batch).backward()
        grads = [weight.grad.detach() for weight in weights if weight.grad is not None]
        dots = timing.flat(ops.weight_dot_list([w.detach() for w in weights], grads))
        squares = [dot.square() for dot in dots]
        scores = squares if scores is None else list(torch._foreach_add(scores, squares))
    work.model.zero_grad(set_to_none=True)


WAYS: dict[str, Callable[[Workload], None]] = {
    "plain": plain,
    "floor": floor,
    "obc.score": scored,
    "obc.score, KL": scored_without_labels,
    "authors": stored,
    "contracted at once": contracted,
}


def scoring_section() -> Iterator[dict[str, Any]]:
    """Time a row and peak memory of whole scoring runs (4 rows, checking row included) relative to plain."""
    for make in (resnet50, vit_b, llama_8b):
        built: list[Workload] = []
        made = timing.attempt({"model": make.__name__}, lambda row: built.append(_made(make)))  # noqa: B023
        if not built:
            yield made
            continue
        work = built.pop()
        base = 0.0
        for way, run in WAYS.items():
            for backend in timing.backends() if way in ("obc.score", "contracted at once") else [None]:
                row: dict[str, Any] = {"model": work.name, "way": way, "backend": backend}
                try:
                    with obc.use_backend(backend or obc.backends.chosen(timing.device()).name):
                        per_row, peak = _row_cost(run, work)
                except torch.OutOfMemoryError:
                    # The authors' way keeps a whole gradient a row: of a large model it is not to be had.
                    work.model.zero_grad(set_to_none=True)
                    row["failed"] = "out of memory"
                except Exception as error:  # as timing.attempt does
                    work.model.zero_grad(set_to_none=True)
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                else:
                    base = base or per_row
                    row |= {"ms_per_row": per_row * 1e3, "relative": per_row / base, "peak_MiB_above_model": peak}
                yield row
                _free()
        del work
        _free()


def _made(make: Callable[..., Workload]) -> Workload:
    return make(timing.device(), small=timing.is_dry())


def _free() -> None:
    gc.collect()
    if not timing.is_dry():
        torch.cuda.empty_cache()


def _row_cost(run: Callable[[Workload], None], work: Workload) -> tuple[float, int | None]:
    """Seconds a row, and the peak of memory above what the model and batch take."""
    if timing.is_dry():
        return timing.wall_seconds(lambda: run(work)) / ROWS, None
    run(work)  # compiles kernels, fills the allocator's cache
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    per_row = timing.seconds(lambda: run(work), repeats=3) / ROWS
    return per_row, round((torch.cuda.max_memory_allocated() - before) / timing.MIB)


def rows_section() -> Iterator[dict[str, Any]]:
    """A steady row against plain forward and backward, each launched kernel by kernel and as a CUDA graph."""
    for make in (resnet56, resnet50, vit_b):
        rows: list[dict[str, Any]] = []
        last = timing.attempt({"model": make.__name__}, lambda _: rows.extend(_rows_of(_made(make))))  # noqa: B023
        yield from rows
        if "error" in last:
            yield last
        _free()


def _rows_of(work: Workload) -> Iterator[dict[str, Any]]:
    def step() -> None:
        work.loss(work.model, work.batch).backward()

    def frozen() -> None:
        work.loss_from_entry(work.model, entry).backward()

    # Without zero_grad the gradients stay in their memory, as a captured backward needs it.
    base, graph_base = _eager_and_graph(step)
    yield _steady_row(work, "plain", None, base, graph_base, base, graph_base)
    work.model.zero_grad(set_to_none=True)
    work.model.requires_grad_(False)
    entry = work.entry.detach().clone().requires_grad_()
    yield _steady_row(work, "floor", None, *_eager_and_graph(frozen), base, graph_base)
    work.model.requires_grad_(True)
    for backend in timing.backends():
        with obc.use_backend(backend):
            scorer = obc.JacobianScorer(work.model)

            def row(scorer: obc.JacobianScorer = scorer) -> None:
                with scorer.row():
                    step()

            with scorer:
                row()  # the checking row
                times = _eager_and_graph(row)
            yield _steady_row(work, "obc, a steady row", backend, *times, base, graph_base)


def _eager_and_graph(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a call launched kernel by kernel, and of the replay of its CUDA graph."""
    if timing.is_dry():
        return timing.wall_seconds(call), timing.wall_seconds(call)
    graph, _ = timing.captured(call)
    return timing.loop_seconds(call, [()]), timing.seconds(graph.replay)


def _steady_row(
    work: Workload, way: str, backend: str | None, eager: float, graph: float, base: float, graph_base: float
) -> dict[str, Any]:
    return {
        "model": work.name,
        "way": way,
        "backend": backend,
        "eager_ms": eager * 1e3,
        "eager_relative": eager / base,
        "graph_ms": graph * 1e3,
        "graph_relative": graph / graph_base,
    }
