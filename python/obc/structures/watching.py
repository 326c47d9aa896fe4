"""Notes what reads channels besides layers: attention, recurrent layers' first states, products outside layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from obc.model.evaluation import tensors_in
from obc.model.layouts import has_several_weights, is_depthwise
from obc.model.names import joined, named_modules
from obc.structures.probing import Prober, split_arguments, sums

_PRODUCTS = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__, Tensor.__rmatmul__),
}


class Watching(TorchFunctionMode):
    """Notes what torch's attention, recurrent layers as first states, and products outside layers read.

    A functional use of a layer that calls it is no product outside layers.
    """

    def __init__(self, prober: Prober) -> None:
        super().__init__()
        self._prober, model = prober, prober.model
        self.seen: dict[str, list[str]] = {}
        self._names: dict[int, str] = {}
        self._handles = []
        for name, module in named_modules(model):
            if has_several_weights(module):
                label = f"{name!r} ({type(module).__name__})"
                hook = partial(self._note_whole, label)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        whole = filter(has_several_weights, model.modules())
        inside = {id(parameter) for module in whole for parameter in module.parameters()}
        for name, module in named_modules(model):
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.dim() > 1 and id(tensor) not in inside and not is_depthwise(module):
                    self._names[_address(tensor)] = joined(name, key)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note_whole(self, label: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what a module reads not channel by channel: a recurrent layer's first states, an attention's masks."""
        self.note(label, tensors_in(split_arguments(module, args, kwargs)[1]))

    def note(self, label: str, tensors: list[Tensor]) -> None:
        """Add one number for each of the tensors that are read; it is text, so that NaN equals NaN."""
        self.seen.setdefault(label, []).extend(repr(float(sums(t.detach().reshape(1, -1), 0))) for t in tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or self._prober.products.handling:
            return func(*args, **(kwargs or {}))
        calls = self._prober.calls
        result = func(*args, **(kwargs or {}))
        if self._prober.calls == calls:
            tensors = tensors_in((args, kwargs or {}))
            held = [name for t in tensors if (name := self._names.get(_address(t))) is not None]
            if held:
                others = [t for t in tensors if _address(t) not in self._names]
                self.note(f"a product outside layers with {held[0]!r}", others)
        return result


def _address(tensor: Tensor) -> int:
    """Where a tensor's entries lie; sparse tensors are told apart as objects."""
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
