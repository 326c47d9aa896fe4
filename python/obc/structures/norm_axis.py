"""Where a norm's channels lie in its input, if several dimensions are as long: images as wide as they have channels.

Only the norm knows. Its weights fit no input with one channel more, but one with one position more.

And which modules with a vector or two are no norms. A norm without a channel is the norm of the others; that is so if
the channel's parameters act on no other channel once its input is zero. Vectors that act on all channels together, such
as one whose softmax weighs them or with which they are convolved, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from obc.model.evaluation import Run, first_floating
from obc.model.layouts import held_width
from obc.model.names import named_modules
from obc.model.rules import Rule, rule_for
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike

_TORCHS_OWN = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
# How far the others may change, relative to the largest: a norm's do not, but for rounding.
_UNCHANGED = 1e-2


def norm_channels(module: nn.Module) -> tuple[int, int] | None:
    """(channels, their usual dimension) of a norm, or of another module with a weight for each channel; else None."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[-1], -1
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return held_width(module) or 0, 1
    rule = rule_for(module)
    if not isinstance(rule, Rule) or not rule.elementwise or rule.out_dim is None:
        return None
    size = getattr(module, rule.weight).shape[-1]
    return (size, rule.out_dim) if size > 1 else None  # else one scale of all channels


class NormAxisError(ValueError):
    """Which dimension holds a norm's channels is not known."""


def norm_axis(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], size: int, dim: int
) -> int | None:
    """The dimension of a norm's input, ``dim`` or 1, that holds its channels; None if neither is ``size`` long.

    Args:
        forward: the norm's forward, which is called only if both are.
        args, kwargs: what it reads; tensors of the shape of the first are lengthened with it.
        size: number of its channels.
        dim: where they usually are.

    Raises:
        NormAxisError: both are, and ``forward`` runs with more entries along both, or along neither.
    """
    x = first_floating(args, kwargs)
    if x is None:
        return None
    shape = x.shape
    axes = [axis for axis in dict.fromkeys((dim % x.dim(), 1)) if x.dim() > axis and shape[axis] == size]
    if len(axes) < 2:
        return axes[0] if axes else None

    def fits(axis: int) -> bool:
        def longer(value: Any) -> Any:
            alike = isinstance(value, Tensor) and value.shape == shape
            return torch.cat([value, value.narrow(axis, 0, 1)], axis) if alike else value

        try:
            with torch.no_grad():
                forward(*map(longer, args), **{key: longer(one) for key, one in kwargs.items()})
        except Exception:  # the norm's own code
            return False
        return True

    refused = [axis for axis in axes if not fits(axis)]
    if len(refused) != 1:
        raise NormAxisError(
            f"which dimension of an input {tuple(shape)} holds the {size} channels of a norm is not known; pass "
            "example_inputs of another size"
        )
    return refused[0]


def other_vectors(model: nn.Module, run: Run) -> frozenset[str]:
    """The modules with a rule of norms (:func:`norm_channels`) that their calls in ``run(model)`` show to be no norms.

    Their parameters are parameters outside layers. Where they have other names than weight and bias, each call must
    show that it is a norm over channels; where each channel is scaled alone, it makes no difference whether it is one.
    One pass, if there are modules to look at.
    """
    copied = shared_copy(model)
    asked = {
        name: module
        for name, module in named_modules(copied)
        if not isinstance(module, _TORCHS_OWN) and norm_channels(module) is not None
    }
    seen = dict[str, bool]()

    def called(name: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if seen.get(name, True):
            seen[name] = _is_norm(module, forward, args, kwargs)
        return forward(*args, **kwargs)

    for name, module in asked.items():
        module.forward = partial(called, name, module, module.forward)  # type: ignore[method-assign]
    if asked:
        try:
            run_alike(copied, run)
        except Exception:  # the model's own code
            seen.clear()
    return frozenset(name for name, module in asked.items() if not seen.get(name, _has_usual_names(module)))


def _has_usual_names(module: nn.Module) -> bool:
    return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


def _is_norm(module: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call shows that a module is a norm; of one with the usual names, that nothing shows that it is none."""
    channels, x = norm_channels(module), first_floating(args, kwargs)
    if channels is None or x is None:
        return _has_usual_names(module)

    try:
        size, axis = channels[0], norm_axis(forward, args, kwargs, *channels)
    except NormAxisError:
        return True  # which the proof says
    if axis is None:
        return _has_usual_names(module)
    dim: int = axis

    def result(zeroed: Tensor) -> Any:
        """With ``zeroed`` channels of what it reads, on copies, with the same random numbers."""

        def of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.index_fill(dim, zeroed, 0) if value.shape == x.shape else value.clone()

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return forward(*pytree.tree_map(of, tuple(args)), **pytree.tree_map(of, dict(kwargs)))

    try:
        returned = result(torch.empty(0, dtype=torch.int64, device=x.device))
    except Exception:  # its own code
        return _has_usual_names(module)
    if not isinstance(returned, Tensor) or returned.shape != x.shape:
        return _has_usual_names(module)
    own = {key: one for key, one in module._parameters.items() if one is not None}
    order, mixes = torch.randperm(size, generator=torch.Generator().manual_seed(0), device="cpu"), False
    for share in (2, 3):  # a vector that is read in another order may act within one of these halves or thirds
        gone, kept = order[: size // share].to(x.device), order[size // share :].to(x.device)
        results = []
        try:
            for sign in (0, 1, -1):
                for key, one in own.items():
                    more = sign * (1 + 2 * one.detach().abs().max())
                    other = one.detach().index_add(-1, gone, more.expand(*one.shape[:-1], len(gone)))
                    module._parameters[key] = nn.Parameter(other, requires_grad=False)
                results.append(result(gone).index_select(dim, kept))
        finally:
            module._parameters.update(own)
        if not all(_are_close(results[0], one) for one in results):
            return False
        mixes = mixes or not _are_close(results[0], returned.index_select(dim, kept))
    return mixes or _has_usual_names(module)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _UNCHANGED * one.abs().max())
