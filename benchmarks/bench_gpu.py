"""All figures that need a GPU, in one run: ``python -m benchmarks.bench_gpu``. ``benchmarks/gpu.sh`` tests first.

Method: correctness first, against the reference on the benchmarked inputs. Kernels are timed by replaying a CUDA graph
that goes once through several input sets, together at least four times the L2 cache, so that every read comes from
memory; median of the replays by events. The ceilings are measured in the same run: a device-to-device copy of as many
bytes (bytes read plus written), and the matrix rate of ``torch.matmul``. Whole scoring runs are timed without graphs,
as a user would run them. Sections past the time budget are left out and named; a section that fails is reported, the
others run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks.gpu_models import Workload, llama_1b, resnet50, resnet50_model
from obc import ops
from obc.backends import gemm
from obc_kernels.fold import MOST_KEPT_IN, fold_fits, fold_triton

L2_MULTIPLE = 4  # input sets together are this many times the L2 cache
REPLAYS = 15
MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

Rows = list[dict[str, Any]]


def seconds(call: Callable[[], Any], repeats: int = REPLAYS) -> float:
    """Median time of one call on the current stream."""
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


def graph_seconds(call: Callable[..., Any], input_sets: Sequence[tuple[Any, ...]]) -> float:
    """Time of one ``call(*inputs)`` when a captured graph goes through all input sets, at least ten calls a graph."""
    rounds = -(-10 // len(input_sets))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for inputs in input_sets:
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for inputs in input_sets:
                call(*inputs)
    return seconds(graph.replay) / (rounds * len(input_sets))


def sets(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Fresh input sets that together exceed the cache."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(-(-L2_MULTIPLE * cache // size)))]


def copy_rate(size: int) -> float:
    """Bytes per second of a device-to-device copy that reads and writes ``size`` bytes in all."""

    def make() -> tuple[Tensor, Tensor]:
        source = torch.randn(size // 8, device="cuda")
        return torch.empty_like(source), source

    return size / graph_seconds(lambda target, source: target.copy_(source), sets(make))


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large product of random matrices."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / graph_seconds(torch.matmul, [(a, b)])


def kernels(call: Callable[[], Any]) -> int:
    """Kernels and copies that one call puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def gpu_backends() -> list[str]:
    return [name for name in ("cuda", "triton") if name in obc.backends.available()]


def flat(result: Any) -> list[Tensor]:
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


def bandwidth_section() -> Rows:
    """channel_dot, weight_dot and weight_moments as a share of the copy bandwidth."""

    def pair(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Callable[[], tuple[Tensor, ...]]:
        memory = torch.channels_last if channels_last else torch.contiguous_format
        return lambda: tuple(
            torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory) for _ in range(2)
        )

    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[int, ...], bool]] = []
    tokens = ("channel_dot tokens", lambda a, g: ops.channel_dot(a, g, -1), lambda a, g: (a.float() * g).sum((0, 1)))
    images = ("channel_dot images", lambda a, g: ops.channel_dot(a, g, 1), lambda a, g: (a.float() * g).sum((0, 2, 3)))
    weights = ("weight_dot", ops.weight_dot, lambda w, g: (lambda p: (p.sum(1), p.sum(0)))(w.float() * g))
    moments = ("weight_moments", ops.weight_moments, None)
    for megabytes in (64, 256):
        elements = megabytes * MIB // 2
        cases += [
            (*tokens, (8, elements // 8 // 4096, 4096), False),
            (*images, (elements // (256 * 3136), 256, 56, 56), False),
            (*images, (elements // (256 * 3136), 256, 56, 56), True),
            (*weights, (elements // 4096, 4096), False),
            (*moments, (elements // 4096, 4096), False),
        ]
    cases += [
        (*images, (256, 3, 224, 224), False),
        (*images, (512, 2048, 7, 7), False),
        (*tokens, (1, 64, 524_288), False),
    ]
    rows: Rows = []
    for name, call, eager, shape, channels_last in cases:
        for dtype_name, dtype in DTYPES.items():
            input_sets = sets(pair(*shape, dtype=dtype, channels_last=channels_last))
            moved = sum(tensor.numel() * tensor.element_size() for tensor in input_sets[0])
            ceiling = copy_rate(moved)
            row = {"operator": name, "shape": list(shape), "channels_last": channels_last, "dtype": dtype_name}
            row |= {"MiB": round(moved / MIB), "copy_GB_per_s": ceiling / 1e9}
            for backend in gpu_backends():
                with obc.use_backend(backend):
                    check(lambda inputs=input_sets[0], call=call: call(*inputs))
                    rate = moved / graph_seconds(call, input_sets)
                row |= {f"{backend}_GB_per_s": rate / 1e9, f"{backend}_share_of_copy": rate / ceiling}
            if eager is not None:
                row["eager_share_of_copy"] = moved / graph_seconds(eager, input_sets[:2]) / ceiling
            rows.append(row)
    return rows


def llama_8b_layer() -> list[tuple[int, int]]:
    return [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


def list_section() -> Rows:
    """weight_dot_list: kernels on the GPU and time for a model's weights, against one weight_dot a layer."""
    convolutions = [m for m in resnet50_model().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    resnet = [tuple(m.weight.shape) for m in convolutions]
    rows: Rows = []
    for name, shapes in (("ResNet-50", resnet), ("Llama-8B layer", llama_8b_layer())):
        weights, grads = ([torch.randn(s, device="cuda").bfloat16() for s in shapes] for _ in range(2))
        moved = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
        row: dict[str, Any] = {"weights": name, "tensors": len(weights), "MiB": round(moved / MIB)}
        for backend in gpu_backends():
            with obc.use_backend(backend):
                whole = lambda: ops.weight_dot_list(weights, grads)  # noqa: B023, E731 - called in this iteration only
                each = lambda: [ops.weight_dot(w, g) for w, g in zip(weights, grads, strict=True)]  # noqa: B023, E731
                check(whole)
                row |= {
                    f"{backend}_list_kernels": kernels(whole),
                    f"{backend}_list_ms": seconds(whole) * 1e3,
                    f"{backend}_each_kernels": kernels(each),
                    f"{backend}_each_ms": seconds(each) * 1e3,
                    f"{backend}_list_graph_GB_per_s": moved / graph_seconds(whole, [()]) / 1e9,
                }
        row["copy_GB_per_s"] = copy_rate(moved) / 1e9
        rows.append(row)
    return rows


def end_row_section() -> Rows:
    """end_row: time and kernels of a row over the channels of small and large models."""
    rows: Rows = []
    for channels in (4096, 100_000, 1_000_000):
        groups = torch.arange(channels, device="cuda") // 5
        scores, row = torch.zeros(channels, device="cuda"), torch.randn(channels, device="cuda")
        for backend in [*gpu_backends(), "reference"]:
            with obc.use_backend(backend):
                plain, grouped = lambda: ops.end_row(scores, row), lambda: ops.end_row(scores, row, 1.0, groups)  # noqa: B023
                rows.append(
                    {
                        "channels": channels,
                        "backend": backend,
                        "plain_us": graph_seconds(plain, [()]) * 1e6,
                        "grouped_us": graph_seconds(grouped, [()]) * 1e6,
                        "kernels": kernels(grouped),
                    }
                )
    return rows


def fold_section() -> Rows:
    """fold: one launch and two products as a share of the matrix rate that torch.matmul reaches at 8192."""
    rows: Rows = []
    shapes = [
        ((256, 64, 1, 1), 128, 32),
        ((512, 512), 256, 256),
        ((1024, 1024), 512, 256),
        ((256, 256, 3, 3), 128, 128),
        ((2048, 2048), 1024, 1024),
        ((8192, 2048), 4096, 2048),
    ]
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for name, dtype in DTYPES.items():
                ceiling = matrix_rate(dtype)
                for shape, kept_out, kept_in in shapes:
                    weight = torch.randn(shape, device="cuda").to(dtype)
                    c = torch.randn(kept_out, shape[0], device="cuda").to(dtype)
                    d = torch.randn(shape[1], kept_in, device="cuda").to(dtype)
                    row = {"dtype": name, "float32_matmul": precision, "matmul_TFLOP_per_s": ceiling / 1e12}
                    rows.append(row | _fold_row((weight, c, d, 1, 1), ceiling))
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


def _fold_row(inputs: tuple[Any, ...], ceiling: float) -> dict[str, Any]:
    """One fold by two products and, where it is written for that, in one launch."""
    weight, c, d, *_ = inputs
    (out_channels, in_channels), kept_out, kept_in = weight.shape[:2], c.shape[0], d.shape[1]
    area = weight[0, 0].numel()
    compress_first = kept_out * in_channels * (out_channels + kept_in)
    flops = 2 * area * min(compress_first, out_channels * kept_in * (in_channels + kept_out))
    check(lambda: ops.fold(weight, c, d))
    row: dict[str, Any] = {"shape": list(weight.shape), "kept": [kept_out, kept_in], "GFLOP": flops / 1e9}
    products = graph_seconds(gemm.fold, [inputs])
    row |= {"products_us": products * 1e6, "products_share": flops / products / ceiling}
    if kept_in <= MOST_KEPT_IN and area == 1:
        launch = graph_seconds(fold_triton, [inputs])
        row |= {"one_launch_us": launch * 1e6, "one_launch_share": flops / launch / ceiling}
        row["one_launch_is_chosen"] = fold_fits(*inputs)
    return row


# --- whole scoring runs ---------------------------------------------------------------------------------------------

ROWS = 4


def plain(work: Workload) -> None:
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


def weighted(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def stored(work: Workload) -> None:
    """The authors' way: every row's weight gradients stored, contracted at the end."""
    weights = weighted(work.model)
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
    weights = weighted(work.model)
    scores: list[Tensor] | None = None
    for _ in range(ROWS):
        work.model.zero_grad(set_to_none=True)
        work.loss(work.model, work.batch).backward()
        grads = [weight.grad.detach() for weight in weights if weight.grad is not None]
        squares = [dot.square() for dot in flat(ops.weight_dot_list([w.detach() for w in weights], grads))]
        scores = squares if scores is None else torch._foreach_add(scores, squares)
    work.model.zero_grad(set_to_none=True)


WAYS = {"plain": plain, "floor": floor, "obc.score": scored, "authors": stored, "contracted at once": contracted}


def scoring_section() -> Rows:
    """Time a row and peak memory of whole scoring runs relative to a plain forward and backward."""
    rows: Rows = []
    for make in (resnet50, llama_1b):
        work = make("cuda")
        base = 0.0
        for way, run in WAYS.items():
            for backend in gpu_backends() if way in ("obc.score", "contracted at once") else [None]:
                with obc.use_backend(backend or obc.backends.chosen("cuda").name):
                    run(work)  # compiles kernels, fills the allocator's cache
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    per_row = seconds(lambda run=run, work=work: run(work), repeats=3) / ROWS
                    peak = torch.cuda.max_memory_allocated() - before
                base = base or per_row
                row = {"model": work.name, "way": way, "backend": backend, "ms_per_row": per_row * 1e3}
                rows.append(row | {"relative": per_row / base, "peak_MiB_above_model": round(peak / MIB)})
        del work
        gc.collect()
        torch.cuda.empty_cache()
    return rows


SECTIONS: dict[str, Callable[[], Rows]] = {
    "bandwidth": bandwidth_section,
    "launches": list_section,
    "scoring": scoring_section,
    "fold": fold_section,
    "end_row": end_row_section,
}


def facts() -> dict[str, Any]:
    """Where and with what this run was made."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"unknown ({type(error).__name__})"

    import triton

    root = str(Path(__file__).resolve().parent.parent)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30),
        "L2_MiB": properties.L2_cache_size / MIB,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": output("git", "-C", root, "rev-parse", "HEAD"),
        "uncommitted_changes": output("git", "-C", root, "status", "--porcelain", "--untracked-files=no") != "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backends": obc.backends.describe(),
    }


def table(name: str, rows: Rows) -> str:
    """Rows of one section under the union of their columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([f"\n{name}: {(SECTIONS[name].__doc__ or '').strip()}", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)


def main() -> int:
    """Run the sections, print a table each, write ``gpu-<name>.json`` and ``.txt``; 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=480, help="no section starts after this many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    started = time.monotonic()
    report: dict[str, Any] = {"facts": facts(), "sections": {}, "failed": {}, "left_out": []}
    texts = [json.dumps({key: value for key, value in report["facts"].items() if key != "backends"}, indent=1)]
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"gpu-{report['facts']['gpu'].replace(' ', '-').lower()}"
    for name in options.sections:
        if time.monotonic() - started > options.seconds:
            report["left_out"].append(name)
            continue
        section_started = time.monotonic()
        try:
            report["sections"][name] = SECTIONS[name]()
            texts.append(table(name, report["sections"][name]))
        except Exception:  # the report carries it, and the exit code; the other sections are worth having
            report["failed"][name] = traceback.format_exc()
            texts.append(f"\n{name} FAILED\n{report['failed'][name]}")
        texts.append(f"({time.monotonic() - section_started:.0f} s)")
        print(*texts[-2:], sep="\n", flush=True)
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".txt").write_text("\n".join(texts) + "\n")
        torch.cuda.empty_cache()
    if report["left_out"]:
        print(f"left out, the time was spent: {', '.join(report['left_out'])}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
