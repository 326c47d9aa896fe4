"""Autocast around obc: a model runs under the caller's autocast, obc's own arithmetic does not.

Under autocast, products of float32 matrices are computed in half precision. Sums that are solved or subtracted from
each other need all digits. Whether GPUs round float32 products (TF32) is asked here, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from obc.model.evaluation import Function, with_state_of


def _enabled() -> list[tuple[str, torch.dtype]]:
    """(device type, dtype) of every autocast that is on."""
    accelerator = torch.accelerator.current_accelerator()
    types = dict.fromkeys(["cpu", "cuda", *([] if accelerator is None else [accelerator.type])])
    available = (name for name in types if torch.amp.is_autocast_available(name))
    return [(name, torch.get_autocast_dtype(name)) for name in available if torch.is_autocast_enabled(name)]


class PresentAutocast:
    """The autocast at the time when the object is made, to be entered again later, any number of times.

    It keeps no casts of weights, which may change from one time to the next.
    """

    def __init__(self) -> None:
        self._found = _enabled()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, dtype in self._found:
                stack.enter_context(torch.autocast(name, dtype=dtype, cache_enabled=False))
            yield


# What was on when the outermost ``without_autocast`` was entered; None outside of it.
_CALLERS: ContextVar[PresentAutocast | None] = ContextVar("callers_autocast", default=None)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast inside the block, and none entered inside it keeps casts of weights.

    Otherwise torch keeps them until the caller's outermost block ends, even of weights that obc changes meanwhile.
    """
    keeps_casts = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        if _CALLERS.get() is None:
            stack.callback(_CALLERS.reset, _CALLERS.set(PresentAutocast()))
        for name, _ in _enabled():
            stack.enter_context(torch.autocast(name, enabled=False))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(keeps_casts)
            torch.clear_autocast_cache()


@contextlib.contextmanager
def callers_autocast() -> Iterator[None]:
    """The autocast around the outermost :func:`without_autocast`; outside of one, whatever is on.

    For code that calls the user's model itself and not through a function of the user's.
    """
    callers = _CALLERS.get()
    with contextlib.nullcontext() if callers is None else callers():
        yield


def in_present_autocast(function: Function) -> Function:
    """``function`` under the present autocast, whatever is on when it is called; itself if there is none."""
    if function is None or not _enabled():
        return function
    autocast = PresentAutocast()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return function(*args, **kwargs)

    return with_state_of(function, call)  # type: ignore[return-value]


def tf32_is_allowed() -> bool:
    """Whether any of torch's settings lets GPUs multiply float32 with eleven bits (TF32).

    cuDNN's convolutions may by default. The older settings (``allow_tf32``) can't be read once a newer one was set.
    """
    backends = torch.backends
    return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
