"""Refuses models that no call can work on: no module, weights without values, inference mode."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from obc.model.arguments import listed

# What to do if two models that must differ do not.
OTHER_MODEL = "pass the unpruned model, or a copy.deepcopy of it from before it was pruned"


def refuse_unusable(model: Any, role: str = "the model") -> None:
    """Raise if the weights of ``model`` can't be differentiated or replaced, or if it is no model.

    Raises:
        TypeError: it is no ``torch.nn.Module``.
        ValueError: the call is inside ``torch.inference_mode()``, or a weight was made there or is on the meta device.
    """
    refuse_without_values(model, role)
    refuse_inference(model, role)


def refuse_inference(model: Any, role: str = "the model") -> None:
    """Raise if ``model`` is no module, or a ValueError if a weight or the call is inside inference mode."""
    refuse_non_modules(model, role)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "this is inside torch.inference_mode(), where no gradient can be taken and no weight that can be trained "
            "is made; call it outside"
        )
    refuse_inference_tensors(model, role)


def refuse_inference_tensors(model: nn.Module, role: str = "the model") -> None:
    """Raise a ValueError if a parameter or buffer was made inside inference mode."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        # Lazy layers are refused where it is known what they are needed for.
        if not isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) and tensor.is_inference():
            raise ValueError(
                f"{role}: {name} was made inside torch.inference_mode(), so no gradient can be taken and nothing "
                "written outside; make the model outside, or replace its weights by clones made outside"
            )


def refuse_without_values(model: Any, role: str = "the model") -> None:
    """Raise if ``model`` is no module, or a ValueError if a weight is on the meta device."""
    refuse_non_modules(model, role)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{role}: {name} is on the meta device, {_remedy(model)}")


def not_finite(model: nn.Module) -> str:
    """The end of a message about figures that are not finite: the weights that are not; empty if all are."""
    names = [name for name, one in model.named_parameters() if not one.is_meta and not bool(one.isfinite().all())]
    return f"; not finite itself is {listed(names)}" if names else ""


def refuse_non_modules(model: Any, role: str = "the model") -> None:
    """Raise a TypeError if ``model`` is no ``torch.nn.Module``."""
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, dict) and any(isinstance(value, Tensor) for value in model.values()):
            hint = "; a state dict must be loaded into its model first"
        raise TypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}{hint}")


def refuse_one_model(model: nn.Module, other: nn.Module, role: str, other_role: str) -> None:
    """Raise a ValueError if both are one object."""
    if model is other:
        raise ValueError(f"{role} and {other_role} are one object; {OTHER_MODEL}")


def _remedy(model: nn.Module) -> str:
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return (
            "because hooks of accelerate load its values for each forward pass; load the model without them "
            "(accelerate.hooks.remove_hook_from_submodules), or collect statistics with obc.collect(..., by_block=True)"
        )
    return "so it has no values; load them first, for example with model.load_state_dict(weights, assign=True)"
