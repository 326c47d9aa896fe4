"""channel_moments on every backend against the reference in float64, and the reference against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, KERNEL_TARGETS, LAYOUTS, TARGETS, layout_id, on, poison_heap, shapes, strided, truth_of
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_sum_close
from torch import Tensor

from obc import ops, reference

# (shape, channel_dim): one, around the vector widths and row blocks of kernels, primes, empty, 2-D to 5-D, samples of
# one position, and long enough for several chunks and threads in each direction.
CASES = [
    ((1, 5), 1),
    ((5, 1), 1),
    ((31, 33), 1),
    ((64, 128), -1),
    ((3, 5, 7), 1),
    ((3, 5, 7), -1),
    ((1, 130, 33), -1),
    ((2, 16, 8, 8), 1),
    ((2, 17, 1, 1), 1),
    ((4, 1, 9, 9), 1),
    ((3, 2, 11, 13), -1),
    ((2, 3, 5, 7, 2), 1),
    ((2, 3, 4, 5, 6), 2),
    ((0, 4), 1),
    ((4, 0), 1),
    ((2, 3, 0, 5), 1),
    ((2, 0, 3, 4), 1),
    ((3, 5, 8193), 1),
    ((1, 2, 70_001), 1),
    ((70_001, 3), 1),
    ((30_001, 2, 3), -1),
    ((2, 4099, 129), -1),
    ((3, 2, 1025), -1),
]


def case_id(case: tuple[tuple[int, ...], int]) -> str:
    return "x".join(map(str, case[0])) + f"-dim{case[1]}"


def mask_for(x: Tensor, channel_dim: int) -> Tensor:
    """About a third of the positions left out, and all of the last sample's."""
    shape = list(x.shape)
    del shape[channel_dim]
    mask = torch.rand(shape) > 1 / 3
    mask[-1:] = False
    return mask.to(x.device)


def check(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> None:
    actual = ops.channel_moments(x, channel_dim, mask)
    exact = truth_of(x), channel_dim, None if mask is None else mask.cpu()
    truths = reference.channel_moments(*exact)
    # Rounding errors grow with the sum of |x|; squaring doubles the relative error.
    magnitudes = (truths[2], truths[1], truths[2], 2 * truths[3])
    for moment, truth, magnitude in zip(actual, truths, magnitudes, strict=True):
        assert_sum_close(moment, truth, magnitude, x.numel() // max(1, len(truth)), x.dtype)


def poisoned(x: Tensor, channel_dim: int, mask: Tensor) -> Tensor:
    """NaN at the positions that the mask leaves out."""
    return x.masked_fill(~mask.unsqueeze(channel_dim if channel_dim >= 0 else channel_dim + x.dim()), torch.nan)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 4, 5, 2), 1), ((3, 6, 4), -1), ((5, 4), 1)])
def test_the_reference_is_the_formula(shape: tuple[int, ...], channel_dim: int, masked: bool) -> None:
    """Loops over samples and channels, written from the formula."""
    x = torch.randn(shape, dtype=torch.float64)
    mask = mask_for(x, channel_dim) if masked else None
    moments = reference.channel_moments(x, channel_dim, mask)
    for c in range(x.shape[channel_dim]):
        sums = [0.0, 0.0, 0.0, 0.0]
        for n in range(len(x)):
            values = x[n].select(channel_dim if channel_dim < 0 else channel_dim - 1, c).reshape(-1)
            if mask is not None:
                values = values[mask[n].reshape(-1)]
            for value in values.tolist():
                sums[0] += value
                sums[1] += value * value
                sums[2] += abs(value)
            if len(values):
                sums[3] += (sum(map(abs, values.tolist())) / len(values)) ** 2
        assert [float(moment[c]) for moment in moments] == pytest.approx(sums, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_channel_moments_matches_reference(device: str, dtype: torch.dtype, case: tuple[tuple[int, ...], int]) -> None:
    shape, channel_dim = case
    x = torch.randn(shape, device=device).to(dtype)
    poison_heap()
    check(x, channel_dim)
    mask = mask_for(x, channel_dim)
    check(x, channel_dim, mask)
    expected = ops.channel_moments(x, channel_dim, mask)
    actual = ops.channel_moments(poisoned(x, channel_dim, mask), channel_dim, mask)
    assert all(map(torch.equal, actual, expected)), "a position that the mask leaves out was read"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_layout", LAYOUTS[:6], ids=layout_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_channel_moments_noncontiguous(
    device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], mask_layout: Callable[[Tensor], Tensor]
) -> None:
    for shape in ((5, 33), (3, 4, 35), (2, 19, 6, 5), (2, 5, 3, 4, 3)):
        x = layout(torch.randn(shape, device=device).to(dtype))
        for channel_dim in {1, len(shape) - 1}:
            check(x, channel_dim)
            check(x, channel_dim, mask_layout(mask_for(x, channel_dim)))


@pytest.mark.parametrize("target", TARGETS)
@given(
    data=st.data(), shape=shapes.filter(lambda s: len(s) > 1), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_channel_moments_of_any_shape_and_strides(
    target: tuple[str, str], data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = data.draw(strided(shape, dtype))
    channel_dim = data.draw(st.integers(1, len(shape) - 1))
    mask = None
    if data.draw(st.booleans()):
        mask = data.draw(strided((*shape[:channel_dim], *shape[channel_dim + 1 :]), torch.float32)) > 0
    with on(target) as device:
        check(x.to(device), channel_dim, None if mask is None else mask.to(device))


@pytest.mark.parametrize("device", KERNEL_TARGETS, indirect=True)
@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((8, 32, 32, 32), 1), ((2, 512, 258), 2), ((9, 4, 8193), 1), ((900, 3, 70), 2)]
)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=layout_id)
def test_channel_moments_is_deterministic(
    device: str, threads: None, shape: tuple[int, ...], channel_dim: int, layout: Callable[[Tensor], Tensor]
) -> None:
    """The same bits over repeats, whatever the number of threads and the memory's earlier content."""
    x = layout(torch.randn(shape, device=device))
    mask = mask_for(x, channel_dim)
    torch.set_num_threads(1)
    expected = [ops.channel_moments(x, channel_dim, each) for each in (None, mask)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(2):
            poison_heap()
            for each, moments in zip((None, mask), expected, strict=True):
                assert all(map(torch.equal, ops.channel_moments(x, channel_dim, each), moments))


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_channel_moments_keeps_what_is_not_finite_in_its_channel(device: str) -> None:
    x = torch.randn(3, 4, 6, device=device)
    x[1, 2, 3], x[0, 0, 0] = torch.nan, -torch.inf
    total, square, absolute, mean_square = ops.channel_moments(x, 1)
    for moment in (total, square, absolute, mean_square):
        assert moment.isnan().tolist() == [False, False, True, False]
    assert [float(m[0]) for m in (total, square, absolute, mean_square)] == [-torch.inf, *[torch.inf] * 3]


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_channel_moments_opcheck(device: str) -> None:
    x = torch.randn(3, 5, 4, device=device)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in ((x, 1), (x, -1, mask_for(x, -1)), (x.mT, 2, mask_for(x.mT, 2)), (x[:, :, 0], 1)):
        torch.library.opcheck(torch.ops.obc.channel_moments.default, args, test_utils=utils)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_channel_moments_in_a_compiled_graph(device: str) -> None:
    x = torch.randn(3, 5, 4, device=device)
    compiled = torch.compile(lambda x: ops.channel_moments(x.sin(), 1)[3] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.channel_moments(x.sin(), 1)[3] * 2)


def test_channel_moments_is_not_differentiable_and_says_so() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="obc::channel_moments is not differentiable; detach x"):
        ops.channel_moments(x, 1)[0].sum().backward()


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X.int(), 1), TypeError, "x must be float32, .* got torch.int32; convert it first"),
        ((X, 3), IndexError, "channel_dim 3 is outside x of 3 dimensions"),
        ((X, -4), IndexError, "channel_dim -4 is outside x of 3 dimensions"),
        ((torch.tensor(1.0), 0), IndexError, "channel_dim 0 is outside x of 0 dimensions"),
        ((X, 0), ValueError, "samples are along dim 0, but channel_dim is 0 too; unsqueeze a batch of one"),
        ((X, 1, torch.ones(2, 4)), TypeError, "mask must be bool, got torch.float32"),
        (
            (X, 1, torch.ones(2, 3) > 0),
            ValueError,
            r"mask has shape \(2, 3\), expected \(2, 4\): that of x, \(2, 3, 4\)",
        ),
        ((X, 2, (torch.ones(2, 3) > 0).to("meta")), ValueError, "mask is on meta, x on cpu; pass one device"),
    ],
)
def test_channel_moments_rejects(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.channel_moments(*args)
    with pytest.raises(error, match=message):  # the same words when a graph is traced
        ops.channel_moments(*(a.to("meta") if isinstance(a, Tensor) and "on meta" not in message else a for a in args))
