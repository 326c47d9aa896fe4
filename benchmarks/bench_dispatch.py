"""The overhead of every call and every gate: ``python -m benchmarks.bench_dispatch``.

Tensors of eight elements, so that nothing is computed: a call of each operator through ``obc.ops`` and through
``torch.ops.obc``, the backend's own callable below it, and the definition in torch; then a gate on a layer, forward and
backward, against the same layer without one. Small networks (ResNet-56, small ViTs) are bound by these. The limit is
one ``torch.mul``, or for gates the layer itself. After the tables: the CPU time of one gate, in C++ and in Python, on
one thread: how much more a longer chain of layers costs gated than frozen, per gate, and what a row costs once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from benchmarks.harness import Case, Provider, main
from obc import ops, reference
from obc.backends import native_gates

_SIZE = 8
# Layers of the two chains whose difference gives the cost of one gate, and of the fewest seconds of how many rounds.
_FEW, _MANY = 16, 96
_ROUNDS, _CALLS = 9, 20
GATE_TARGET_US = 12.0


def _inputs(name: str) -> tuple[Any, ...]:
    matrix, grad = torch.ones(2, _SIZE, _SIZE)
    return {
        "channel_dot": (torch.ones(1, _SIZE), torch.ones(1, _SIZE), 1, False),
        "weight_dot": (matrix, grad, None, None, 1, False),
        "weight_moments": (matrix, grad),
        "fold": (matrix, None, None, 1, 1),
    }[name]


OPERATORS = ("channel_dot", "weight_dot", "weight_moments", "fold")


def operator(name: str) -> Case:
    """One call of an operator on next to nothing."""
    arguments = _inputs(name)
    native = obc.backends.resolve(name, "cpu")
    public, raw, definition = (getattr(namespace, name) for namespace in (ops, torch.ops.obc, reference))
    expected = definition(*arguments)
    a, b = torch.ones(2, _SIZE)

    def check(result: Any) -> None:
        torch.testing.assert_close(result, expected)

    return Case(
        [
            Provider("obc", lambda: public(*arguments)),
            Provider("torch.ops.obc", lambda: raw(*arguments)),
            Provider("backend alone", lambda: native(*arguments)),
            Provider("reference", lambda: definition(*arguments)),
        ],
        baseline="reference",
        limit=Provider("one torch.mul", lambda: torch.mul(a, b)),
        bytes_moved=sum(argument.nbytes for argument in arguments if isinstance(argument, Tensor)),
        check=check,
    )


def gates(layers: int = 32) -> Case:
    """A row of a chain of tiny layers with a scorer attached, against frozen layers without one."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(layers))).eval()
    frozen = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(layers))).eval().requires_grad_(False)
    scored = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(layers))).eval()
    for model in (frozen, scored):
        model.load_state_dict(plain.state_dict())
    x = torch.ones(1, _SIZE, requires_grad=True)
    scorer = obc.JacobianScorer(scored)
    scorer.__enter__()  # stays attached, so that no round pays for attaching

    def row() -> Tensor:
        with scorer.row():
            loss = scored(x).sum()
            loss.backward()
        return loss.detach()

    row()  # the checking row

    def backward(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = model(x).sum()
            loss.backward()
            return loss.detach()

        return run

    expected = plain(x).sum().detach()
    return Case(
        [Provider("obc row", row), Provider("forward + backward", backward(plain))],
        baseline="forward + backward",
        limit=Provider("frozen, no gates", backward(frozen)),
        bytes_moved=sum(parameter.nbytes for parameter in plain.parameters()),
        check=lambda loss: torch.testing.assert_close(loss, expected),
    )


CASES: dict[str, Callable[[], Case]] = {
    **{f"{name} of {_SIZE} elements": lambda name=name: operator(name) for name in OPERATORS},
    f"a row of 32 linear layers {_SIZE} x {_SIZE}": gates,
}


def _cpu_us(call: Callable[[], object]) -> float:
    """Microseconds of this thread's CPU time, which a busy machine disturbs least."""
    call()
    rounds = []
    for _ in range(_ROUNDS):
        start = time.thread_time()
        for _ in range(_CALLS):
            call()
        rounds.append((time.thread_time() - start) / _CALLS)
    return 1e6 * min(rounds)


def _gates_us(layers: int, chains: bool) -> tuple[float, int]:
    """(what gates add to a chain of layers, how many inputs and outputs have a gate, or a chain in its place)."""
    torch.manual_seed(0)
    frozen = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(layers))).eval().requires_grad_(False)
    scored = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(layers))).eval()
    x = torch.ones(1, _SIZE)
    watched = x.clone().requires_grad_()
    scorer = obc.JacobianScorer(scored, chains=chains)

    def row() -> None:
        with scorer.row():
            scored(x).sum().backward()

    with scorer:
        row()
        row()
        added = _cpu_us(row) - _cpu_us(lambda: frozen(watched).sum().backward())
    return added, 2 * layers


def print_gates() -> None:
    """The CPU time of one gate by each kind, and of a row without any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind, switch in (("C++", "1"), ("Python", "0")):
        os.environ[native_gates.SWITCH] = switch
        if switch == "1" and (reason := native_gates.why_unavailable()):
            print(f"gates in C++: not here, {reason}")
            continue
        for chains in (False, True):
            (few, few_gates), (many, many_gates) = (_gates_us(layers, chains) for layers in (_FEW, _MANY))
            gate = (many - few) / (many_gates - few_gates)
            line = (
                f"gates in {kind}, {'with' if chains else 'without'} chains: {gate:.1f} us of CPU time a gate or chain"
            )
            line += f", {few - few_gates * gate:.0f} us a row; one thread"
            if switch == "1":
                line += f" (target: at most {GATE_TARGET_US:g}): {'met' if gate <= GATE_TARGET_US else 'missed'}"
            print(line, flush=True)
    del os.environ[native_gates.SWITCH]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("title", CASES)
def test_overhead(benchmark: Any, title: str) -> None:
    """obc's provider, checked, then timed."""
    case = CASES[title]()
    provider = case.providers[0]
    case.check(provider.call())
    benchmark.group = "overhead"
    benchmark(provider.call)


if __name__ == "__main__":
    with obc.use_backend("cpu"):
        status = main("bench_dispatch", CASES)
        print_gates()
    sys.exit(status)
