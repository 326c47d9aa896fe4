"""torch's recurrent layers: which of them have known channels (:mod:`obc.model.channel_dims`), and their sizes."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn


def is_recurrent(module: nn.Module | None) -> TypeGuard[nn.RNNBase]:
    """Whether a module is an LSTM, GRU or RNN whose channels are known.

    They are not with an LSTM's projections, or if weights are computed (weight norm).
    """
    if not isinstance(module, nn.RNNBase) or module.proj_size:
        return False
    return all(name in module._parameters for name in module._flat_weights_names)


def sync_recurrent(module: nn.RNNBase) -> None:
    """Set the sizes to those of the weights, and let the kernels use the present weights."""
    weights = dict(module.named_parameters(recurse=False))
    module.input_size, module.hidden_size = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
    module._flat_weights = [weights[name] for name in module._flat_weights_names]
    module.flatten_parameters()
