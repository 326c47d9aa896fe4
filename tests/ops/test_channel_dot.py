"""channel_dot on every backend against the reference in float64."""

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

# (shape, channel_dim): one, around the vector widths and row blocks of kernels, primes, empty, 1-D to 5-D, and long
# enough for several chunks and threads in each direction.
CASES = [
    ((1,), 0),
    ((33,), -1),
    ((1, 5), 1),
    ((5, 1), 1),
    ((32, 32), 1),
    ((31, 33), 1),
    ((33, 31), 0),
    ((63, 127), 1),
    ((64, 128), 1),
    ((65, 129), -1),
    ((3, 5, 7), 1),
    ((3, 5, 7), -1),
    ((2, 16, 8, 8), 1),
    ((2, 17, 1, 1), 1),
    ((4, 1, 9, 9), 1),
    ((3, 2, 11, 13), -1),
    ((2, 3, 5, 7, 2), 1),
    ((2, 3, 4, 5, 6), 2),
    ((0,), 0),
    ((0, 4), 1),
    ((4, 0), 1),
    ((2, 3, 0, 5), 1),
    ((2, 0, 3, 4), 1),
    ((3, 5, 8191), 1),
    ((70_001, 3), 1),
    ((4099, 129), 1),
    ((3, 4099), 1),
]


def case_id(case: tuple[tuple[int, ...], int]) -> str:
    return "x".join(map(str, case[0])) + f"-dim{case[1]}"


def check(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool = False) -> None:
    actual = ops.channel_dot(activation, grad, channel_dim, per_sample)
    a, g = truth_of(activation), truth_of(grad)
    truth = reference.channel_dot(a, g, channel_dim, per_sample)
    magnitude = reference.channel_dot(a.abs(), g.abs(), channel_dim, per_sample)
    assert_sum_close(actual, truth, magnitude, a.numel() // max(1, truth.numel()), activation.dtype)


def pair(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_channel_dot_matches_reference(device: str, dtype: torch.dtype, case: tuple[tuple[int, ...], int]) -> None:
    shape, channel_dim = case
    activation, grad = pair(shape, dtype, device)
    poison_heap()
    check(activation, grad, channel_dim)
    if channel_dim % len(shape):
        check(activation, grad, channel_dim, per_sample=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_channel_dot_noncontiguous(
    device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], grad_layout: Callable[[Tensor], Tensor]
) -> None:
    for shape in ((5, 33), (3, 4, 35), (2, 19, 6, 5), (2, 5, 3, 4, 3)):
        activation, grad = pair(shape, dtype, device)
        activation, grad = layout(activation), grad_layout(grad)
        for channel_dim in {1, len(shape) - 1}:
            check(activation, grad, channel_dim)
            check(activation, grad, channel_dim, per_sample=True)
        check(activation, grad, 0)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data(), shape=shapes, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_channel_dot_of_any_shape_and_strides(
    target: tuple[str, str], data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    activation, grad = data.draw(strided(shape, dtype)), data.draw(strided(shape, dtype))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    per_sample = channel_dim % len(shape) != 0 and data.draw(st.booleans())
    with on(target) as device:
        check(activation.to(device), grad.to(device), channel_dim, per_sample)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("device", KERNEL_TARGETS, indirect=True)
@pytest.mark.parametrize(("shape", "channel_dim"), [((8, 32, 32, 32), 1), ((2, 512, 258), 2), ((9, 4, 8191), 1)])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]], ids=layout_id)
def test_channel_dot_is_deterministic(
    device: str, threads: None, shape: tuple[int, ...], channel_dim: int, layout: Callable[[Tensor], Tensor]
) -> None:
    """The same bits over repeats, whatever the number of threads and the memory's earlier content."""
    activation, grad = (layout(t) for t in pair(shape, torch.float32, device))
    torch.set_num_threads(1)
    expected = [ops.channel_dot(activation, grad, channel_dim, per_sample) for per_sample in (False, True)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(3):
            poison_heap()
            assert torch.equal(ops.channel_dot(activation, grad, channel_dim), expected[0])
            assert torch.equal(ops.channel_dot(activation, grad, channel_dim, per_sample=True), expected[1])


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_dot_backward(device: str, dtype: torch.dtype) -> None:
    """The gradients by both inputs are the other input, spread: exact up to the rounding of one product."""
    for per_sample in (False, True):
        activation, grad = (t.requires_grad_() for t in pair((3, 5, 4), dtype, device))
        dot = ops.channel_dot(activation, grad, 1, per_sample)
        weighting = torch.randn_like(dot)
        grads = torch.autograd.grad(dot, (activation, grad), weighting)
        spread = truth_of(weighting).reshape(3 if per_sample else 1, 5, 1)
        for actual, other in zip(grads, (grad, activation), strict=True):
            truth = spread * truth_of(other)
            assert_sum_close(actual, truth, truth.abs(), 1, dtype, stored=dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("per_sample", [False, True])
def test_channel_dot_gradcheck(device: str, per_sample: bool) -> None:
    activation, grad = (t.requires_grad_() for t in pair((3, 4, 2), torch.float64, device))
    assert torch.autograd.gradcheck(lambda a, g: ops.channel_dot(a, g, 1, per_sample), (activation, grad))


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
def test_channel_dot_opcheck(device: str, requires_grad: bool) -> None:
    activation, grad = (t.requires_grad_(requires_grad) for t in pair((3, 5, 4), torch.float32, device))
    for args in ((activation, grad, 1), (activation, grad, -1, True), (activation.mT, grad.mT, 2, True)):
        torch.library.opcheck(torch.ops.obc.channel_dot.default, args)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_channel_dot_in_a_compiled_graph(device: str) -> None:
    activation, grad = pair((3, 5, 4), torch.float32, device)
    compiled = torch.compile(lambda a, g: ops.channel_dot(a.sin(), g, 1) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(activation, grad), ops.channel_dot(activation.sin(), grad, 1) * 2)


A = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((A, torch.zeros(2, 3, 5), 1), ValueError, r"grad has shape \(2, 3, 5\), activation has \(2, 3, 4\)"),
        ((A, A.double(), 1), TypeError, "grad is torch.float64, activation is torch.float32; pass one dtype"),
        ((A, A.to("meta"), 1), ValueError, "grad is on meta, activation on cpu; pass one device"),
        ((A.int(), A.int(), 1), TypeError, "activation must be float32, .* got torch.int32; convert it first"),
        ((A.to(torch.complex64), A.to(torch.complex64), 1), TypeError, "got torch.complex64"),
        ((A.bool(), A.bool(), 1), TypeError, "got torch.bool"),
        ((A, A, 3), IndexError, "channel_dim 3 is outside an activation of 3 dimensions"),
        ((A, A, -4), IndexError, "channel_dim -4 is outside an activation of 3 dimensions"),
        ((torch.tensor(1.0), torch.tensor(1.0), 0), IndexError, "outside an activation of 0 dimensions"),
        ((A, A, 0, True), ValueError, "per_sample needs samples along dim 0, but channel_dim is 0 too"),
        ((A, A, -3, True), ValueError, "per_sample needs samples along dim 0, but channel_dim is 0 too"),
    ],
)
def test_channel_dot_rejects(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.channel_dot(*args)
    with pytest.raises(error, match=message):  # the same words when a graph is traced
        ops.channel_dot(*(a.to("meta") if isinstance(a, Tensor) and "on meta" not in message else a for a in args))
