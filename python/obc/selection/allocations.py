"""The allocations by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from obc.model.arguments import one_of
from obc.selection.allocation import Allocation, BlockProfile, Equal, Global, LogProfile, Profile, TwoClasses, Uniform
from obc.selection.depth_allocations import Tail, Window
from obc.selection.search import Search

ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "global": Global,
    "uniform": Uniform,
    "equal": Equal,
    "profile": BlockProfile,
    "log_profile": LogProfile,
    "two_classes": TwoClasses,
    "search": Search,
    "window": Window,
    "tail": Tail,
}


def allocation_of(allocation: str | Allocation) -> Allocation:
    """The allocation for a name, a mapping of strengths, or an allocation object.

    Raises:
        ValueError: unknown name; the message lists the known names.
        TypeError: the argument is none of these.
    """
    if isinstance(allocation, str):
        one_of("allocation", allocation, ALLOCATIONS)
        return ALLOCATIONS[allocation]()
    if isinstance(allocation, Mapping):
        return Profile(allocation)
    if isinstance(allocation, type) or not hasattr(allocation, "select"):
        raise TypeError(
            f"an allocation is a name, a mapping of strengths or an object with select(task), got {allocation!r}"
        )
    return allocation
