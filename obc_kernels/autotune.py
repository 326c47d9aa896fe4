"""Launch parameters chosen by timing instead of by the heuristics, only with ``OBC_AUTOTUNE=1``.

A family of kernels has a few variations of its heuristic's parameters. At the first call of a class of shapes (sizes up
to the next power of two, layout, dtype, device) each is timed on that call's own inputs, which waits for the device;
from then on the fastest is used for as long as the process lives. Within one choice results have the same bits every
time; another choice may add in another order, so two processes that tune may differ in the last bits.

``OBC_AUTOTUNE_FILE=choices.json`` keeps choices between processes: what it contains is not timed again. Choices that
can't be timed (a CUDA graph is being captured, or tensors have no memory) are the heuristic's, and are not kept.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import triton
from torch import Tensor

from obc_kernels.launch import is_dry

logger = logging.getLogger("obc")


class LaunchParameters(Protocol):
    """The interface of a kernel's class of launch parameters; the arguments are its own."""

    @classmethod
    def from_heuristic(cls, *arguments: Any) -> Any:
        """The parameters that are used if nothing is tuned."""

    @classmethod
    def variations(cls, *arguments: Any) -> Any:
        """Name -> the parameters that tuning tries, the heuristic ones among them."""


Config = TypeVar("Config", bound=LaunchParameters)

# The variation that every family has, and that runs where nothing is tuned.
HEURISTIC = "heuristic"

# Key -> name of the variation. Backward runs on another thread than forward.
_choices: dict[str, str] = {}
_lock = threading.RLock()
_read: Path | None = None


def enabled() -> bool:
    """Whether ``OBC_AUTOTUNE=1`` asks for tuning."""
    return os.environ.get("OBC_AUTOTUNE") == "1"


def size_class(*sizes: int) -> tuple[int, ...]:
    """The sizes up to the next power of two: shapes of one class share a choice."""
    return tuple(1 << max(0, size - 1).bit_length() for size in sizes)


def choose(
    family: str,
    config: type[Config],
    arguments: tuple[Any, ...],
    shape_class: tuple[Any, ...],
    like: Tensor,
    run: Callable[[Config], Any],
) -> Config:
    """The launch parameters of one call.

    Args:
        family: the operator.
        config: the class of its parameters. ``from_heuristic(*arguments)`` makes those that are used where nothing is
            tuned, ``variations(*arguments)`` what is tried, by name; one of them is ``heuristic``.
        arguments: of both.
        shape_class: what the choice depends on, beside the dtype and device of ``like``.
        like: an input.
        run: launches the call with some parameters; it must leave its inputs as they are.
    """
    device = like.device
    if not enabled() or is_dry() or device.type == "meta" or _capturing(device):
        return config.from_heuristic(*arguments)
    shape_class = (*shape_class, like.dtype)
    key = f"{family} {shape_class} {_device_name(device)} triton {triton.__version__}"
    with _lock:
        _read_file()
        candidates = config.variations(*arguments)
        name = _choices.get(key, "")
        if name not in candidates:
            name = _choices[key] = _fastest(key, candidates, run, device)
            _write_file()
    return candidates[name]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call; by the wall clock where Triton's interpreter runs it."""
    if device.type == "cpu":
        call()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3


def _fastest(key: str, candidates: Mapping[str, Config], run: Callable[[Config], Any], device: torch.device) -> str:
    times: dict[str, float] = {}
    tried: list[Config] = []
    for name, config in candidates.items():
        if config in tried:  # on small shapes variations are alike
            continue
        tried.append(config)
        try:
            times[name] = seconds(lambda config=config: run(config), device)  # type: ignore[misc]
        except triton.runtime.errors.OutOfResources as error:
            logger.debug("autotune: %s can't run as %r: %s", key, name, error)
    if not times:
        raise RuntimeError(f"autotune: no launch parameters for {key} fit this device; unset OBC_AUTOTUNE")
    fastest = min(times, key=lambda name: times[name])
    logger.info("autotune: %s: %s of %s", key, fastest, {name: f"{time * 1e6:.1f} us" for name, time in times.items()})
    return fastest


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _file() -> Path | None:
    name = os.environ.get("OBC_AUTOTUNE_FILE")
    return Path(name) if name else None


def _read_file() -> None:
    """Take over what the file holds, once; choices made here go before it."""
    global _read
    path = _file()
    if path is None or path == _read:
        return
    _read = path
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"OBC_AUTOTUNE_FILE={path} is not JSON ({error}); delete it, it will be rewritten") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"OBC_AUTOTUNE_FILE={path} does not hold launch parameters; name another file")
    _choices.update({key: name for key, name in found.items() if key not in _choices})


def _write_file() -> None:
    path = _file()
    if path is None:
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(_choices, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)
