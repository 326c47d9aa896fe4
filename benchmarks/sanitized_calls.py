"""Every CUDA operator once per kind of path at small sizes, compared with the reference: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python benchmarks/sanitized_calls.py        (see benchmarks/sanitize_gpu.sh)

``--dtype`` names the one dtype of sums, ``--backend`` another backend, ``--device`` another device, to try the script
itself where there is no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import obc
from obc import ops

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def layouts(tensor: Tensor) -> list[Tensor]:
    """Contiguous, dim 1 innermost, unaligned, and a slice of a wider buffer."""
    last = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    wider = tensor.new_empty([size + 3 for size in tensor.shape])[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return [tensor, last, shifted, wider.copy_(tensor)]


def close(actual: Tensor, truth: Tensor) -> None:
    """Equal to 1e-4 of the largest entry: a sanitizer is no reason to measure accuracy again."""
    scale = truth.double().abs().max() if truth.numel() else 1.0
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    assert ((actual.double() - truth.double()).abs() <= 1e-4 * scale + 1e-6).all()


class Calls:
    """Runs calls on a backend and on the reference, and counts them."""

    def __init__(self, backend: str) -> None:
        self.backend, self.count = backend, 0

    def check(self, call: Callable[[], Tensor | Sequence[Tensor]]) -> None:
        with obc.use_backend(self.backend):
            actual = call()
        with obc.use_backend("reference"):
            truth = call()
        flat = [[result] if isinstance(result, Tensor) else list(result) for result in (actual, truth)]
        for got, want in zip(*flat, strict=True):
            close(got, want)
        self.count += 1


def sums(calls: Calls, device: str, dtype: torch.dtype) -> None:
    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)

    # Short lines, several chunks and sections, few positions, many positions, an odd number of them, short rows.
    for shape in ((900, 24), (4000, 24), (40, 6, 7, 7), (3, 2, 70, 70), (2, 3, 17, 17), (5, 33)):
        for a, g in zip(*map(layouts, pair(*shape)), strict=True):
            calls.check(lambda a=a, g=g: ops.channel_dot(a, g, 1))
            calls.check(lambda a=a, g=g: ops.channel_dot(a, g, 1, True))
            mask = g.select(1, 0) > 0  # with the strides of its layout
            for dim in {1, a.dim() - 1}:
                calls.check(lambda a=a, dim=dim: ops.channel_moments(a, dim))
            calls.check(lambda a=a, mask=mask: ops.channel_moments(a, 1, mask))
    weights, grads, groups = [], [], []
    # Several tiles and chunks, grouped, depthwise, a kernel larger than a tile, one row.
    for shape, count in (
        ((150, 700), 1),
        ((36, 20, 3), 2),
        ((64, 1, 3, 3), 64),
        ((3, 2, 25, 25), 1),
        ((1, 600), 1),
    ):
        for w, g in zip(*map(layouts, pair(*shape)), strict=True):
            calls.check(lambda w=w, g=g, count=count: ops.weight_dot(w, g, groups=count))
            calls.check(lambda w=w, g=g: ops.weight_moments(w, g))
            weights, grads, groups = [*weights, w], [*grads, g], [*groups, count]
    for side in (0, 1):
        calls.check(lambda w=weights, g=grads, n=groups, side=side: ops.weight_dot_list(w, g, groups=n)[side])


def rows(calls: Calls, device: str) -> None:
    # One block, blocks that wait for each other, a group that a warp finishes.
    for channels, members in ((100, 1), (20_000, 3), (9_000, 4_000)):
        groups = torch.arange(channels, device=device) // members
        for bad in (None, channels // 2):
            before, values = torch.rand(channels, device=device), torch.randn(channels, device=device)
            if bad is not None:
                values[bad] = torch.nan

            def end_row(before: Tensor = before, values: Tensor = values, groups: Tensor = groups) -> list[Tensor]:
                scores, row = before.clone(), values.clone()
                return [ops.end_row(scores, row, 2.0, groups), scores, row]

            calls.check(end_row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    calls = Calls(options.backend)
    sums(calls, options.device, DTYPES[options.dtype])
    rows(calls, options.device)
    print(f"{calls.count} calls checked on {options.backend}")


if __name__ == "__main__":
    main()
