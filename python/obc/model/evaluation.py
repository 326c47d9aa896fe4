"""Calling a model on example inputs and on batches; eval mode that keeps activation checkpointing on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from obc.model.errors import explained
from obc.model.hooks import hooked, replaced

ForwardFn = Callable[[nn.Module, Any], Any]
LossFn = Callable[[nn.Module, Any], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any] | None)
# Runs a model on inputs that are always the same.
Run = Callable[[nn.Module], Any]


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter, or else buffer; the CPU if it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model on example inputs: ``model(*inputs)`` for a tuple or list, ``model(**inputs)`` for a mapping,
    otherwise ``model(inputs)``. Unlike a batch, example inputs contain no labels.
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def call_on_batch(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch of a data loader, according to the arguments that its ``forward`` requires.

    This is the default ``forward_fn`` everywhere. Let k be the number of arguments that ``forward`` requires, at least
    1:

    ================================== ============================================================================
    batch                              call
    ================================== ============================================================================
    a mapping                          by keyword, without keys that ``forward`` does not take; ``model(batch)`` where
                                       ``forward`` requires one argument, and none of the keys is its name
    a tuple or list such as            the first k entries: ``model(inputs)`` for k = 1. Where k > 1 and the first
    (inputs, labels)                   entry is a tuple or list of k, that one's entries: ``((a, b), labels)``
    anything else                      ``model(batch)``
    ================================== ============================================================================

    Raises:
        PruningError: the model fails on it.
    """
    remedy = "pass forward_fn(model, batch) that calls it in the right way"
    with explained(model, f"calling it on a batch ({type(batch).__name__})", remedy):
        return _call_on_batch(model, batch)


def seek(loss_fn: LossFn, row: int, sample: int) -> None:
    """Tell a loss with a state, such as a label-free one, that the next call begins at this sample of this row."""
    if hasattr(loss_fn, "seek"):
        loss_fn.seek(row, sample)


def with_state_of(function: Any, call: Function) -> Function:
    """``call``, under the names by which a loss with a state is told which row comes, and names itself."""
    for name in ("seek", "identity"):
        if hasattr(function, name):
            setattr(call, name, getattr(function, name))
    return call


def with_outputs(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The result of ``run()``, and what each outermost call of ``model``, or of its ``forward``, meanwhile returned."""
    outputs: list[Any] = []
    depth = 0
    forward = model.forward

    # A loss that is a method of the model calls its forward, without the hooks of a call.
    def recorded(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            depth -= 1
        if not depth:
            outputs.append(output)
        return output

    # The caller's own hooks may have changed what forward returned.
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not depth:
            outputs[-1] = output

    with hooked([model.register_forward_hook(hook)]), replaced(model, forward=recorded):
        return run(), outputs


def _call_on_batch(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return _call_on_mapping(model, batch)
    if not isinstance(batch, (tuple, list)) or not batch:
        return model(batch)
    count = max(1, len(_required_arguments(model)))
    first = batch[0]
    if count == 1:
        return _call_on_mapping(model, first) if isinstance(first, Mapping) else model(first)
    if isinstance(first, (tuple, list)) and len(first) == count:
        return model(*first)
    return model(*batch[:count])


def _call_on_mapping(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    arguments = _arguments(model)
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return model(**batch)
    taken = {argument.name for argument in arguments} & set(batch)
    if not taken and len(_required_arguments(model)) == 1:
        return model(batch)
    return model(**{name: value for name, value in batch.items() if name in taken})


def _required_arguments(model: nn.Module) -> list[str]:
    """The arguments of the model's ``forward`` without a default."""
    return [
        argument.name
        for argument in _arguments(model)
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
    ]


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return list(inspect.signature(model.forward).parameters.values())


def stream_of(output: Any) -> Tensor | None:
    """The hidden states that a module passes on: its output, or the first entry of a tuple; None for anything else."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a model's inputs or outputs, nested in sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        inner = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, field.name, None) for field in dataclasses.fields(value))
    else:
        return []
    return [tensor for item in inner for tensor in tensors_in(item)]


def main_output(outputs: Any) -> tuple[str, Tensor] | None:
    """What a model computes: its "logits", else its "last_hidden_state", under that name.

    Otherwise the first floating tensor, or else the first one, without a name; None if there is no tensor. Of a tuple
    or list such as (outputs, state) the first entry's.
    """
    for name in ("logits", "last_hidden_state"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return name, found
    if isinstance(outputs, (tuple, list)) and outputs and (found := main_output(outputs[0])) is not None:
        return found
    tensors = tensors_in(outputs)
    return ("", next((one for one in tensors if one.is_floating_point()), tensors[0])) if tensors else None


def first_floating(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating tensor among a call's arguments; None without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def differentiable(output: Any) -> list[Tensor]:
    """The output's tensors that gradients flow from."""
    return [tensor for tensor in tensors_in(output) if tensor.requires_grad]


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Use eval mode inside the block; afterwards every module's own training flag is restored.

    Layers of transformers checkpoint their activations only in train mode. If ``gradient_checkpointing_enable()`` was
    called, they are in train mode when they decide about checkpointing and in eval mode when they run. cuDNN computes
    gradients of recurrent layers only in train mode, so on a GPU these are in train mode without dropout.

    Some modules keep what they computed in eval mode (tables of biases, merged weights) until ``train()`` is called. So
    it is called after the block on models that were in train mode; of others, what such modules keep is restored.
    """
    trained = [model for model in models if model.training]
    kept = [(module, kept_by(module)) for model in models if not model.training for module in model.modules()]
    training = {module: module.training for model in models for module in model.modules()}
    layers = [module for module in training if checkpoints_activations(module)]
    functions: dict[Any, Any] = {layer: layer._gradient_checkpointing_func for layer in layers}
    dropouts = {module: module.dropout for module in training if _run_by_cudnn(module)}
    try:
        for model in models:
            model.eval()
        for recurrent in dropouts:
            recurrent.training, recurrent.dropout = True, 0.0
        for layer, function in functions.items():
            layer._gradient_checkpointing_func = _running_in_eval_mode(layer, function)
            layer.training = True
        yield
    finally:
        for layer, function in functions.items():
            layer._gradient_checkpointing_func = function
        for recurrent, dropout in dropouts.items():
            recurrent.dropout = dropout
        for model in trained:
            model.train()
        for module, values in kept:
            vars(module).update(values)
        for module, flag in training.items():
            module.training = flag


def kept_by(module: nn.Module) -> dict[str, Any]:
    """What a module with a ``train`` of its own may keep of its calls: tensors, lists and dicts in plain attributes."""
    if type(module).train is nn.Module.train:
        return {}
    kinds = (type(None), Tensor, list, tuple, dict)
    plain = {key: value for key, value in vars(module).items() if key[0] != "_" and isinstance(value, kinds)}
    return {key: copy.copy(value) if type(value) in (list, dict) else value for key, value in plain.items()}


def _run_by_cudnn(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    return isinstance(module, nn.RNNBase) and device_of(module).type == "cuda"


@contextlib.contextmanager
def without_cache(*models: nn.Module) -> Iterator[None]:
    """Stop transformers models from building a key/value cache, which a module that runs again would extend."""
    configs: list[Any] = [getattr(model, "config", None) for model in models]
    configs = [config for config in configs if isinstance(getattr(config, "use_cache", None), bool)]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, use in zip(configs, before, strict=True):
            config.use_cache = use


def checkpoints_activations(module: nn.Module) -> bool:
    """Whether the module is a transformers layer whose training flag matters for checkpointing only."""
    is_layer = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return is_layer and getattr(module, "gradient_checkpointing", False)


def _running_in_eval_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint(function, ...)`` whose function finds the layer in eval mode, now and when it is rerun."""

    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def in_eval_mode(*inner_args: Any, **inner_kwargs: Any) -> Any:
            before, layer.training = layer.training, False
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                layer.training = before

        return checkpoint(in_eval_mode, *args, **kwargs)

    return checkpointed
