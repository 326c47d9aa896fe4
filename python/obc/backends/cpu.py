"""The vectorised C++ kernels of ``csrc/cpu``, and ``fold`` by the platform's GEMM."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from obc.backends import gemm, native


def load() -> SimpleNamespace:
    """Load the library and return its operators; raises ImportError if it was not built."""
    library = native.load("cpu", "the CPU kernels were not built (no C++ compiler was found when obc was installed)")

    def end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
        finite, bad_group = library.end_row.default(scores, row, loss_scale, groups)
        if bad_group >= 0:
            assert groups is not None
            raise ValueError(describe_bad_group(bad_group, int(groups[bad_group]), scores.shape[0]))
        return finite

    return SimpleNamespace(**native.callables("cpu", library) | {"end_row": end_row, "fold": gemm.fold})


def describe_bad_group(position: int, group: int, count: int) -> str:
    """The message for the first entry of end_row's groups that is out of range or less than the one before it."""
    return (
        f"obc::end_row: groups[{position}] is {group}, expected ascending groups of at least 0 and below {count} "
        "(the length of scores); sort the channels by group. Nothing was changed"
    )
