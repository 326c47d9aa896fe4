"""The changes that an attached scorer makes in a model, and their reversal.

Weights are frozen, norms keep their gradients in one flat vector, and gates sit on inputs and outputs. In the checking
row every weight's gradient is contracted. ``undo`` restores requires_grad, .grad and hooks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obc.model.settings import every_submodule
from obc.model.sharding import data_parallel_modules, is_fully_sharded
from obc.scoring.errors import ScoringError
from obc.scoring.reading import refusals
from obc.scoring.reading.gradients import NormGradients
from obc.scoring.reading.module_readers import ModuleReader, RowReading
from obc.scoring.reading.reading_plan import Plan
from obc.scoring.reading.single_samples import guard

# Modules that have a scorer attached: a second scorer would put gates on gates.
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attachment:
    """The hooks and flags of a model that is being scored."""

    def __init__(self, model: nn.Module, plan: Plan, reading: RowReading) -> None:
        self.model, self.plan, self.reading = model, plan, reading
        self.modules = list(model.modules())
        self.norms: list[NormGradients] = []
        self.warned_of_train_mode = False  # by the first row: the mode may be set after attaching
        self._before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        self._settings = contextlib.ExitStack()
        # fully_shard fixes at the first forward which parameters require a gradient: freezing one now would be final.
        self._freezes = not is_fully_sharded(model)
        self._synchronising = [
            (wrapper, wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync)
            for wrapper in data_parallel_modules(model)
        ]
        self._norm_hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def make(self) -> None:
        """Attach. If this raises, the model is left as it was.

        Raises:
            ScoringError: a scorer is already attached to part of the model, or modules were replaced since planning.
        """
        if any(module in _attached for module in self.modules):
            model = type(self.model).__name__
            raise ScoringError(f"another scorer is attached to this {model} or a part of it; leave its block first")
        refusals.refuse_changed(self.model, self.plan)
        try:
            self._make()
        except BaseException:
            self.undo()
            raise

    def _make(self) -> None:
        _attached.update(self.modules)
        self._settings.enter_context(every_submodule.changed())
        for wrapper, _, _ in self._synchronising:  # each process keeps its own gradients
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        for parameter, requires_grad, _ in self._before:
            parameter.requires_grad_(requires_grad and not self._freezes)
            parameter.grad = None
        for flat in self.plan.flats.values():
            flat.zero()
        self._set_norm_gradients()
        if self.reading.checking:
            self._set_reference_gradients()
        else:
            self.set_weight_gradients()
        for reader in self.plan.readers.values():
            if reader.how == "gate" and reader.scored:
                if not self.reading.per_sample:
                    for slot in reader.slots:
                        slot.bind()
                reader.attach(self.reading)
        # Registered after the gates' hooks: among hooks that are prepended, the last one registered runs first.
        self._guards = [handle for module in self.modules if (handle := guard(module)) is not None]
        self._guards.append(register_optimizer_step_pre_hook(self._refuse_step))
        self.plan.chains.bind(self.norms)

    def undo(self) -> None:
        """Remove the hooks and restore the flags."""
        _attached.difference_update(self.modules)
        for reader in self.plan.readers.values():
            reader.detach()
        for source in self.plan.sources:
            source.gradient.detach()
        for flat in self.plan.flats.values():
            flat.release()
        for handle in (*self._norm_hooks.values(), *self._guards):
            handle.remove()
        for parameter, requires_grad, grad in self._before:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for wrapper, backward, forward in self._synchronising:
            wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = backward, forward
        self._settings.close()
        self.reading.samples = None

    def _refuse_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(parameter) for parameter, _, _ in self._before}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ScoringError(
                f"{type(optimizer).__name__}.step() inside `with scorer:` would change the model between rows, where "
                "only norms have gradients; step optimizers outside the block"
            )

    def drop_gradients(self) -> None:
        """Drop gradients that a row left in weights that could not be frozen."""
        if not self._freezes:
            for parameter, _, _ in self._before:
                parameter.grad = None

    def set_weight_gradients(self) -> None:
        """Freeze the weights after the checking row, except those that are read from their gradient."""
        for source in self.plan.sources:
            if any(reader.how == "weight gradient" and reader.scored for reader in source.readers):
                source.gradient.attach(lambda flat: flat.row)
            else:
                source.gradient.detach()

    def _set_reference_gradients(self) -> None:
        for flat in self.plan.flats.values():
            flat.reference = torch.zeros_like(flat.row)
        for source in self.plan.sources:
            source.gradient.attach(lambda flat: flat.reference, measure=True)

    def _set_norm_gradients(self) -> None:
        self.norms = [NormGradients(entries[0][1].flat, entries) for entries in self.plan.norms]
        for norms in self.norms:
            for parameter in norms.parameters:
                parameter.requires_grad_(True)
            norms.bind()
        for name, reader in self.plan.readers.items():
            if reader.how == "norm gradient" and not reader.used:
                weight = reader.weight
                assert isinstance(weight, nn.Parameter)
                self._norm_hooks[name] = weight.register_post_accumulate_grad_hook(self._note_use(name, reader))

    def _note_use(self, name: str, reader: ModuleReader) -> Callable[[Tensor], None]:
        """A hook that notes that a gradient reached the norm, then removes itself."""

        def note(parameter: Tensor) -> None:
            reader.used = True
            self._norm_hooks.pop(name).remove()

        return note
