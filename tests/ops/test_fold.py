"""fold on every backend against the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, LAYOUTS, TARGETS, channels_last, layout_id, on, poison_heap, strided, truth_of
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_sum_close
from torch import Tensor

from obc import ops, reference
from obc.backends import gemm

Factors = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Shapes of weight, C and D; ``None`` is the identity."""

    weight: tuple[int, ...]
    c: tuple[int, ...] | None = None
    d: tuple[int, ...] | None = None
    groups: int = 1
    in_repeat: int = 1

    def __str__(self) -> str:
        parts = ["x".join(map(str, shape)) if shape else "none" for shape in (self.weight, self.c, self.d)]
        more = [f"groups{self.groups}"] * (self.groups > 1) + [f"repeat{self.in_repeat}"] * (self.in_repeat > 1)
        return "-".join(parts + more)

    def tensors(self, dtype: torch.dtype, device: str) -> Factors:
        """Weight, C and D; scaled so that sums stay within float16."""
        shapes = (self.weight, self.c, self.d)
        return tuple(None if s is None else (torch.randn(s, device=device) / 4).to(dtype) for s in shapes)


# Either factor or both; expanding and shrinking, so that both orders of multiplication occur; kernels of no to three
# dimensions; blocks, groups as blocks and as matrices, depthwise, a Linear after flatten; empty.
CASES = [
    Case((6, 5)),
    Case((6, 5), (4, 6)),
    Case((6, 5), None, (5, 3)),
    Case((6, 5), (4, 6), (5, 3)),
    Case((1, 1), (1, 1), (1, 1)),
    Case((33, 64, 3, 3), (17, 33), (64, 31)),
    Case((64, 8, 3), (3, 64), (8, 8)),
    Case((8, 64, 3), (8, 8), (64, 3)),
    Case((4, 3, 2, 2, 2), (9, 4), (3, 7)),
    Case((127, 131), (63, 127), (131, 65)),
    Case((6, 8), (3, 2, 2), (2, 4, 3)),
    Case((6, 8, 3), (3, 1, 2), (8, 5)),
    Case((6, 4, 3, 3), (2, 2, 3), (2, 4, 3), groups=2),
    Case((6, 4, 3, 3), (4, 6), (8, 6), groups=2),
    Case((6, 4, 3), (4, 6), None, groups=2),
    Case((6, 4, 3), None, (2, 4, 1), groups=2),
    Case((9, 1, 3, 3), (9, 1, 1), (9, 1, 1), groups=9),
    Case((7, 20), (4, 7), (5, 3), in_repeat=4),
    Case((7, 20), None, (5, 3), in_repeat=4),
    Case((0, 5), (3, 0), (5, 2)),
    Case((6, 5, 3), (0, 6), (5, 0)),
    Case((6, 0), (3, 6), (0, 2)),
    Case((6, 5, 0), (3, 6), (5, 2)),
]


# The public function may serve a tensor without a call through the dispatcher; the operator is there for graphs.
FORMS = [ops.fold, torch.ops.obc.fold]


def check(tensors: Factors, groups: int = 1, in_repeat: int = 1) -> None:
    exact = [None if tensor is None else truth_of(tensor) for tensor in tensors]
    truth = reference.fold(*exact, groups, in_repeat)
    magnitude = reference.fold(*(None if tensor is None else tensor.abs() for tensor in exact), groups, in_repeat)
    terms = sum(tensor.shape[side] for tensor, side in ((exact[1], -1), (exact[2], -2)) if tensor is not None)
    for fold in FORMS:
        actual = fold(*tensors, groups, in_repeat)
        assert actual.is_contiguous()
        assert_sum_close(actual, truth, magnitude, terms, tensors[0].dtype, stored=tensors[0].dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fold_matches_reference(device: str, dtype: torch.dtype, case: Case) -> None:
    tensors = case.tensors(dtype, device)
    poison_heap()
    check(tensors, case.groups, case.in_repeat)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_fold_noncontiguous(device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for case in (CASES[3], CASES[5], CASES[10], CASES[12], CASES[13], CASES[17]):
        weight, c, d = case.tensors(dtype, device)
        for tensors in ((layout(weight), c, d), (weight, layout(c), d), (weight, c, layout(d))):
            check(tensors, case.groups, case.in_repeat)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data(), groups=st.integers(1, 3), kernel=st.lists(st.integers(1, 3), max_size=3))
def test_fold_of_any_shape_and_strides(
    target: tuple[str, str], data: st.DataObject, groups: int, kernel: list[int]
) -> None:
    """Sizes are per diagonal block; a factor is a matrix, its blocks, or absent."""
    out, in_, kept_out, kept_in = (data.draw(st.integers(1, 6)) for _ in range(4))
    weight = data.draw(strided((groups * out, in_, *kernel), torch.float32))

    def factor(rows: int, columns: int) -> Tensor | None:
        if data.draw(st.booleans()):
            return None
        as_blocks = data.draw(st.booleans())
        shape = (groups, rows, columns) if as_blocks else (groups * rows, groups * columns)
        return data.draw(strided(shape, torch.float32))

    tensors = weight, factor(kept_out, out), factor(in_, kept_in)
    with on(target) as device:
        check(tuple(None if tensor is None else tensor.to(device) for tensor in tensors), groups)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", FORMS, ids=["function", "operator"])
def test_fold_without_factors_is_a_copy(device: str, dtype: torch.dtype, fold: Callable[..., Tensor]) -> None:
    for layout in LAYOUTS:
        weight = layout(torch.randn(4, 3, 2, device=device).to(dtype))
        folded = fold(weight)
        assert torch.equal(folded, weight)
        folded.zero_()
        assert weight.isfinite().all()
        assert weight.any()


@pytest.mark.sampled(members=8)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.weight[0] in (6, 7, 9) and (case.c or case.d) and 0 not in case.weight],
    ids=str,
)
@pytest.mark.parametrize("fold", FORMS, ids=["function", "operator"])
def test_fold_gradcheck(device: str, case: Case, fold: Callable[..., Tensor]) -> None:
    given_tensors = [t.requires_grad_() for t in case.tensors(torch.float64, device) if t is not None]

    def folded(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        weight, c, d = (None if shape is None else next(rest) for shape in (case.weight, case.c, case.d))
        return fold(weight, c, d, case.groups, case.in_repeat)

    assert torch.autograd.gradcheck(folded, given_tensors)


def test_fold_can_be_differentiated_twice() -> None:
    """The backward of a backward can't use the product that the forward kept."""
    for case in (CASES[6], CASES[7], CASES[12]):
        tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float64, "cpu")]
        # In one random direction: every entry by itself would take minutes.
        fold = functools.partial(_folded, case.groups)
        assert torch.autograd.gradgradcheck(fold, tensors, fast_mode=True)


def _folded(groups: int, *tensors: Tensor) -> Tensor:
    return ops.fold(*tensors, groups)


# Weight, C, D as the factors of the dropped channels only; C first, D first, either alone, blocks, groups, a flatten.
REDUCED = [
    Case((6, 7, 3), (2, 4), (4, 3)),
    Case((6, 7, 3), (4, 2), (5, 2)),
    Case((6, 7, 3), (4, 2)),
    Case((6, 7, 3), None, (5, 2)),
    Case((6, 8), (3, 1, 1), (4, 4)),
    Case((6, 8), (3, 1, 1), (2, 1, 3)),
    Case((6, 4, 3), (2, 1, 2), (2, 3, 1), groups=2),
    Case((6, 4, 3), (2, 2, 1), (2, 1, 3), groups=2),
    Case((7, 20), (4, 3), (2, 3), in_repeat=4),
    Case((6, 5), (6, 0), (0, 5)),
]


def with_kept(factor: Tensor | None, dim: int) -> Tensor | None:
    """The whole factor: the identity over the kept channels before the dropped ones', along ``dim`` of each block."""
    if factor is None:
        return None
    blocks = factor if factor.dim() == 3 else factor[None]
    kept = blocks.shape[2 if dim == 1 else 1]
    identity = torch.eye(kept, dtype=factor.dtype).expand(len(blocks), kept, kept)
    return torch.cat([identity, blocks], dim)


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("channels_innermost", [False, True])
@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_factors_of_dropped_channels_fold_like_whole_ones(case: Case, channels_innermost: bool) -> None:
    given_tensors = [t.requires_grad_() for t in case.tensors(torch.float64, "cpu") if t is not None]

    def form(*tensors: Tensor) -> Factors:
        rest = iter(tensors)
        weight, c, d = (None if shape is None else next(rest) for shape in (case.weight, case.c, case.d))
        assert weight is not None
        return channels_last(weight) if channels_innermost else weight, c, d

    def reduced(*tensors: Tensor) -> Tensor:
        return gemm.fold(*form(*tensors), case.groups, case.in_repeat, reduced=True)

    weight, c, d = form(*given_tensors)
    expected = reference.fold(weight, with_kept(c, 2), with_kept(d, 1), case.groups, case.in_repeat)
    assert (reduced(*given_tensors) - expected).abs().max() < 1e-14
    assert torch.autograd.gradcheck(reduced, given_tensors)


@pytest.mark.parametrize("case", REDUCED[:2], ids=str)
def test_fold_of_dropped_channels_can_be_differentiated_twice(case: Case) -> None:
    """The backward that another one goes through must not write a gradient over what that one reads."""
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float64, "cpu")]
    assert torch.autograd.gradgradcheck(lambda *t: gemm.fold(*t, reduced=True), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", REDUCED[:2], ids=str)
def test_factors_of_dropped_channels_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    """Wide intermediates beside half-precision factors: the float32 result and gradients, rounded once."""
    half = [tensor.requires_grad_() for tensor in case.tensors(dtype, "cpu")]
    wide = [tensor.detach().float().requires_grad_() for tensor in half]
    folded, expected = (gemm.fold(*tensors, reduced=True) for tensors in (half, wide))
    grad = torch.randn_like(folded)
    grads, expected_grads = torch.autograd.grad(folded, half, grad), torch.autograd.grad(expected, wide, grad.float())
    for found, truth in zip((folded, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(found, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", FORMS, ids=["function", "operator"])
def test_fold_backward(device: str, dtype: torch.dtype, fold: Callable[..., Tensor]) -> None:
    """The gradients equal the float64 einsum's, for every dtype and every subset of inputs that require grad."""
    case = Case((6, 5, 3), (4, 6), (5, 3))
    values = case.tensors(dtype, device)
    weighting = torch.randn(4, 3, 3, device=device).to(dtype)
    exact = [truth_of(tensor).requires_grad_() for tensor in values]
    truth = torch.autograd.grad(
        torch.einsum("ko,ois,ij->kjs", exact[1], exact[0], exact[2]), exact, truth_of(weighting)
    )
    absolute = [tensor.detach().abs().requires_grad_() for tensor in exact]
    magnitude = torch.autograd.grad(
        torch.einsum("ko,ois,ij->kjs", absolute[1], absolute[0], absolute[2]), absolute, truth_of(weighting).abs()
    )
    for wanted in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2]):
        tensors = [tensor.clone().requires_grad_(n in wanted) for n, tensor in enumerate(values)]
        grads = torch.autograd.grad(fold(*tensors), [tensors[n] for n in wanted], weighting)
        for n, actual in zip(wanted, grads, strict=True):
            terms = weighting.numel() + 6 + 5  # at most: all of the cotangent, and both of the other products
            assert_sum_close(actual, truth[n], magnitude[n], terms, dtype, stored=dtype)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
def test_fold_opcheck(device: str, requires_grad: bool) -> None:
    for case in (CASES[1], CASES[2], CASES[3], CASES[12], CASES[17]):
        tensors = [t if t is None else t.requires_grad_(requires_grad) for t in case.tensors(torch.float32, device)]
        torch.library.opcheck(torch.ops.obc.fold.default, (*tensors, case.groups, case.in_repeat))
    weight = torch.randn(6, 4, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_(requires_grad)
    c = torch.randn(3, 6, device=device)
    for args in ((weight,), (weight, c), (weight, None, torch.randn(4, 2, device=device))):
        torch.library.opcheck(torch.ops.obc.fold.default, args)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("fold", FORMS, ids=["function", "operator"])
def test_fold_in_a_compiled_graph(device: str, fold: Callable[..., Tensor]) -> None:
    compiled = torch.compile(lambda *t: fold(*t).sin(), fullgraph=True, backend="aot_eager")
    tensors = CASES[3].tensors(torch.float32, device)
    torch.testing.assert_close(compiled(*tensors), fold(*tensors).sin())


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_fold_is_deterministic(device: str, threads: None) -> None:
    tensors = CASES[5].tensors(torch.float32, device)
    torch.set_num_threads(2)
    expected = ops.fold(*tensors)
    for _ in range(5):
        poison_heap()
        assert torch.equal(ops.fold(*tensors), expected)


W, C, D = torch.zeros(6, 4, 3), torch.zeros(2, 6), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((W.int(), C), TypeError, "weight must be float32, .* got torch.int32"),
        ((W[:, 0, 0], C), ValueError, r"weight must be \(out, in / groups, \*kernel\), got shape \(6,\)"),
        ((W, C.double()), TypeError, "compressor is torch.float64, weight is torch.float32; pass one dtype"),
        ((W, C.to("meta")), ValueError, "compressor is on meta, weight on cpu; pass one device"),
        ((W, None, D.half()), TypeError, "decompressor is torch.float16, weight is torch.float32"),
        ((W, C[0]), ValueError, r"compressor must be a matrix or .* got shape \(6,\)"),
        ((W, C[:, :5]), ValueError, r"compressor of shape \(2, 5\) does not fit 6 channels of a weight \(6, 4, 3\)"),
        ((W, None, D[:3]), ValueError, r"decompressor of shape \(3, 2\) does not fit 4 channels"),
        ((W, None, D, 2), ValueError, r"decompressor of shape \(4, 2\) does not fit 8 channels .* groups=2"),
        ((W, torch.zeros(3, 6), None, 2), ValueError, r"compressor of shape \(3, 6\) can't be split into 2 diagonal"),
        ((W, torch.zeros(3, 1, 2), None, 2), ValueError, r"compressor of shape \(3, 1, 2\) can't be split into 2"),
        ((W, C, None, 4), ValueError, "6 out channels are not divisible into 4 groups"),
        ((W[..., 0], None, D, 1, 3), ValueError, "4 columns are not divisible by in_repeat=3"),
        ((W[..., 0], None, D, 1, 0), ValueError, "not divisible by in_repeat=0"),
        (
            (W, None, D, 1, 2),
            ValueError,
            r"in_repeat=2 is for a Linear after flatten, got a weight of shape \(6, 4, 3\)",
        ),
    ],
)
def test_fold_rejects(args: tuple, error: type[Exception], message: str) -> None:
    for fold in FORMS:
        with pytest.raises(error, match="obc::fold: .*" + message):
            fold(*args)
