"""Linear layers of other libraries' classes, recognised by what their forward computes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

# Class, or module -> what its forward may depend on -> whether it is a linear layer's.
_known: WeakKeyDictionary[Any, dict[Hashable, bool]] = WeakKeyDictionary()
_TORCHS_OWN = {*vars(nn.Module()), "forward", "weight", "bias"} - {"training"}
_PLAIN = (bool, int, float, str, type(None))
_SIZES = (("out_features", "in_features"), ("out_channels", "in_channels"))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer, or of another class whose forward computes what that computes.

    That is ``F.linear(x, self.weight, self.bias)`` and nothing else, as in torch-geometric's own linear layer.
    """
    return isinstance(module, nn.Linear) or acts_as_linear(module)


def acts_as_linear(module: nn.Module) -> bool:
    """Whether a module that is not torch's linear layer has just its tensors, and a forward that computes the same."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.Linear):  # Torch-Pruning's graph has parameters, too
        return False
    own, kind = {name for name, one in module._parameters.items() if one is not None}, type(module)
    if not {"weight"} <= own <= {"weight", "bias"} or module._modules or module._buffers or not hasattr(module, "bias"):
        return False
    weight: Any = module._parameters["weight"]
    bias: Any = module.bias
    if is_lazy(weight) or weight.dim() != 2 or kind.__module__.startswith("torch.nn."):
        return False
    if bias is not None and ("bias" not in own or is_lazy(bias) or bias.shape != weight.shape[:1]):
        return False
    own_values = {key: value for key, value in vars(module).items() if key not in _TORCHS_OWN}
    plain = all(type(value) in _PLAIN for value in own_values.values())
    found = _known.setdefault(kind if plain else module, {})
    values = [(key, value if type(value) in _PLAIN else id(value)) for key, value in own_values.items()]
    key = bias is None, *values
    if key not in found:
        found[key] = _computes_a_linear_layer(module)
    return found[key]


def _computes_a_linear_layer(module: nn.Module) -> bool:
    from torch.fx import Tracer  # takes time to import

    try:
        nodes = list(Tracer().trace(module).nodes)
    except Exception:  # the module's own code, which need not run on a stand-in for its input
        return False
    calls = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or len(calls) != 1 or calls[0].target is not F.linear or nodes[-1].args != (calls[0],):
        return False
    given = dict(zip(("input", "weight", "bias"), calls[0].args, strict=False)) | calls[0].kwargs
    held = {name: node.target if getattr(node, "op", None) == "get_attr" else node for name, node in given.items()}
    bias = None if module.bias is None else "bias"
    return held.get("input") is inputs[0] and held.get("weight") == "weight" and held.get("bias") == bias


def sizes_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of the attributes in which a module keeps (out channels, in channels)."""
    yield from (pair for pair in _SIZES if all(type(getattr(module, name, None)) is int for name in pair))
