"""Every operator once on every GPU backend, small, and a row of scoring: does anything run at all?

    python -m benchmarks.gpu_smoke              a line for each operator, backend and dtype, as soon as it is known
    python -m benchmarks.gpu_smoke --dry-run    the same on the CPU, where there is no GPU

The first part of ``benchmarks/gpu.sh`` after the build. Every result is compared with the reference in float64 on the
CPU. One that fails is shown with its error, the others run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks.gpu_timing import flat
from obc import ops
from obc.backends.operators import OPERATORS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}

# Of the largest entry. Sums are in float32 or better of the very inputs that the reference reads; fold's products
# round each result to the dtype, and float32 ones may be computed in TF32.
_ALLOWED = {"fold": 2e-2, "default": 1e-4}

Call = Callable[..., Any]


def operator_calls() -> dict[str, list[tuple[Call, tuple[tuple[int, ...], ...]]]]:
    """Per operator the calls that are tried, each with the shapes of its inputs: one for every way of reading."""
    matrix, image, kernels = (130, 520), (6, 40, 14, 14), (48, 40, 3, 3)

    def end_row(scores: Tensor, row: Tensor) -> list[Tensor]:
        scores, row = scores.clone(), row.clone()
        groups = torch.arange(row.numel(), device=row.device) * scores.numel() // row.numel()
        return [ops.end_row(scores, row, 2.0, groups), scores, row]

    return {
        "channel_dot": [
            (lambda a, g: ops.channel_dot(a, g, 1), (matrix, matrix)),
            (lambda a, g: ops.channel_dot(a, g, 1), (image, image)),
            (lambda a, g: ops.channel_dot(a, g, 1, True), (image, image)),
        ],
        "channel_moments": [
            (lambda x: ops.channel_moments(x, -1), ((3, 50, 520),)),
            (lambda x: ops.channel_moments(x, 1), (image,)),
        ],
        "weight_dot": [(ops.weight_dot, (matrix, matrix)), (ops.weight_dot, (kernels, kernels))],
        "weight_dot_list": [
            (lambda w, v, g, h: ops.weight_dot_list([w, v], [g, h]), (matrix, kernels, matrix, kernels))
        ],
        "weight_moments": [(ops.weight_moments, (matrix, matrix))],
        "fold": [(ops.fold, (matrix, (60, 130), (520, 130)))],
        "end_row": [(end_row, ((1000,), (5000,)))],
    }


def inputs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Random tensors on the CPU, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def tried(name: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """The largest error of an operator's calls on a backend, relative to the largest entry of each result."""
    errors = []
    for call, shapes in operator_calls()[name]:
        on_cpu = inputs(shapes, dtype)
        with obc.use_backend(backend):
            actual = flat(call(*[tensor.to(device) for tensor in on_cpu]))
        with obc.use_backend("reference"):
            truth = flat(call(*[tensor.double() for tensor in on_cpu]))
        for got, want in zip(actual, truth, strict=True):
            if got.shape != want.shape:
                raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
            difference = (got.detach().cpu().double() - want.double()).abs().max()
            errors.append(difference / want.double().abs().max().clamp_min(1e-30))
    return float(torch.stack(errors).max())  # NaN where one is


def scored_row(backend: str, device: str) -> float:
    """The largest error of scores of a small network on the device against those of the reference on the CPU."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(2))
    model = nn.Sequential(*layers, nn.Linear(64, 10)).eval()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]

    def scores(backend: str, device: str) -> obc.Scores:
        model.to(device)
        with obc.use_backend(backend):
            return obc.score(model, batches, lambda m, x: m(x.to(device)).square().mean(), progress=False)

    actual, truth = scores(backend, device), scores("reference", "cpu")
    errors = []
    for name, channels in truth.items():
        want = channels.out_channels
        if want is not None:
            got = actual[name].out_channels
            assert got is not None
            errors.append((got.cpu() - want).abs().max() / want.abs().max())
    return float(torch.stack(errors).max())


def attempts(backends: Sequence[str], device: str) -> list[tuple[str, Callable[[], float], float]]:
    """The cases, float32 first: (name, error, allowed error)."""
    found: list[tuple[str, Callable[[], float], float]] = []
    for dtype_name, dtype in DTYPES.items():
        for backend in backends:
            for name in OPERATORS:
                if name == "end_row" and dtype not in (torch.float32, torch.float64):
                    continue  # rows are float32 or float64
                allowed = _ALLOWED.get(name, _ALLOWED["default"])
                call = lambda n=name, b=backend, d=dtype: tried(n, b, d, device)  # noqa: E731
                found.append((f"{backend} {name} {dtype_name}", call, allowed))
            if dtype_name == "f32":
                found.append((f"{backend} rows of scoring", lambda b=backend: scored_row(b, device), 1e-2))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each attempt, at the end their number; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="after which no further is begun (default: 60)")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to try the script itself")
    options = parser.parse_args(arguments)
    device, wanted = ("cpu", ["cpu"]) if options.dry_run else ("cuda", options.backends)
    failed = []
    for name in wanted:
        if reason := obc.backends.BACKENDS[name].why_unavailable():
            print(f"FAILED  {name}: {reason}", flush=True)
            failed.append(name)
    listed = attempts([name for name in wanted if name not in failed], device)
    begun = time.monotonic()
    for place, (what, call, allowed) in enumerate(listed):
        if time.monotonic() - begun > options.seconds:
            print(f"{len(listed) - place} not tried: the time was spent")
            break
        started = time.monotonic()
        try:
            error = call()
            if not error <= allowed:
                raise AssertionError(f"off by {error:.1e} of the largest entry, allowed {allowed:.0e}")
            print(f"ok      {what}: error {error:.1e}, {time.monotonic() - started:.2f} s", flush=True)
        except Exception:  # the exit code tells, and what else fails is worth knowing
            failed.append(what)
            print(f"FAILED  {what}\n{traceback.format_exc(limit=-4)}", flush=True)
    print(f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
