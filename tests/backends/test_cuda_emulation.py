"""The kernels of csrc/cuda, compiled for the host and run thread by thread, against the reference in float64.

What a GPU would show besides (speed, what the hardware does with unaligned or unordered accesses) is not tested here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import test_channel_dot
import test_channel_moments
import test_weight_dot
import torch
from cases import DTYPES, LAYOUTS, layout_id, poison_heap, shapes, strided
from cuda_emulation import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import obc
from benchmarks.gpu_models import llama_8b_layer, resnet50_weights
from obc import ops, reference
from obc.backends import BACKENDS, Backend, cuda, native

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or c++, or CXX)")

ORDERS = ["forward", "backward", "interleaved"]


@functools.cache
def _load() -> SimpleNamespace:
    torch.ops.load_library(build.build())
    native.check("cuda")
    return cuda.operators(torch.ops.obc_cuda)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ctypes.CDLL]:
    """The emulated library, serving CPU tensors as a backend of its own while this module runs."""
    _load()
    BACKENDS["cuda-emulated"] = Backend("cuda-emulated", lambda: frozenset({"cpu"}), _load, "it is part of the tests")
    with obc.use_backend("cuda-emulated"):
        yield ctypes.CDLL(build.build())
    del BACKENDS["cuda-emulated"]


@pytest.fixture(params=range(len(ORDERS)), ids=ORDERS)
def order(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[int]:
    """Threads and blocks run in this order."""
    library.obc_emulation_order(request.param)
    yield request.param
    library.obc_emulation_order(0)


@pytest.fixture
def capturing(library: ctypes.CDLL) -> Iterator[None]:
    """Every stream says that a graph is being captured."""
    library.obc_emulation_capture(1)
    yield
    library.obc_emulation_capture(0)


# The longest ones take a thousand blocks of 256 emulated threads.
CHANNEL_CASES = [*test_channel_dot.CASES, ((70, 1023), 1), ((4, 3, 17, 17), 1), ((2, 5, 40, 40), 1), ((3, 2200, 8), 2)]
WEIGHT_CASES = [case for case in test_weight_dot.CASES if max(case.shape) < 70_000]
WEIGHT_CASES += [
    test_weight_dot.Case((1031, 3)),
    test_weight_dot.Case((1, 4096)),
    test_weight_dot.Case((40, 600)),  # several chunks and tiles
    test_weight_dot.Case((3, 2, 25, 25)),  # a kernel larger than a tile
    test_weight_dot.Case((64, 1, 3, 3), groups=32),  # depthwise, two rows a group, aligned
    test_weight_dot.Case((600, 1, 3), groups=300, transposed=True),
    test_weight_dot.Case((4, 2, 3, 2, 3)),
]


@pytest.mark.sampled(members=24)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CHANNEL_CASES, ids=test_channel_dot.case_id)
def test_channel_dot_matches_reference(dtype: torch.dtype, case: tuple[tuple[int, ...], int]) -> None:
    shape, channel_dim = case
    activation, grad = test_channel_dot.pair(shape, dtype, "cpu")
    poison_heap()
    test_channel_dot.check(activation, grad, channel_dim)
    if channel_dim % len(shape):
        test_channel_dot.check(activation, grad, channel_dim, per_sample=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_noncontiguous(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], grad_layout: Callable[[Tensor], Tensor]
) -> None:
    for shape in ((5, 33), (2, 20, 4, 6), (2, 5, 3, 4, 3)):
        activation, grad = test_channel_dot.pair(shape, dtype, "cpu")
        activation, grad = layout(activation), grad_layout(grad)
        test_channel_dot.check(activation, grad, 1)
        test_channel_dot.check(activation, grad, len(shape) - 1, per_sample=True)
        test_channel_dot.check(activation, grad, 0)
    for case in (
        test_weight_dot.Case((5, 33)),
        test_weight_dot.Case((6, 35, 3), groups=3),
        test_weight_dot.Case((4, 8, 3, 3)),
        test_weight_dot.Case((4, 3, 2, 3, 2), 2),
        test_weight_dot.Case((6, 1, 3, 3), 3, True),
    ):
        weight, grad, bias, bias_grad = case.tensors(dtype, "cpu")
        weight, grad, bias, bias_grad = layout(weight), grad_layout(grad), layout(bias), grad_layout(bias_grad)
        test_weight_dot.check([weight, grad, bias, bias_grad], case.groups, case.transposed)
        test_weight_dot.check_moments(weight, grad)


MOMENT_CASES = [case for case in test_channel_moments.CASES if max(case[0]) < 10_000]
MOMENT_CASES += [((2, 5, 40, 40), 1), ((70, 24, 1, 4), 1), ((5, 1200, 24), -1), ((1, 4000, 6), -1), ((9, 300), 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MOMENT_CASES, ids=test_channel_moments.case_id)
def test_channel_moments_matches_reference(dtype: torch.dtype, case: tuple[tuple[int, ...], int]) -> None:
    shape, channel_dim = case
    x = torch.randn(shape).to(dtype)
    mask = test_channel_moments.mask_for(x, channel_dim)
    poison_heap()
    test_channel_moments.check(x, channel_dim)
    test_channel_moments.check(x, channel_dim, mask)
    expected = ops.channel_moments(x, channel_dim, mask)
    poisoned = test_channel_moments.poisoned(x, channel_dim, mask)
    assert all(map(torch.equal, ops.channel_moments(poisoned, channel_dim, mask), expected))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_channel_moments_noncontiguous(layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((5, 33), (2, 20, 4, 6), (2, 5, 3, 4, 3)):
        x = layout(torch.randn(shape))
        for channel_dim in {1, len(shape) - 1}:
            test_channel_moments.check(x, channel_dim)
            test_channel_moments.check(x, channel_dim, layout(test_channel_moments.mask_for(x, channel_dim)))


def test_channel_moments_of_more_axes_than_a_kernel_walks_are_copied() -> None:
    x = torch.randn(4, 3, 4, 3, 4, 3, 4)[::2, :2, ::2, :2, ::2, :2, ::2]
    test_channel_moments.check(x, 1)
    test_channel_moments.check(x, 3, test_channel_moments.mask_for(x, 3))


def loads(library: ctypes.CDLL, call: Callable[[], object]) -> int:
    """16-byte loads that one call makes."""
    before = library.obc_emulation_vector_loads()
    call()
    return library.obc_emulation_vector_loads() - before


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("shape", [(2, 3, 17, 17), (1, 2, 67, 67), (300, 8, 17, 17), (2, 2, 9, 9)], ids=str)
def test_rows_that_begin_at_no_vector_are_read_in_vectors(
    library: ctypes.CDLL, shape: tuple[int, ...], shift: int, dtype: torch.dtype
) -> None:
    """Maps of an odd number of positions: all but fewer than two vectors an output come by 16 bytes."""
    activation, grad = (t.new_empty(t.numel() + 8)[shift : shift + t.numel()].view(shape).copy_(t)
                        for t in test_channel_dot.pair(shape, dtype, "cpu"))  # fmt: skip
    items, positions = 16 // dtype.itemsize, shape[2] * shape[3]
    if positions > 256:  # fewer are read by tiles
        count = loads(library, lambda: ops.channel_dot(activation, grad, 1, True))
        assert count >= 2 * shape[0] * shape[1] * (positions // items - 1)
        # If the sum is over samples too, each sample's map is a separate contiguous run.
        if positions >= 2 * items * items:
            count = loads(library, lambda: ops.channel_dot(activation, grad, 1))
            assert count >= 2 * shape[0] * shape[1] * (positions // items - 1)
    test_channel_dot.check(activation, grad, 1, True)
    test_channel_dot.check(activation, grad, 1)
    test_weight_dot.check_moments(activation.flatten(0, 1).flatten(1), grad.flatten(0, 1).flatten(1))


def test_rows_that_begin_differently_in_both_arrays_are_read_by_element(library: ctypes.CDLL) -> None:
    activation, grad = (torch.randn(1 + 2 * 289)[shift : shift + 578].view(1, 2, 17, 17) for shift in (0, 1))
    assert loads(library, lambda: ops.channel_dot(activation, grad, 1, True)) == 0
    test_channel_dot.check(activation, grad, 1, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_weight_dot_matches_reference(dtype: torch.dtype, case: test_weight_dot.Case) -> None:
    tensors = case.tensors(dtype, "cpu")
    poison_heap()
    test_weight_dot.check(tensors, case.groups, case.transposed)
    test_weight_dot.check(tensors[:2], case.groups, case.transposed)
    test_weight_dot.check_moments(*tensors[:2])


@settings(max_examples=60)
@given(data=st.data(), shape=shapes, groups=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_shape_and_strides(data: st.DataObject, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    shape = (shape[0] * groups, *(shape[1:] or (1,)))
    tensors = [data.draw(strided(shape, dtype)), data.draw(strided(shape, dtype))]
    channel_dim = data.draw(st.integers(0, len(shape) - 1))
    test_channel_dot.check(tensors[0], tensors[1], channel_dim, channel_dim > 0 and data.draw(st.booleans()))
    transposed = data.draw(st.booleans())
    if data.draw(st.booleans()):
        out_channels = test_weight_dot.Case(shape, groups, transposed).out_channels
        tensors += [data.draw(strided((out_channels,), dtype)), data.draw(strided((out_channels,), dtype))]
    test_weight_dot.check(tensors, groups, transposed)
    test_weight_dot.check_moments(*tensors[:2])


def test_more_axes_than_a_kernel_walks_are_copied() -> None:
    buffers = [torch.randn(4, 3, 4, 3, 4, 3, 4) for _ in range(2)]
    activation, grad = (buffer[::2, :2, ::2, :2, ::2, :2, ::2] for buffer in buffers)
    test_channel_dot.check(activation, grad, 1)
    test_channel_dot.check(activation, grad, 3, per_sample=True)
    test_weight_dot.check([activation, grad])
    test_weight_dot.check_moments(activation, grad)
    outs, ins = ops.weight_dot_list([activation, activation], [grad, grad])
    for out, in_ in zip(outs, ins, strict=True):
        torch.testing.assert_close([out, in_], list(reference.weight_dot(activation, grad)))


def _layers(dtype: torch.dtype) -> tuple[list[list[Tensor | None]], list[int], list[bool]]:
    cases = [*test_weight_dot.CASES[:27], test_weight_dot.Case((130, 129, 3, 3))]
    tensors = [case.tensors(dtype, "cpu") for case in cases]
    layers = [layer if n % 2 else [*layer[:2], None, None] for n, layer in enumerate(tensors)]
    return layers, [case.groups for case in cases], [case.transposed for case in cases]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_dot_list_is_one_launch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    layers, groups, transposed = _layers(dtype)
    columns = list(zip(*layers, strict=True))
    for _ in range(2):  # the second time the plan is there already
        before = library.obc_emulation_launches()
        outs, ins = ops.weight_dot_list(*columns, groups, transposed)
        assert library.obc_emulation_launches() - before == 1
        for n, layer in enumerate(layers):
            out, in_ = ops.weight_dot(*layer, groups[n], transposed[n])
            torch.testing.assert_close(outs[n], out)
            torch.testing.assert_close(ins[n], in_)


@pytest.mark.parametrize("shapes", [resnet50_weights(), llama_8b_layer()], ids=["ResNet-50", "Llama-8B layer"])
def test_a_models_weights_take_one_launch(library: ctypes.CDLL, shapes: list[tuple[int, ...]]) -> None:
    """The same layers with 64 times fewer channels: the size of a launch does not depend on theirs."""
    weights = [torch.randn(max(1, out // 64), max(1, in_ // 64), *kernel) for out, in_, *kernel in shapes]
    grads = [torch.randn_like(weight) for weight in weights]
    before = library.obc_emulation_launches()
    ops.weight_dot_list(weights, grads)
    assert library.obc_emulation_launches() - before == 1


def test_weight_dot_list_of_more_layers_than_one_launch_takes(library: ctypes.CDLL) -> None:
    """The parameters of one launch carry 70 layers; nothing else is launched, the first time either."""
    weights, grads = ([torch.randn(3, 4) for _ in range(401)] for _ in range(2))
    before = library.obc_emulation_launches()
    outs, ins = ops.weight_dot_list(weights, grads)
    assert library.obc_emulation_launches() - before == 6
    for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        torch.testing.assert_close([outs[n], ins[n]], list(reference.weight_dot(weight, grad)))


def test_opcheck() -> None:
    """Results share no memory with each other or an input, and match the fakes."""
    weight, grad, bias, bias_grad = test_weight_dot.Case((6, 4, 3)).tensors(torch.float32, "cpu")
    without_backward = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.obc.channel_dot.default, (weight, grad, 1, True))
    torch.library.opcheck(torch.ops.obc.weight_dot.default, (weight, grad, bias, bias_grad))
    torch.library.opcheck(torch.ops.obc.weight_moments.default, (weight, grad), test_utils=without_backward)
    lists = [weight, weight], [grad, grad], [bias, None], [bias_grad, None], [1, 2], [False, False]
    torch.library.opcheck(torch.ops.obc.weight_dot_list.default, lists, test_utils=without_backward)
    torch.library.opcheck(torch.ops.obc.end_row.default, (bias, bias_grad, 2.0, torch.tensor([0, 0, 1, 3, 3, 5])))


def test_weight_dot_list_of_mixed_dtypes_and_layouts() -> None:
    weights = [layout(torch.randn(6, 4, 3, 3)) for layout in LAYOUTS]
    weights += [torch.randn(5, 7, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    grads = [torch.randn(weight.shape).to(weight.dtype) for weight in weights]
    outs, ins = ops.weight_dot_list(weights, grads)
    for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        out, in_ = ops.weight_dot(weight, grad)
        torch.testing.assert_close(outs[n], out)
        torch.testing.assert_close(ins[n], in_)


def test_a_plan_serves_other_memory_of_the_same_layout() -> None:
    weight, grads = torch.randn(8, 16).double(), torch.randn(20, 8, 16).double()
    bias, bias_grads = torch.randn(8).double(), torch.randn(20, 8).double()
    for grad, bias_grad in zip(grads, bias_grads, strict=True):
        (out,), (in_,) = ops.weight_dot_list([weight], [grad], [bias], [bias_grad])
        torch.testing.assert_close([out, in_], list(reference.weight_dot(weight, grad, bias, bias_grad)))


def test_a_plan_does_not_serve_another_layout(library: ctypes.CDLL) -> None:
    """Another alignment, other strides, another dtype, a bias: each of them in turn, after all others."""
    buffer = torch.randn(3, 8 * 16 + 1)
    aligned, shifted = (buffer[:, start : start + 128].reshape(3, 8, 16) for start in (0, 0))
    shifted = torch.randn(3 * 128 + 1)[1:].view(3, 8, 16)
    transposed = torch.randn(3, 16, 8).transpose(1, 2)
    layouts = [aligned, shifted, transposed, aligned.double(), aligned.to(torch.bfloat16)]
    for _ in range(2):
        for weight, grad, bias in layouts:
            for biases in ([None], [bias[:, 0]]):
                outs, ins = ops.weight_dot_list([weight], [grad], biases, biases)
                expected = ops.weight_dot(weight, grad, *biases, *biases)
                torch.testing.assert_close([*outs, *ins], list(expected))


SPLIT = [
    lambda: ops.channel_dot(torch.randn(4000, 24), torch.randn(4000, 24), 1),  # more chunks than one section has
    lambda: ops.channel_dot(torch.randn(900, 24), torch.randn(900, 24), 1),
    lambda: ops.channel_dot(torch.randn(3, 2, 70, 70), torch.randn(3, 2, 70, 70), 1),
    lambda: ops.channel_dot(torch.randn(40, 6, 7, 7), torch.randn(40, 6, 7, 7), 1, True),
    lambda: torch.cat(ops.weight_dot(torch.randn(150, 700), torch.randn(150, 700))),
    lambda: torch.cat(ops.weight_dot(torch.randn(36, 20, 3), torch.randn(36, 20, 3), groups=2)),
    lambda: torch.cat(ops.channel_moments(torch.randn(3, 900, 24), 2)),
    lambda: torch.cat(ops.channel_moments(torch.randn(2, 2, 70, 70), 1)),
    lambda: torch.cat(ops.weight_moments(torch.randn(2, 9000), torch.randn(2, 9000))),
    lambda: torch.cat(ops.weight_dot_list([torch.randn(150, 700)], [torch.randn(150, 700)])[0]),
]


def test_the_same_bits_whatever_runs_first(library: ctypes.CDLL) -> None:
    """Threads and blocks in three orders, memory poisoned between: a forgotten barrier or a stale counter shows."""
    results = []
    for order in range(len(ORDERS)):
        library.obc_emulation_order(order)
        torch.manual_seed(1)
        poison_heap()
        results.append([call() for call in SPLIT])
    library.obc_emulation_order(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operators_leave_the_counters_that_they_share_at_zero() -> None:
    """Each of them after each other one, on the counters of one stream."""

    def end_row() -> Tensor:
        scores, row = torch.zeros(20_000), torch.randn(20_000)  # several blocks, which wait for each other
        ops.end_row(scores, row)
        return scores

    calls = [end_row, *SPLIT]
    expected = []
    for call in calls:
        torch.manual_seed(2)
        with obc.use_backend("reference"):
            expected.append(call())
    for before in calls:
        for call, truth in zip(calls, expected, strict=True):
            before()
            torch.manual_seed(2)
            torch.testing.assert_close(call(), truth, rtol=1e-3, atol=1e-3)


def test_a_captured_call_is_its_one_kernel(library: ctypes.CDLL) -> None:
    """Neither a table is copied nor are counters cleared: a replay launches what it computes with, nothing else."""
    for call in SPLIT:
        call()
    library.obc_emulation_capture(1)
    try:
        for call in SPLIT:
            kernels = 2 if "channel_moments" in call.__code__.co_names else 1
            launches, memsets = library.obc_emulation_launches(), library.obc_emulation_memsets()
            call()
            assert library.obc_emulation_launches() - launches == kernels
            assert library.obc_emulation_memsets() == memsets
    finally:
        library.obc_emulation_capture(0)


def test_a_capture_that_finds_no_counters_left_clears_its_own(library: ctypes.CDLL) -> None:
    """More captured calls than the counters that were cleared beforehand suffice for; eager calls then clear more."""
    activation, grad = torch.randn(2, 4100).double(), torch.randn(2, 4100).double()
    call = lambda: ops.channel_dot(activation, grad, 0)  # noqa: E731 - two rows, each shared by several blocks
    call()
    truth = reference.channel_dot(activation, grad, 0)
    before = library.obc_emulation_memsets()
    library.obc_emulation_capture(1)
    try:
        while library.obc_emulation_memsets() == before:
            torch.testing.assert_close(call(), truth)
        torch.testing.assert_close(call(), truth)
    finally:
        library.obc_emulation_capture(0)
    assert library.obc_emulation_memsets() > before
    torch.testing.assert_close(call(), truth)  # eager, it fills the reserve again
    before = library.obc_emulation_memsets()
    library.obc_emulation_capture(1)
    try:
        torch.testing.assert_close(call(), truth)
    finally:
        library.obc_emulation_capture(0)
    assert library.obc_emulation_memsets() == before


def test_in_a_captured_graph_nothing_is_shared_with_eager_calls(capturing: None) -> None:
    weight, grad = torch.randn(150, 700), torch.randn(150, 700)
    for _ in range(2):
        test_weight_dot.check([weight, grad])
        outs, ins = ops.weight_dot_list([weight], [grad])
    torch.testing.assert_close([*outs, *ins], list(reference.weight_dot(weight, grad)))


def end_row_case(channels: int, members: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """scores, row and groups of about ``members`` channels; None is no groups."""
    row = torch.randn(channels, dtype=dtype)
    if members is None:
        return torch.rand(channels, dtype=dtype), row, None
    count = channels // members + 2  # some groups stay empty
    return torch.rand(count, dtype=dtype), row, torch.randint(count, (channels,)).sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("members", [None, 1, 7, 5000], ids=str)
@pytest.mark.parametrize("channels", [0, 1, 33, 1025, 9000, 40_000])
def test_end_row_matches_reference(
    library: ctypes.CDLL, order: int, channels: int, members: int | None, dtype: torch.dtype
) -> None:
    scores, row, groups = end_row_case(channels, members, dtype)
    expected, spent = scores.double(), row.double()
    reference.end_row(expected, spent, 4.0, groups)
    before = library.obc_emulation_launches()
    assert ops.end_row(scores, row, 4.0, groups)
    assert library.obc_emulation_launches() - before == 1
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)
    assert not row.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("channels", [5, 20_000])
def test_end_row_adds_nothing_where_a_square_is_not_finite(channels: int, bad: float) -> None:
    for position in (0, channels // 2, channels - 1):
        scores, row, groups = end_row_case(channels, 3, torch.float32)
        row[position] = bad
        before = scores.clone()
        assert not ops.end_row(scores, row, 1.0, groups)
        assert torch.equal(scores, before)
        assert not row.any()


@pytest.mark.parametrize("groups", [[0, 2, 1], [0, 1, 3], [-1, 0, 1]], ids=["descending", "beyond", "negative"])
def test_end_row_adds_nothing_where_groups_are_wrong(groups: list[int]) -> None:
    scores, row = torch.ones(3), torch.ones(3)
    assert not ops.end_row(scores, row, 1.0, torch.tensor(groups))
    assert torch.equal(scores, torch.ones(3))
    assert not row.any()


def test_end_row_honours_strides() -> None:
    scores, row = torch.zeros(20)[::2], torch.arange(20.0)[1::2]
    groups = torch.stack([torch.arange(10), torch.full((10,), 99)], dim=1)[:, 0]
    assert ops.end_row(scores, row, 2.0, groups)
    assert torch.equal(scores, (torch.arange(20.0)[1::2] / 2).square())
    assert not row.any()
