"""The vectorised C++ kernels of ``csrc/cpu``, and ``fold`` by the platform's GEMM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from obc.backends import gemm

LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libobc_cpu.so"


def load() -> SimpleNamespace:
    """Load the library and return its operators; ImportError where it was not built."""
    if not LIBRARY.exists():
        raise ImportError("the CPU kernels were not built (no C++ compiler was found when obc was installed)")
    torch.ops.load_library(LIBRARY)
    native = torch.ops.obc_cpu

    def end_row(scores: Tensor, row: Tensor, loss_scale: float = 1.0, groups: Tensor | None = None) -> Tensor:
        finite, bad_group = native.end_row.default(scores, row, loss_scale, groups)
        if bad_group >= 0:
            assert groups is not None
            raise ValueError(describe_bad_group(bad_group, int(groups[bad_group]), scores.shape[0]))
        return finite

    return SimpleNamespace(
        channel_dot=native.channel_dot.default,
        weight_dot=native.weight_dot.default,
        weight_dot_list=native.weight_dot_list.default,
        weight_moments=native.weight_moments.default,
        fold=gemm.fold,
        end_row=end_row,
    )


def describe_bad_group(position: int, group: int, count: int) -> str:
    """The message for the first of end_row's groups that is out of range or less than the one before it."""
    return (
        f"obc::end_row: groups[{position}] is {group}, expected ascending groups of at least 0 and below {count} "
        "(the length of scores); sort the channels by group. Nothing was changed"
    )
