"""Compares two models on the same batch: the inputs of every layer, and the models' outputs.

For each channel that a layer reads, one number is kept: the sum over all positions, each weighted by a random number
that is the same for both models. If two channels or positions swap places, the sums differ. This detects a misplaced
channel even where the output hides it, behind a weight that is zero or too small for float32, and it tells where two
models diverge.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.autocast import tf32_is_allowed
from obc.model.depth import Skipped
from obc.model.evaluation import Run, evaluating, first_floating, tensors_in
from obc.model.hooks import hooked
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.rules import Rule, rule_for
from obc.model.usable_batches import all_finite
from obc.structures.units import without

# Roundings per layer that may accumulate like a random walk over the layers, in float32 and float64.
_ROUNDINGS = 1000
# Half precision is coarser: this many roundings are allowed, even if they exceed this share.
_FEW_ROUNDINGS, _SMALL_SHARE = 4, 1e-2
# A fault changes a value by about the size of the value.
_LARGEST = 0.5
_SEED = 0x0BC


@dataclass
class LayerInput:
    """The input of one call of one layer.

    Attributes:
        sums: (C,) random sums over the positions.
        sizes: (C,) roots of the sums of squares.
    """

    sums: Tensor
    sizes: Tensor


@dataclass
class Observation:
    """One forward pass.

    Attributes:
        readings: layer -> one reading per call, in the order of first calls.
        outputs: the floating tensors that were returned.
        called: modules that were called.
        modules: all modules of the model except stand-ins.
        rounding: the coarsest relative rounding of the numbers that layers read and returned.
        calls: number of calls of layers.
        draws: whether the model drew random numbers.
    """

    readings: dict[str, list[LayerInput]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    rounding: float = 0.0
    calls: int = 0
    draws: bool = False

    @property
    def tolerance(self) -> float:
        """The largest relative difference that rounding explains, from the dtype and the number of layers.

        1000 roundings times the root of the number of layers: at 100 layers 1e-3 for float32 and 2e-12 for float64.
        Above a hundredth only 4 roundings: 0.3 for bfloat16 at 100 layers, where a misplaced channel is off by about
        1.4. Half precision is thus proved by what layers read; in its outputs only large differences show.
        """
        walk = self.rounding * math.sqrt(max(self.calls, 1))
        return min(_ROUNDINGS * walk, max(_FEW_ROUNDINGS * walk, _SMALL_SHARE), _LARGEST)

    def finite(self) -> bool:
        """Whether all outputs are finite."""
        return all_finite(self.outputs)


@dataclass(frozen=True)
class Difference:
    """The difference between two models.

    Attributes:
        error: the largest relative difference; infinite if shapes differ.
        where: the first layer or output where it exceeds the tolerance, with the fault; None if there is none.
    """

    error: float
    where: str | None


def observe(model: nn.Module, run: Run, lost: Mapping[str, Tensor] | None = None) -> Observation:
    """Run ``model`` once in eval mode, without gradients and with the same random numbers every time.

    Args:
        run: returns what the model returns, in any nesting.
        lost: layer -> channels to leave out of what it reads.
    """
    seen = Observation()
    handles = []
    for name, module in named_modules(model):
        if not isinstance(module, Skipped):
            seen.modules.add(name)
        record = partial(_record, seen, name, (lost or {}).get(name))
        handles.append(module.register_forward_hook(record, with_kwargs=True))
    generators = _generators(model)

    def watched(model: nn.Module) -> Any:
        before = [generator.get_state() for generator in generators]
        returned = run(model)
        seen.draws = any(not torch.equal(one.get_state(), was) for one, was in zip(generators, before, strict=True))
        return returned

    with hooked(handles):
        returned = run_alike(model, watched)
    seen.outputs = [tensor.detach() for tensor in returned if tensor.is_floating_point()]
    if not seen.calls:  # all weights lie outside layers
        seen.rounding = max((_rounding(tensor) for tensor in seen.outputs), default=0.0)
    return seen


def run_alike(model: nn.Module, run: Run) -> list[Tensor]:
    """The tensors that ``run(model)`` returns, in eval mode, without gradients, with the same random numbers."""
    with evaluating(model), torch.no_grad(), _same_random_numbers(model):
        return tensors_in(run(model))


def _record(
    seen: Observation, name: str, lost: Tensor | None, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    """Record what one call of the layer ``name`` reads, without the channels ``lost``."""
    seen.called.add(name)
    if layout_of(module) is None:
        return
    rule = rule_for(module)
    x = first_floating(args, kwargs)
    if not isinstance(rule, Rule) or rule.in_dim is None or x is None:
        return
    seen.calls += 1
    for tensor in (x, output):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            seen.rounding = max(seen.rounding, _rounding(tensor))
    seen.readings.setdefault(name, []).append(_read(x.detach(), rule.in_dim, lost))


def _rounding(tensor: Tensor) -> float:
    """Relative rounding of arithmetic on a tensor: GPUs may multiply float32 with eleven bits (TF32)."""
    precise = torch.finfo(tensor.dtype).eps
    if tensor.dtype == torch.float32 and tensor.device.type == "cuda":
        return 2.0**-11 if tf32_is_allowed() else precise
    return precise


def _read(x: Tensor, dim: int, lost: Tensor | None) -> LayerInput:
    x = x if x.dtype == torch.float64 else x.float()
    if lost is not None:
        x = without(x, lost, dim)
    dim %= x.dim()
    others = [axis for axis in range(x.dim()) if axis != dim]
    positions = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    generator = torch.Generator().manual_seed(_SEED)
    weights = torch.randn(positions, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    if not others:
        return LayerInput((x * weights).cpu(), x.abs().cpu())
    return LayerInput((x * weights).sum(others).cpu(), torch.linalg.vector_norm(x, dim=others).cpu())


def cuda_devices(model: nn.Module) -> list[int]:
    """The numbers of the GPUs that hold parameters of ``model``."""
    if not torch.cuda.is_initialized():  # then no tensor is on one
        return []
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(devices=cuda_devices(model)):
        # torch.manual_seed would also seed GPUs that do not hold the model, and these are not restored.
        for generator in _generators(model):
            generator.manual_seed(_SEED)
        yield


def _generators(model: nn.Module) -> list[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators[device] for device in cuda_devices(model))]


def compare(expected: Observation, got: Observation) -> Difference:
    """The difference of ``got`` from ``expected``: per channel of layers' inputs, per tensor of outputs."""
    tolerance, largest = expected.tolerance, 0.0
    for name, readings in got.readings.items():
        wanted = expected.readings.get(name, [])
        if len(wanted) != len(readings):
            return Difference(math.inf, f"{name} runs {len(readings)} times instead of {len(wanted)}")
        for one, other in zip(wanted, readings, strict=True):
            if one.sums.shape != other.sums.shape:
                return Difference(math.inf, f"{name} reads {len(other.sums)} channels instead of {len(one.sums)}")
            error = _channel_error(one, other)
            largest = max(largest, error)
            if not error <= tolerance:
                return Difference(largest, f"what {name} reads differs by {error:.2g}")
    # Modules in removed blocks and branches don't run any more.
    if lacking := [name for name in expected.readings if name not in got.readings and name in got.modules]:
        return Difference(math.inf, f"{lacking[0]} does not run")
    if (shapes := _shapes(expected)) != (other_shapes := _shapes(got)):
        return Difference(math.inf, f"the model's output changes from {shapes} to {other_shapes}")
    for index, (one_leaf, other_leaf) in enumerate(zip(expected.outputs, got.outputs, strict=True)):
        error = _relative(other_leaf - one_leaf, one_leaf)
        largest = max(largest, error)
        if not error <= tolerance:
            return Difference(largest, f"output {index} differs by {error:.2g}")
    return Difference(largest, None)


def _shapes(seen: Observation) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in seen.outputs]


def _channel_error(one: LayerInput, other: LayerInput) -> float:
    """The largest difference of a channel, relative to its size, or to the mean size if that is larger."""
    if not len(one.sums):
        return 0.0
    sizes = torch.maximum(one.sizes, one.sizes.mean())
    sizes = torch.where(sizes > 0, sizes, other.sizes)  # if it is zero, the other's
    error = (other.sums - one.sums).abs() / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    worst = float(error.max())
    return math.inf if math.isnan(worst) else worst


def _relative(difference: Tensor, reference: Tensor) -> float:
    size = float(torch.linalg.vector_norm(reference.double()))
    error = float(torch.linalg.vector_norm(difference.double())) / (size or 1.0)
    return math.inf if math.isnan(error) else error
