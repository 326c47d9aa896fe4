"""A snapshot of a model, so that an exception does not leave it half pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.model.layouts import is_expanded
from obc.model.names import joined, named_tensors


class Snapshot:
    """Remembers a model's modules, widths and tensors, without copying its weights.

    Pruning replaces weights, so the unpruned ones only have to be kept alive. Buffers and vectors are copied, because
    running statistics and biases are changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _copied(module.__dict__)) for module in model.modules()]
        self._tensors = {
            joined(module_name, name): _remembered(tensor) for module_name, _, name, tensor in named_tensors(model)
        }
        held = {id(tensor): tensor for _, state in self._modules for tensor in _own_tensors(state)}
        self._held = [(tensor, _remembered(tensor)) for tensor in held.values()]

    def tensors(self) -> dict[str, Tensor]:
        """The unpruned model's parameters and persistent buffers, by their names in its state dict."""
        return self._tensors

    def restore(self) -> None:
        """Restore the model: the same modules with the same parameters, widths and values."""
        for module, state in self._modules:
            module.__dict__.clear()
            module.__dict__.update(_copied(state))
        with torch.no_grad():
            for tensor, value in self._held:
                if tensor.shape != value.shape:
                    tensor.data = value
                elif tensor.layout is not torch.strided or is_expanded(tensor):
                    continue  # sparse, or entries that share memory: nothing of obc writes there
                elif tensor.data_ptr() != value.data_ptr():
                    tensor.copy_(value)


def _remembered(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.dim() <= 1 else tensor.detach()


_OWN = ("_parameters", "_buffers", "_modules")


def _copied(state: dict[str, object]) -> dict[str, object]:
    return {key: dict(value) if key in _OWN and isinstance(value, dict) else value for key, value in state.items()}


def _own_tensors(state: dict[str, object]) -> list[Tensor]:
    values = [value for key in _OWN[:2] if isinstance(found := state.get(key), dict) for value in found.values()]
    return [value for value in values if isinstance(value, Tensor)]
