"""The CUDA C++ kernels on a real GPU: the tests of the Triton kernels at full size, and their own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_triton_gpu import (  # noqa: F401 - collected here too, to run on this module's backend
    _need_memory,
    test_a_row_of_gates_replays_from_a_graph,
    test_channel_dot_beyond_32_bits,
    test_does_not_synchronise,
    test_is_deterministic,
    test_matches_reference_at_full_size,
    test_replays_from_a_graph,
    test_runs_on_every_device,
    test_runs_on_the_current_stream,
    test_weight_dot_and_moments_beyond_32_bits,
)
from torch import Tensor

import obc
from benchmarks.gpu_timing import captured
from obc import ops, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if reason := obc.backends.BACKENDS["cuda"].why_unavailable():
        pytest.skip(f"backend 'cuda' is not available: {reason}")
    with obc.use_backend("cuda"):
        yield


def kernels(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that one call launches, where torch does not fill what it hands out uninitialised."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


def layers(count: int) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(16, 16, 3, 3), (32, 16, 3, 3), (64, 64, 3, 3), (64, 1, 3, 3), (10, 64)]
    weights = [torch.randn(shapes[n % len(shapes)], device="cuda") for n in range(count)]
    return weights, [torch.randn_like(weight) for weight in weights]


def test_a_model_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, grads = layers(57)
    groups = [64 if weight.shape[1] == 1 else 1 for weight in weights]
    call = lambda: ops.weight_dot_list(weights, grads, groups=groups)  # noqa: E731
    call()  # grows the counters of this stream
    names = kernels(call, monkeypatch)
    assert len(names) == 1, names
    assert "weight_dot_list_kernel" in names[0]


@pytest.mark.parametrize("channels", [100, 1_000_000])
def test_end_row_is_one_launch(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, row = torch.zeros(channels, device="cuda"), torch.randn(channels, device="cuda")
    groups = torch.arange(channels, device="cuda") // 3
    ops.end_row(scores, row, 1.0, groups)  # grows the counters of this stream
    names = kernels(lambda: ops.end_row(scores, row, 1.0, groups), monkeypatch)
    assert len(names) == 1, names


def test_a_captured_model_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table is copied and no counter cleared when it is replayed."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    weights, grads = layers(57)
    groups = [64 if weight.shape[1] == 1 else 1 for weight in weights]
    graph, dots = captured(lambda: ops.weight_dot_list(weights, grads, groups=groups))
    names = kernels(graph.replay, monkeypatch)
    assert len(names) == 1, names
    for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        truth = list(reference.weight_dot(weight, grad, groups=groups[n]))
        torch.testing.assert_close([dots[0][n], dots[1][n]], truth, rtol=1e-4, atol=1e-3)


def test_streams_side_by_side_do_not_share_counters() -> None:
    """Split sums on many streams at once, again and again: every one is right, and its bits are the same each time."""
    inputs = [[torch.randn(40_000, 24, device="cuda") for _ in range(2)] for _ in range(8)]
    truths = [ops.channel_dot(a, g, 1) for a, g in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(20):
        for n, (a, g) in enumerate(inputs):
            with torch.cuda.stream(streams[n]):
                results[n].append(ops.channel_dot(a, g, 1))
    torch.cuda.synchronize()
    for truth, found, (a, g) in zip(truths, results, inputs, strict=True):
        assert all(torch.equal(truth, other) for other in found)
        torch.testing.assert_close(truth, reference.channel_dot(a, g, 1), rtol=1e-4, atol=1e-2)


def test_a_plan_serves_gradients_wherever_they_lie() -> None:
    """Many sets of gradients, each in memory of its own, then the first ones again."""
    weights, _ = layers(10)
    sets = [[torch.randn_like(weight) for weight in weights] for _ in range(12)]
    for grads in [*sets, *sets[:3]]:
        outs, ins = ops.weight_dot_list(weights, grads)
        for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            torch.testing.assert_close(
                [outs[n], ins[n]], list(reference.weight_dot(weight, grad)), rtol=1e-4, atol=1e-3
            )


def test_groups_out_of_order_or_range_change_nothing() -> None:
    for wrong in ([0, 2, 1], [0, 1, 3], [-1, 0, 1]):
        scores, row = torch.ones(3, device="cuda"), torch.ones(3, device="cuda")
        assert not ops.end_row(scores, row, 1.0, torch.tensor(wrong, device="cuda"))
        assert torch.equal(scores, torch.ones(3, device="cuda"))
