"""The state that scoring must restore: every trace that it could leave on a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Snapshot:
    """Everything about a model that scoring must give back."""

    HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.parameters = dict(model.named_parameters())
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.grads = {name: p.grad for name, p in self.parameters.items()}
        self.grad_values = {name: None if p.grad is None else p.grad.clone() for name, p in self.parameters.items()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.hooks = self._hooks()
        self.attributes = self._attributes()
        self.fast_path = torch.backends.mha.get_fastpath_enabled()

    def _hooks(self) -> dict[str, list[Any]]:
        found = {
            f"{name}.{kind}": list(getattr(module, kind).values())
            for name, module in self.model.named_modules()
            for kind in self.HOOKS
        }
        for name, parameter in self.model.named_parameters():
            found[name] = list((parameter._post_accumulate_grad_hooks or {}).values())
            found[name] += list((parameter._backward_hooks or {}).values())
        return found

    def _attributes(self) -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in self.model.named_modules()}

    def assert_restored(self) -> None:
        now = dict(self.model.named_parameters())
        assert {name: id(p) for name, p in now.items()} == {name: id(p) for name, p in self.parameters.items()}
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.values[name]), f"{name} has changed"
        for name, parameter in now.items():
            assert parameter.requires_grad == self.requires_grad[name], f"{name}.requires_grad"
            assert parameter.grad is self.grads[name], f"{name}.grad is another tensor"
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, self.grad_values[name]), f"{name}.grad has changed"
        assert {name: module.training for name, module in self.model.named_modules()} == self.training
        assert self._hooks() == self.hooks
        assert self._attributes() == self.attributes
        assert torch.backends.mha.get_fastpath_enabled() == self.fast_path


def unusual(model: nn.Module) -> nn.Module:
    """Give a model a state that is easily lost: mixed training flags, frozen parameters, gradients, a user's hook."""
    generator = torch.Generator().manual_seed(3)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.requires_grad_(False)
        elif index % 3 == 1:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    next(model.children()).register_forward_hook(lambda module, args, output: None)
    return model
