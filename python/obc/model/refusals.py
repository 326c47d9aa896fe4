"""Refuses models that can't be pruned as they are: compiled, wrapped, with adapters, or with computed weights.

Also refuses ``save_pretrained`` of pruned ones, if ``from_pretrained`` would load the folder wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from obc.model.arguments import listed
from obc.model.kept import PlanError
from obc.model.layouts import is_compiled, layout_of
from obc.model.sharding import is_in_flat_shards, is_sharded
from obc.model.usable import refuse_non_modules

# Classes of hooks that compute a weight before every forward -> what turns it into a parameter again.
_REMOVERS: dict[type, Callable[[nn.Module, str], nn.Module]] = {
    WeightNorm: remove_weight_norm,
    SpectralNorm: remove_spectral_norm,
    prune.BasePruningMethod: prune.remove,
}


def refuse_unprunable(model: nn.Module, *, computed: bool = True) -> None:
    """Raise if layers can't be given smaller weights; the message says what can be pruned instead.

    Args:
        model: the model.
        computed: whether to refuse :func:`computed_weights` too; False if the caller leaves those layers as they are.

    Raises:
        PlanError: the model, or a part of it, is compiled or scripted; it is wrapped for several processes or GPUs, or
            spread over processes; or it has unmerged adapters, computed or complex weights, layers of torch's own
            quantisation, or lazy layers without weights.
    """
    refuse_non_modules(model)
    name = type(model).__name__
    if is_compiled(model):
        raise PlanError("the model is compiled; prune the model that was passed to torch.compile, then compile again")
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError(f"{name} is a ScriptModule, whose layers can't be changed; prune the model it was made of")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(f"the model is wrapped in {name}; prune model.module, then wrap it again")
    if is_in_flat_shards(model):
        raise PlanError("the model is wrapped in FullyShardedDataParallel; prune the model first, then wrap it")
    if is_sharded(model):
        raise PlanError("the model's parameters are split over several processes; prune the model first, then shard it")
    refuse_adapted(model)
    for layer, module in model.named_modules():
        if is_compiled(module) or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            raise PlanError(
                f"{name}: {layer or 'its forward'} is compiled; prune the model with the module, or forward, that was "
                "passed to torch.compile in its place, then compile again"
            )
        if "_checkpoint_wrapped_module" in module._modules:
            raise PlanError(
                f"{name}: {layer or 'it'} is a {type(module).__name__}, which renames the parameters inside; prune the "
                "model with the module that it wraps in its place, then wrap it again"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanError(
                f"{name}: {layer} is a ScriptModule, whose layers can't be changed; put the module that it was made of "
                "in its place"
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise PlanError(
                f"{name}: {layer or 'the model'} is a {type(module).__name__} that has no weights yet; call the model "
                "once on an input first"
            )
        weight = module._parameters.get("weight")
        if layout_of(module) is not None and weight is not None and weight.is_complex():
            raise PlanError(
                f"{name}: {layer or 'it'} is a {type(module).__name__} of {weight.dtype}, and obc prunes real weights "
                "alone; keep the real and the imaginary part in layers of their own"
            )
        _refuse_torch_quantised(layer, module)
    if computed:
        for reason in computed_weights(model).values():
            raise PlanError(reason)


def _refuse_torch_quantised(layer: str, module: nn.Module) -> None:
    """Refuse layers of ``torch.ao.quantization``: their activations are quantised as well, so no plain layer fits."""
    kind = type(module).__module__
    layers = kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
    if layers and type(module).__name__ not in ("Quantize", "DeQuantize"):
        raise PlanError(
            f"{layer or 'the model'} is a quantised {type(module).__name__} of torch.ao; prune the model that was "
            "quantised, then quantise the pruned one"
        )
    if kind.startswith(("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")) or kind.endswith("quantization.fake_quantize"):
        raise PlanError(
            f"{layer or 'the model'} is a {type(module).__name__} of torch.ao, prepared for quantisation-aware "
            "training with one scale per channel; prune the model first, then prepare it"
        )


def refuse_adapted(model: nn.Module) -> None:
    """Refuse PEFT adapters, whose widths are those of the unpruned model.

    They are layers that wrap the model's layers and add to their outputs, trained copies of layers
    (``modules_to_save``), and learned prompts.

    Raises:
        PlanError: names the first of them and the remedy.
    """
    name = type(model).__name__
    wrappers = _classes("peft.tuners.tuners_utils", "BaseTunerLayer") + _classes(
        "peft.utils.other", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"
    )
    for layer, module in model.named_modules():
        if isinstance(module, wrappers):
            raise PlanError(
                f"{name} has adapters of PEFT ({layer!r} is a {type(module).__name__}), which would "
                "not fit new widths; prune model.merge_and_unload(), or adapt the pruned model"
            )
    if isinstance(model, _classes("peft.peft_model", "PeftModel")):
        raise PlanError(
            f"{name} has prompts of PEFT, which would not fit new widths; prune model.get_base_model(), and "
            "learn prompts for the pruned model"
        )


def _classes(module: str, *names: str) -> tuple[type, ...]:
    """Those of a module's classes that exist; imports nothing, so a model without them costs nothing."""
    return tuple(found for name in names if isinstance(found := getattr(sys.modules.get(module), name, None), type))


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Layer -> why it can't be sliced, if its weight is computed before every forward and is not a parameter."""
    found: dict[str, str] = {}
    remedy = "obc.plain_layers(model, example_inputs) makes it a parameter"
    for layer, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found[layer] = f"{layer or 'the model'} is parametrised and can't be sliced; {remedy}"
        for name, _ in computing_hooks(module):
            found[layer] = (
                f"{layer or 'the model'} has a weight that {name} computes before every forward, so it can't be "
                f"sliced; {remedy} again"
            )
    return found


def computing_hooks(module: nn.Module) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The hooks that compute a tensor before every forward: each one's class, and what makes it a parameter again."""
    return [
        (
            kind.__name__,
            partial(remove, module, getattr(hook, "_tensor_name" if kind is prune.BasePruningMethod else "name")),
        )
        for hook in module._forward_pre_hooks.values()
        for kind, remove in _REMOVERS.items()
        if isinstance(hook, kind)
    ]


_REMEDY = "obc.structures.transformers.save_pruned and load_pruned keep it"


def refuse_fresh_weights(model: Any, reason: str) -> None:
    """Make ``model.save_pretrained`` raise, because the config can't express that modules were removed."""
    _refuse_save_pretrained(
        model,
        "from_pretrained would give this model fresh weights, or other constants, where modules were removed "
        f"({reason}); {_REMEDY}",
    )


def refuse_dropped_biases(model: Any, layers: Sequence[str]) -> str:
    """Make ``model.save_pretrained`` raise, because no config can express the new biases of ``layers``; says so."""
    said = f"{listed(layers)} have a bias now that no config can express: from_pretrained would drop it; {_REMEDY}"
    _refuse_save_pretrained(model, said)
    return said


def _refuse_save_pretrained(model: Any, said: str) -> None:
    vars(model)["save_pretrained"] = partial(_raise, said)  # of a module, so that the model can be pickled


def _raise(said: str, *args: Any, **kwargs: Any) -> None:
    raise PlanError(said)
