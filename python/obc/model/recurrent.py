"""Where the channels of torch's recurrent layers lie: their inputs, and the hidden units.

A hidden unit is one number of the state: unit j is the j-th of every layer and direction at once, because torch gives
all of them one ``hidden_size``. It has a row in every gate's block of ``weight_ih``, ``weight_hh`` and the biases of
all layers, a column in every ``weight_hh``, and a column for each direction in the ``weight_ih`` of the next layer.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

_GATES = {"LSTM": 4, "GRU": 3}


def is_recurrent(module: nn.Module | None) -> TypeGuard[nn.RNNBase]:
    """Whether a module is an LSTM, GRU or RNN whose channels are known.

    They are not with an LSTM's projections, or if weights are computed (weight norm).
    """
    if not isinstance(module, nn.RNNBase) or module.proj_size:
        return False
    return all(name in module._parameters for name in module._flat_weights_names)


def gates_of(module: nn.RNNBase) -> int:
    """The number of blocks in the rows of its weights."""
    return _GATES.get(module.mode, 1)


def directions_of(module: nn.RNNBase) -> int:
    """2 for a bidirectional layer, otherwise 1."""
    return 2 if module.bidirectional else 1


def rows_of(module: nn.RNNBase, tensor: Tensor, units: Tensor | None) -> Tensor | None:
    """The rows of a weight or bias that belong to these hidden units; None stands for all."""
    gates = gates_of(module)
    return None if units is None else torch.cat([units + gate * (len(tensor) // gates) for gate in range(gates)])


def columns_of(
    module: nn.RNNBase, name: str, tensor: Tensor, units: Tensor | None, inputs: Tensor | None
) -> Tensor | None:
    """The columns of the tensor ``name`` that read these hidden units and inputs; None stands for all."""
    if not name.startswith("weight"):
        return None
    if name.startswith("weight_ih_l0"):
        return inputs
    if name.startswith("weight_hh") or units is None:
        return units
    size = len(tensor) // gates_of(module)
    return torch.cat([units + direction * size for direction in range(directions_of(module))])


def sync_recurrent(module: nn.RNNBase) -> None:
    """Set the sizes to those of the weights, and let the kernels use the present weights."""
    weights = dict(module.named_parameters(recurse=False))
    module.input_size, module.hidden_size = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
    module._flat_weights = [weights[name] for name in module._flat_weights_names]
    module.flatten_parameters()
