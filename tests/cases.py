"""The parameters of the operators' tests: dtypes, layouts, backends with their devices, and strategies for strides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import obc

DTYPES = [
    pytest.param(dtype, id=name)
    for name, dtype in (
        ("f32", torch.float32),
        ("f64", torch.float64),
        ("bf16", torch.bfloat16),
        ("f16", torch.float16),
    )
]


def _targets() -> list[tuple[str, str]]:
    on_cpu = [(name, "cpu") for name, backend in obc.backends.BACKENDS.items() if backend.serves("cpu")]
    return [*on_cpu, ("reference", "cuda"), ("triton", "cuda"), ("cuda", "cuda")]


def _param(name: str, device: str) -> object:
    return pytest.param((name, device), id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])


# Every (backend, device): each backend that serves CPU tensors here, and on a machine with a GPU those that serve it.
TARGETS = [_param(name, device) for name, device in _targets()]
# The reference sums with torch, whose order of additions may depend on the number of threads.
KERNEL_TARGETS = [_param(name, device) for name, device in _targets() if name != "reference"]


@contextlib.contextmanager
def on(target: tuple[str, str]) -> Iterator[str]:
    """Use the target's backend and yield its device; skip, with the reason, what this machine lacks."""
    name, device = target
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if reason := obc.backends.BACKENDS[name].why_unavailable():
        pytest.skip(f"backend {name!r} is not available: {reason}")
    with obc.use_backend(name):
        yield device


# --- layouts: each gives a tensor of the same shape in other memory; what must not be read there is NaN -----------


def _nan(like: Tensor, shape: list[int]) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    """Dim 1 innermost: the channels-last memory format in 4-D and 5-D, its analogue otherwise."""
    if tensor.dim() < 2:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def wider_buffer(tensor: Tensor) -> Tensor:
    """A slice in every dimension of a larger buffer."""
    buffer = _nan(tensor, [size + 3 for size in tensor.shape])
    view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def stepped(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension: no stride is 1."""
    view = _nan(tensor, [*tensor.shape[:-1], 2 * tensor.shape[-1]])[..., ::2]
    return view.copy_(tensor)


def reversed_dims(tensor: Tensor) -> Tensor:
    """Dim 0 innermost."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def unaligned(tensor: Tensor) -> Tensor:
    """Contiguous, starting one element after an aligned address."""
    return _nan(tensor, [tensor.numel() + 1])[1:].view(tensor.shape).copy_(tensor)


def expanded_first(tensor: Tensor) -> Tensor:
    """Stride 0 along dim 0."""
    return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor


def expanded_last(tensor: Tensor) -> Tensor:
    """Stride 0 along the last dimension."""
    return tensor[..., :1].expand(tensor.shape) if tensor.shape[-1] else tensor


def one_element(tensor: Tensor) -> Tensor:
    """Stride 0 everywhere, as in the backward of a sum."""
    return tensor.flatten()[0].expand(tensor.shape) if tensor.numel() else tensor


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    contiguous,
    channels_last,
    wider_buffer,
    stepped,
    reversed_dims,
    unaligned,
    expanded_first,
    expanded_last,
    one_element,
]


def layout_id(layout: Callable[[Tensor], Tensor]) -> str:
    return layout.__name__


def truth_of(tensor: Tensor) -> Tensor:
    """The tensor's values in contiguous float64 on the CPU."""
    return tensor.detach().cpu().double().contiguous()


def poison_heap() -> None:
    """Fill and free buffers of many sizes with NaN, so that scratch memory taken from the heap starts as NaN."""
    buffers = [torch.full((2**power + extra,), torch.nan) for power in range(17) for extra in (0, 1, 3)]
    buffers.clear()


# --- hypothesis: any shape up to 5-D, any strides ----------------------------------------------------------------

shapes = st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of ``shape`` with drawn order of dimensions, steps, offsets and stride-0 dimensions."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    starts = [draw(st.integers(0, 2)) for _ in shape]
    repeated = [draw(st.booleans()) and draw(st.booleans()) for _ in shape]
    stored = [min(size, 1) if repeat else size for size, repeat in zip(shape, repeated, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    buffer = torch.full(
        [starts[d] + steps[d] * stored[d] for d in order], torch.nan, dtype=dtype
    )  # memory in the drawn order
    view = buffer.permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    view = view[tuple(slice(size) for size in stored)]
    view.copy_(torch.randn(stored, generator=generator))
    return view.expand(shape)
