"""BatchNorm statistics for a pruned model from batches that need not resemble the training data.

A few calibration batches rarely have the statistics of the training data: recalibrated on them, even an unpruned model
may lose accuracy. But both models can be compared on the same batches. Let M and V be the mean and variance of a norm
channel's input on them, M_full and V_full those in the unpruned model, and mean and var the unpruned norm's own
statistics. Then

    ratio = (V + delta) / (V_full + delta)
    var' + eps = ratio (var + eps),    mean' = M - sqrt(ratio) (M_full - mean)

and the norm's output has the same mean and variance on these batches as in the unpruned model. If the batches resemble
the training data, the new statistics are M and V, as in plain recalibration; if nothing was pruned, they are the norm's
own. delta, a small part of var + eps, protects the scale of channels that hardly vary on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.depth import original_names
from obc.model.hooks import hooked
from obc.model.plan import PruningPlan
from obc.model.processes import ALONE, Processes

# delta relative to a channel's var + eps.
_DELTA = 1e-2
# Positions whose moments are added in the input's type, unless a sample has more.
_POSITIONS = 4096


# Result of one run: a norm's key, the mean and the variance of its input, for each call.
Calls = list[tuple[Any, Tensor, Tensor]]
Moments = tuple[Tensor, Tensor]


class MomentSums:
    """Sums over calls of the mean and the variance of every channel of a norm's input, (C,) float64.

    Args:
        like: (C,), a tensor on the same device.
    """

    def __init__(self, like: Tensor) -> None:
        self._mean = torch.zeros_like(like, dtype=torch.float64)
        self._variance, self._calls = self._mean.clone(), 0

    def add(self, mean: Tensor, variance: Tensor) -> None:
        """Add one call."""
        self._mean += mean
        self._variance += variance
        self._calls += 1

    def gather(self, processes: Processes) -> None:
        """Add the sums of all processes."""
        calls = torch.tensor(self._calls, device="cpu")
        processes.add([self._mean, self._variance, calls])
        self._calls = int(calls)

    def average(self) -> Moments | None:
        """Mean and variance; None if there were no calls."""
        return (self._mean / self._calls, self._variance / self._calls) if self._calls else None


def moments_of(x: Tensor) -> Moments:
    """(C,) float64 mean and variance of every channel of a norm's input, (N, C, ...)."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.device.type != "cpu" or x.numel() == 0:
        variance, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
        return mean.double(), variance.double()
    # On CPUs torch.var_mean over all dimensions but one takes several times as long as what BatchNorms use in training.
    # That adds in the input's type if channels come last, so it gets a few positions at a time.
    parts = x.split(max(1, _POSITIONS * x.shape[1] * x.shape[0] // x.numel()))
    found = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    shares = torch.tensor([len(part) / len(x) for part in parts], dtype=torch.float64, device="cpu")[:, None]
    means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0)


@dataclass(frozen=True)
class Target:
    """The reference for a pruned model's norm: (C,) float64 each.

    Attributes:
        average: M_full and V_full over all batches.
        by_batch: number of a batch -> M_full and V_full there, for each call.
        own: the unpruned norm's mean and var + eps.
        kept: indexes the channels of these that the pruned norm has.
    """

    average: Moments
    by_batch: Mapping[int, Sequence[Moments]]
    own: Moments
    kept: Tensor | slice

    def put(self, norm: _BatchNorm, mean: Tensor, variance: Tensor, full: Moments | None = None) -> None:
        """Give ``norm`` the statistics that follow from M, V and, by default, the average M_full and V_full."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        full_mean, full_variance, own_mean, own_variance = (
            tensor[self.kept] for tensor in (*(full or self.average), *self.own)
        )
        delta = _DELTA * own_variance
        ratio = (variance + delta) / (full_variance + delta)
        norm.running_var.copy_((ratio * own_variance - norm.eps).clamp_min(0))
        norm.running_mean.copy_(mean - ratio.sqrt() * (full_mean - own_mean))


class NormReference:
    """The targets of an unpruned model's BatchNorms, collected from runs inside :meth:`reading`.

    Args:
        norms: norms by name, in eval mode.
    """

    def __init__(self, norms: Mapping[str, _BatchNorm]) -> None:
        self._norms = dict(norms)
        self._by_batch: dict[str, dict[int, list[Moments]]] = {name: {} for name in self._norms}
        self._own = {name: _statistics(norm) for name, norm in self._norms.items()}

    @contextmanager
    def reading(self) -> Iterator[Calls]:
        """Yields the norms' inputs during the run; pass them to :meth:`add`."""
        calls: Calls = []
        with _before_each(self._norms, lambda name, x: calls.append((name, *moments_of(x)))):
            yield calls

    def add(self, calls: Calls, number: int) -> None:
        """Add the inputs that the batch with this number caused."""
        for name, mean, variance in calls:
            self._by_batch[name].setdefault(number, []).append((mean, variance))

    def numbers(self) -> set[int]:
        """The numbers of the batches added so far."""
        return {number for by_batch in self._by_batch.values() for number in by_batch}

    def targets(
        self,
        pruned: nn.Module,
        plan: PruningPlan,
        place: str = "",
        left_out: Container[int] = (),
        processes: Processes = ALONE,
    ) -> dict[_BatchNorm, Target]:
        """The targets of the pruned model's norms; norms that the unpruned model did not run have none.

        Args:
            pruned: the pruned model, or a module of it.
            place: that module's name in the unpruned model.
            left_out: numbers of batches that no longer count.
            processes: averages include the batches of all of them.
        """
        found = {}
        names = {name: name for name, _ in pruned.named_modules()} if place else original_names(pruned, plan.depth)
        for name, unpruned_name in names.items():
            norm, full_name = pruned.get_submodule(name), ".".join(part for part in (place, unpruned_name) if part)
            if full_name not in self._norms or not isinstance(norm, _BatchNorm):
                continue
            sums, by_batch = MomentSums(self._own[full_name][0]), self._by_batch[full_name]
            for number, calls in by_batch.items():
                for moments in calls if number not in left_out else ():
                    sums.add(*moments)
            sums.gather(processes)
            if (average := sums.average()) is not None:
                kept = plan.out_index(full_name, average[0].device)
                found[norm] = Target(average, by_batch, self._own[full_name], kept)
        return found


def take_statistics(pruned: nn.Module, original: nn.Module, plan: PruningPlan) -> None:
    """Give the norms of ``pruned`` the statistics of the unpruned model's, for the remaining channels."""
    for name, unpruned_name in original_names(pruned, plan.depth).items():
        norm = pruned.get_submodule(name)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            continue
        own: Any = original.get_submodule(unpruned_name)
        index = plan.out_index(unpruned_name, norm.running_mean.device)
        norm.running_mean.copy_(own.running_mean[index])
        norm.running_var.copy_(own.running_var[index])


@contextmanager
def matching(targets: Mapping[_BatchNorm, Target], number: int) -> Iterator[Calls]:
    """Make these norms, in eval mode, use in every call the statistics that follow from that call's input.

    The reference is what the unpruned model showed on the batch with the same number, or the average if that is
    unknown. Yields the norms' inputs. The norms keep the statistics of the last call.
    """
    calls: Calls = []
    counts: dict[_BatchNorm, int] = {}

    def match(norm: _BatchNorm, x: Tensor) -> None:
        mean, variance = moments_of(x)
        calls.append((norm, mean, variance))
        place = counts[norm] = counts.get(norm, -1) + 1
        known = targets[norm].by_batch.get(number, ())
        targets[norm].put(norm, mean, variance, known[place] if place < len(known) else None)

    with _before_each({norm: norm for norm in targets}, match):
        yield calls


@contextmanager
def _before_each(norms: Mapping[Any, _BatchNorm], act: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Call ``act`` with the key and the input before every call of one of the norms."""

    def read(key: Any, norm: nn.Module, args: tuple[Any, ...]) -> None:
        # Whoever follows tensors through the run, as obc.recovery.stream_points does, must not see this.
        with torch._C.DisableTorchFunction():
            act(key, args[0].detach())

    with hooked([norm.register_forward_pre_hook(partial(read, key)) for key, norm in norms.items()]):
        yield


def _statistics(norm: _BatchNorm) -> Moments:
    """A norm's mean and var + eps in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.double().clone(), norm.running_var.double() + norm.eps
