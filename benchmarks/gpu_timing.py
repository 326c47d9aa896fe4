"""How the GPU benchmarks time and check: CUDA graphs over input sets larger than the cache, medians by events.

A dry run (:func:`dry_run`) goes through the same code on the CPU with small shapes and one call each, to find its
mistakes where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import obc

L2_MULTIPLE = 4  # input sets together are this many times the L2 cache
REPLAYS = 15
CALLS = 10  # at least, in one replay or one loop
MIB = 2**20

_dry = False


def dry_run() -> None:
    """Make everything run on the CPU from here on, once and with small shapes."""
    global _dry
    _dry = True


def is_dry() -> bool:
    return _dry


def device() -> str:
    """The device of the benchmarks' tensors."""
    return "cpu" if _dry else "cuda"


def sized(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that is measured; in a dry run one of at most 64 in each dimension but 4 in all but two."""
    if not _dry:
        return tuple(shape)
    longest = sorted(shape, reverse=True)[:2]
    return tuple(min(size, 64 if size in longest else 4) for size in shape)


def attempt(row: dict[str, Any], measure: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The row with what ``measure`` wrote into it, or as far as it came: then ``error`` says what went wrong."""
    try:
        measure(row)
    except Exception as error:  # the report names it and fails; the other rows are worth having
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def backends() -> list[str]:
    """The backends to compare, if they are available."""
    return [name for name in (("cpu",) if _dry else ("cuda", "triton")) if name in obc.backends.available()]


def synchronize() -> None:
    if not _dry:
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], repeats: int = REPLAYS) -> float:
    """Median time of one call on the current stream."""
    if _dry:
        return wall_seconds(call)
    call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def wall_seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _over(input_sets: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The input sets in turn, until they are at least ``CALLS``."""
    return [*input_sets] * math.ceil(CALLS / len(input_sets))


def graph_seconds(call: Callable[..., Any], input_sets: Sequence[tuple[Any, ...]]) -> float:
    """Time of one ``call(*inputs)`` when a captured graph goes through all input sets: what the GPU takes."""
    if _dry:
        return wall_seconds(lambda: call(*input_sets[0]))
    turns = _over(input_sets)
    graph, _ = captured(lambda: [call(*inputs) for inputs in turns])
    return seconds(graph.replay) / len(turns)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the call, and its result, which a replay fills; it ran once before, on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def loop_seconds(call: Callable[..., Any], input_sets: Sequence[tuple[Any, ...]]) -> float:
    """Time of one ``call(*inputs)`` in a loop without a graph: the larger of what the GPU and the launches take."""
    turns = _over(input_sets)
    return seconds(lambda: [call(*inputs) for inputs in turns]) / len(turns)


def sets(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Fresh input sets that together exceed the cache."""
    first = make()
    if _dry:
        return [first]
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    # Of tiny inputs 64 sets: a graph of more would take longer to capture than all that is measured with it.
    return [first, *(make() for _ in range(min(63, math.ceil(L2_MULTIPLE * cache / size))))]


@functools.cache
def copy_rate(size: int) -> float:
    """Bytes per second of a device-to-device copy that reads and writes ``size`` bytes in all; measured once a size."""

    def make() -> tuple[Tensor, Tensor]:
        source = torch.randn(size // 8, device=device())
        return torch.empty_like(source), source

    return size / graph_seconds(lambda target, source: target.copy_(source), sets(make))


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large product of random matrices."""
    size = sized((size,))[0]
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    return 2 * size**3 / graph_seconds(torch.matmul, [(a, b)])


def kernels(call: Callable[[], Any]) -> int | None:
    """Kernels and copies that one call puts on the GPU; None in a dry run."""
    call()
    if _dry:
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flat(result: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples."""
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def check(call: Callable[[], Any]) -> None:
    """The backend in use agrees with the reference, to 1e-3 of the largest entry (2e-2 where stored in half)."""
    actual = flat(call())
    with obc.use_backend("reference"):
        truth = flat(call())
    for got, want in zip(actual, truth, strict=True):
        allowed = 2e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-3
        error, scale = (got.double() - want.double()).abs().max(), want.double().abs().max()
        assert error <= allowed * scale, f"off by {error / scale:.2e} of the largest entry, allowed {allowed:.0e}"
