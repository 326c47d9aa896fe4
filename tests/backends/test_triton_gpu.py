"""The Triton kernels on a real GPU at full size: addresses, determinism, streams, devices and CUDA graphs."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import obc
from benchmarks.gpu_timing import captured
from obc import ops

pytestmark = pytest.mark.gpu

REPEATS = 20  # enough for a race among programs to show


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with obc.use_backend("triton"):
        yield


@dataclass
class Call:
    """An operator with inputs on a device; ``renew`` draws new values into the same memory."""

    run: Callable[..., Any]
    inputs: list[Tensor]

    def __call__(self) -> list[Tensor]:
        return flattened(self.run(*self.inputs))

    def renew(self) -> None:
        for tensor in self.inputs:
            tensor.copy_(torch.randn(tensor.shape, device=tensor.device))


def flattened(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flattened(part)]


def calls(device: torch.device | str = "cuda") -> dict[str, Call]:
    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    groups = torch.arange(100_000, device=device) // 7

    def end_row(scores: Tensor, row: Tensor) -> list[Tensor]:
        scores, row = scores.clone(), row.clone()
        return [ops.end_row(scores, row, 2.0, groups), scores, row]

    def dot_list(*tensors: Tensor) -> Any:
        half = len(tensors) // 2
        return ops.weight_dot_list(tensors[:half], tensors[half:], groups=[1, 1, 256])

    shapes = [(1000, 2048), (256, 130, 3, 3), (256, 1, 3, 3)]
    image = draw(16, 256, 56, 56)
    mask = torch.rand(16, 56, 56, device=device) > 1 / 3
    return {
        "channel_dot tokens": Call(lambda a, g: ops.channel_dot(a, g, -1), [draw(8, 1999, 1024), draw(8, 1999, 1024)]),
        "channel_dot images": Call(lambda a, g: ops.channel_dot(a, g, 1), [image, torch.randn_like(image)]),
        "channel_dot samples": Call(
            lambda a, g: ops.channel_dot(a, g, 1, True),
            [t.contiguous(memory_format=torch.channels_last) for t in (image, torch.randn_like(image))],
        ),
        "channel_moments tokens": Call(lambda x: torch.stack(ops.channel_moments(x, -1)), [draw(8, 1999, 1024)]),
        "channel_moments images": Call(lambda x: torch.stack(ops.channel_moments(x, 1, mask)), [draw(16, 256, 56, 56)]),
        "weight_dot": Call(ops.weight_dot, [draw(4096, 4090), draw(4096, 4090)]),
        "weight_moments": Call(ops.weight_moments, [draw(512, 256, 3, 3), draw(512, 256, 3, 3)]),
        "weight_dot_list": Call(dot_list, [draw(*shape) for shape in shapes * 2]),
        "fold": Call(ops.fold, [draw(512, 256), draw(256, 512), draw(256, 128)]),
        "end_row": Call(end_row, [draw(20_000, dtype=torch.float32), draw(100_000, dtype=torch.float32)]),
    }


NAMES = [
    "channel_dot tokens",
    "channel_dot images",
    "channel_dot samples",
    "channel_moments tokens",
    "channel_moments images",
    "weight_dot",
    "weight_moments",
    "weight_dot_list",
    "fold",
    "end_row",
]


def expected(call: Call) -> list[Tensor]:
    with obc.use_backend("reference"):
        return call()


def assert_same(actual: list[Tensor], truth: list[Tensor]) -> None:
    """Equal up to the rounding of sums: 1e-4 of the largest entry in float32, one rounding in half precision."""
    for got, want in zip(actual, truth, strict=True):
        if want.dtype == torch.bool:
            assert torch.equal(got, want)
            continue
        allowed = 1e-4 if want.dtype in (torch.float32, torch.float64) else 1e-2
        scale = want.double().abs().max()
        assert (got.double() - want.double()).abs().max() <= allowed * scale


@pytest.mark.parametrize("name", NAMES)
def test_matches_reference_at_full_size(name: str) -> None:
    call = calls()[name]
    assert_same(call(), expected(call))


@pytest.mark.parametrize("name", NAMES)
def test_is_deterministic(name: str) -> None:
    call = calls()[name]
    first = call()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name: str) -> None:
    call = calls()[name]
    truth = expected(call)
    stream = torch.cuda.Stream()
    stale = [tensor.clone() for tensor in call.inputs]
    for tensor in call.inputs:
        tensor.fill_(float("nan"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream would read NaN
        for tensor, value in zip(call.inputs, stale, strict=True):
            tensor.copy_(value)
        actual = call()
    stream.synchronize()
    assert_same(actual, truth)


@pytest.mark.parametrize("name", NAMES)
def test_does_not_synchronise(name: str) -> None:
    call = calls()[name]
    call()  # compiles, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_replays_from_a_graph(name: str) -> None:
    call = calls()[name]
    graph, result = captured(call)
    for _ in range(2):
        call.renew()
        graph.replay()
        assert_same(result, expected(call))
    # A call outside the graph must not be affected by what the replay left behind.
    assert_same(call(), expected(call))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_runs_on_every_device(name: str, index: int) -> None:
    call = calls(torch.device("cuda", index))[name]
    actual = call()
    assert all(tensor.device.index == index for tensor in actual)
    assert_same(actual, expected(call))


def test_a_row_of_gates_replays_from_a_graph() -> None:
    """A backward through a gate and the end of the row, captured as a whole: no host read, no synchronisation."""

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, activation: Tensor, gate: Tensor) -> Tensor:
            ctx.save_for_backward(activation)
            return activation.view_as(activation)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            (activation,) = ctx.saved_tensors
            return grads[0], ops.channel_dot(activation, grads[0], -1)

    layer = torch.nn.Linear(256, 512, device="cuda").requires_grad_(False)
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    gate, row, scores = (torch.zeros(512, device="cuda") for _ in range(3))
    gate.requires_grad_()
    gate.grad = row

    def step() -> Tensor:
        Gate.apply(layer(x), gate).square().mean().backward()
        return ops.end_row(scores, row)

    graph, finite = captured(step)
    scores.zero_()
    for _ in range(3):
        graph.replay()
    y = layer(x.detach()).double()
    truth = 3 * (y * (2 * y / y.numel())).sum(0).square()
    assert finite.item()
    assert not row.any()
    assert (scores.double() - truth).abs().max() <= 1e-4 * truth.max()


# --- beyond 2^31 elements: zeros but for a few entries near the ends, so that every sum is exact ------------------

FAR = 2**31 + 2**20


@pytest.fixture(name="need_memory")
def _need_memory() -> Iterator[Callable[[int], None]]:
    """Skips a test where the device has too little memory; such tests run one at a time, whichever process has them."""
    with (Path(tempfile.gettempdir()) / "obc-tests-gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def need(gigabytes: int) -> None:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            if free < gigabytes * 1e9:
                pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free / 1e9:.0f} GB are free")

        yield need
        gc.collect()
        torch.cuda.empty_cache()  # for the next one, which may be another process's


@pytest.mark.parametrize(
    ("shape", "dim"), [((FAR // 4096 + 1, 4096), 1), ((2, FAR // 8192, 4096), 1), ((3, FAR // 3), 0)], ids=str
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_channel_dot_beyond_32_bits(
    shape: tuple[int, ...], dim: int, per_sample: bool, need_memory: Callable[[int], None]
) -> None:
    if per_sample and dim == 0:
        shape, dim = (1, *shape), 1
    # Two inputs, and with samples apart a result in float32 that is as long as they are: with its partial sums 20 GB.
    need_memory(30)
    activation, grad = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    last = tuple(size - 1 for size in shape)
    for position, value in ((last, 3.0), ((0,) * len(shape), 5.0)):
        activation[position], grad[position] = value, 2.0
    actual = ops.channel_dot(activation, grad, dim, per_sample)
    assert actual.sum().item() == 16.0
    ends = (actual[0, 0], actual[-1, -1]) if per_sample else (actual[0], actual[-1])
    assert [end.item() for end in ends] == [10.0, 6.0]


@pytest.mark.parametrize("shape", [(FAR // 4096, 4096), (1024, FAR // 1024)], ids=str)
def test_weight_dot_and_moments_beyond_32_bits(shape: tuple[int, int], need_memory: Callable[[int], None]) -> None:
    need_memory(12)
    weight, grad = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight[-1, -1], grad[-1, -1], weight[0, 0], grad[0, 0] = 3.0, 2.0, 5.0, 2.0
    for dot in ops.weight_dot(weight, grad):
        assert (dot[0].item(), dot[-1].item(), dot.sum().item()) == (10.0, 6.0, 16.0)
    for dot in (dots[0] for dots in ops.weight_dot_list([weight], [grad])):
        assert (dot[0].item(), dot[-1].item(), dot.sum().item()) == (10.0, 6.0, 16.0)
    moments = ops.weight_moments(weight, grad)
    assert [moment[-1].item() for moment in moments] == [6.0, 36.0, 6.0, 9.0, 3.0]


def test_weight_dot_of_almost_32_bits_of_rows(need_memory: Callable[[int], None]) -> None:
    """The last tile begins below 2^31 and would end beyond it."""
    need_memory(40)
    weight = torch.zeros(2**31 - 3, 1, dtype=torch.bfloat16, device="cuda")
    weight[-1], weight[0] = 3.0, 5.0
    rows, columns = ops.weight_dot(weight, weight)
    assert (rows[0].item(), rows[-1].item(), columns.item()) == (25.0, 9.0, 34.0)
    assert rows.count_nonzero().item() == 2
