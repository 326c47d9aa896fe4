"""The CPU operators on anything that torch and NumPy let a caller build, against the reference in float64.

Shapes with zero sizes, any order of dimensions, steps, stride 0, windows that overlap in memory, strides beyond 32
bits, values that are not finite, and arguments that do not fit. ``make fuzz`` draws more examples: OBC_FUZZ_EXAMPLES
for each test, from the seed of ``--hypothesis-seed``. The closing line counts them.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import shapes, strided, truth_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tolerances import allowed_error, assert_sum_close
from torch import Tensor

import obc
from obc import ops, reference

if reason := obc.backends.BACKENDS["cpu"].why_unavailable():
    pytest.skip(f"backend 'cpu' is not available: {reason}", allow_module_level=True)

from obc.integrations import numpy as onp

EXAMPLES = int(os.environ.get("OBC_FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="OBC_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
counts: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _cpu_backend() -> Iterator[None]:
    with obc.use_backend("cpu"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _print_counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz: {counts.total()} examples of operators ({each})")


# --- tensors -------------------------------------------------------------------------------------------------------


@st.composite
def overlapping(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A window over a short buffer: any strides of 0 to 7, so that elements share memory; NaN outside the window."""
    strides = [draw(st.integers(0, 7)) for _ in shape]
    offset = draw(st.integers(0, 3))
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    buffer = torch.full((offset + max(reach, 0) + 1 + draw(st.integers(0, 3)),), torch.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    buffer[offset : offset + reach + 1] = torch.randn(reach + 1, generator=generator).to(dtype)
    return buffer.as_strided(shape, strides, offset)


@st.composite
def far_strides(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Strides of up to 2^62 where they move nowhere: along dimensions of one element, or of a tensor without any."""
    far = st.integers(0, 2**62)
    tensor = draw(strided(shape, dtype))
    strides = [
        draw(far) if size == 1 or not tensor.numel() else stride
        for size, stride in zip(shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(shape, strides)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    return st.one_of(strided(shape, dtype), overlapping(shape, dtype), far_strides(shape, dtype))


@st.composite
def pairs(draw: st.DrawFn, least_dims: int = 1) -> tuple[Tensor, Tensor]:
    shape, dtype = draw(shapes.filter(lambda shape: len(shape) >= least_dims)), draw(DTYPES)
    return draw(tensors(shape, dtype)), draw(tensors(shape, dtype))


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]:
    """The arguments of weight_dot."""
    weight, grad = draw(pairs(least_dims=2))
    rows = weight.shape[0]
    groups = draw(st.sampled_from([g for g in range(1, rows + 2) if rows % g == 0]))
    transposed = draw(st.booleans())
    out_channels = weight.shape[1] * groups if transposed else rows
    biases = [draw(tensors((out_channels,), weight.dtype)) for _ in range(2)] if draw(st.booleans()) else [None, None]
    return weight, grad, *biases, groups, transposed


def exact(value: object) -> object:
    return truth_of(value) if isinstance(value, Tensor) else value


def absolute(value: object) -> object:
    return truth_of(value).abs() if isinstance(value, Tensor) else value


def assert_dots(dots: tuple[Tensor, Tensor], arguments: tuple) -> None:
    truths = reference.weight_dot(*map(exact, arguments))
    magnitudes = reference.weight_dot(*map(absolute, arguments))
    for actual, truth, magnitude in zip(dots, truths, magnitudes, strict=True):
        terms = arguments[0].numel() // max(1, truth.numel()) + 1
        assert_sum_close(actual, truth, magnitude, terms, arguments[0].dtype)


# --- values --------------------------------------------------------------------------------------------------------


@fuzz
@given(pair=pairs(), data=st.data())
def test_channel_dot(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    counts["channel_dot"] += 1
    activation, grad = pair
    dims = activation.dim()
    channel_dim = data.draw(st.integers(-dims, dims - 1))
    per_sample = channel_dim % dims != 0 and data.draw(st.booleans())
    actual = ops.channel_dot(activation, grad, channel_dim, per_sample)
    truth = reference.channel_dot(truth_of(activation), truth_of(grad), channel_dim, per_sample)
    magnitude = reference.channel_dot(truth_of(activation).abs(), truth_of(grad).abs(), channel_dim, per_sample)
    assert_sum_close(actual, truth, magnitude, activation.numel() // max(1, truth.numel()), activation.dtype)


@fuzz
@given(data=st.data(), shape=shapes.filter(lambda s: len(s) > 1), dtype=DTYPES)
def test_channel_moments(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    counts["channel_moments"] += 1
    x = data.draw(tensors(shape, dtype))
    channel_dim = data.draw(st.integers(1 - len(shape), len(shape) - 1).filter(lambda d: d % len(shape) != 0))
    axis, mask = channel_dim % len(shape), None
    if data.draw(st.booleans()):
        mask = data.draw(tensors((*shape[:axis], *shape[axis + 1 :]), torch.float32)) > 0
    truths = reference.channel_moments(truth_of(x), channel_dim, mask)
    magnitudes = (truths[2], truths[1], truths[2], 2 * truths[3])  # a square has twice the relative error of its root
    terms = x.numel() // max(1, shape[axis])
    for actual, truth, magnitude in zip(ops.channel_moments(x, channel_dim, mask), truths, magnitudes, strict=True):
        assert_sum_close(actual, truth, magnitude, terms, dtype)


@fuzz
@given(arguments=weights())
def test_weight_dot(arguments: tuple) -> None:
    counts["weight_dot"] += 1
    assert_dots(ops.weight_dot(*arguments), arguments)


@fuzz
@given(layers=st.lists(weights(), max_size=4))
def test_weight_dot_list(layers: list[tuple]) -> None:
    counts["weight_dot_list"] += 1
    columns = [list(column) for column in zip(*layers, strict=True)] or [[], []]
    out_dots, in_dots = ops.weight_dot_list(*columns)
    for *dots, layer in zip(out_dots, in_dots, layers, strict=True):
        assert_dots(tuple(dots), layer)


@fuzz
@given(pair=pairs(least_dims=2))
def test_weight_moments(pair: tuple[Tensor, Tensor]) -> None:
    counts["weight_moments"] += 1
    weight, grad = pair
    w, g = truth_of(weight), truth_of(grad)
    truths, magnitudes = reference.weight_moments(w, g), reference.weight_moments(w.abs(), g.abs())
    terms = w[0].numel() if len(w) else 0
    for actual, truth, magnitude in zip(ops.weight_moments(weight, grad), truths, magnitudes, strict=True):
        assert_sum_close(actual, truth, magnitude, terms, weight.dtype)


@fuzz
@given(data=st.data(), dtype=DTYPES, groups=st.integers(1, 3), kernel=st.lists(st.integers(1, 3), max_size=2))
def test_fold(data: st.DataObject, dtype: torch.dtype, groups: int, kernel: list[int]) -> None:
    counts["fold"] += 1
    out, columns, kept_out, kept_in = (data.draw(st.integers(0, 5)) for _ in range(4))
    in_repeat = data.draw(st.integers(1, 3)) if groups == 1 and not kernel else 1
    weight = data.draw(tensors((groups * out, columns * in_repeat, *kernel), dtype))
    compressor = decompressor = None
    if data.draw(st.booleans()):
        compressor = data.draw(tensors((groups, kept_out, out) if groups > 1 else (kept_out, out), dtype))
    if data.draw(st.booleans()):
        decompressor = data.draw(tensors((groups, columns, kept_in) if groups > 1 else (columns, kept_in), dtype))
    arguments = (weight, compressor, decompressor, groups, in_repeat)
    actual = ops.fold(*arguments)
    truth, magnitude = reference.fold(*map(exact, arguments)), reference.fold(*map(absolute, arguments))
    # Half precision may round the product in between too.
    error = 3 * allowed_error(truth, magnitude, max(1, out) * max(1, columns), dtype, dtype)
    error += torch.finfo(dtype).eps * magnitude
    assert actual.shape == truth.shape
    assert actual.dtype == dtype
    assert bool(((actual.double() - truth).abs() <= error).all())


@fuzz
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]), grouped=st.booleans())
def test_end_row(data: st.DataObject, dtype: torch.dtype, grouped: bool) -> None:
    """Any strides, loss scales, groups and values; a row that is not finite or has bad groups changes no score."""
    counts["end_row"] += 1
    size, count = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    length = count if grouped else size
    values = st.floats(-1e3, 1e3, width=32) | st.sampled_from([math.nan, math.inf, 3e38, 1e-45])
    row = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)
    steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    scores_memory = torch.full((length * steps[0],), -7.0, dtype=dtype)
    row_memory = torch.full((size * steps[1],), -7.0, dtype=dtype)
    scores_view = scores_memory[:: steps[0]].copy_(torch.arange(length))
    row_view = row_memory[:: steps[1]].copy_(row)
    loss_scale = data.draw(st.sampled_from([1.0, -2.0, 65536.0, 1e-30, math.inf, 1e300]))
    groups = None
    if grouped:
        drawn = data.draw(st.lists(st.integers(-1, count + 1), min_size=size, max_size=size))
        groups = torch.tensor(sorted(drawn) if data.draw(st.booleans()) else drawn, dtype=torch.int64)
    before = scores_memory.clone(), row_memory.clone()
    if groups is not None and size and (bool((groups.diff() < 0).any()) or groups.min() < 0 or groups.max() >= count):
        with pytest.raises(ValueError, match=r"groups\[\d+\] is -?\d+, expected ascending"):
            ops.end_row(scores_view, row_view, loss_scale, groups)
        torch.testing.assert_close((scores_memory, row_memory), before, rtol=0, atol=0, equal_nan=True)
        return
    # In the same precision: whether a square is finite depends on it.
    expected_scores, expected_row = scores_view.clone(), row_view.clone()
    expected = reference.end_row(expected_scores, expected_row, loss_scale, groups)
    assert bool(ops.end_row(scores_view, row_view, loss_scale, groups)) == bool(expected)
    assert not row_view.any()
    torch.testing.assert_close(scores_view, expected_scores, rtol=1e-5, atol=0)
    for memory, step in ((scores_memory, steps[0]), (row_memory, steps[1])):
        between = torch.ones(len(memory), dtype=torch.bool)
        between[::step] = False
        assert bool((memory[between] == -7).all()), "memory between the elements was written"


@fuzz
@given(data=st.data(), pair=pairs(least_dims=2))
def test_values_that_are_not_finite(data: st.DataObject, pair: tuple[Tensor, Tensor]) -> None:
    """NaN and infinities come out exactly where the definition has them; other channels keep their values."""
    counts["not finite"] += 1
    activation, grad = (tensor.clone() for tensor in pair)
    for tensor in (activation, grad):
        for _ in range(data.draw(st.integers(0, 2)) if tensor.numel() else 0):
            position = data.draw(st.integers(0, tensor.numel() - 1))
            value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
            tensor[torch.unravel_index(torch.tensor(position), tensor.shape)] = value
    exact_pair = truth_of(activation), truth_of(grad)
    tables = [
        ([ops.channel_dot(activation, grad, 1)], [reference.channel_dot(*exact_pair, 1)]),
        ([ops.channel_dot(activation, grad, 1, True)], [reference.channel_dot(*exact_pair, 1, True)]),
        (ops.channel_moments(activation, 1), reference.channel_moments(exact_pair[0], 1)),
        (ops.weight_dot(activation, grad), reference.weight_dot(*exact_pair)),
        (ops.weight_moments(activation, grad), reference.weight_moments(*exact_pair)),
    ]
    for results, truths in tables:
        for actual, truth in zip(results, truths, strict=True):
            assert torch.equal(actual.isnan(), truth.isnan())
            assert torch.equal(actual.isposinf(), truth.isposinf())
            assert torch.equal(actual.isneginf(), truth.isneginf())


# --- NumPy: negative strides and shared memory ---------------------------------------------------------------------


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Windows with strides from -5 to 5 elements."""
    strides = [draw(st.integers(-5, 5)) for _ in shape]
    low = sum((size - 1) * min(stride, 0) for size, stride in zip(shape, strides, strict=True) if size)
    high = sum((size - 1) * max(stride, 0) for size, stride in zip(shape, strides, strict=True) if size)
    values = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal(high - low + 1).astype(dtype)
    return np.lib.stride_tricks.as_strided(values[-low:], shape, [stride * values.itemsize for stride in strides])


@fuzz
@given(data=st.data(), shape=shapes.filter(lambda s: len(s) > 1), dtype=st.sampled_from([np.float32, np.float16]))
def test_numpy_arrays_with_any_strides(data: st.DataObject, shape: tuple[int, ...], dtype: type) -> None:
    counts["NumPy"] += 1
    first, second = data.draw(arrays(shape, dtype)), data.draw(arrays(shape, dtype))
    exact_pair = tuple(torch.from_numpy(array.astype(np.float64)) for array in (first, second))
    absolute_pair = tuple(tensor.abs() for tensor in exact_pair)
    terms = exact_pair[0].numel()
    channel_dim = data.draw(st.integers(0, len(shape) - 1))
    for results, definition in (
        ([onp.channel_dot(first, second, channel_dim)], lambda *pair: [reference.channel_dot(*pair, channel_dim)]),
        (onp.weight_dot(first, second), reference.weight_dot),
        (onp.weight_moments(first, second), reference.weight_moments),
    ):
        for actual, truth, magnitude in zip(results, definition(*exact_pair), definition(*absolute_pair), strict=True):
            assert_sum_close(torch.from_numpy(actual), truth, magnitude, terms, torch.float32)


# --- memory beyond 32 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3])
def test_strides_beyond_32_bits(stride: int) -> None:
    """Two float16 rows that lie gigabytes apart; of the memory between them no page exists."""
    rows = mmap.mmap(-1, 2 * (stride + 64))
    memory = torch.frombuffer(rows, dtype=torch.float16)
    tensor = memory.as_strided((2, 50), (stride, 1))
    tensor.copy_(torch.randn(2, 50))
    assert_dots(ops.weight_dot(tensor, tensor), (tensor, tensor, None, None, 1, False))
    for view in (tensor, tensor.mT):
        for channel_dim in (0, 1):
            truth = reference.channel_dot(truth_of(view), truth_of(view), channel_dim)
            assert_sum_close(ops.channel_dot(view, view, channel_dim), truth, truth, 50, torch.float16)
    truths = reference.channel_moments(truth_of(tensor), 1)
    for actual, truth in zip(ops.channel_moments(tensor, 1), truths, strict=True):
        assert_sum_close(actual, truth, 2 * truth.abs(), 50, torch.float16)
    truths = reference.weight_moments(truth_of(tensor), truth_of(tensor))
    for actual, truth in zip(ops.weight_moments(tensor, tensor), truths, strict=True):
        assert_sum_close(actual, truth, truth.abs(), 50, torch.float16)


# --- arguments that do not fit -------------------------------------------------------------------------------------

_any_tensor = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
_any_number = st.integers(-5, 5) | st.sampled_from([2**31, 2**63 - 1, -(2**63)])


@fuzz
@given(st.data())
def test_arguments_that_do_not_fit_are_refused_by_name(data: st.DataObject) -> None:
    """Whatever is passed, the operator refuses it with its own words, or gives what the reference gives."""
    counts["refusals"] += 1
    op, *kinds = data.draw(
        st.sampled_from(
            [
                ("channel_dot", _any_tensor, _any_tensor, _any_number, st.booleans()),
                ("channel_moments", _any_tensor, _any_number, st.none() | _any_tensor),
                ("weight_dot", _any_tensor, _any_tensor, *[st.none() | _any_tensor] * 2, _any_number, st.booleans()),
                ("weight_moments", _any_tensor, _any_tensor),
                ("fold", _any_tensor, *[st.none() | _any_tensor] * 2, _any_number, _any_number),
                ("end_row", _any_tensor, _any_tensor, st.sampled_from([0.0, 1.0]), st.none() | _any_tensor),
            ]
        )
    )
    arguments = [data.draw(kind) for kind in kinds]
    # Without rows any number of groups divides them, and in channels times groups results are what was asked for.
    assume(op != "weight_dot" or arguments[0].shape[:1] != (0,) or arguments[4] <= 5)
    if data.draw(st.booleans()):  # make the second like the first, so that more calls pass the first checks
        arguments[1] = arguments[0].clone() if isinstance(arguments[1], Tensor) else arguments[1]
    copies = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    try:
        actual = getattr(ops, op)(*arguments)
    except (ValueError, TypeError, IndexError) as error:
        refusal = str(error)
        assert f"obc::{op}" in refusal, refusal
        return
    torch.testing.assert_close(actual, getattr(reference, op)(*copies))
