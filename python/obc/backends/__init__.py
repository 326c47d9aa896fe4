"""Chooses the implementation that runs an operator: one record per backend, one order of preference.

============  ===========================  ====================================================================
explicit      ``with obc.use_backend(n)``  always obeyed; raises if it can't serve the tensor
environment   ``OBC_BACKEND=n``            the same, for the whole process (read at import)
best          :mod:`obc.backends.fastest`   first available for device, operator, dtype and size; logged once
============  ===========================  ====================================================================

A backend is a module-like object with one callable per operator, each with the operator's positional signature.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from obc.backends.fastest import PREFERENCE, order, size_class
from obc.model.arguments import instance

logger = logging.getLogger("obc")


class BackendError(RuntimeError):
    """A backend requested by name is unknown, can't be loaded, or can't serve a device."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: its name in ``use_backend`` and ``OBC_BACKEND``.
        devices: device types it serves; ``None`` means all.
        load: returns the operators as attributes; raises ImportError or OSError with the reason on failure.
        remedy: how to get it if it is missing.
    """

    name: str
    devices: Callable[[], frozenset[str] | None]
    load: Callable[[], Any]
    remedy: str

    @functools.cache  # noqa: B019 - the records live as long as the process
    def why_unavailable(self) -> str | None:
        """Why this backend can't be used on this machine; None if it can."""
        try:
            self.load()
        except (ImportError, OSError) as error:
            return f"{error}"
        return None

    def serves(self, device_type: str) -> bool:
        """Whether it takes tensors on devices of this type."""
        devices = self.devices()
        return devices is None or device_type in devices


def _load_reference() -> Any:
    from obc import reference

    return reference


@functools.cache
def _loaded(name: str) -> Any:
    from obc.backends import cpu, cuda, triton

    return {"cpu": cpu, "cuda": cuda, "triton": triton}[name].load()


def _triton_devices() -> frozenset[str]:
    # Triton's interpreter runs kernels on CPU tensors. It is for tests and never chosen automatically.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return frozenset({"cpu", "cuda", "xpu"} if interpreted else {"cuda", "xpu"})


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            lambda: frozenset({"cuda"}),
            partial(_loaded, "cuda"),
            "install obc on a machine with nvcc and a torch with CUDA",
        ),
        Backend("triton", _triton_devices, partial(_loaded, "triton"), "pip install triton on a machine with a GPU"),
        Backend(
            "cpu", lambda: frozenset({"cpu"}), partial(_loaded, "cpu"), "install a C++17 compiler and reinstall obc"
        ),
        Backend("reference", lambda: None, _load_reference, "it is part of obc"),
    )
}

# One process-wide choice, not a ContextVar: Dynamo can't trace one, and CUDA's backward runs on another thread.
_explicit: str | None = None
_resolved: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _named(name: str) -> Backend:
    instance("a backend", name, str, "a name")
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]


def _usable(name: str) -> Backend:
    backend = _named(name)
    if reason := backend.why_unavailable():
        raise BackendError(f"backend {name!r} is not available: {reason}; to get it: {backend.remedy}")
    return backend


_environment: str | None = os.environ.get("OBC_BACKEND") or None


def available() -> list[str]:
    """Names of the backends usable on this machine."""
    return [name for name, backend in BACKENDS.items() if backend.why_unavailable() is None]


def requested() -> str | None:
    """The backend requested by name, in this process (``use_backend``) or by ``OBC_BACKEND``; else None."""
    return _explicit or _environment


def chosen(device_type: str, names: Sequence[str] | None = None) -> Backend:
    """The backend that now serves tensors on ``device_type``; unless one was requested, the first available of
    ``names``.

    Raises:
        BackendError: a backend requested by name is unknown, missing, or does not serve this device.
    """
    if name := requested():
        backend = _usable(name)
        if not backend.serves(device_type):
            served = ", ".join(sorted(backend.devices() or ()))
            raise BackendError(f"backend {name!r} serves {served} tensors, got a tensor on {device_type!r}")
        return backend
    for name in names or PREFERENCE.get(device_type, ("reference",)):
        reason = BACKENDS[name].why_unavailable()
        if reason is None:
            return BACKENDS[name]
        _log_fallback(name, device_type, reason)
    raise AssertionError("the reference serves every device")


@functools.cache
def _log_fallback(name: str, device_type: str, reason: str) -> None:
    logger.info(
        "backend %r is not used for %s tensors: %s; to get it: %s", name, device_type, reason, _named(name).remedy
    )


def resolve(
    operator: str, device_type: str, dtype: torch.dtype = torch.float32, elements: int = 0
) -> Callable[..., Any]:
    """The callable that runs ``operator`` for a first input with this device, dtype and number of elements."""
    key = (operator, device_type, dtype, size_class(elements))
    if (call := _resolved.get(key)) is None:
        backend = chosen(device_type, order(device_type, operator, dtype, elements))
        call = _resolved[key] = getattr(backend.load(), operator)
    return call


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator of this process on the backend ``name`` inside the ``with`` block.

    Raises:
        BackendError: the backend is unknown or not available; the message says why and how to get it.
    """
    global _explicit
    _usable(name)
    before, _explicit = _explicit, name
    _resolved.clear()
    try:
        yield
    finally:
        _explicit = before
        _resolved.clear()


def describe() -> dict[str, dict[str, Any]]:
    """Per backend: whether it is available, why not, how to get it, and where its compiled part is."""
    facts: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        reason = backend.why_unavailable()
        facts[name] = {"available": reason is None}
        if reason is not None:
            facts[name] |= {"reason": reason, "remedy": backend.remedy}
    return facts
