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
    def run(
        self, rows: NDArray, places: NDArray, target: float, removed: NDArray, reach: NDArray, states: NDArray
    ) -> int: ...

def row_products(rows: NDArray, places: NDArray, vector: NDArray, products: NDArray) -> None: ...
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
