"""New statistics for the BatchNorms of one module of the chain, once its layers are corrected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.evaluation import stream_of
from obc.model.plan import PruningPlan
from obc.model.processes import Processes
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.calibration import named_norms, recalibrate_from, restorer
from obc.recovery.norm_reference import NormReference


class ModuleNorms:
    """The BatchNorms of a module that may get new statistics, and what the unpruned model shows of them."""

    def __init__(self, name: str, unpruned: nn.Module, pruned: nn.Module, changeable: Sequence[_BatchNorm]) -> None:
        self.name, self.pruned = name, pruned
        self.norms = [norm for norm in named_norms(pruned).values() if any(norm is other for other in changeable)]
        self._reference = NormReference(named_norms(unpruned, name) if self.norms else {})

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Inside the block the unpruned module runs on the calibration batch with this index."""
        with self._reference.reading() as calls:
            yield
        if all_finite(calls):  # otherwise the passes over the pruned model leave the batch out and say why
            self._reference.add(calls, index)

    def renew(
        self,
        run: Callable[[int], Any],
        calibration: Sequence[int],
        wanted: Mapping[int, Tensor],
        plan: PruningPlan,
        processes: Processes,
    ) -> tuple[bool, dict[int, Tensor]]:
        """New statistics if they bring the outputs closer; whether they do, and the outputs on the held-out batches.

        Args:
            run: runs the pruned module on a batch given by its index.
            calibration: the batches to take statistics from.
            wanted: held-out batch -> the unpruned module's output.
            processes: all of them decide together.
        """
        before, outputs = self._distance(run, wanted, processes)
        put_back = restorer(self.norms)
        batches = UsableBatches(()).part([(index, index) for index in calibration])
        left_out = set(self._reference.numbers()) - set(calibration)
        targets = self._reference.targets(self.pruned, plan, self.name, left_out, processes)
        recalibrate_from(self.pruned, self.norms, batches, lambda _, index: run(index), processes, targets)
        after, renewed = self._distance(run, wanted, processes)
        if after < before:
            return True, renewed
        put_back()
        return False, outputs

    @staticmethod
    def _distance(
        run: Callable[[int], Any], wanted: Mapping[int, Tensor], processes: Processes
    ) -> tuple[float, dict[int, Tensor]]:
        """The squared distance of the outputs to those wanted, and the outputs."""
        total, outputs, comparable = 0.0, dict[int, Tensor](), True
        for index, full in wanted.items():
            got = stream_of(run(index))
            assert got is not None
            outputs[index] = got
            # If the stream itself lost channels nothing can be compared, and the norms stay.
            comparable = comparable and got.shape == full.shape
            if comparable:
                total += float((got.double() - full.to(got.device).double()).square().sum())
        return processes.total(total if comparable else 0.0)[0], outputs


def reads_the_same(
    names: Sequence[str], models: Sequence[nn.Module], runs: Sequence[Callable[[], Any]], plan: PruningPlan
) -> bool:
    """Whether these norms of (unpruned, pruned) models read tensors of the same moments, but for dropped channels."""
    seen = []
    for model, run in zip(models, runs, strict=True):
        norms = {name: norm for name, norm in named_norms(model).items() if name in names}
        with NormReference(norms).reading() as calls:
            run()
        seen.append(calls)
    if [name for name, *_ in seen[0]] != [name for name, *_ in seen[1]]:
        return False
    for (name, *full), (_, *own) in zip(*seen, strict=True):
        index = plan.out_index(name, own[0].device)
        if not all(torch.allclose(a[index], b, rtol=1e-4, atol=1e-6) for a, b in zip(full, own, strict=True)):
            return False
    return True
