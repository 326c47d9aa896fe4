"""Launches every kernel in one place, so that launches can be counted and compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what :mod:`obc_kernels.aot` compiles and what a launch count counts."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, int]


_recorder: list[Launch] | None = None
_dry = False


@contextlib.contextmanager
def recording(dry: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; with ``dry`` they are not run (the tensors may be on ``meta``)."""
    global _recorder, _dry
    before = _recorder, _dry
    _recorder, _dry = [], dry
    try:
        yield _recorder
    finally:
        _recorder, _dry = before


def is_dry() -> bool:
    """Whether launches are recorded instead of run."""
    return _dry


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int = 128,
    **constexprs: Any,
) -> None:
    """Run ``programs`` programs of ``kernel`` on the current stream of the device of ``args[0]``.

    ``num_stages`` is 1 except for matrix products: the streaming kernels keep enough 16-byte loads in flight without
    the software pipeline. ``max_registers`` tells NVIDIA's assembler that 128 registers a thread, four programs of
    four warps on a multiprocessor, are fine: left alone it spills to reach an occupancy that nothing here needs.
    """
    if programs == 0:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, args, constexprs, options))
    if not _dry:
        device = args[0].device
        if device.type != "cuda" or torch.version.hip:
            del options["maxnreg"]
        with on_device(device):
            kernel[(programs,)](*args, **constexprs, **options)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one; Triton launches on the current device's current stream."""
    if device.index is None:  # the interpreter's CPU tensors
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
