"""All figures that need a GPU, in one run: ``python -m benchmarks.bench_gpu``. ``benchmarks/gpu.sh`` tests first.

Method: correctness first, against the reference on the benchmarked inputs. Kernels are timed by replaying a CUDA graph
that goes through several input sets, together at least four times the L2 cache, so that every read comes from memory;
median of the replays by events. The ceilings are measured in the same run: a device-to-device copy of as many bytes
(bytes read plus written), and the matrix rate of ``torch.matmul``. Which backend is the default is decided by loops
without a graph, as a user would call it. Whole scoring runs are timed without graphs too, a steady row both ways.

Every row is written as it is measured. Each section has a share of the time, and what earlier ones leave; a section
that is cut short, or left out, is named; one that fails is reported, the others run, and the exit code is 1.

    python -m benchmarks.bench_gpu --dry-run    the same code on the CPU, small and once: its figures mean nothing
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import obc
from benchmarks import gpu_timing as timing
from benchmarks.gpu_models import llama_8b_layer, resnet50_weights
from benchmarks.gpu_pruning import pruning_section
from benchmarks.gpu_scoring import rows_section, scoring_section
from obc import ops
from obc.backends import gemm

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

Row = dict[str, Any]
Rows = Iterator[Row]


def _random(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(timing.sized(shape), device=timing.device()).to(dtype).contiguous(memory_format=memory)


def _pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _random(shape, dtype), _random(shape, dtype)


def _eager_weight_dot(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    product = w.float() * g
    return product.sum(1), product.sum(0)


def _eager_moments(x: Tensor) -> tuple[Tensor, ...]:
    x = x.float()
    return x.sum((0, 1)), x.square().sum((0, 1)), x.abs().sum((0, 1)), x.abs().mean(1).square().sum(0)


def bandwidth_section() -> Rows:
    """The operators that read once as a share of the copy bandwidth, with eager and compiled torch."""
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any] | None, tuple[int, ...], bool]] = []
    tokens = ("channel_dot tokens", lambda a, g: ops.channel_dot(a, g, 2), lambda a, g: (a.float() * g).sum((0, 1)))
    images = ("channel_dot images", lambda a, g: ops.channel_dot(a, g, 1), lambda a, g: (a.float() * g).sum((0, 2, 3)))
    weights = ("weight_dot", ops.weight_dot, _eager_weight_dot)
    moments = ("weight_moments", ops.weight_moments, None)
    inputs = ("channel_moments tokens", lambda x: ops.channel_moments(x, 2), _eager_moments)
    for mebibytes in (256, 64):  # the larger first: what is compared with the ceiling, should the time be spent
        elements = mebibytes * timing.MIB // 2
        cases += [
            (*tokens, (8, elements // 8 // 4096, 4096), False),
            (*weights, (elements // 4096, 4096), False),
            (*inputs, (8, elements // 8 // 4096, 4096), False),
            (*images, (elements // (256 * 3136), 256, 56, 56), False),
            (*images, (elements // (256 * 3136), 256, 56, 56), True),
            (*moments, (elements // 4096, 4096), False),
        ]
    cases += [
        (*images, (256, 3, 224, 224), False),
        (*images, (512, 2048, 7, 7), False),
        (*tokens, (1, 64, 524_288), False),
    ]
    for name, call, eager, shape, channels_last in cases:
        for dtype_name, dtype in DTYPES.items():
            row: Row = {"operator": name, "shape": list(timing.sized(shape)), "channels_last": channels_last}
            row |= {"dtype": dtype_name}
            count = 1 if name.startswith("channel_moments") else 2
            make = lambda: tuple(_random(shape, dtype, channels_last) for _ in range(count))  # noqa: B023, E731
            yield timing.attempt(row, lambda row: _bandwidth_row(row, call, eager, make))  # noqa: B023


def _bandwidth_row(
    row: Row, call: Callable[..., Any], eager: Callable[..., Any] | None, make: Callable[[], tuple[Tensor, ...]]
) -> None:
    input_sets = timing.sets(make)
    moved = timing.bytes_of(input_sets[0])
    ceiling = timing.copy_rate(moved)
    row |= {"MiB": round(moved / timing.MIB), "copy_GB_per_s": ceiling / 1e9}
    for backend in timing.backends():
        with obc.use_backend(backend):
            timing.check(lambda: call(*input_sets[0]))
            rate = moved / timing.graph_seconds(call, input_sets)
        row |= {f"{backend}_GB_per_s": rate / 1e9, f"{backend}_share_of_copy": rate / ceiling}
    if eager is not None:
        row["eager_share_of_copy"] = moved / timing.graph_seconds(eager, input_sets[:2]) / ceiling
    # Compiling takes seconds: once an operator, at the size that all shares are compared at.
    if eager is not None and 256 <= moved // timing.MIB < 300 and not timing.is_dry():
        compiled = torch.compile(eager, dynamic=False)
        row["compiled_share_of_copy"] = moved / timing.graph_seconds(compiled, input_sets[:2]) / ceiling


def list_section() -> Rows:
    """weight_dot_list: kernels on the GPU and time for a model's weights, against one weight_dot a layer."""
    for name, shapes in (("ResNet-50", resnet50_weights()), ("Llama-8B layer", llama_8b_layer())):
        pairs = [_pair(shape, torch.bfloat16) for shape in shapes]
        weights, grads = ([pair[side] for pair in pairs] for side in range(2))
        row: Row = {"weights": name, "tensors": len(weights)}
        yield timing.attempt(row, lambda row: _list_row(row, weights, grads))  # noqa: B023 - called at once


def _list_row(row: Row, weights: list[Tensor], grads: list[Tensor]) -> None:
    def whole() -> Any:
        return ops.weight_dot_list(weights, grads)

    def each() -> Any:
        return [ops.weight_dot(w, g) for w, g in zip(weights, grads, strict=True)]

    moved = 2 * timing.bytes_of(weights)
    row |= {"MiB": round(moved / timing.MIB), "copy_GB_per_s": timing.copy_rate(moved) / 1e9}
    for backend in timing.backends():
        with obc.use_backend(backend):
            timing.check(whole)
            row |= {
                f"{backend}_list_kernels": timing.kernels(whole),
                f"{backend}_list_ms": timing.seconds(whole) * 1e3,
                f"{backend}_each_kernels": timing.kernels(each),
                f"{backend}_each_ms": timing.seconds(each) * 1e3,
                f"{backend}_list_graph_GB_per_s": moved / timing.graph_seconds(whole, [()]) / 1e9,
            }


def end_row_section() -> Rows:
    """end_row: time and kernels of a row over the channels of small and large models."""
    for channels in (4096, 100_000, 1_000_000):
        size = timing.sized((channels,))[0]
        groups = torch.arange(size, device=timing.device()) // 5
        scores, row = torch.zeros(size, device=timing.device()), torch.randn(size, device=timing.device())

        def measure(found: Row, scores: Tensor = scores, row: Tensor = row, groups: Tensor = groups) -> None:
            with obc.use_backend(found["backend"]):
                found["plain_us"] = timing.graph_seconds(lambda: ops.end_row(scores, row), [()]) * 1e6
                found["grouped_us"] = timing.graph_seconds(lambda: ops.end_row(scores, row, 1.0, groups), [()]) * 1e6
                found["kernels"] = timing.kernels(lambda: ops.end_row(scores, row, 1.0, groups))

        for backend in [*timing.backends(), "reference"]:
            yield timing.attempt({"channels": size, "backend": backend}, measure)


def fold_section() -> Rows:
    """fold: one launch and two products as a share of the matrix rate that torch.matmul reaches at 8192."""
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
                ceiling = timing.matrix_rate(dtype)
                for shape, kept_out, kept_in in shapes:
                    weight = torch.randn(timing.sized(shape), device=timing.device()).to(dtype)
                    kept = [min(kept_out, weight.shape[0] // 2), min(kept_in, weight.shape[1] // 2)]
                    c = torch.randn(kept[0], weight.shape[0], device=timing.device()).to(dtype)
                    d = torch.randn(weight.shape[1], kept[1], device=timing.device()).to(dtype)
                    row: Row = {"dtype": name, "float32_matmul": precision, "matmul_TFLOP_per_s": ceiling / 1e12}
                    row |= {"shape": list(weight.shape), "kept": [c.shape[0], d.shape[1]]}
                    yield timing.attempt(row, lambda row: _fold_row(row, weight, c, d, ceiling))  # noqa: B023
    finally:
        torch.set_float32_matmul_precision(before)


def _fold_row(row: Row, weight: Tensor, c: Tensor, d: Tensor, ceiling: float) -> None:
    """One fold by two products and, where it is written for that, in one launch; and a forward with its backward."""
    flops = 2 * min(gemm.multiplications(weight, c, d))
    timing.check(lambda: ops.fold(weight, c, d))
    row["GFLOP"] = flops / 1e9
    products = timing.graph_seconds(gemm.fold, [(weight, c, d)])
    row |= {"products_us": products * 1e6, "products_share": flops / products / ceiling}
    if "triton" in timing.backends() and weight[0, 0].numel() == 1:
        from obc_kernels.fold import MOST_KEPT_IN, fold_fits, fold_triton

        if d.shape[1] <= MOST_KEPT_IN:
            launch = timing.graph_seconds(fold_triton, [(weight, c, d)])
            row |= {"one_launch_us": launch * 1e6, "one_launch_share": flops / launch / ceiling}
            row["one_launch_is_chosen"] = fold_fits(weight, c, d, 1, 1)
    leaves = [tensor.requires_grad_() for tensor in (weight, c, d)]
    trained = timing.seconds(lambda: torch.autograd.grad(ops.fold(*leaves).sum(), leaves))
    row |= {"forward_backward_us": trained * 1e6, "forward_backward_share": 3 * flops / trained / ceiling}


# Elements of the first input in the middle of each size class of obc.backends.fastest.
CLASS_SIZES = {"small": 2**14, "medium": 2**21, "large": 2**26}


def _chosen_calls(elements: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]]:
    """Per operator a call of ``elements`` and its input sets."""
    width = min(4096, max(64, elements // 64))
    matrices = timing.sets(lambda: _pair((elements // width, width), dtype))
    halves = [[tensor.tensor_split(2) for tensor in matrix] for matrix in matrices]
    calls: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
        "channel_dot": (lambda a, g: ops.channel_dot(a, g, 1), [*matrices]),
        "weight_dot": (ops.weight_dot, [*matrices]),
        "weight_dot_list": (ops.weight_dot_list, [tuple(map(list, pair)) for pair in halves]),
        "weight_moments": (ops.weight_moments, [*matrices]),
        "channel_moments": (lambda x, _: ops.channel_moments(x, 1), [*matrices]),
    }
    if dtype == torch.float32:
        rows = [(torch.zeros_like(a.flatten()), g.flatten()) for a, g in matrices[:4]]
        calls["end_row"] = (ops.end_row, [*rows])
    return calls


def defaults_section() -> Rows:
    """The faster backend by operator, dtype and size class, called in a loop, for backends/fastest.py."""
    for size, elements in CLASS_SIZES.items():
        elements = min(elements, 2**12) if timing.is_dry() else elements
        for name, dtype in (*DTYPES.items(), ("f16", torch.float16)):
            for operator, (call, input_sets) in _chosen_calls(elements, dtype).items():

                def measure(
                    row: Row, call: Callable[..., Any] = call, input_sets: list[tuple[Any, ...]] = input_sets
                ) -> None:
                    for backend in timing.backends():
                        with obc.use_backend(backend):
                            timing.check(lambda: call(*input_sets[0]))
                            row[f"{backend}_us"] = timing.loop_seconds(call, input_sets) * 1e6

                row: Row = {"operator": operator, "dtype": name, "size": size, "elements": elements}
                yield timing.attempt(row, measure)


# Each section and its share of the time.
SECTIONS: dict[str, tuple[Callable[[], Rows], float]] = {
    "defaults": (defaults_section, 0.12),
    "bandwidth": (bandwidth_section, 0.22),
    "launches": (list_section, 0.05),
    "scoring": (scoring_section, 0.26),
    "rows": (rows_section, 0.1),
    "pruning": (pruning_section, 0.12),
    "fold": (fold_section, 0.09),
    "end_row": (end_row_section, 0.04),
}


def facts() -> dict[str, Any]:
    """The machine and software of this run."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"unknown ({type(error).__name__})"

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    root = str(Path(__file__).resolve().parent.parent)
    gpu: dict[str, Any] = {"gpu": "none: a dry run"}
    if not timing.is_dry():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30),
            "L2_MiB": properties.L2_cache_size / timing.MIB,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return gpu | {
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": output("git", "-C", root, "rev-parse", "HEAD"),
        "uncommitted_changes": output("git", "-C", root, "status", "--porcelain", "--untracked-files=no") or "none",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backends": obc.backends.describe(),
    }


class Report:
    """The measurements so far, written to disk after every row: ``gpu-<name>.json`` and, as tables, ``.txt``."""

    def __init__(self, out: Path) -> None:
        self.content: dict[str, Any] = {"facts": facts(), "sections": {}, "failed": {}, "cut_short": [], "left_out": []}
        out.mkdir(parents=True, exist_ok=True)
        self.stem = out / f"gpu-{self.content['facts']['gpu'].replace(' ', '-').replace(':', '').lower()}"
        self.write()

    def write(self) -> None:
        self.stem.with_suffix(".json").write_text(json.dumps(self.content, indent=1) + "\n")
        shown = {key: value for key, value in self.content["facts"].items() if key != "backends"}
        texts = [json.dumps(shown, indent=1), *(table(*section) for section in self.content["sections"].items())]
        texts += [f"\n{name} FAILED\n{error}" for name, error in self.content["failed"].items()]
        for word in ("cut_short", "left_out"):
            texts += [f"\n{word.replace('_', ' ')}: {', '.join(self.content[word])}"] if self.content[word] else []
        self.stem.with_suffix(".txt").write_text("\n".join(texts) + "\n")

    def measure(self, name: str, end: float) -> None:
        """Run a section until its rows are done or the time ``end`` has come."""
        rows = self.content["sections"][name] = []
        try:
            for row in SECTIONS[name][0]():
                rows.append(row)
                if "error" in row:
                    told = self.content["failed"].get(name, "")
                    self.content["failed"][name] = f"{told}row {len(rows)}: {row['error']}\n"
                self.write()
                if time.monotonic() > end:
                    self.content["cut_short"].append(name)
                    break
        except Exception:  # the report carries it, and the exit code; the other sections are worth having
            self.content["failed"][name] = self.content["failed"].get(name, "") + traceback.format_exc()
        self.write()


def table(name: str, rows: list[Row]) -> str:
    """Rows of one section under the union of their columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([f"\n{name}: {(SECTIONS[name][0].__doc__ or '').strip()}", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print a table each; 1 if a section failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=480, help="for all sections together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small and once: to try the script itself")
    options = parser.parse_args(arguments)
    if options.dry_run:
        timing.dry_run()
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (--dry-run tries the script itself)")
    torch.manual_seed(0)
    started = time.monotonic()
    report = Report(options.out)
    shares = sum(SECTIONS[name][1] for name in options.sections)
    end = started
    for name in options.sections:
        begun = time.monotonic()
        if begun > started + options.seconds:
            report.content["left_out"].append(name)
            report.write()
            continue
        end += options.seconds * SECTIONS[name][1] / shares
        report.measure(name, end)
        print(table(name, report.content["sections"][name]))
        print(report.content["failed"].get(name, ""), f"({time.monotonic() - begun:.0f} s)", flush=True)
        if not options.dry_run:
            torch.cuda.empty_cache()
    for word in ("cut_short", "left_out"):
        if report.content[word]:
            print(f"{word.replace('_', ' ')}, the time was spent: {', '.join(report.content[word])}")
    print(f"written: {report.stem.with_suffix('.json')}")
    return 1 if report.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
