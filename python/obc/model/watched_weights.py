"""Weights whose uses are seen: for a while their class is one that torch asks before it runs a function on them.

Functions that get no watched weight run as always; a ``TorchFunctionMode`` would see every function of the model. What
a function made of a weight is followed until it meets an activation.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.utils import parametrize

# What multiplies two tensors channel by channel, so that one of them can be an activation.
_PRODUCTS: set[Any] = {
    *(F.linear, F.bilinear, F.embedding, F.embedding_bag, torch.einsum, torch.tensordot, torch.inner, torch.outer),
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(getattr(space, name) for space in (torch, Tensor) for name in ("matmul", "mm", "bmm", "mv", "addmm", "addmv")),
    *(torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm, Tensor.inner, Tensor.outer),
    *(Tensor.__matmul__, Tensor.__rmatmul__, torch.dot, Tensor.dot, torch.vdot, Tensor.vdot),
}
# These do too, if the other factor is no weight.
_FACTORS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
# What gives tensors without a value of the weight.
_WITHOUT_VALUES = {
    *(getattr(torch, f"{kind}_like") for kind in ("zeros", "ones", "empty", "full", "rand", "randn")),
    *(getattr(Tensor, f"new_{kind}") for kind in ("zeros", "ones", "empty", "full")),
    *(Tensor.grad.__get__, Tensor.requires_grad_),  # type: ignore[union-attr]
}
# What takes no value from its second argument.
_ALIKE = {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as}
_WITHOUT_GRADIENT = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_MODULES, _CALL = nn.Module.__module__, nn.Module._call_impl.__code__
_BETWEEN = (__name__, "torch.overrides", "torch.nn.functional", "torch._tensor")
_Modules = list[nn.Module]
Lasting = list[tuple["weakref.ref[Tensor]", "Use"]]


@dataclass(frozen=True)
class Use:
    """A weight that a function gets, as such or as something made of it, outside of its layers' forwards.

    Attributes:
        weight: the parameter, or None if the layer computes its weight or several are used.
        layers: the layers that have it.
        function: the first function that got it.
        how: "itself", "transposed", or "made of it".
        gradient: a gradient with respect to the use is one with respect to the weight.
    """

    weight: Tensor | None
    layers: _Modules
    function: str
    how: str
    gradient: bool = True


class WeightWatch:
    """While it is entered, uses of weights outside of their layers' forwards are told to :meth:`note`.

    Args:
        pairs: (module, one of its parameters).
        computing: modules that compute their weight.
        lasting: what was made of weights in earlier watches and is still there, such as a merged weight that is kept;
            renewed on leaving.

    Attributes:
        gradients: gradients are watched, not activations alone.
    """

    gradients = False

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Module, Tensor]],
        computing: Iterable[nn.Module] = (),
        lasting: Lasting | None = None,
    ) -> None:
        self._pairs, self._computing, self._lasting = list(pairs), computing, [] if lasting is None else lasting
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Any:
        for module in self._computing:
            self._follow_computed(module)
        for module, weight in self._pairs:
            kind = type(weight)
            if kind is nn.Parameter:
                _known[id(weight)] = [module]
                weight.__class__ = WatchedWeight
            elif kind is WatchedWeight:
                _known[id(weight)].append(module)
        for reference, use in self._lasting:
            if type(one := reference()) is Tensor:
                follow(one, use)
        _entered.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _entered.remove(self)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for module, weight in self._pairs:
            if (modules := _known.get(id(weight))) is not None:
                modules.remove(module)
                if not modules:
                    del _known[id(weight)]
                    weight.__class__ = nn.Parameter
        made = [one for reference in _made if type(one := reference()) is _Made]
        self._lasting[:] = [(weakref.ref(one), one.use) for one in made]
        if not _entered:
            for one in made:
                one.__class__ = Tensor  # type: ignore[assignment]
                del one.use
            _made.clear()

    def _follow_computed(self, module: nn.Module) -> None:
        """Follow what the module computes as its weight, by a parametrisation or a hook before its forward."""
        if parametrize.is_parametrized(module, "weight"):
            computes: Any = module.parametrizations["weight"]  # type: ignore[union-attr, index]
            self._undo.append(
                computes.register_forward_hook(lambda _, args, computed: _computed(module, computed)).remove
            )
        else:
            _computed(module, vars(module)["weight"])
            self._undo.append(module.register_forward_pre_hook(_hooked).remove)

    def called(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], uses: Mapping[int, Use]
    ) -> Callable[[], Any] | None:
        """What to run in place of the function, or None.

        Args:
            uses: of each argument that is a weight or made of one, by identity.
        """
        return None

    def note(self, use: Use, product: bool, differentiable: bool) -> None:
        """Be told of a use.

        Args:
            product: the function may have met an activation.
            differentiable: the function got the weight itself, and a gradient may come to it from the result.
        """


# The modules that have a watched weight, by its identity, once for each watch; the watches entered, the innermost last;
# what was made of weights; and which code is torch's, between a function and the call of a module.
_known: dict[int, list[nn.Module]] = {}
_entered: list[WeightWatch] = []
_made: list[weakref.ref[Tensor]] = []
_torchs: dict[CodeType, bool] = {}


class WatchedWeight(nn.Parameter):
    """The class of a parameter that is watched."""

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        return nn.Parameter(data, requires_grad)  # by ``type(parameter)(...)``

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        try:
            return copy.deepcopy(self, memo)
        finally:
            self.__class__ = WatchedWeight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _seen(func, types, args, kwargs or {})


class _Made(Tensor):
    """The class of what a function made of a weight."""

    use: Use

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _seen(func, types, args, kwargs or {})


_OWN = frozenset((WatchedWeight, _Made))


def _seen(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of a function that gets a weight or what was made of one."""
    if is_compiling() or _is_torchs_own_call() or _is_obcs(caller := _caller()) or _is_compiled(caller):
        return _plainly(func, types, args, kwargs)
    given = args[:1] if func in _ALIKE else (args, kwargs)
    uses = {id(one): use for one in _tensors(given) if (use := _use(one, func, caller)) is not None}
    if not uses:
        return _plainly(func, types, args, kwargs)
    # What an autograd.Function does is differentiated by its own backward, in which no layer is called.
    inside = _is_in_autograd_function(caller)
    for watch in [] if inside and any(one.gradients for one in _entered) else reversed(_entered):
        if (call := watch.called(func, args, kwargs, uses)) is not None:
            return call()
    result = _plainly(func, types, args, kwargs)
    values = [
        one
        for one in _tensors(result)
        if func not in _WITHOUT_VALUES and (one.is_floating_point() or one.is_complex()) and id(one) not in uses
    ]
    gradient = bool(values) and func not in _WITHOUT_GRADIENT and (inside or torch.is_grad_enabled())
    others = [one for one in args if type(one) is Tensor and one.numel() > 1]
    product = func in _PRODUCTS or (func in _FACTORS and bool(others))
    for use in uses.values():
        for watch in _entered:
            watch.note(use, product, gradient and use.gradient and use.how == "itself")
    if not product:
        first, *more = uses.values()
        alone = not more and type(result) is Tensor and bool(args) and first.how == "itself"
        how = how_made(args[0], result) if alone else "made of it"
        layers = [layer for use in uses.values() for layer in use.layers]
        made = Use(None if more else first.weight, layers, first.function, how, gradient and first.gradient)
        for one in values:
            if type(one) is Tensor and one.numel() > 1:
                follow(one, made)
    return result


def _plainly(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What torch computes; other classes' own functions are heeded."""
    if _OWN.issuperset(types):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    classes = [(one, type(one)) for one in _tensors((args, kwargs)) if type(one) in (WatchedWeight, _Made)]
    for one, kind in classes:
        one.__class__ = nn.Parameter if kind is WatchedWeight else Tensor
    try:
        return func(*args, **kwargs)
    finally:
        for one, kind in classes:
            one.__class__ = kind


def follow(one: Tensor, use: Use) -> None:
    """Follow a tensor that is made of a weight, or shares its memory, until all watches are left."""
    one.__class__ = _Made
    one.use = use  # type: ignore[attr-defined]
    _made.append(weakref.ref(one))


def _computed(module: nn.Module, weight: Any) -> None:
    if type(weight) is Tensor and not is_compiling():
        follow(weight, Use(None, [module], "a function", "itself"))


def _hooked(module: nn.Module, args: Any) -> None:
    _computed(module, vars(module).get("weight"))


def computes_its_weight(module: nn.Module) -> bool:
    """Whether its weight is a tensor that is computed from parameters, as by torch.nn.utils.parametrize."""
    computed = "parametrizations" in module._modules and parametrize.is_parametrized(module, "weight")
    return computed or isinstance(vars(module).get("weight"), Tensor)


def _use(one: Tensor, func: Any, caller: FrameType | None) -> Use | None:
    """The use of a weight that this argument is, if it isn't its own layer that uses it."""
    if type(one) is _Made:
        if one.use.how != "itself":
            return one.use
        return None if _runs_in(one.use.layers, caller) else replace(one.use, function=func.__name__)
    layers = list(dict.fromkeys(_known.get(id(one), ())))
    return Use(one, layers, func.__name__, "itself") if layers and not _runs_in(layers, caller) else None


def how_made(weight: Tensor, one: Tensor) -> str:
    """``Use.how`` of a tensor that shares the weight's memory or is computed from it."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(one)  # which has no address
    if not wrapped and one.data_ptr() == weight.data_ptr() and one.dim() == weight.dim():
        if (one.shape, one.stride()) == (weight.shape, weight.stride()):
            return "itself"
        if one.dim() == 2 and (one.shape[::-1], one.stride()[::-1]) == (weight.shape, weight.stride()):
            return "transposed"
    return "made of it"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _caller() -> FrameType | None:
    """The frame that calls the function, beyond those of torch's wrappers and of function modes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        between = frame if _name(frame) in _BETWEEN else _mode_around(frame)
        if between is None:
            break
        frame = between.f_back
    return frame


def _mode_around(frame: FrameType | None) -> FrameType | None:
    """The frame of a function mode that has called this one of obc, or is this one."""
    while frame is not None and (_is_obcs(frame) or frame.f_code.co_name == "__torch_function__"):
        if frame.f_code.co_name == "__torch_function__":
            return frame
        frame = frame.f_back
    return None


def _is_obcs(frame: FrameType | None) -> bool:
    return frame is not None and _name(frame).partition(".")[0] == "obc"


def _is_torchs_own_call() -> bool:
    """Whether one of torch's own modules calls the function in its forward."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            return True
        if (own := _torchs.get(code)) is None:
            own = _name(frame) in _BETWEEN or _name(frame).startswith("torch.nn.modules.")
            _torchs[code] = own
        if not own:
            return False
        frame = frame.f_back
    return False


def _is_compiled(frame: FrameType | None) -> bool:
    """Whether the function is run by what torch.compile made, or by the compiler: no layer is called there."""
    while frame is not None and (_name(frame).startswith("torch.") or frame.f_code.co_filename.startswith("<")):
        if _name(frame).startswith("torch._dynamo."):
            return True
        frame = frame.f_back
    return False


def _is_in_autograd_function(frame: FrameType | None) -> bool:
    while frame is not None and _name(frame) != torch.autograd.Function.__module__:
        frame = frame.f_back
    return frame is not None


def _runs_in(layers: _Modules, frame: FrameType | None) -> bool:
    """Whether the frame is inside a call of one of the layers, or straight of another of torch's own modules."""
    first = True
    while frame is not None:
        name = _name(frame)
        if name not in _BETWEEN and (first or name == _MODULES):
            this = frame.f_locals.get("self")
            own = any(this is layer for layer in layers)
            if (own and name == _MODULES) or (first and not own and name.startswith("torch.nn.modules.")):
                return True
            first = False
        frame = frame.f_back
    return False
