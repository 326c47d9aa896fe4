"""Features that only the Triton launchers have: tile shapes, splits, worklists, layouts that need a copy.

Run by ``tests/test_triton.py`` in a process of its own with TRITON_INTERPRET=1; the name keeps pytest from collecting
it elsewhere. The operators' own tests run there too, on the backend ``triton``.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_sum_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obc import reference
from obc_kernels import weight_dot_list
from obc_kernels.channel_dot import ChannelDotConfig, channel_dot_triton
from obc_kernels.channel_moments import channel_moments_triton
from obc_kernels.end_row import EndRowConfig, end_row_triton
from obc_kernels.fold import fold_fits, fold_triton
from obc_kernels.launch import recording
from obc_kernels.layout import Walk
from obc_kernels.upload import Reserve
from obc_kernels.weight_dot import WeightDotConfig, WeightWalk, weight_dot_triton
from obc_kernels.weight_dot_list import CACHED_WORKLISTS, weight_dot_list_triton
from obc_kernels.weight_moments import WeightMomentsConfig, weight_moments_triton

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_dot(actual: Tensor, arguments: tuple[Tensor, Tensor], definition: object, terms: int) -> None:
    """``definition`` of the float64 arguments, and of their magnitudes for the bound."""
    first, second = (argument.double() for argument in arguments)
    truth, magnitude = definition(first, second), definition(first.abs(), second.abs())  # type: ignore[operator]
    assert_sum_close(actual, truth, magnitude, terms, arguments[0].dtype)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_channel_dot_in_tiles(dtype: torch.dtype, per_sample: bool, splits: int, channels_last: bool) -> None:
    activation, grad = (torch.randn(3, 21, 5, 7).to(dtype) for _ in range(2))
    if channels_last:
        activation, grad = (t.contiguous(memory_format=torch.channels_last) for t in (activation, grad))
    # 21 channels are two blocks; 35 positions are three blocks, the last of which extends beyond the end.
    config = ChannelDotConfig(block_c=16, block_p=16, splits=splits)
    actual = channel_dot_triton(activation, grad, 1, per_sample, config)
    assert_dot(actual, (activation, grad), lambda a, g: reference.channel_dot(a, g, 1, per_sample), terms=105)


def test_channel_dot_copies_what_has_too_many_axes() -> None:
    activation = torch.randn(4, 6, 5, 5, 5, 5)[:, :, :2, :2, :2, :2]
    assert Walk.over(1, False, activation, activation) is None
    actual = channel_dot_triton(activation, activation, 1)
    assert_dot(actual, (activation, activation), lambda a, g: reference.channel_dot(a, g, 1), terms=64)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles_per_split", [1, 2])
@pytest.mark.parametrize(("shape", "groups"), [((37, 5, 3, 3), 1), ((36, 5, 3, 3), 3), ((36, 1, 3, 3), 36)], ids=str)
def test_weight_dot_in_tiles(dtype: torch.dtype, tiles_per_split: int, shape: tuple[int, ...], groups: int) -> None:
    weight, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    config = WeightDotConfig(block_g=4, block_r=4, block_m=16, tiles_per_split=tiles_per_split)
    actual = weight_dot_triton(weight, grad, groups=groups, config=config)
    for side in range(2):
        definition = lambda w, g, side=side: reference.weight_dot(w, g, groups=groups)[side]  # noqa: E731
        assert_dot(actual[side], (weight, grad), definition, terms=37 * 9)


def test_weight_dot_copies_what_has_too_many_axes() -> None:
    weight = torch.randn(6, 4, 4, 4, 4).permute(0, 1, 4, 2, 3)[:, :, :2, :3, :3]
    assert WeightWalk.over(weight, weight, 1) is None
    for actual, truth in zip(
        weight_dot_triton(weight, weight), reference.weight_dot(*[weight.double()] * 2), strict=True
    ):
        assert_sum_close(actual, truth, truth, terms=6 * 18, dtype=torch.float32)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_moments_in_tiles(dtype: torch.dtype, transposed: bool) -> None:
    weight, grad = (torch.randn(21, 37).to(dtype) for _ in range(2))
    if transposed:
        weight, grad = weight.t(), grad.t()
    config = WeightMomentsConfig(block_o=8, block_p=16, run=4, splits=2)
    actual = weight_moments_triton(weight, grad, config)
    for index, moment in enumerate(actual):
        definition = lambda w, g, index=index: reference.weight_moments(w, g)[index]  # noqa: E731
        assert_dot(moment, (weight, grad), definition, terms=37)


def layers(count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """``count`` layers of three kinds: read in vectors, by element, depthwise."""
    shapes = [(16, 64), (5, 7), (8, 1, 3, 3)]
    weights, grads = ([torch.randn(shapes[i % 3]).to(dtype) for i in range(count)] for _ in range(2))
    return weights, grads


def dot_list(weights: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(weights)
    groups = [weight.shape[0] if weight.dim() == 4 else 1 for weight in weights]
    return weight_dot_list_triton(weights, grads, [None] * count, [None] * count, groups, [False] * count)


def test_weight_dot_list_launches_do_not_grow_with_the_model() -> None:
    counted = []
    for count in (3, 30):
        with recording() as launches:
            dot_list(*layers(count))
        counted.append(len(launches))
    assert counted == [4, 4]  # three kinds of layers, one second stage


def test_weight_dot_list_reuses_its_worklist_for_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = weight_dot_list._build
    monkeypatch.setattr(weight_dot_list, "_build", lambda layers, device: built.append(1) or build(layers, device))
    weights, grads = layers(3)
    dot_list(weights, grads)
    for grad in grads:
        grad.mul_(2)
    again, _ = dot_list(weights, grads)
    assert len(built) == 1
    assert_dot(again[0], (weights[0], grads[0]), lambda w, g: reference.weight_dot(w, g)[0], terms=64)
    dot_list(weights, [grad.clone() for grad in grads])
    assert len(built) == 2
    kept = [dot_list(*layers(3)) for _ in range(CACHED_WORKLISTS + 2)]
    assert len(kept) == CACHED_WORKLISTS + 2
    assert len(weight_dot_list._cache) == CACHED_WORKLISTS


@pytest.mark.parametrize("channels", [64, 65, 200])
def test_end_row_adds_groups_that_span_tiles(channels: int) -> None:
    # A group of one channel, one that fills tiles of 64, one that ends within a tile, empty groups, and one at the end.
    groups = torch.tensor([0] + [2] * (channels - 9) + [3] * 4 + [6] * 4)
    row = torch.randn(channels, dtype=torch.float64)
    scores = torch.rand(8, dtype=torch.float64)
    truth = scores.clone().index_add(0, groups, (row / 3).square())
    finite = end_row_triton(scores, row, 3.0, groups, EndRowConfig(block_c=64))
    assert finite.item() is True
    assert not row.any()
    assert_sum_close(scores, truth, truth, terms=channels, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "kept_out", "kept_in", "in_repeat"),
    [((33, 17), 20, 9, 1), ((64, 70), 40, 33, 1), ((40, 24, 3, 3), 30, 10, 1), ((32, 48), 16, 5, 4)],
    ids=str,
)
def test_fold_in_one_launch(
    dtype: torch.dtype, shape: tuple[int, ...], kept_out: int, kept_in: int, in_repeat: int
) -> None:
    weight = torch.randn(shape).to(dtype)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    factors = (
        torch.randn(kept_out, shape[0]).to(dtype),
        torch.randn(shape[1] // in_repeat, kept_in).to(dtype),
    )
    with recording() as launches:
        actual = fold_triton(weight, *factors, 1, in_repeat)
    assert len(launches) == 1
    truth = reference.fold(weight.double(), *(f.double() for f in factors), 1, in_repeat)
    magnitude = reference.fold(weight.double().abs(), *(f.double().abs() for f in factors), 1, in_repeat)
    assert_sum_close(actual, truth, magnitude, terms=shape[0] * shape[1], dtype=dtype, stored=dtype)


def test_fold_fits_says_which_folds_one_launch_serves() -> None:
    weight, compressor, decompressor = torch.randn(64, 64, 1, 1), torch.randn(32, 64), torch.randn(64, 32)
    assert fold_fits(weight, compressor, decompressor, 1, 1)
    assert not fold_fits(weight, compressor, None, 1, 1)
    assert not fold_fits(weight, compressor, decompressor, 2, 1)
    assert not fold_fits(weight.double(), compressor.double(), decompressor.double(), 1, 1)
    assert not fold_fits(torch.randn(64, 64, 3, 3), compressor, decompressor, 1, 1)  # channels lie 9 apart
    assert not fold_fits(weight, torch.randn(64, 64), torch.randn(64, 8), 1, 1)  # D first is cheaper
    with pytest.raises(ValueError, match="one launch takes both factors"):
        fold_triton(weight, compressor, None)


def test_tables_of_captured_calls_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads them: no later table may lie where an earlier one does, however few were expected."""
    monkeypatch.setattr(Reserve, "ENTRIES", 10)
    reserve = Reserve(pinned=False)
    tables = [torch.full((size,), size) for size in (3, 4, 2, 30, 5, 1)]
    taken = [reserve.take(tables[0])]  # before anything was kept ready
    for table in tables[1:]:
        reserve.fill()
        taken.append(reserve.take(table))
    assert all(map(torch.equal, taken, tables))


def test_moments_make_only_the_kernels_that_they_need() -> None:
    """Results are not cleared before they are written, nor copied one by one."""
    calls = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with Counting():
        channel_moments_triton(torch.randn(2, 3, 5), 1)
        weight_moments_triton(torch.randn(3, 5), torch.randn(3, 5))
    assert not {torch.ops.aten.zero_, torch.ops.aten.zeros, torch.ops.aten.new_zeros, torch.ops.aten.clone} & set(calls)
    assert calls.count(torch.ops.aten._foreach_mul) == 1
