"""Hooks and attributes for the time of a block, hooks that come first, and the end of a run that has shown enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Reached(BaseException):
    """Stops a forward pass once it has shown enough. Not an Exception, so that error handlers don't catch it."""


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks of these handles when the block ends, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced(*objects: Any, **values: Any) -> Iterator[None]:
    """Give the objects these attributes inside the block; afterwards they have their own again, or none."""
    own = [{name: vars(one)[name] for name in values if name in vars(one)} for one in objects]
    try:
        for one in objects:
            vars(one).update(values)
        yield
    finally:
        for one, before in zip(objects, own, strict=True):
            for name in values:
                vars(one).pop(name, None)
            vars(one).update(before)


def hook_before_others(module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> RemovableHandle:
    """Register a forward hook that runs before the module's other ones, so that ``torch.compile`` sees that order.

    ``prepend=True`` moves an entry of an ``OrderedDict``, but not in the plain dictionary beneath it, which keeps the
    order of insertion. torch 2.11's compiler follows the first order and checks its guards in the second: of a
    function beside a method it raises ``AttributeError: 'function' object has no attribute '__func__'``. So the entries
    are inserted again, which makes both orders one.
    """
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=with_kwargs)
    in_order = list(module._forward_hooks.items())
    module._forward_hooks.clear()
    module._forward_hooks.update(in_order)
    return handle
