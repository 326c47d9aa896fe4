from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

def build_facts() -> dict[str, str]: ...
def instruction_set() -> str: ...
def thread_count() -> int: ...

class GreedySteps:
    def __init__(
        self,
        sizes: NDArray,
        constants: Sequence[NDArray],
        unit_costs: NDArray | None,
        state: Sequence[NDArray],
        per_cost: bool,
        column_factor: float,
    ) -> None: ...
    def step(self, column: NDArray | None, reach: NDArray | None = None) -> int: ...

def find_rivals(
    groups: NDArray,
    products: NDArray,
    increments: NDArray,
    inverse: NDArray,
    unit_costs: NDArray | None,
    reach: NDArray,
    slack: NDArray,
    found: NDArray,
) -> None: ...

# The operators on NumPy arrays, declared in csrc/module.cpp.
def __getattr__(name: str) -> Any: ...
