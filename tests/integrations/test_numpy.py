"""obc.integrations.numpy: bit for bit the torch operators on the CPU, on any strides, with the same refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import assert_sum_close

import obc
from obc import reference

if reason := obc.backends.BACKENDS["cpu"].why_unavailable():
    pytest.skip(
        f"the native module comes with backend 'cpu', which is not available: {reason}", allow_module_level=True
    )

from obc.integrations import numpy as onp

DTYPES = [np.float32, np.float64, np.float16]


@pytest.fixture(autouse=True)
def _cpu_backend():
    with obc.use_backend("cpu"):
        yield


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: type) -> NDArray:
    return generator.standard_normal(shape).astype(dtype)


def _laid_out(array: NDArray, order: list[int], step: int, flip: bool) -> NDArray:
    """The same values with dimensions in memory in ``order``, every ``step``-th element, and reversed if ``flip``."""
    buffer = np.full([array.shape[d] * step for d in order], np.nan, array.dtype)
    view = buffer[tuple(slice(None, None, -step if flip else step) for _ in order)].transpose(np.argsort(order))
    view[...] = array
    return view


@st.composite
def pairs(draw: st.DrawFn, least_dims: int = 1) -> tuple[NDArray, NDArray]:
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33]), min_size=least_dims, max_size=4)))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(DTYPES))

    def one() -> NDArray:
        order = draw(st.permutations(range(len(shape))))
        return _laid_out(_random(generator, shape, dtype), list(order), draw(st.sampled_from([1, 2])), False)

    return one(), one()


def _bits(actual: NDArray, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.numpy().dtype
    assert actual.shape == tuple(expected.shape)
    assert actual.tobytes() == expected.contiguous().numpy().tobytes()


@given(pairs(), st.data())
def test_channel_dot_equals_torch(pair: tuple[NDArray, NDArray], data: st.DataObject) -> None:
    activation, grad = pair
    channel_dim = data.draw(st.integers(-activation.ndim, activation.ndim - 1))
    per_sample = channel_dim % activation.ndim != 0 and data.draw(st.booleans())
    actual = onp.channel_dot(activation, grad, channel_dim, per_sample)
    _bits(actual, obc.ops.channel_dot(torch.from_numpy(activation), torch.from_numpy(grad), channel_dim, per_sample))


@given(pairs(least_dims=2), st.data())
def test_channel_moments_equals_torch(pair: tuple[NDArray, NDArray], data: st.DataObject) -> None:
    x, other = pair
    channel_dim = data.draw(st.integers(1, x.ndim - 1))
    mask = np.take(other, 0, channel_dim) > 0 if other.shape[channel_dim] and data.draw(st.booleans()) else None
    expected = obc.ops.channel_moments(
        torch.from_numpy(x), channel_dim, None if mask is None else torch.from_numpy(mask)
    )
    for actual, moment in zip(onp.channel_moments(x, channel_dim, mask), expected, strict=True):
        _bits(actual, moment)


@given(pairs(least_dims=2), st.booleans(), st.sampled_from([1, 2, 3]), st.booleans())
def test_weight_dot_equals_torch(pair: tuple[NDArray, NDArray], transposed: bool, groups: int, with_bias: bool) -> None:
    weight, grad = pair
    groups = groups if weight.shape[0] % groups == 0 else 1
    bias = bias_grad = None
    if with_bias:
        out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
        bias, bias_grad = np.random.default_rng(0).standard_normal((2, out_channels)).astype(weight.dtype)
    arrays = (weight, grad, bias, bias_grad)
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    actual = onp.weight_dot(*arrays, groups, transposed)
    for dot, expected in zip(actual, obc.ops.weight_dot(*tensors, groups, transposed), strict=True):
        _bits(dot, expected)
    as_list = onp.weight_dot_list(*([array] for array in arrays), [groups], [transposed])
    for dots, expected in zip(as_list, actual, strict=True):
        assert dots[0].tobytes() == expected.tobytes()


@given(pairs(least_dims=2))
def test_weight_moments_equals_torch(pair: tuple[NDArray, NDArray]) -> None:
    expected = obc.ops.weight_moments(*map(torch.from_numpy, pair))
    for moment, tensor in zip(onp.weight_moments(*pair), expected, strict=True):
        _bits(moment, tensor)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("last", [1.0, np.inf, np.nan, 1e300])
def test_end_row_equals_torch(dtype: type, grouped: bool, last: float) -> None:
    generator = np.random.default_rng(1)
    row = _random(generator, (101,), dtype)
    with np.errstate(over="ignore"):
        row[-1] = last
    groups = np.sort(generator.integers(0, 30, 101)) if grouped else None
    scores = _random(generator, (30 if grouped else 101,), dtype)
    torch_scores, torch_row = torch.tensor(scores), torch.tensor(row)
    finite = onp.end_row(scores, row, 3.0, groups)
    torch_finite = obc.ops.end_row(torch_scores, torch_row, 3.0, None if groups is None else torch.tensor(groups))
    assert finite is bool(torch_finite)
    assert finite is (last == 1.0)
    _bits(scores, torch_scores)
    assert not row.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (2, 2), (1, 3)])
def test_fold_agrees_with_reference(dtype: type, groups: int, blocks: int) -> None:
    generator = np.random.default_rng(2)
    weight = _random(generator, (12, 6, 3, 2), dtype)
    compressor = _random(generator, (blocks, 2, 12 // blocks), dtype)
    decompressor = _random(generator, (blocks, 6 * groups // blocks, 2), dtype)
    tensors = [torch.from_numpy(array) for array in (weight, compressor, decompressor)]
    truth = reference.fold(*(tensor.double() for tensor in tensors), groups)
    magnitude = reference.fold(*(tensor.double().abs() for tensor in tensors), groups)
    folded = onp.fold(weight, compressor, decompressor, groups)
    _bits(folded, obc.ops.fold(*tensors, groups))
    actual = torch.from_numpy(folded)
    assert_sum_close(actual, truth, magnitude, 12 * 6, tensors[0].dtype, tensors[0].dtype)


def test_fold_with_in_repeat_and_alone() -> None:
    generator = np.random.default_rng(3)
    weight, decompressor = _random(generator, (4, 15), np.float64), _random(generator, (5, 2), np.float64)
    expected = reference.fold(torch.from_numpy(weight), None, torch.from_numpy(decompressor), 1, 3)
    np.testing.assert_allclose(onp.fold(weight, None, decompressor, in_repeat=3), expected.numpy(), rtol=1e-13)
    copy = onp.fold(weight)
    assert np.array_equal(copy, weight)
    assert not np.shares_memory(copy, weight)


def test_negative_strides() -> None:
    generator = np.random.default_rng(4)
    activation, grad = (_random(generator, (5, 7, 130), np.float32) for _ in range(2))
    truth = (activation.astype(np.float64) * grad).sum((0, 2))
    flipped = onp.channel_dot(_laid_out(activation, [0, 1, 2], 1, True), grad, 1)
    np.testing.assert_allclose(flipped, truth, rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------

W = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: onp.channel_dot([1.0], W, 0), TypeError, "activation must be a NumPy array, got list"),
        (lambda: onp.channel_dot(W, W[:3], 0), ValueError, r"grad has shape \(3, 3\), activation has \(4, 3\)"),
        (
            lambda: onp.channel_dot(W, W.astype(np.float64), 0),
            TypeError,
            "grad is torch.float64, activation is torch.float32",
        ),
        (lambda: onp.channel_dot(W.astype(int), W.astype(int), 0), TypeError, "got torch.int64; convert it first"),
        (lambda: onp.channel_dot(W.astype(">f4"), W.astype(">f4"), 0), TypeError, "native byte order, got >f4"),
        (lambda: onp.channel_dot(W, W, 2), IndexError, "channel_dim 2 is outside an activation of 2 dimensions"),
        (lambda: onp.channel_dot(W, W, 0, True), ValueError, "per_sample needs samples along dim 0"),
        (lambda: onp.weight_dot(W[0], W[0]), ValueError, r"got shape \(3,\)"),
        (lambda: onp.weight_dot(W, W, groups=3), ValueError, r"dim 0 of the weight \(4\) is not divisible into 3"),
        (lambda: onp.weight_dot(W, W, W[:, 0]), ValueError, "bias and bias_grad go together, got only bias"),
        (lambda: onp.weight_dot(W, W, W[0], W[0]), ValueError, r"bias has shape \(3,\), expected \(4,\)"),
        (lambda: onp.weight_dot_list([W], []), ValueError, "0 grads for 1 weights"),
        (
            lambda: onp.fold(W, np.ones((2, 3), np.float32)),
            ValueError,
            "compressor of shape .* does not fit 4 channels",
        ),
        (lambda: onp.end_row(W, W), ValueError, r"scores and row are flat vectors, got shapes \(4, 3\)"),
        (lambda: onp.end_row(np.ones(2, np.float16), np.ones(2, np.float16)), TypeError, "got torch.float16"),
        (lambda: onp.end_row(np.ones(2), np.ones(3)), ValueError, "scores has 2 entries, row 3"),
        (lambda: onp.end_row(np.ones(2), np.ones(2), 0.0), ValueError, "loss_scale must not be 0"),
        (lambda: onp.end_row(W[0], W[0, ::-1]), ValueError, "scores and row share memory.*pass a copy of one of them"),
        (lambda: onp.end_row(np.ones(2), np.broadcast_to(1.0, 2)), ValueError, "row is read-only"),
        (
            lambda: onp.end_row(np.ones(2), np.lib.stride_tricks.as_strided(np.ones(1), (2,), (0,))),
            ValueError,
            "row is broadcast: its entries share memory; pass a copy",
        ),
        (
            lambda: onp.end_row(np.ones(2), np.ones(2), 1.0, np.zeros(2, np.int32)),
            TypeError,
            "must be int64, got torch.int32",
        ),
        (lambda: onp.channel_dot(W, None, 0), TypeError, "grad must be a NumPy array, got NoneType"),
        (
            lambda: onp.channel_dot(W, W, "0"),
            TypeError,
            "channel_dot: channel_dim must be a whole number, got '0'",
        ),
        (lambda: onp.channel_moments(W, 1.0), TypeError, "obc::channel_moments: channel_dim must be .* got 1.0"),
        (
            lambda: onp.weight_dot(W, W, groups=2.0),
            TypeError,
            "weight_dot: groups must be a whole number, got 2.0",
        ),
        (
            lambda: onp.weight_dot_list([W], [W], groups=[None]),
            TypeError,
            "weight_dot_list: groups must .* got None",
        ),
        (lambda: onp.weight_dot_list([W], [W], groups=1), TypeError, "obc::weight_dot_list: groups must be a list"),
        (lambda: onp.weight_dot_list(W[0, 0], [W]), TypeError, "obc::weight_dot_list: weights must be a list"),
        (lambda: onp.fold(W, in_repeat=1.5), TypeError, "obc::fold: in_repeat must be a whole number, got 1.5"),
        (lambda: onp.end_row(W[0].copy(), W[0].copy(), "x"), TypeError, "obc::end_row: loss_scale must be a number"),
    ],
)
def test_refuses(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_takes_numbers_of_numpy() -> None:
    dots = onp.channel_dot(W, W, np.int64(-1))
    assert dots.tobytes() == onp.channel_dot(W, W, 1).tobytes()
    for actual, expected in zip(onp.weight_dot(W, W, groups=np.int32(2)), onp.weight_dot(W, W, groups=2), strict=True):
        assert actual.tobytes() == expected.tobytes()
    assert onp.end_row(np.ones(2), np.ones(2), np.float32(2))


def test_refuses_fields_of_structured_arrays() -> None:
    records = np.zeros((4, 3), dtype=[("flag", np.int8), ("value", np.float32)])["value"]
    with pytest.raises(ValueError, match="not multiples of its 4-byte elements"):
        onp.channel_dot(records, records, 0)


@pytest.mark.parametrize("groups", [[0, 2, 1], [0, 1, 3], [-1, 0, 1]])
def test_end_row_refuses_bad_groups_and_changes_nothing(groups: list[int]) -> None:
    scores, row = np.ones(3, np.float32), np.full(3, 2, np.float32)
    with pytest.raises(ValueError, match=r"groups\[\d\] is -?\d, expected ascending groups"):
        onp.end_row(scores, row, 1.0, np.array(groups))
    with pytest.raises(ValueError, match=r"groups\[\d\] is -?\d, expected ascending groups"):
        obc.ops.end_row(torch.from_numpy(scores), torch.from_numpy(row), 1.0, torch.tensor(groups))
    assert scores.tolist() == [1, 1, 1]
    assert row.tolist() == [2, 2, 2]


# --- the same bits on every instruction set, with any number of threads ----------------------------------------

DIGEST = textwrap.dedent("""
    import hashlib, itertools, sys
    import torch, obc
    import numpy as np
    from obc import _native
    from obc.integrations import numpy as onp

    torch.manual_seed(0)
    digest = hashlib.sha256()
    take = lambda results: [digest.update(t.contiguous().numpy().tobytes()) for t in results]
    shapes = [(3, 70, 9, 9), (2, 5, 40, 33), (700, 130), (65, 300, 3, 3), (2, 3, 20000)]
    with obc.use_backend("cpu"):
        for shape, dtype in itertools.product(shapes, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
            a, g = torch.randn(2, *shape).to(dtype)
            a.flatten()[::97] *= 1e-5  # subnormal in float16
            last = torch.channels_last if a.dim() == 4 else torch.contiguous_format
            in_last = [t.contiguous(memory_format=last) for t in (a, g)]
            for x, y in ((a, g), in_last, (a[:, 1:], g[:, 1:])):
                take([obc.ops.channel_dot(x, y, 1), obc.ops.channel_dot(x, y, 1, True)])
                take([*obc.ops.weight_dot(x, y), *obc.ops.weight_dot(x, y, transposed=True)])
                take(obc.ops.weight_moments(x, y))
                if dtype != torch.bfloat16:
                    take(map(torch.from_numpy, onp.weight_dot(x.numpy(), y.numpy())))
    print(_native.instruction_set(), _native.thread_count(), digest.hexdigest())
""")


def _digest(isa: str, threads: int) -> tuple[str, int, str]:
    environment = {
        **os.environ,
        "OBC_CPU_ISA": isa,
        "OBC_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", DIGEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, used_threads, digest = done.stdout.split()
    return used, int(used_threads), digest


@pytest.mark.slow
def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    runs = [_digest("x86-64-v4", 1), _digest("x86-64-v3", 3), _digest("baseline", 2)]
    assert [threads for _, threads, _ in runs] == [1, 3, 2]
    assert runs[-1][0] == "baseline"
    assert len({digest for _, _, digest in runs}) == 1, runs
