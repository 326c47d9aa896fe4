"""One call of everything that a wheel carries, for a fresh environment in which nothing but the wheel is installed.

python tests/packaging/wheel_smoke.py: prints what it did, ends with an error where something is missing or wrong.
"""

from __future__ import annotations

import time

started = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import obc  # noqa: E402
from obc.backends.operators import OPERATORS  # noqa: E402
from obc.integrations import numpy as onp  # noqa: E402

ONES = torch.ones(4, 3)
ARGUMENTS = {
    "channel_dot": (ONES, ONES, 1),
    "weight_dot": (ONES, ONES),
    "weight_dot_list": ([ONES], [ONES]),
    "weight_moments": (ONES, ONES),
    "fold": (ONES, torch.ones(2, 4), torch.ones(3, 2)),
    "channel_moments": (ONES, 1),
}


def flat(result: object) -> list[float]:
    """The numbers in an operator's result."""
    if isinstance(result, (list, tuple)):
        return [number for part in result for number in flat(part)]
    return np.asarray(result).ravel().tolist()


def check_operators() -> None:
    """The native operators against the reference."""
    assert "cpu" in obc.backends.available(), obc.info()["backends"]["cpu"]
    for name in OPERATORS:
        results = []
        for backend in ("cpu", "reference"):
            with obc.use_backend(backend):
                if name == "end_row":
                    scores, row = torch.zeros(3), torch.full((3,), 2.0)
                    finite = obc.ops.end_row(scores, row)
                    results.append([*flat(scores), *flat(row), float(finite)])
                else:
                    results.append(flat(getattr(obc.ops, name)(*ARGUMENTS[name])))
        assert results[0] == results[1], (name, results)


def check_numpy() -> None:
    """An entry point for arrays."""
    array = np.ones((4, 3), dtype=np.float32)
    assert onp.channel_dot(array, array, 1).tolist() == [4, 4, 4]


def check_scorer() -> None:
    """A first score, against the definition."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(5, 6), torch.randint(0, 3, (5,))) for _ in range(3)]

    def loss_fn(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    scores = obc.score(model, batches, loss_fn)
    expected = torch.zeros(8)
    for batch in batches:
        (grad,) = torch.autograd.grad(loss_fn(model, batch), model[2].weight)
        expected += (model[2].weight * grad).sum(0).square().detach()
    torch.testing.assert_close(scores["2"].in_channels, expected, rtol=1e-4, atol=1e-9)


if __name__ == "__main__":
    imported = time.perf_counter() - started
    begun = time.perf_counter()
    check_scorer()
    first = time.perf_counter() - begun
    check_operators()
    check_numpy()
    facts = obc.info()
    print(
        f"{facts['distribution']} {facts['obc']} with torch {facts['torch']}: {len(OPERATORS)} operators, NumPy, scorer"
    )
    everything = time.perf_counter() - started
    print(f"imported in {imported:.1f} s, first score in {first:.2f} s, everything done in {everything:.1f} s")
