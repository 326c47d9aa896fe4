"""What every call and every gate costs besides the work itself: ``python -m benchmarks.bench_dispatch``.

Tensors of eight elements, so that nothing is computed: a call of each operator through ``obc.ops`` and through
``torch.ops.obc``, the backend's own callable below it, and the definition in torch; then a gate on a layer, forward and
backward, against the same layer without one. Small networks (ResNet-56, small ViTs) are bound by these. The limit is
one ``torch.mul``, or for gates the layer itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from benchmarks.harness import Case, Provider, main
from obc import ops, reference

_SIZE = 8


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
    public, raw, definition = (getattr(of, name) for of in (ops, torch.ops.obc, reference))
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
        sys.exit(main("bench_dispatch", CASES))
