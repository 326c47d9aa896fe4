"""Equivalent Pruning, folded: the pruned model's weights computed from the original ones in every forward.

A layer whose outputs were pruned gets weight = C W and bias = C b, one whose inputs were pruned weight = W D, one
with both C W D, over the unpruned W, with C and D starting as rows and columns of the identity. Function, gradients
and training trajectory are those of the network with explicit 1x1 layers, at the pruned model's activations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obc import ops
from obc.equivalent.layers import Layout, is_compiled, is_depthwise, layout_of, split_by_group
from obc.equivalent.plan import Kept, PlanError, PruningPlan, named_modules, original_tensor


class FoldedTensor(nn.Module):
    """A parametrisation: one tensor of a layer as a fold of the original's.

    Attributes:
        held: the folded tensor that every forward shares inside :meth:`EquivalentPruning.accumulate`.
        parameter_names: the layer's parameters in their order, to restore it when merging.
    """

    def __init__(self, parameter_names: tuple[str, ...]) -> None:
        super().__init__()
        self.parameter_names = parameter_names
        self.held: Tensor | None = None

    def forward(self, original: Tensor) -> Tensor:
        return self.fold(original) if self.held is None else self.held

    def fold(self, original: Tensor) -> Tensor:
        raise NotImplementedError


class FoldedWeight(FoldedTensor):
    """weight = C W D, by :func:`obc.ops.fold`."""

    def __init__(
        self,
        parameter_names: tuple[str, ...],
        compressor: nn.Parameter | None,
        decompressor: nn.Parameter | None,
        layout: Layout,
        in_repeat: int,
    ) -> None:
        super().__init__(parameter_names)
        self.compressor, self.decompressor = compressor, decompressor
        self.groups, self.transposed, self.in_repeat = layout.groups, layout.transposed, in_repeat

    def fold(self, original: Tensor) -> Tensor:
        if not self.transposed:
            return ops.fold(original, self.compressor, self.decompressor, self.groups, self.in_repeat)
        rows, columns = (None if factor is None else factor.mT for factor in (self.decompressor, self.compressor))
        return ops.fold(original, rows, columns, self.groups, self.in_repeat)  # of the weight transposed


class FoldedBias(FoldedTensor):
    """bias = C b, with the C of the layer's weight."""

    def __init__(self, parameter_names: tuple[str, ...], compressor: nn.Parameter) -> None:
        super().__init__(parameter_names)
        self.compressor = compressor

    def fold(self, original: Tensor) -> Tensor:
        return ops.fold(original[:, None], self.compressor)[:, 0]


def equivalent_pruning(
    pruned_model: nn.Module,
    original_state_dict: Mapping[str, Tensor],
    plan: PruningPlan,
    *,
    decompressor: Literal["identity"] | Mapping[str, Tensor] = "identity",
) -> EquivalentPruning:
    """Give every pruned layer of ``pruned_model`` its original weight behind a compressor and a decompressor, in place.

    Linear and convolutional layers (transposed and grouped too, block-diagonal by group) are folded; norms,
    embeddings, depthwise convolutions and torch's own attention stay sliced. A fold costs the same for every batch
    size: it pays off above about out * kept / (1 - kept) positions (batch x height x width, or tokens) per step.

    The folded model's ``state_dict`` can be saved and loaded like any other's; to load it, build the same folded
    model from the original state dict and the plan first.

    Args:
        pruned_model: the naively pruned model, as pruning left it.
        original_state_dict: the unpruned model's.
        plan: what :func:`~obc.integrations.torch_pruning.prune_step` recorded.
        decompressor: "identity", or per layer name the start of its D, (in, kept in) over channels; layers that it
            doesn't name start as the identity.

    Returns:
        The handle for training and merging; its ``model`` is ``pruned_model``.

    Raises:
        PlanError: the plan doesn't describe the model (nothing has been changed then).
        ValueError: the model is compiled, a layer is already parametrised, or a decompressor doesn't fit.
    """
    if is_compiled(pruned_model):
        raise ValueError("the model is compiled; fold the model that was passed to torch.compile, then compile it")
    layers = [
        prepared
        for name, module in named_modules(pruned_model)
        if (prepared := _prepare(name, module, original_state_dict, plan)) is not None
    ]
    starts: Mapping[str, Tensor] = {} if decompressor == "identity" else decompressor  # type: ignore[assignment]
    if unknown := starts.keys() - {layer.name for layer in layers if layer.in_kept is not None}:
        raise ValueError(f"decompressors for layers whose inputs were not pruned: {', '.join(sorted(unknown))}")
    factors = [(layer, *layer.factors(starts.get(layer.name))) for layer in layers]
    for layer, compressor, start in factors:
        layer.fold(compressor, start)
    return EquivalentPruning(pruned_model)


@dataclass(frozen=True)
class _Layer:
    """A layer about to be folded."""

    name: str
    module: nn.Module
    layout: Layout
    weight: Tensor
    bias: Tensor | None
    kept: Kept

    @property
    def in_kept(self) -> Tensor | None:
        return self.kept.in_channels

    def factors(self, start: Tensor | None) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """C and D as they start."""
        rows, columns = self.layout.sizes(self.weight)
        compressor = decompressor = None
        if self.kept.out_channels is not None:
            blocks = self.layout.groups if self.layout.groups > 1 else self.kept.out_blocks
            compressor = nn.Parameter(self._selection(self.kept.out_channels, rows, blocks))
        if self.in_kept is not None:
            selection = self._selection(
                self.in_kept, columns // self.kept.in_repeat, self.layout.groups
            ).mT.contiguous()
            decompressor = nn.Parameter(selection if start is None else self._started(start, selection))
        return compressor, decompressor

    def _selection(self, kept: Tensor, size: int, blocks: int) -> Tensor:
        """Rows of the identity: (kept, size), or its diagonal blocks."""
        if blocks == 1:
            return torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)[kept.to(self.weight.device)]
        local = split_by_group(kept, size, blocks)
        if local is None:
            raise PlanError(f"{self.name}: its {blocks} groups keep unequal numbers of channels: {kept.tolist()}")
        return torch.eye(size // blocks, dtype=self.weight.dtype, device=self.weight.device)[
            local.to(self.weight.device)
        ]

    def _started(self, start: Tensor, selection: Tensor) -> Tensor:
        if start.shape != selection.shape:
            raise ValueError(
                f"the decompressor of {self.name} must be {tuple(selection.shape)}, got {tuple(start.shape)}; "
                f"it maps kept channels to original ones"
            )
        return start.to(selection).clone()

    def fold(self, compressor: nn.Parameter | None, decompressor: nn.Parameter | None) -> None:
        """Replace the pruned parameters by the original ones and register the folds."""
        names = tuple(self.module._parameters)
        layout, repeat = self.layout, self.kept.in_repeat
        self._register("weight", self.weight, FoldedWeight(names, compressor, decompressor, layout, repeat))
        if self.bias is not None and compressor is not None:
            self._register("bias", self.bias, FoldedBias(names, compressor))

    def _register(self, name: str, original: Tensor, folded: FoldedTensor) -> None:
        pruned = getattr(self.module, name)
        values = _positions_outside(original.to(pruned.device))
        setattr(self.module, name, nn.Parameter(values, requires_grad=pruned.requires_grad))
        # unsafe: a fold changes the shape, which is what it is for.
        parametrize.register_parametrization(self.module, name, folded, unsafe=True)


def _positions_outside(weight: Tensor) -> Tensor:
    """A copy of ``weight`` with its in channels next to each other: both products of a fold then need no copy."""
    if weight.dim() <= 2:
        return weight.clone(memory_format=torch.contiguous_format)
    return weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _prepare(
    name: str, module: nn.Module, original_state_dict: Mapping[str, Tensor], plan: PruningPlan
) -> _Layer | None:
    """The layer if it is to be folded; checked against the plan."""
    kept, layout = plan.get(name), layout_of(module)
    if kept is None or layout is None:
        return None
    if parametrize.is_parametrized(module):
        raise ValueError(f"{name} is already parametrised; merge or remove its parametrisation before folding")
    tensors = {}
    for tensor_name, pruned in module.named_parameters(recurse=False):
        plan.verify_tensor(original_state_dict, name, module, tensor_name, pruned.detach())
        tensors[tensor_name] = original_tensor(original_state_dict, f"{name}.{tensor_name}" if name else tensor_name)
    if is_depthwise(module, tensors["weight"]):
        return None
    return _Layer(name, module, layout, tensors["weight"], tensors.get("bias"), kept)


class EquivalentPruning:
    """A folded model in training.

    Attributes:
        model: the folded model: train, compile, checkpoint or wrap it like any other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def param_groups(
        self, lr: float, weight_decay: float, lr_div: float = 1.0, wd_div: float = 1.0
    ) -> list[dict[str, Any]]:
        """Two optimizer groups: the model's own parameters, then the compressors and decompressors.

        Args:
            lr: learning rate of the model's own parameters.
            weight_decay: their weight decay.
            lr_div: the factors' learning rate is ``lr / lr_div``.
            wd_div: their weight decay is ``weight_decay / wd_div``; 0 means none.
        """
        factors = {id(p): p for _, folded in _folds(self.model) for p in folded.parameters()}
        own = [parameter for parameter in self.model.parameters() if id(parameter) not in factors]
        factor_decay = 0.0 if wd_div == 0 else weight_decay / wd_div
        return [
            {"params": own, "lr": lr, "weight_decay": weight_decay},
            {"params": list(factors.values()), "lr": lr / lr_div, "weight_decay": factor_decay},
        ]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Exact gradient accumulation: fold once, share it in every forward inside, go back through it once at the end.

        >>> with equivalent.accumulate():
        ...     for batch in micro_batches:
        ...         loss_fn(model, batch).backward()
        >>> optimizer.step()

        Don't step an optimizer inside. Parameters of folded layers get their gradients at the end of the block, so
        under DistributedDataParallel leave it out: there every backward folds for itself.

        Raises:
            RuntimeError: the model is merged, or blocks are nested.
        """
        folds = list(_folds(self.model))
        if not folds:
            raise RuntimeError("the model has no folded layer (it is merged already)")
        if any(folded.held is not None for _, folded in folds):
            raise RuntimeError("accumulate() can't be nested: the folded tensors are shared already")
        tensors = [folded.fold(original) for original, folded in folds]
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        for (_, folded), leaf in zip(folds, leaves, strict=True):
            folded.held = leaf
        try:
            yield
        finally:
            for _, folded in folds:
                folded.held = None
        reached = [(tensor, leaf.grad) for tensor, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])

    def merge(self, model: nn.Module | None = None) -> nn.Module:
        """Evaluate every fold once and return the plain pruned model, which needs no obc; in place.

        Build a new optimizer afterwards: the old one holds parameters that the model no longer has, and stepping it
        raises.

        Args:
            model: a deep copy or an averaged copy of :attr:`model` to merge instead of it; the others stay folded.

        Raises:
            RuntimeError: nothing is folded (any more), or a layer has further parametrisations.
        """
        return merge(self.model if model is None else model)


def merge(model: nn.Module) -> nn.Module:
    """:meth:`EquivalentPruning.merge` of any copy of a folded model, in place."""
    layers = [(name, module) for name, module in named_modules(model) if any(_folds(module, recurse=False))]
    if not layers:
        raise RuntimeError("the model has no folded layer: it was merged already, or never folded")
    for name, module in layers:
        chains: Any = module.parametrizations
        for tensor_name, chain in chains.items():
            if len(chain) != 1 or not isinstance(chain[0], FoldedTensor):
                raise RuntimeError(f"{name}.{tensor_name} has other parametrisations; remove them before merging")
    for name, module in layers:
        _merge_layer(name, module)
    return model


def _merge_layer(name: str, module: nn.Module) -> None:
    parametrizations: Any = module.parametrizations
    order: tuple[str, ...] = ()
    merged: dict[str, nn.Parameter] = {}
    for tensor_name, chain in parametrizations.items():
        order = chain[0].parameter_names
        with torch.no_grad():
            value = chain[0].fold(chain.original)
        merged[tensor_name] = nn.Parameter(value, requires_grad=chain.original.requires_grad)
        for parameter in chain.parameters():
            _RETIRED[id(parameter)] = f"{name}.{tensor_name}"
            weakref.finalize(parameter, _RETIRED.pop, id(parameter), None)
    _watch_optimizers()
    # The dynamic class stays as it is: copies of this module share it.
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    kept = dict(module._parameters)
    module._parameters.clear()
    for parameter_name in order:
        module._parameters[parameter_name] = merged.get(parameter_name, kept.get(parameter_name))


def _folds(model: nn.Module, recurse: bool = True) -> Iterator[tuple[Tensor, FoldedTensor]]:
    """(original, fold) of every folded tensor."""
    for module in model.modules() if recurse else (model,):
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            yield from ((chain.original, chain[0]) for chain in chains.values() if isinstance(chain[0], FoldedTensor))


# Parameters that a merge took out of a model, by id, as long as something (an optimizer) keeps them alive.
_RETIRED: dict[int, str] = {}
_watching = False


def _watch_optimizers() -> None:
    """Make every optimizer refuse to step parameters that a merge has taken out of their model."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_retired)
        _watching = True


def _refuse_retired(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _RETIRED:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (layer := _RETIRED.get(id(parameter))) is not None:
                raise RuntimeError(
                    f"this optimizer holds parameters of {layer} from before the merge; "
                    f"build a new optimizer from the merged model's parameters"
                )
