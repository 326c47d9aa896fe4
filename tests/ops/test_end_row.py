"""end_row on every backend against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import KERNEL_TARGETS, TARGETS, on, poison_heap, truth_of
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_sum_close
from torch import Tensor

import obc
from obc import ops, reference

DTYPES = [pytest.param(torch.float32, id="f32"), pytest.param(torch.float64, id="f64")]
# One, around vector widths and blocks, primes, empty, and long enough for several chunks and threads.
SIZES = [0, 1, 7, 31, 32, 33, 127, 1024, 1025, 70_001]
# By name, a value from the dtype's largest; the last is finite and its square is not.
NOT_FINITE = {
    "nan": lambda largest: torch.nan,
    "inf": lambda largest: torch.inf,
    "-inf": lambda largest: -torch.inf,
    "overflow": lambda largest: largest**0.75,
}


def random_groups(channels: int, groups: int, device: str) -> Tensor:
    """Ascending groups of uneven sizes, some of them empty."""
    return torch.randint(max(1, groups), (channels,)).sort().values.to(device)


def strided_vector(values: Tensor) -> Tensor:
    """The values at every third place of a NaN buffer."""
    return torch.full((3 * len(values),), torch.nan, dtype=values.dtype, device=values.device)[::3].copy_(values)


def check(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> None:
    """Values, zeroed row and flag of a finite row."""
    truth, exact_row = truth_of(scores), truth_of(row)
    magnitude = truth.abs()
    exact_groups = None if groups is None else groups.cpu()
    reference.end_row(magnitude, exact_row.clone(), loss_scale, exact_groups)
    assert reference.end_row(truth, exact_row, loss_scale, exact_groups)
    terms = 2 if groups is None or not len(groups) else int(groups.bincount().max()) + 1
    finite = ops.end_row(scores, row, loss_scale, groups)
    assert finite.shape == ()
    assert finite.dtype == torch.bool
    assert finite.device == scores.device
    assert finite.item() is True
    assert not row.any()
    assert_sum_close(scores, truth, magnitude, terms, scores.dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", SIZES)
def test_end_row_matches_reference(device: str, dtype: torch.dtype, channels: int) -> None:
    for loss_scale in (1.0, 3.0, 65536.0):
        scores, row = torch.randn(2, channels, dtype=dtype, device=device)
        poison_heap()
        check(scores, row * loss_scale, loss_scale)
        for count in (1, 5, channels + 3):
            scores, row = torch.randn(count, dtype=dtype, device=device), torch.randn_like(row)
            check(scores, row * loss_scale, loss_scale, random_groups(channels, count, device))


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_end_row_noncontiguous(device: str, dtype: torch.dtype) -> None:
    for channels in (5, 33, 1025):
        scores, row = (strided_vector(torch.randn(channels, dtype=dtype, device=device)) for _ in range(2))
        check(scores, row)
        scores, row = (strided_vector(torch.randn(channels, dtype=dtype, device=device)) for _ in range(2))
        groups = random_groups(channels, channels, device)
        wide_groups = torch.zeros(2 * channels, dtype=torch.int64, device=device)[::2].copy_(groups)
        check(scores, row, 2.0, wide_groups)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("place", [0, 700, 1499])
def test_end_row_leaves_out_a_row_that_is_not_finite(
    device: str, dtype: torch.dtype, bad: Callable[[float], float], place: int
) -> None:
    for groups in (None, random_groups(1500, 1500, device)):
        scores, row = torch.randn(2, 1500, dtype=dtype, device=device)
        before = scores.clone()
        row[place] = bad(torch.finfo(dtype).max)
        assert ops.end_row(scores, row, 1.0, groups).item() is False
        assert torch.equal(scores, before)
        assert not row.any()


@pytest.mark.parametrize("device", KERNEL_TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [6, 5000])
def test_end_row_leaves_out_a_row_whose_groups_do_not_fit(device: str, dtype: torch.dtype, channels: int) -> None:
    """Negative, descending and beyond the scores: no kernel writes outside of them, or adds a part of the row."""
    for place, group in ((0, -1), (channels // 2, 0), (channels - 1, channels)):
        groups = torch.arange(channels, device=device)
        groups[place] = group
        scores, row = torch.randn(2, channels, dtype=dtype, device=device)
        before = scores.clone()
        if obc.backends.requested() == "cpu":
            with pytest.raises(ValueError, match=rf"groups\[{place}\] is {group}, expected ascending"):
                ops.end_row(scores, row, 1.0, groups)
        else:
            assert ops.end_row(scores, row, 1.0, groups).item() is False
            assert not row.any()
        assert torch.equal(scores, before)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_end_row_divides_before_it_squares(device: str) -> None:
    """Scaled gradients whose square overflows float32, while the row's own does not."""
    scores, row = torch.zeros(4, device=device), torch.full((4,), 1e25, device=device)
    assert ops.end_row(scores, row, 1e20).item() is True
    torch.testing.assert_close(scores, torch.full((4,), 1e10, device=device))


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_end_row_accumulates_over_rows(device: str) -> None:
    rows = torch.randn(5, 40, device=device)
    scores, row = torch.zeros(40, device=device), torch.empty(40, device=device)
    for n, values in enumerate(rows):
        row.copy_(values)
        if n == 2:
            row[0] = torch.nan
        ops.end_row(scores, row)
    kept = truth_of(rows[[0, 1, 3, 4]]).square().sum(0)
    assert_sum_close(scores, kept, kept, 5, torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@given(
    channels=st.integers(0, 200),
    sizes=st.lists(st.integers(0, 9), max_size=30),
    loss_scale=st.floats(1e-3, 1e6),
    grouped=st.booleans(),
)
def test_end_row_of_any_size(
    target: tuple[str, str], channels: int, sizes: list[int], loss_scale: float, grouped: bool
) -> None:
    with on(target) as device:
        if grouped:
            groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64)).to(device)
            check(torch.randn(len(sizes), device=device), torch.randn(len(groups), device=device), loss_scale, groups)
        else:
            check(torch.randn(channels, device=device), torch.randn(channels, device=device), loss_scale)


@pytest.mark.parametrize("device", KERNEL_TARGETS, indirect=True)
@pytest.mark.parametrize("grouped", [False, True], ids=["channels", "groups"])
def test_end_row_is_deterministic(device: str, threads: None, grouped: bool) -> None:
    """The same bits over repeats, whatever the number of threads and the memory's earlier content."""
    values, before = torch.randn(2, 200_003, device=device)
    groups = random_groups(200_003, 500, device) if grouped else None
    results = []
    for count in (1, 1, 2, 3, 3):
        torch.set_num_threads(count)
        scores, row = before.clone(), values.clone()
        poison_heap()
        assert ops.end_row(scores, row, 3.0, groups)
        results.append(scores)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("grouped", [False, True], ids=["channels", "groups"])
def test_end_row_bumps_version_counters(device: str, grouped: bool) -> None:
    """So that autograd notices when a tensor that it saved was changed."""
    scores, row = torch.randn(2, 6, device=device)
    groups = torch.arange(6, device=device) if grouped else None
    versions = scores._version, row._version
    leaf = torch.ones(6, device=device, requires_grad=True)
    products = leaf * scores, leaf * row
    ops.end_row(scores, row, 1.0, groups)
    assert scores._version > versions[0]
    assert row._version > versions[1]
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_end_row_opcheck(device: str) -> None:
    scores, row = torch.randn(2, 6, device=device)
    groups = torch.tensor([0, 0, 1, 3, 3, 5], device=device)
    for args in ((scores, row), (scores, row, 4.0, groups)):
        torch.library.opcheck(torch.ops.obc.end_row.default, args)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_end_row_in_a_compiled_graph(device: str) -> None:
    compiled = torch.compile(lambda s, r: ops.end_row(s, r, 2.0).logical_not(), fullgraph=True, backend="aot_eager")
    scores, values = torch.randn(2, 6, device=device)
    row, expected = values.clone(), scores + (values / 2).square()
    assert not compiled(scores, row)
    assert not row.any()
    torch.testing.assert_close(scores, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [target for target in KERNEL_TARGETS if "cuda" in str(target.id)], indirect=True)
def test_end_row_does_not_wait_for_the_device(device: str) -> None:
    scores, row = torch.randn(2, 1000, device=device)
    groups = random_groups(1000, 100, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.end_row(scores, row)
        ops.end_row(scores, row, 2.0, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SHARING = {
    "same": lambda flat: (flat, flat),
    "shifted": lambda flat: (flat[:-1], flat[1:]),
    "reached by steps": lambda flat: (flat[1::3], flat[::2][: len(flat[1::3])]),
    "one entry": lambda flat: (flat[3:4], flat[3:4]),
}


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("views", SHARING.values(), ids=SHARING)
def test_end_row_refuses_vectors_that_share_memory(device: str, views: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    flat = torch.randn(30, device=device)
    before = flat.clone()
    with pytest.raises(ValueError, match=r"obc::end_row: scores and row share memory.*clone one of them first"):
        ops.end_row(*views(flat))
    with pytest.raises(ValueError, match="share memory"):
        torch.compile(lambda vector: ops.end_row(*views(vector)), fullgraph=True, backend="aot_eager")(flat)
    assert torch.equal(flat, before)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_end_row_of_vectors_in_one_buffer(device: str, dtype: torch.dtype) -> None:
    """Side by side, and interlaced."""
    flat = torch.randn(2 * 33, dtype=dtype, device=device)
    check(flat[33:], flat[:33])
    flat.normal_()
    check(flat[::2], flat[1::2])
    check(flat[:1], flat[1:2])
    check(flat[:0], flat[:0])


V, W = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((V, torch.zeros(5)), ValueError, "scores has 4 entries, row 5; pass groups or equal lengths"),
        ((V[None], V[None]), ValueError, r"flat vectors, got shapes \(1, 4\) and \(1, 4\)"),
        ((V, V.double()), TypeError, "row is torch.float64, scores is torch.float32; pass one dtype"),
        ((V, V.to("meta")), ValueError, "row is on meta, scores on cpu; pass one device"),
        ((V.int(), V.int()), TypeError, "scores must be float32, .* got torch.int32"),
        ((V.half(), V.half()), TypeError, "scores must be float32 or float64, got torch.float16"),
        ((V.bfloat16(), V.bfloat16()), TypeError, "scores must be float32 or float64, got torch.bfloat16"),
        ((V, V[:1].expand(4)), ValueError, "row is expanded: its entries share memory; clone it first"),
        ((V[:1].expand(4), V), ValueError, "scores is expanded: its entries share memory; clone it first"),
        ((V, W, 0.0), ValueError, "loss_scale must not be 0"),
        ((V, W, 1.0, torch.zeros(4, dtype=torch.int32)), TypeError, "groups must be int64, got torch.int32"),
        ((V, W, 1.0, torch.zeros(5, dtype=torch.int64)), ValueError, r"groups has shape \(5,\), row \(4,\)"),
        ((V, W, 1.0, torch.zeros(4, dtype=torch.int64, device="meta")), ValueError, "groups is on meta, row on cpu"),
        ((torch.zeros(4, requires_grad=True), V), RuntimeError, "not differentiable: .* detach them first"),
        ((V, torch.zeros(4, requires_grad=True)), RuntimeError, "not differentiable: .* detach them first"),
    ],
)
def test_end_row_rejects(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="obc::end_row.*" + message):
        ops.end_row(*args)
