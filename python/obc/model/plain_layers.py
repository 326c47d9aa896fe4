"""Plain layers in place of those that compute their weights before every forward pass, so that these can be sliced."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from obc.model.arguments import listed
from obc.model.errors import explained
from obc.model.evaluation import call, evaluating, first_floating, without_cache
from obc.model.hooks import replaced
from obc.model.kept import PlanError
from obc.model.names import named_modules
from obc.model.refusals import computing_hooks, refuse_unprunable
from obc.model.rules import packed_weight

logger = logging.getLogger("obc")

# A call of a function: the function, its arguments by name, and what it returned.
_Call = tuple[Any, dict[str, Any], Any]

_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_STRAIGHT = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# A function of an input, a weight and a bias -> the layer that is this function, and the function's arguments.
_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, _STRAIGHT[:3]),
    F.conv1d: (nn.Conv1d, _STRAIGHT),
    F.conv2d: (nn.Conv2d, _STRAIGHT),
    F.conv3d: (nn.Conv3d, _STRAIGHT),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}


class _NotPlainError(ValueError):
    """The layer computes something else than a plain layer would; the message says what."""


@dataclass
class _Calls(TorchFunctionMode):
    """Records what a layer's forward calls of ``_FUNCTIONS``."""

    made: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            named = dict(zip(_FUNCTIONS[func][1], args, strict=False)) | dict(kwargs or {})
            self.made.append((func, named, output))
        return output


@torch.no_grad()
def plain_layers(model: nn.Module, example_inputs: Any) -> list[str]:
    """Put a plain layer in place of every layer that computes its weight before each forward pass; in place.

    No channel can be taken out of such a layer exactly: the computed weight of the channels that stay changes with
    those that go. The plain layer has the weight that is computed now, as its parameter. Replaced are:

    - linear layers and convolutions of a class whose ``forward`` computes the weight it multiplies with: weight
      standardisation (NFNet, BiT), equalised learning rates (StyleGAN), normalised rows (cosine classifiers). The
      class needs neither be nor derive from one of torch's.
    - layers with parametrisations of ``torch.nn.utils.parametrize`` (weight, spectral and orthogonal norm).
    - layers with hooks of ``torch.nn.utils`` that compute the weight (``weight_norm``, ``spectral_norm``, ``prune``).

    A layer with a ``forward`` of its own is replaced only if that computes, on the example inputs and on random
    numbers, what the plain layer computes. One that does not (it pads its input, scales its output, or its weight
    depends on its input) stays, and a warning names it. A parameter that several layers compute their weights from is
    no longer shared. Build an optimizer afterwards, not before.

    Args:
        model: the model, changed in place.
        example_inputs: a tensor, tuple or mapping that the model is called with once, in eval mode.

    Returns:
        The names of the replaced layers.

    Raises:
        PlanError: the model can't be pruned for another reason (it is compiled, wrapped, has adapters …).
        PruningError: the model fails on the example inputs; it is unchanged.
    """
    refuse_unprunable(model, computed=False)
    with explained(model, "running it on the example inputs", "pass inputs that it can be called with"):
        computing = _computing(model, example_inputs)
    new: dict[nn.Module, nn.Module] = {}
    kept: list[str] = []
    names = {module: name for name, module in named_modules(model)}
    for module, seen in computing.items():
        try:
            new[module] = _plain(module, seen)
        except _NotPlainError as error:
            kept.append(f"{names[module]!r} ({type(module).__name__}): {error}")
    if model in new:
        raise PlanError(f"the model is itself a layer, a {type(model).__name__}; pass the model that it is part of")
    if kept:
        logger.warning("these layers compute their weights and stay: %s", listed(kept))
    put_in_place(model, new)
    with evaluating(model):
        return [*(names[module] for module in new), *_merged(model)]


def put_in_place(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of the model, wherever they are."""
    for parent in list(model.modules()):
        parent._modules.update(
            {key: new.get(child, child) for key, child in parent._modules.items() if child is not None}
        )


def _merged(model: nn.Module) -> list[str]:
    """Make parameters of the tensors that parametrisations and hooks compute; returns the layers' names."""
    found = []
    for name, module in named_modules(model):
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            for tensor, computed in list(parametrizations.items()):
                parameters = list(computed.parameters())
                # Without gradients torch would make a buffer of a weight that is computed from several tensors.
                with torch.enable_grad():
                    parametrize.remove_parametrizations(module, tensor)
                if parameters and (weight := module._buffers.pop(tensor, None)) is not None:
                    setattr(module, tensor, nn.Parameter(weight, requires_grad=False))
            found.append(name)
        for _, remove in computing_hooks(module):
            trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            remove()  # makes a parameter that is trained
            module.requires_grad_(trained)
            found.append(name)
    return list(dict.fromkeys(found))


def _computing(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[_Seen]]:
    """The layers whose own forward multiplies with another tensor than a parameter -> their calls on these inputs."""
    seen: dict[nn.Module, list[_Seen]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        for module in model.modules():
            if _may_compute(module):
                stack.enter_context(replaced(module, forward=_recorded(module, module.forward, seen)))
        call(model, example_inputs)
    return {module: calls for module, calls in seen.items() if any(one.computes(module) for one in calls)}


def _may_compute(module: nn.Module) -> bool:
    """Whether it is a layer with parameters and a forward of its own; parametrised ones are left to torch."""
    own = not type(module).forward.__module__.startswith("torch.") and packed_weight(module) is None
    return own and not module._modules and bool(module._parameters) and not computing_hooks(module)


@dataclass(frozen=True)
class _Seen:
    """One call of a layer: its input, which functions it called, and whether it returned what the first one did."""

    x: Tensor | None
    made: list[_Call]
    returned: bool

    def computes(self, module: nn.Module) -> bool:
        """Whether a function got a weight or a bias that is none of the layer's parameters."""
        own = {id(None), *map(id, module._parameters.values())}
        return any(id(named.get(name)) not in own for _, named, _ in self.made for name in ("weight", "bias"))


def _recorded(module: nn.Module, forward: Callable[..., Any], seen: dict[nn.Module, list[_Seen]]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Calls() as calls:
            output = forward(*args, **kwargs)
        returned = bool(calls.made) and output is calls.made[0][2]
        seen.setdefault(module, []).append(_Seen(first_floating(args, kwargs), calls.made, returned))
        return output

    return run


def _plain(module: nn.Module, seen: list[_Seen]) -> nn.Module:
    """The plain layer that computes what the module computes of the inputs of these calls, and of random numbers."""
    made = [one for call in seen for one in call.made]
    if any(len(call.made) != 1 for call in seen) or len({function for function, _, _ in made}) != 1:
        raise _NotPlainError(f"it multiplies {len(made)} times in {len(seen)} calls")
    if not all(call.returned for call in seen):
        raise _NotPlainError("it returns something else than the product")
    if any(call.x is None or call.made[0][1].get("input") is not call.x for call in seen):
        raise _NotPlainError("it changes its input before the product")
    function, named, _ = made[0]
    plain = _layer(function, named).train(module.training)
    plain.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
    for one in seen:
        assert one.x is not None
        generator = torch.Generator(one.x.device).manual_seed(0)
        drawn = torch.randn(one.x.shape, generator=generator, device=one.x.device, dtype=one.x.dtype)
        with evaluating(module):
            for x in (one.x, drawn):
                _compare(plain(x), module(x))
    return plain


def _layer(function: Any, named: dict[str, Any]) -> nn.Module:
    """The layer that is the function with its weight, bias and geometry."""
    kind, arguments = _FUNCTIONS[function]
    weight, bias = named["weight"], named.get("bias")
    geometry = {key: value for key, value in named.items() if key in arguments[3:]}
    groups = geometry.get("groups", 1)
    rows, columns = weight.shape[:2]
    sizes = (rows, columns * groups) if arguments is _TRANSPOSED else (columns * groups, rows)
    if kind is not nn.Linear:
        geometry["kernel_size"] = tuple(weight.shape[2:])
    plain: Any = kind(*sizes, bias=bias is not None, device="meta", **geometry)
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain  # type: ignore[no-any-return]


def _compare(found: Tensor, expected: Tensor) -> None:
    """Raise if a plain layer's output differs by more than the square root of one rounding step."""
    largest = float(expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
    worst = float((found - expected).abs().max()) / largest
    if not worst <= torch.finfo(expected.dtype).eps ** 0.5:
        raise _NotPlainError(f"its weight depends on its input: a plain layer differs by {worst:.2g} on other numbers")
