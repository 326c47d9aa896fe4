"""weight_dot, weight_dot_list and weight_moments on every backend against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, KERNEL_TARGETS, LAYOUTS, TARGETS, layout_id, on, poison_heap, shapes, strided, truth_of
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_sum_close
from torch import Tensor

from obc import ops, reference


@dataclass(frozen=True)
class Case:
    """A weight's shape and kind: (out, in / groups, *kernel), or (in, out / groups, *kernel) if transposed."""

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        grouped = f"-groups{self.groups}" if self.groups > 1 else ""
        return "x".join(map(str, self.shape)) + grouped + ("-transposed" if self.transposed else "")

    @property
    def out_channels(self) -> int:
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """weight, grad, bias, bias_grad"""
        shapes = [self.shape, self.shape, (self.out_channels,), (self.out_channels,)]
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


# One, around the vector widths, primes, empty, 2-D to 5-D, grouped, depthwise, transposed, and long enough for several
# chunks and threads in each direction.
CASES = [
    Case((1, 1)),
    Case((1, 7)),
    Case((7, 1)),
    Case((31, 33)),
    Case((32, 32)),
    Case((33, 31)),
    Case((63, 129)),
    Case((5, 3, 3)),
    Case((6, 5, 3, 3)),
    Case((17, 16, 1, 1)),
    Case((4, 3, 2, 3, 5)),
    Case((6, 4, 3, 3), groups=2),
    Case((9, 1, 3, 3), groups=9),
    Case((18, 1, 5), groups=9),
    Case((33, 11, 3), groups=11),
    Case((6, 4, 3, 3), transposed=True),
    Case((6, 4, 3, 3), groups=3, transposed=True),
    Case((8, 1, 4), groups=8, transposed=True),
    Case((0, 3)),
    Case((3, 0)),
    Case((0, 1)),
    Case((1, 0)),
    Case((1, 3, 0)),
    Case((2, 0, 3), groups=2),
    Case((0, 2, 3), groups=2),
    Case((4, 2, 0)),
    Case((4, 0, 3), groups=2, transposed=True),
    Case((300, 1031)),
    Case((3, 70_001)),
    Case((70_001, 3)),
    Case((65, 64, 7, 7)),
    Case((520, 130, 3), groups=4),
]


def check(tensors: list[Tensor], groups: int = 1, transposed: bool = False) -> None:
    """``tensors`` are weight and grad, or with bias and bias_grad."""
    bias = [*tensors[2:], None, None][:2]
    check_dots(ops.weight_dot(*tensors[:2], *bias, groups, transposed), tensors, groups, transposed)


def check_dots(dots: tuple[Tensor, Tensor], tensors: list[Tensor], groups: int = 1, transposed: bool = False) -> None:
    """``dots`` are the out_dot and in_dot of ``tensors``."""
    exact = [truth_of(tensor) for tensor in tensors]
    exact_bias, absolute_bias = [*exact[2:], None, None][:2], [*(t.abs() for t in exact[2:]), None, None][:2]
    truths = reference.weight_dot(*exact[:2], *exact_bias, groups, transposed)
    magnitudes = reference.weight_dot(*(t.abs() for t in exact[:2]), *absolute_bias, groups, transposed)
    for actual, truth, magnitude in zip(dots, truths, magnitudes, strict=True):
        terms = exact[0].numel() // max(1, truth.numel()) + 1  # 1 for the bias
        assert_sum_close(actual, truth, magnitude, terms, tensors[0].dtype)


def check_moments(weight: Tensor, grad: Tensor) -> None:
    w, g = truth_of(weight), truth_of(grad)
    truths, magnitudes = reference.weight_moments(w, g), reference.weight_moments(w.abs(), g.abs())
    terms = w[0].numel() if len(w) else 0
    for actual, truth, magnitude in zip(ops.weight_moments(weight, grad), truths, magnitudes, strict=True):
        assert_sum_close(actual, truth, magnitude, terms, weight.dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_dot_matches_reference(device: str, dtype: torch.dtype, case: Case) -> None:
    tensors = case.tensors(dtype, device)
    poison_heap()
    check(tensors, case.groups, case.transposed)
    check(tensors[:2], case.groups, case.transposed)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_moments_matches_reference(device: str, dtype: torch.dtype, case: Case) -> None:
    weight, grad = case.tensors(dtype, device)[:2]
    poison_heap()
    check_moments(weight, grad)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_weight_dot_noncontiguous(
    device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], grad_layout: Callable[[Tensor], Tensor]
) -> None:
    for case in (Case((5, 33)), Case((6, 35, 3), groups=3), Case((6, 5, 3, 3), 2, True), Case((4, 3, 2, 3, 2), 2)):
        weight, grad, bias, bias_grad = case.tensors(dtype, device)
        weight, grad, bias, bias_grad = layout(weight), grad_layout(grad), layout(bias), grad_layout(bias_grad)
        check([weight, grad, bias, bias_grad], case.groups, case.transposed)
        check_moments(weight, grad)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data(), shape=shapes, groups=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_weight_dot_of_any_shape_and_strides(
    target: tuple[str, str], data: st.DataObject, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    shape = (shape[0] * groups, *(shape[1:] or (1,)))
    tensors = [data.draw(strided(shape, dtype)), data.draw(strided(shape, dtype))]
    transposed = data.draw(st.booleans())
    with on(target) as device:
        if data.draw(st.booleans()):
            out_channels = Case(shape, groups, transposed).out_channels
            tensors += [data.draw(strided((out_channels,), dtype)), data.draw(strided((out_channels,), dtype))]
        tensors = [tensor.to(device) for tensor in tensors]
        check(tensors, groups, transposed)
        check_moments(*tensors[:2])


def _model(dtype: torch.dtype, device: str) -> tuple[list[Case], list[list[Tensor]]]:
    """Many small layers and some larger ones, as a network has them, every other one with a bias."""
    cases = [*CASES[:27], Case((130, 129, 3, 3)), Case((257, 1031))] * 2
    tensors = [case.tensors(dtype, device) for case in cases]
    return cases, [layer if n % 2 else [*layer[:2], None, None] for n, layer in enumerate(tensors)]


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_dot_list_equals_weight_dot(device: str, dtype: torch.dtype) -> None:
    """Layer by layer the truth that weight_dot is compared with."""
    cases, layers = _model(dtype, device)
    groups, transposed = [case.groups for case in cases], [case.transposed for case in cases]
    outs, ins = ops.weight_dot_list(*zip(*layers, strict=True), groups, transposed)
    plain_outs, plain_ins = ops.weight_dot_list(*list(zip(*layers, strict=True))[:2])
    for n, (layer, case) in enumerate(zip(layers, cases, strict=True)):
        check_dots((outs[n], ins[n]), [t for t in layer if t is not None], case.groups, case.transposed)
        check_dots((plain_outs[n], plain_ins[n]), layer[:2])


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_weight_dot_list_takes_mixed_dtypes_and_layouts_and_none(device: str) -> None:
    assert ops.weight_dot_list([], []) == ([], [])
    weights = [layout(torch.randn(6, 4, 3, 3, device=device)) for layout in LAYOUTS]
    weights += [torch.randn(5, 7, dtype=dtype, device=device) for dtype in (torch.float64, torch.bfloat16)]
    grads = [torch.randn(weight.shape, device=device).to(weight.dtype) for weight in weights]
    outs, ins = ops.weight_dot_list(weights, grads)
    for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        check_dots((outs[n], ins[n]), [weight, grad])


@pytest.mark.parametrize("device", KERNEL_TARGETS, indirect=True)
@pytest.mark.parametrize(
    "case", [Case((513, 1031)), Case((130, 64, 3, 3)), Case((520, 130, 3), 4), Case((96, 33, 3), 3, True)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=layout_id)
def test_weight_dot_is_deterministic(
    device: str, threads: None, case: Case, layout: Callable[[Tensor], Tensor]
) -> None:
    """The same bits over repeats, whatever the number of threads and the memory's earlier content."""
    weight, grad, bias, bias_grad = (layout(t) for t in case.tensors(torch.float32, device))

    def results() -> list[Tensor]:
        dots = ops.weight_dot(weight, grad, bias, bias_grad, case.groups, case.transposed)
        lists = ops.weight_dot_list(
            [weight] * 3, [grad] * 3, [bias] * 3, [bias_grad] * 3, [case.groups] * 3, [case.transposed] * 3
        )
        return [*dots, *ops.weight_moments(weight, grad), *lists[0], *lists[1]]

    torch.set_num_threads(1)
    expected = results()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(3):
            poison_heap()
            assert all(torch.equal(actual, wanted) for actual, wanted in zip(results(), expected, strict=True))


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("case", [Case((4, 3)), Case((6, 2, 3), 3), Case((6, 2, 2), 2, True)], ids=str)
def test_weight_dot_gradcheck(device: str, case: Case) -> None:
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float64, device)]
    for given_tensors in (tensors, tensors[:2]):
        assert torch.autograd.gradcheck(
            lambda *t: ops.weight_dot(*[*t, None, None][:4], case.groups, case.transposed), given_tensors
        )


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_dot_backward(device: str, dtype: torch.dtype) -> None:
    """The gradient by weight is, for every dtype, grad times (out's + in's cotangent), and so the other way round."""
    weight, grad, bias, bias_grad = (t.requires_grad_() for t in Case((5, 4, 3)).tensors(dtype, device))
    dots = ops.weight_dot(weight, grad, bias, bias_grad)
    by_out, by_in = (torch.randn_like(dot) for dot in dots)
    grads = torch.autograd.grad(dots, (weight, grad, bias, bias_grad), (by_out, by_in))
    out_part, in_part = truth_of(by_out), truth_of(by_in)
    spread = out_part[:, None, None] + in_part[None, :, None]
    magnitude = out_part.abs()[:, None, None] + in_part.abs()[None, :, None]
    for actual, factor, other, scale in (
        (grads[0], spread, grad, magnitude),
        (grads[1], spread, weight, magnitude),
        (grads[2], out_part, bias_grad, out_part.abs()),
        (grads[3], out_part, bias, out_part.abs()),
    ):
        other = truth_of(other)
        assert_sum_close(actual, factor * other, scale * other.abs(), 2, dtype, stored=dtype)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_weight_dot_list_and_moments_are_not_differentiable(device: str) -> None:
    weight, grad = (t.requires_grad_() for t in Case((4, 3)).tensors(torch.float32, device)[:2])
    with pytest.raises(RuntimeError, match="weight_moments is not differentiable; write the moment"):
        sum(moment.sum() for moment in ops.weight_moments(weight, grad)).backward()
    outs, _ = ops.weight_dot_list([weight], [grad])
    with pytest.raises(RuntimeError, match="weight_dot_list is not differentiable; call weight_dot for each layer"):
        outs[0].sum().backward()


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
def test_weight_dot_opcheck(device: str, requires_grad: bool) -> None:
    grouped, transposed = Case((6, 4, 3, 3), groups=2), Case((6, 4, 3), groups=2, transposed=True)
    for case in (grouped, transposed):
        tensors = [t.requires_grad_(requires_grad) for t in case.tensors(torch.float32, device)]
        torch.library.opcheck(torch.ops.obc.weight_dot.default, (*tensors, case.groups, case.transposed))
        torch.library.opcheck(torch.ops.obc.weight_dot.default, (*tensors[:2], None, None, case.groups))


# The backward of these two is an error by design, which opcheck's trace of the backward would report.
_WITHOUT_BACKWARD = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("device", TARGETS, indirect=True)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
def test_weight_dot_list_and_moments_opcheck(device: str, requires_grad: bool) -> None:
    utilities = _WITHOUT_BACKWARD if requires_grad else (*_WITHOUT_BACKWARD, "test_aot_dispatch_dynamic")
    weight, grad, bias, bias_grad = (
        t.requires_grad_(requires_grad) for t in Case((4, 3, 2)).tensors(torch.float32, device)
    )
    torch.library.opcheck(torch.ops.obc.weight_moments.default, (weight, grad), test_utils=utilities)
    for args in (
        ([weight, weight], [grad, grad]),
        ([weight, weight], [grad, grad], [bias, None], [bias_grad, None], [1, 2], [False, False]),
    ):
        torch.library.opcheck(torch.ops.obc.weight_dot_list.default, args, test_utils=utilities)


@pytest.mark.parametrize("device", TARGETS, indirect=True)
def test_weight_dot_in_a_compiled_graph(device: str) -> None:
    weight, grad = Case((6, 4, 3)).tensors(torch.float32, device)[:2]

    def formula(w: Tensor, g: Tensor) -> list[Tensor]:
        lists = ops.weight_dot_list([w, g], [g, g])
        return [*ops.weight_dot(w.sin(), g, groups=2), *ops.weight_moments(w, g), *lists[0], *lists[1]]

    compiled = torch.compile(formula, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, grad), formula(weight, grad))


W, B = torch.zeros(6, 4, 3), torch.zeros(6)
FAULTS = [
    ((W, torch.zeros(6, 4, 2)), ValueError, r"grad has shape \(6, 4, 2\), weight has \(6, 4, 3\); pass equal shapes"),
    ((W, W.half()), TypeError, "grad is torch.float16, weight is torch.float32; pass one dtype"),
    ((W, W.to("meta")), ValueError, "grad is on meta, weight on cpu; pass one device"),
    ((W.int(), W.int()), TypeError, "weight must be float32, .* got torch.int32; convert it first"),
    ((B, B), ValueError, r"weight must be \(out, in / groups, \*kernel\), got shape \(6,\)"),
]
DOT_FAULTS = [
    ((W, W, B), ValueError, "bias and bias_grad go together, got only bias"),
    ((W, W, None, B), ValueError, "bias and bias_grad go together, got only bias_grad"),
    ((W, W, B[:5], B[:5]), ValueError, r"bias has shape \(5,\), expected \(6,\)"),
    ((W, W, B, B[:, None]), ValueError, r"bias_grad has shape \(6, 1\), expected \(6,\)"),
    ((W, W, B, B, 1, True), ValueError, r"bias has shape \(6,\), expected \(4,\)"),
    ((W, W, B.double(), B.double()), TypeError, "bias is torch.float64, weight is torch.float32"),
    ((W, W, B, B.to("meta")), ValueError, "bias_grad is on meta, weight on cpu"),
    ((W, W, None, None, 4), ValueError, r"dim 0 of the weight \(6\) is not divisible into 4 groups"),
    ((W, W, None, None, 0), ValueError, "not divisible into 0 groups"),
]


@pytest.mark.parametrize(("args", "error", "message"), [*FAULTS, *DOT_FAULTS])
def test_weight_dot_rejects(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="obc::weight_dot: .*" + message):
        ops.weight_dot(*args)
    with pytest.raises(error, match="obc::weight_dot_list: .*" + message):
        ops.weight_dot_list([W, args[0]], *([default, arg] for default, arg in zip(_DEFAULTS, args[1:], strict=False)))


_DEFAULTS = (W, None, None, 1, False)


@pytest.mark.parametrize(("args", "error", "message"), FAULTS)
def test_weight_moments_rejects(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="obc::weight_moments: .*" + message):
        ops.weight_moments(*args)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([W], []), "0 grads for 1 weights"),
        (([W], [W], [None, None]), "2 biases for 1 weights"),
        (([W], [W], None, [None, None]), "2 bias_grads for 1 weights"),
        (([W], [W], None, None, [1, 1]), "2 groups for 1 weights"),
        (([W], [W], None, None, None, []), "0 transposed for 1 weights"),
        (([W, W.to("meta")], [W, W.to("meta")]), "weights on cpu and meta; pass weights of one device per call"),
    ],
)
def test_weight_dot_list_rejects(lists: tuple, message: str) -> None:
    with pytest.raises(ValueError, match="obc::weight_dot_list: " + message):
        ops.weight_dot_list(*lists)
