"""Running a model: eval mode with the user's activation checkpointing left on, and how a model is called on inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

ForwardFn = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model(*inputs)`` of a tuple or list, ``model(**inputs)`` of a dict, ``model(inputs)`` of anything else."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own training flag is restored after it.

    Layers of transformers checkpoint their activations in train mode only: where ``gradient_checkpointing_enable()``
    was called, they are in train mode when they decide about it, and in eval mode when they run.
    """
    training = {module: module.training for model in models for module in model.modules()}
    layers = [module for module in training if checkpoints_activations(module)]
    functions: dict[Any, Any] = {layer: layer._gradient_checkpointing_func for layer in layers}
    try:
        for model in models:
            model.eval()
        for layer, function in functions.items():
            layer._gradient_checkpointing_func = _running_in_eval_mode(layer, function)
            layer.training = True
        yield
    finally:
        for layer, function in functions.items():
            layer._gradient_checkpointing_func = function
        for module, flag in training.items():
            module.training = flag


def checkpoints_activations(module: nn.Module) -> bool:
    """Whether the module is a layer of transformers that nothing but checkpointing tells its training flag."""
    is_layer = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return is_layer and getattr(module, "gradient_checkpointing", False)


def _running_in_eval_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint(function, ...)`` whose function, now and when it is run again, finds the layer in eval mode."""

    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def in_eval_mode(*inner_args: Any, **inner_kwargs: Any) -> Any:
            before, layer.training = layer.training, False
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                layer.training = before

        return checkpoint(in_eval_mode, *args, **kwargs)

    return checkpointed
