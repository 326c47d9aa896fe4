"""Speed of the operators on the CPU: ``python -m benchmarks.bench_ops``, or ``pytest benchmarks --benchmark-only``.

Bytes a call, the floor of every implementation: channel_dot, weight_dot and weight_moments read their two inputs
once (results are negligible); end_row reads and writes both vectors. fold is bound by multiplications instead.
channel_moments reads its one input once.
"Two plain reads" is ``torch.dot`` of each of the two inputs with itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import obc
from benchmarks.harness import Case, Provider, Target, main, plain_product, plain_read
from obc import ops, reference
from tests.tolerances import allowed_error

PLAIN_READS = "two plain reads"
PLAIN_READ = "one plain read"
# What the project promises of the reductions, and of weight_dot against torch.compile.
WEIGHT_TARGET = Target("obc", PLAIN_READS, 1.2)
CHANNEL_TARGET = Target("obc", PLAIN_READS, 1.1)
MOMENTS_TARGET = Target("obc", PLAIN_READ, 1.2)
COMPILED_TARGET = Target("obc", "torch.compile", 1 / 4)


def _same(expected: Callable[[Callable[..., Any]], Any], terms: int, dtype: torch.dtype) -> Callable[[Any], None]:
    """A check against ``expected``, which applies a map to the float64 inputs before it computes: x for the truth,
    |x| for the magnitude that rounding errors scale with."""
    truths, magnitudes = _tuple(expected(Tensor.double)), _tuple(expected(lambda x: x.double().abs()))

    def check(result: Any) -> None:
        for actual, truth, magnitude in zip(_tuple(result), truths, magnitudes, strict=True):
            error = (actual.double() - truth).abs()
            allowed = allowed_error(truth, magnitude, terms, dtype, actual.dtype)
            assert (error <= allowed).all(), f"largest error {error.max():.3g}, allowed there {allowed.max():.3g}"

    return check


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _plain_reads(*tensors: Tensor) -> Provider:
    flat = [_flat(tensor) for tensor in tensors]
    return Provider(PLAIN_READS, lambda: [torch.dot(vector, vector) for vector in flat])


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's memory, in whatever order, as a vector: no copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _providers(op: Callable[..., Any], definition: Callable[..., Any], args: tuple[Any, ...]) -> list[Provider]:
    torch.compiler.reset()  # every case is a fresh compilation for its own shapes
    compiled = torch.compile(definition, dynamic=False)
    return [
        Provider("obc", lambda: op(*args)),
        Provider("reference", lambda: definition(*args)),
        Provider("torch.compile", lambda: compiled(*args)),
    ]


def weight_dot(*shape: int) -> Case:
    weight, grad = torch.randn(2, *shape)
    size = weight.numel()
    return Case(
        [*_providers(ops.weight_dot, reference.weight_dot, (weight, grad)), _plain_reads(weight, grad)],
        baseline="reference",
        limit=plain_read(8 * size),
        bytes_moved=8 * size,
        check=_same(lambda f: reference.weight_dot(f(weight), f(grad)), size // min(shape[:2]), weight.dtype),
        unchecked=frozenset({PLAIN_READS}),
        targets=[WEIGHT_TARGET, COMPILED_TARGET],
    )


def weight_moments(*shape: int) -> Case:
    weight, grad = torch.randn(2, *shape)
    size = weight.numel()
    return Case(
        [*_providers(ops.weight_moments, reference.weight_moments, (weight, grad)), _plain_reads(weight, grad)],
        baseline="reference",
        limit=plain_read(8 * size),
        bytes_moved=8 * size,
        check=_same(lambda f: reference.weight_moments(f(weight), f(grad)), size // shape[0], weight.dtype),
        unchecked=frozenset({PLAIN_READS}),
    )


def channel_moments(*shape: int, channel_dim: int = 1) -> Case:
    x = torch.randn(shape)
    size, flat = x.numel(), _flat(x)
    return Case(
        [
            *_providers(ops.channel_moments, reference.channel_moments, (x, channel_dim)),
            Provider(PLAIN_READ, lambda: torch.dot(flat, flat)),
        ],
        baseline="reference",
        limit=plain_read(4 * size),
        bytes_moved=4 * size,
        # A square has twice the relative error of its root; the sum of x is as inexact as that of |x|.
        check=_moments_check(x, channel_dim),
        unchecked=frozenset({PLAIN_READ}),
        targets=[MOMENTS_TARGET],
    )


def _moments_check(x: Tensor, channel_dim: int) -> Callable[[Any], None]:
    truths = reference.channel_moments(x.double(), channel_dim)
    magnitudes = (truths[2], truths[1], truths[2], 2 * truths[3])

    def check(result: Any) -> None:
        for actual, truth, magnitude in zip(result, truths, magnitudes, strict=True):
            allowed = allowed_error(truth, magnitude, x.numel() // len(truth), x.dtype, actual.dtype)
            assert ((actual.double() - truth).abs() <= allowed).all()

    return check


def channel_dot(*shape: int, channel_dim: int = 1, channels_last: bool = False, promised: bool = True) -> Case:
    activation, grad = torch.randn(2, *shape)
    if channels_last:
        activation, grad = (t.to(memory_format=torch.channels_last) for t in (activation, grad))
    size, channels = activation.numel(), shape[channel_dim]
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    # The best that stock torch has: the gradient of a batch norm's scale, for channels in dim 1.
    a, g = (activation.flatten(0, -2), grad.flatten(0, -2)) if channel_dim == -1 else (activation, grad)

    def batch_norm_backward() -> Tensor:
        return torch.ops.aten.native_batch_norm_backward(
            g, a, ones, zeros, ones, None, None, False, 0.0, [False, True, False]
        )[1]

    return Case(
        [
            *_providers(ops.channel_dot, reference.channel_dot, (activation, grad, channel_dim)),
            Provider("batch norm backward", batch_norm_backward),
            _plain_reads(activation, grad),
        ],
        baseline="reference",
        limit=plain_read(8 * size),
        bytes_moved=8 * size,
        check=_same(
            lambda f: reference.channel_dot(f(activation), f(grad), channel_dim), size // channels, activation.dtype
        ),
        unchecked=frozenset({PLAIN_READS}),
        targets=[CHANNEL_TARGET] if promised else [],
    )


def end_row(channels: int, groups: int | None = None) -> Case:
    """Every provider has its own vectors; only the checked first call finds a row that is not zero yet."""
    before, values = torch.randn(2, channels)
    index = None if groups is None else torch.randint(groups, (channels,)).sort().values
    before = before[: groups or channels]

    def own(end: Callable[..., Any]) -> Callable[[], Tensor]:
        scores, row = before.clone(), values.clone()

        def call() -> Tensor:
            end(scores, row, 1.0, index)
            return scores

        return call

    def expected(f: Callable[[Tensor], Tensor]) -> Tensor:
        scores = f(before)
        reference.end_row(scores, f(values), 1.0, index)
        return scores

    bytes_moved = 8 * (len(before) + channels) + (0 if index is None else 8 * channels)
    terms = 2 if index is None else 1 + int(index.bincount().max())
    return Case(
        [
            Provider("obc", own(ops.end_row)),
            Provider("reference", own(reference.end_row)),
            Provider("torch.compile", own(torch.compile(reference.end_row, dynamic=False))),
        ],
        baseline="reference",
        limit=plain_read(bytes_moved),
        bytes_moved=bytes_moved,
        check=_same(expected, terms, before.dtype),
    )


def fold(out: int, in_: int, kept_out: int, kept_in: int, *kernel: int) -> Case:
    weight = torch.randn(out, in_, *kernel) / math.sqrt(out * in_)
    c, d = torch.randn(kept_out, out), torch.randn(in_, kept_in)
    positions = math.prod(kernel)
    multiplications = positions * min(kept_out * in_ * (out + kept_in), out * kept_in * (in_ + kept_out))
    return Case(
        _providers(ops.fold, reference.fold, (weight, c, d)),
        baseline="reference",
        limit=plain_product(multiplications),
        bytes_moved=4 * (weight.numel() + c.numel() + d.numel() + kept_out * kept_in * positions),
        flops=2 * multiplications,
        check=_same(lambda f: reference.fold(f(weight), f(c), f(d)), out + in_, weight.dtype),
    )


def dispatch() -> Case:
    """The cost of a call with nothing to compute."""
    a, g = torch.ones(2, 1, 8)
    native = obc.backends.resolve("channel_dot", "cpu")
    return Case(
        [
            Provider("obc", lambda: ops.channel_dot(a, g, 1)),
            Provider("torch.ops.obc", lambda: torch.ops.obc.channel_dot(a, g, 1)),
            Provider("backend alone", lambda: native(a, g, 1, False)),
            Provider("reference", lambda: reference.channel_dot(a, g, 1)),
        ],
        baseline="reference",
        limit=Provider("one torch.mul", lambda: torch.mul(a, g)),
        bytes_moved=64,
        check=_same(lambda f: reference.channel_dot(f(a), f(g), 1), 1, a.dtype),
    )


CASES: dict[str, Callable[[], Case]] = {
    "weight_dot 4096x4096": lambda: weight_dot(4096, 4096),
    "weight_dot 512x512x3x3": lambda: weight_dot(512, 512, 3, 3),
    "channel_dot 64x64x32x32": lambda: channel_dot(64, 64, 32, 32),
    "channel_dot 64x512x4x4": lambda: channel_dot(64, 512, 4, 4),
    "channel_dot tokens 8x512x2048": lambda: channel_dot(8, 512, 2048, channel_dim=-1),
    "channel_dot channels-last 64x64x32x32": lambda: channel_dot(64, 64, 32, 32, channels_last=True, promised=False),
    "channel_dot channels-last 64x512x4x4": lambda: channel_dot(64, 512, 4, 4, channels_last=True, promised=False),
    "channel_moments 64x64x32x32": lambda: channel_moments(64, 64, 32, 32),
    "channel_moments tokens 8x512x2048": lambda: channel_moments(8, 512, 2048, channel_dim=-1),
    "channel_moments tokens 64x197x384": lambda: channel_moments(64, 197, 384, channel_dim=-1),
    "channel_moments rows 4096x4096": lambda: channel_moments(4096, 4096),
    "end_row 20000": lambda: end_row(20_000),
    "end_row 1000000 in 100000 groups": lambda: end_row(1_000_000, 100_000),
    "weight_moments 4096x4096": lambda: weight_moments(4096, 4096),
    "fold 512x512x3x3 to 256x256": lambda: fold(512, 512, 256, 256, 3, 3),
    "fold 2048x2048 to 1024x1536": lambda: fold(2048, 2048, 1024, 1536),
    "dispatch of channel_dot 1x8": dispatch,
}

# The same for pytest-benchmark, which times one provider after the other: small, for a trend rather than a ratio.
SMALL: dict[str, Callable[[], Case]] = {
    "weight_dot": lambda: weight_dot(256, 256),
    "channel_dot": lambda: channel_dot(8, 64, 16, 16),
    "channel_moments": lambda: channel_moments(8, 64, 16, 16),
    "end_row": lambda: end_row(10_000),
    "weight_moments": lambda: weight_moments(256, 256),
    "fold": lambda: fold(64, 64, 32, 32, 3, 3),
    "dispatch": dispatch,
}


@pytest.mark.parametrize("name", SMALL)
def test_speed(benchmark: Any, name: str) -> None:
    """obc's provider, checked, then timed."""
    case = SMALL[name]()
    provider = case.providers[0]
    case.check(provider.call())
    benchmark.group = "operators"
    benchmark(provider.call)


if __name__ == "__main__":
    torch.manual_seed(0)
    with obc.use_backend("cpu"):
        sys.exit(main("bench_ops", CASES))
