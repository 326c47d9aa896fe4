"""Equivalent Pruning, folded: every forward computes the pruned model's weights from the original ones.

A layer whose outputs were pruned gets weight = C W and bias = C b, one whose inputs were pruned weight = W D, one with
both C W D, where W is the unpruned weight and C and D start as rows and columns of the identity. Function, gradients
and training trajectory are those of the network with explicit 1x1 layers; activations are as small as the pruned
model's. :mod:`obc.recovery.folds` has the parametrisations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obc.model.arguments import instance, number, one_of
from obc.model.kept import Kept, PlanError
from obc.model.layouts import is_compiled, layout_of, split_by_group
from obc.model.names import joined, named_modules
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.rules import Rule
from obc.model.slicing import original_tensor, sliced_weight, was_depthwise
from obc.model.usable import refuse_unusable
from obc.recovery.break_even import break_even, positions, warn_below
from obc.recovery.folds import FoldedBias, FoldedTensor, FoldedWeight


def equivalent_pruning(
    pruned_model: nn.Module,
    original_state_dict: Mapping[str, Tensor],
    plan: PruningPlan,
    *,
    decompressor: Literal["identity"] | Mapping[str, Tensor] = "identity",
    factors: Literal["full", "reduced"] = "full",
    order: Literal["CB"] = "CB",
    example_inputs: Any = None,
) -> EquivalentPruning:
    """Give every pruned layer of ``pruned_model`` its original weight with a compressor and a decompressor, in place.

    Linear and convolutional layers are folded, including transposed ones and grouped ones (block-diagonal by conv
    group); norms, embeddings, depthwise convolutions and torch's own attention stay sliced. A fold costs the same for
    every batch size: below :attr:`EquivalentPruning.break_even` positions (batch x height x width, or tokens) per step,
    explicit 1x1 layers would be cheaper.

    The folded model's ``state_dict`` can be saved and loaded as usual. To load it, first build the same folded model
    from the original state dict and the plan.

    Args:
        pruned_model: the naively pruned model, as pruning left it.
        original_state_dict: state dict of the unpruned model.
        plan: the plan from :func:`~obc.integrations.torch_pruning.prune_step`.
        decompressor: "identity", or layer name -> the initial D, (in, kept in) over channels; layers not named start as
            the identity. For "reduced" factors its kept rows must be the identity.
        factors: "full" as in the paper, or "reduced": C and D cover only the dropped channels, and the kept ones stay
            the identity. The same functions can be reached with fewer multiplications and parameters, on another
            training trajectory.
        order: "CB": the compressor comes before the norm. The paper's "BC" and "BCB", with a norm before the
            compressor, can't be folded and are refused.
        example_inputs: the inputs of one training step: a tensor, a tuple of arguments or a mapping of keyword
            arguments. One forward pass in eval mode, without gradients, then counts each layer's positions, and a
            warning names layers below their break-even.

    Returns:
        The handle for training and merging; its ``model`` is ``pruned_model``.

    Raises:
        PlanError: the plan does not describe the model (nothing was changed).
        ValueError: the model is compiled, a layer is already parametrised, a decompressor does not fit, or ``factors``
            or ``order`` has another value.
    """
    one_of("factors", factors, ("full", "reduced"))
    refuse_unusable(pruned_model, "the pruned model")
    if is_compiled(pruned_model):
        raise ValueError("the model is compiled; fold the model that was passed to torch.compile, then compile it")
    refuse_non_plans(plan)
    plan.refuse_unknown(pruned_model, "the pruned model")
    _refuse_order(order, pruned_model, plan)
    layers = [
        prepared
        for name, module in named_modules(pruned_model)
        if (prepared := _prepare(name, module, original_state_dict, plan)) is not None
    ]
    if isinstance(decompressor, str):
        one_of("decompressor", decompressor, ("identity",))
    else:
        instance("decompressor", decompressor, Mapping, "'identity', or a mapping of layers' names to tensors")
    starts: Mapping[str, Tensor] = {} if isinstance(decompressor, str) else decompressor
    if unknown := starts.keys() - {layer.name for layer in layers if layer.kept.in_channels is not None}:
        raise ValueError(f"decompressors for layers whose inputs were not pruned: {', '.join(sorted(unknown))}")
    folds = [(layer, layer.fold(starts.get(layer.name), factors == "reduced")) for layer in layers]
    seen = {} if example_inputs is None else positions(pruned_model, [layer.name for layer in layers], example_inputs)
    for layer, fold in folds:
        layer.register(fold)
    equivalent = EquivalentPruning(pruned_model)
    warn_below(equivalent.break_even, seen)
    return equivalent


def _refuse_order(order: str, model: nn.Module, plan: PruningPlan) -> None:
    if order == "CB":
        return
    if order not in ("BC", "BCB"):
        raise ValueError(f"order must be 'CB', got {order!r}")
    pruned = (name for name, _ in named_modules(model) if plan.get(name, Kept()).out_channels is not None)
    first = next(pruned, "the plan's first layer")
    raise ValueError(
        f"{first}: order {order!r} has a norm between the layer and its compressor; in training the norm depends on "
        f"the batch, so the layer and the compressor can't be folded into one weight; use order='CB'"
    )


@dataclass(frozen=True)
class _Layer:
    name: str
    module: nn.Module
    layout: Rule
    weight: Tensor
    bias: Tensor | None
    kept: Kept

    def fold(self, start: Tensor | None, reduced: bool) -> FoldedWeight:
        """The initial fold of the weight."""
        rows, columns = self.layout.sizes(self.weight)
        kept, groups = self.kept, self.layout.groups
        compressor = decompressor = None
        if kept.out_channels is not None:
            blocks = groups if groups > 1 else kept.out_blocks
            compressor = nn.Parameter(self._factor(kept.out_channels, rows, blocks, None, reduced))
        if kept.in_channels is not None:
            factor = self._factor(kept.in_channels, columns // kept.in_repeat, groups, start, reduced)
            decompressor = nn.Parameter(factor.mT.contiguous())
        names = tuple(self.module._parameters)
        stored = self._by_block(leading) if reduced else kept
        return FoldedWeight(names, compressor, decompressor, self.layout, stored, reduced)

    def _factor(self, kept: Tensor, size: int, blocks: int, start: Tensor | None, reduced: bool) -> Tensor:
        """The initial C, or D transposed: (kept, size), if reduced (kept, dropped), or their diagonal blocks."""
        local = split_by_group(kept, size, blocks)
        if local is None:
            raise PlanError(f"{self.name}: its {blocks} groups keep unequal numbers of channels: {kept.tolist()}")
        local = local.to(self.weight.device)
        factor = self.weight.new_zeros(*local.shape, size // blocks).scatter_(-1, local[..., None], 1.0)
        if start is not None:
            factor = self._started(start, factor)
        if reduced:
            factor = self._dropped(factor, local)
        return factor[0] if blocks == 1 else factor

    def _started(self, start: Tensor, selection: Tensor) -> Tensor:
        expected = (selection[0] if len(selection) == 1 else selection).mT
        if start.shape != expected.shape:
            raise ValueError(
                f"the decompressor of {self.name} must be {tuple(expected.shape)}, got {tuple(start.shape)}; "
                f"it maps kept channels to original ones"
            )
        return start.to(expected).mT.reshape(selection.shape)

    def _dropped(self, factor: Tensor, local: Tensor) -> Tensor:
        """(blocks, kept, dropped): the columns of the dropped channels; those of the kept ones must be the identity."""
        _, kept, size = factor.shape
        order = torch.stack([kept_first(block, size, 1) for block in local])
        ordered = factor.gather(2, order[:, None].expand(-1, kept, -1))
        identity = torch.eye(kept, dtype=factor.dtype, device=factor.device)
        # A least-squares decompressor has the identity there up to rounding.
        if (ordered[..., :kept] - identity).abs().max() > torch.finfo(factor.dtype).eps ** 0.5:
            raise ValueError(
                f"the decompressor of {self.name} mixes kept channels, which reduced factors can't hold; "
                f"pass factors='full', or one whose rows of kept channels are the identity"
            )
        return ordered[..., kept:].contiguous()

    def register(self, fold: FoldedWeight) -> None:
        """Replace the pruned parameters by the original ones and register the folds."""
        weight, bias = self.weight, self.bias
        if fold.reduced:
            order = self._by_block(kept_first)  # all channels of the pruned sides, the kept ones first
            weight = sliced_weight(weight, self.layout, order)
            bias = bias if bias is None or order.out_channels is None else bias[order.out_channels.to(bias.device)]
        self._register("weight", weight, fold)
        if bias is not None and fold.compressor is not None:
            self._register("bias", bias, FoldedBias(fold.parameter_names, fold.compressor, fold.reduced))

    def _by_block(self, indices: Callable[[Tensor, int, int], Tensor]) -> Kept:
        """``indices`` (kept, previous number, number of blocks) for each pruned side."""
        rows, columns = self.layout.sizes(self.weight)
        kept, groups = self.kept, self.layout.groups
        blocks = groups if groups > 1 else kept.out_blocks
        return Kept(
            None if kept.out_channels is None else indices(kept.out_channels, rows, blocks),
            None if kept.in_channels is None else indices(kept.in_channels, columns // kept.in_repeat, groups),
            kept.in_repeat,
        )

    def _register(self, name: str, original: Tensor, folded: FoldedTensor) -> None:
        pruned = getattr(self.module, name)
        values = _positions_outside(original.to(pruned.device))
        setattr(self.module, name, nn.Parameter(values, requires_grad=pruned.requires_grad))
        # unsafe: a fold changes the shape on purpose.
        parametrize.register_parametrization(self.module, name, folded, unsafe=True)


def kept_first(kept: Tensor, size: int, blocks: int) -> Tensor:
    """All ``size`` indices; within each of ``blocks`` equal parts the kept ones come first."""
    dropped = torch.ones(size, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    others = torch.arange(size, device=kept.device)[dropped]
    return torch.cat([kept.reshape(blocks, -1), others.reshape(blocks, -1)], 1).flatten()


def leading(kept: Tensor, size: int, blocks: int) -> Tensor:
    """The positions of the kept indices in :func:`kept_first`."""
    starts = torch.arange(blocks, device=kept.device)[:, None] * (size // blocks)
    return (starts + torch.arange(len(kept) // blocks, device=kept.device)).flatten()


def _positions_outside(weight: Tensor) -> Tensor:
    """A copy of ``weight`` with adjacent in channels, so that neither product of a fold needs a copy."""
    if weight.dim() <= 2:
        return weight.clone(memory_format=torch.contiguous_format)
    return weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _prepare(
    name: str, module: nn.Module, original_state_dict: Mapping[str, Tensor], plan: PruningPlan
) -> _Layer | None:
    """The layer, checked against the plan, if it must be folded."""
    kept, layout = plan.get(name), layout_of(module)
    if kept is None or layout is None:
        return None
    if parametrize.is_parametrized(module):
        raise ValueError(f"{name} is already parametrised; merge or remove its parametrisation before folding")
    tensors = {}
    for tensor_name, pruned in module.named_parameters(recurse=False):
        plan.verify_tensor(original_state_dict, name, module, tensor_name, pruned.detach())
        tensors[tensor_name] = original_tensor(original_state_dict, joined(name, tensor_name))
    if was_depthwise(module, tensors["weight"], kept):
        return None
    return _Layer(name, module, layout, tensors["weight"], tensors.get("bias"), kept)


class EquivalentPruning:
    """A folded model in training.

    Attributes:
        model: the folded model: train, compile, checkpoint or wrap it like any other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def break_even(self) -> dict[str, float]:
        """Per folded layer, the output positions per step above which a fold is cheaper than explicit layers."""
        return {
            name: break_even(chain[0], chain.original)
            for name, module in named_modules(self.model)
            if parametrize.is_parametrized(module, "weight")
            and isinstance((chain := _chains(module)["weight"])[0], FoldedWeight)
        }

    def param_groups(
        self, lr: float, weight_decay: float, lr_div: float = 1.0, wd_div: float = 1.0
    ) -> list[dict[str, Any]]:
        """Two optimizer groups: the model's own parameters, then the compressors and decompressors.

        Args:
            lr: learning rate of the model's own parameters.
            weight_decay: their weight decay.
            lr_div: the factors' learning rate is ``lr / lr_div``.
            wd_div: their weight decay is ``weight_decay / wd_div``; 0 means none.

        Raises:
            ValueError: an argument is no number, or ``lr_div`` is 0.
        """
        for name, value in {"lr": lr, "weight_decay": weight_decay, "lr_div": lr_div, "wd_div": wd_div}.items():
            number(name, value, finite=True)
        if lr_div == 0:
            raise ValueError("lr_div must not be 0: the factors' learning rate is lr / lr_div")
        factors = {id(p): p for _, folded in _folds(self.model) for p in folded.parameters()}
        own = [parameter for parameter in self.model.parameters() if id(parameter) not in factors]
        factor_decay = 0.0 if wd_div == 0 else weight_decay / wd_div
        return [
            {"params": own, "lr": lr, "weight_decay": weight_decay},
            {"params": list(factors.values()), "lr": lr / lr_div, "weight_decay": factor_decay},
        ]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients exactly: fold once, share it in every forward inside, and backpropagate through it at
        the end.

        >>> with equivalent.accumulate():
        ...     for batch in micro_batches:
        ...         loss_fn(model, batch).backward()
        >>> optimizer.step()

        Don't step an optimizer inside. Parameters of folded layers get their gradients at the end of the block, so
        don't use it under DistributedDataParallel; there every backward folds separately.

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

        Build a new optimizer afterwards: the old one holds parameters that the model no longer has, and raises when
        stepped.

        Args:
            model: a deep copy or an averaged copy of :attr:`model` to merge instead; the others stay folded.

        Raises:
            RuntimeError: nothing is folded (any more), or a layer has other parametrisations.
        """
        return merge(self.model if model is None else model)


def merge(model: nn.Module) -> nn.Module:
    """:meth:`EquivalentPruning.merge` of any copy of a folded model, in place.

    Raises:
        RuntimeError: nothing is folded (any more), or a layer has other parametrisations.
    """
    layers = [(name, module) for name, module in named_modules(model) if any(_folds(module, recurse=False))]
    if not layers:
        raise RuntimeError("the model has no folded layer: it was merged already, or never folded")
    for name, module in layers:
        for tensor_name, chain in _chains(module).items():
            if len(chain) != 1 or not isinstance(chain[0], FoldedTensor):
                raise RuntimeError(f"{name}.{tensor_name} has other parametrisations; remove them before merging")
    for name, module in layers:
        _merge_layer(name, module)
    return model


def _merge_layer(name: str, module: nn.Module) -> None:
    order: tuple[str, ...] = ()
    merged: dict[str, nn.Parameter] = {}
    for tensor_name, chain in _chains(module).items():
        order = chain[0].parameter_names
        with torch.no_grad():
            value = chain[0].fold(chain.original)
        merged[tensor_name] = nn.Parameter(value, requires_grad=chain.original.requires_grad)
        for parameter in chain.parameters():
            _RETIRED[id(parameter)] = f"{name}.{tensor_name}"
            weakref.finalize(parameter, _RETIRED.pop, id(parameter), None)
    _watch_optimizers()
    # The dynamic class is left alone: copies of this module share it.
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
            chains = _chains(module)
            yield from ((chain.original, chain[0]) for chain in chains.values() if isinstance(chain[0], FoldedTensor))


def _chains(module: nn.Module) -> Any:
    return module.parametrizations


# Parameters removed by a merge, by id, as long as something (an optimizer) keeps them alive.
_RETIRED: dict[int, str] = {}
_watching = False


def _watch_optimizers() -> None:
    """Make every optimizer refuse to step parameters that a merge removed from their model."""
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
