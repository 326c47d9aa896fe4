"""The final proof of ``obc.prune``: on the first batch, the pruned model equals the masked unpruned one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.arguments import listed, no_batches
from obc.model.errors import layer_in
from obc.model.evaluation import Run
from obc.model.kept import staying
from obc.model.names import is_within, joined, named_modules, named_tensors
from obc.model.shared_copy import shared_copy
from obc.model.usable_batches import UsableBatches, all_finite
from obc.pruning.report import PruningReport
from obc.structures.comparison import Difference, compare, observe, run_alike
from obc.structures.masking import Lost, lost_channels, masked_copy, unmaskable
from obc.structures.proof import ProofError, lost_inputs, prove
from obc.structures.protocol import Structure
from obc.structures.reaching import in_train_mode
from obc.structures.units import without

_MODEL = "the whole model"


def first_finite(batches: UsableBatches) -> Any:
    """The first batch whose floating tensors are finite, or the first batch if there is none.

    Raises:
        ValueError: no batch has samples.
    """
    first = None
    for number, batch in enumerate(batches):
        first = batch if number == 0 else first
        if all_finite(batch):
            return batch
    if first is None:
        batches.refuse_many()
        raise ValueError(no_batches("score"))
    return first


def prove_groups(structure: Structure, run: Run, report: PruningReport) -> None:
    """Try the structure's groups, unless that was done when it was made, and report the result."""
    proof = getattr(structure, "proof", None)
    if proof is None and hasattr(structure, "twin") and hasattr(structure, "leave_out"):
        proof = prove(structure, run)  # type: ignore[arg-type]
    report.proof = proof
    if proof is None:
        reason = f"{type(structure).__name__} can't be tried on a copy of the model: it has no twin and leave_out"
        report.unproved |= {group.name: reason for group in structure.groups}
    else:
        report.unproved |= proof.unproved


def take_out_blocks(structure: Structure, run: Run) -> None:
    """Delete removed blocks from their lists; the model must compute the same as with stand-ins.

    Raises:
        ProofError: it does not.
    """
    compact = getattr(structure, "compact", None)
    if compact is None or not structure.plan.depth:
        return
    before = observe(structure.model, run)
    compact()
    after = observe(structure.model, run)
    if len(before.outputs) != len(after.outputs):  # one hidden state per block
        before.outputs, after.outputs = before.outputs[:1], after.outputs[:1]
    before.readings = after.readings = {}  # their names differ
    found = compare(before, after)
    if found.where is not None:
        raise ProofError(
            f"with its blocks deleted the model computes something else: {found.where}; what a block does "
            "depends on its place; prune by 'sublayers', or by other kinds"
        )


class FinalProof:
    """Remembers the unpruned model and what is removed; beyond what undoing the pruning needs, it copies vectors."""

    def __init__(self, structure: Structure, run: Run) -> None:
        self._reference, self._groups = shared_copy(structure.model), tuple(structure.groups)
        for parameter in self._reference.parameters():
            if parameter.dim() <= 1:  # compensation writes into biases that a later step cuts
                parameter.data = parameter.detach().clone()
        more: Sequence[Run] = getattr(structure, "more_runs", ())
        self._run = (lambda model: [run(model), *(one(model) for one in more)]) if more else run
        self._alive = {group.name: torch.arange(group.size, device="cpu") for group in self._groups}

    def note(self, removed: Mapping[str, Tensor]) -> None:
        """Record that these units, as indices into the present groups, are removed."""
        for name, units in removed.items():
            self._alive[name] = without(self._alive[name], units.cpu())

    def check(self, model: nn.Module, report: PruningReport) -> None:
        """Compare ``model`` with the masked unpruned one, both normalised by the statistics of the unpruned one.

        Raises:
            ProofError: they differ; the message names the first layer that does.
        """
        gone = {group.name: staying(group.size, self._alive[group.name]) for group in self._groups}
        refused = unmaskable(self._reference, (group for group in self._groups if len(gone[group.name])))
        if refused:
            name, reason = next(iter(refused.items()))
            report.unproved[_MODEL] = f"{name} can't be masked: {reason}"
            return
        difference, tolerance = self._difference(model, gone, report)
        if difference is None:
            return
        if difference.where is not None:
            raise ProofError(
                f"the pruned model does not compute what the unpruned one computes with the same units masked: "
                f"{difference.where}, where rounding explains {tolerance:.2g}; leave the layers before it out with "
                "ignored_layers. verify=False skips this check"
            )
        report.error, report.tolerance = difference.error, tolerance

    def check_train_mode(self, model: nn.Module, report: PruningReport) -> None:
        """Warn if ``model`` fails in train mode on the first batch, where the unpruned one does not.

        Evaluation does not see what only runs in train mode, such as a running mean of channels in a buffer.
        """
        run = in_train_mode(self._run)
        try:
            run_alike(shared_copy(self._reference), run)
        except Exception:  # the model's own code: it may not run like this, for example without targets
            return
        pruned = shared_copy(model)
        try:
            run_alike(pruned, run)
        except Exception as error:  # the model's own code
            layer = layer_in(error, pruned)
            warning = (
                f"in train mode the pruned model fails{'' if layer is None else f' in {layer!r}'}: "
                f"{type(error).__name__}: {error}; before it can be trained, give what keeps the unpruned width there "
                "the new one, or name the layer before it in ignored_layers"
            )
            report.warn(warning)

    def check_buffers(self, model: nn.Module, original: Mapping[str, Tensor], report: PruningReport) -> None:
        """Warn of buffers that no run reads and that keep the shape of an unpruned tensor."""
        if names := unread_buffers(model, original, self._run):
            shown = listed([f"{name} {tuple(model.get_buffer(name).shape)}" for name in names])
            warning = (
                f"buffers that the model does not read in eval mode keep their unpruned shape: {shown}; before "
                "they are used, slice them by what result.plan says of the layer that they belong to, or make them anew"
            )
            report.warn(warning)

    def _difference(
        self, model: nn.Module, gone: Mapping[str, Tensor], report: PruningReport
    ) -> tuple[Difference | None, float]:
        lost = lost_inputs(self._reference, self._groups, gone)
        try:
            masked = masked_copy(self._reference, self._groups, gone)
            expected = observe(masked, self._run, lost)
            if not expected.finite():
                report.unproved[_MODEL] = "the masked model's outputs are not finite on the first batch"
                return None, 0.0
            repeated = compare(expected, observe(masked, self._run, lost))
        except Exception as error:  # the model's own code
            report.unproved[_MODEL] = f"the masked model does not run: {type(error).__name__}: {error}"
            return None, 0.0
        if repeated.where is not None:
            report.unproved[_MODEL] = f"it does not return the same twice on the first batch: {repeated.where}"
            return None, 0.0
        pruned = shared_copy(model)
        self._take_statistics(pruned, lost_channels(self._groups, gone))
        seen = observe(pruned, self._run)
        found = compare(expected, seen)
        if found.where is not None and found.error != math.inf:
            # It may have kept something of the batches that were scored, such as features of its last call.
            again = observe(pruned, self._run)
            if compare(seen, again).where is not None:
                found = compare(expected, again)
                if found.where is not None:
                    report.unproved[_MODEL] = f"it keeps something from call to call: {found.where}"
                    return None, 0.0
        return found, expected.tolerance

    def _take_statistics(self, pruned: nn.Module, lost: Lost) -> None:
        """Give BatchNorms the unpruned model's statistics in place of the re-estimated ones."""
        norms = dict(named_modules(self._reference))
        for name, module in named_modules(pruned):
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                norm: Any = norms[name]
                gone = lost.get((name, "out"), torch.empty(0, dtype=torch.int64, device="cpu"))
                kept = staying(norm.num_features, gone).to(norm.running_mean.device)
                module.running_mean, module.running_var = norm.running_mean[kept], norm.running_var[kept]


def unread_buffers(model: nn.Module, original: Mapping[str, Tensor], run: Run) -> list[str]:
    """Names of floating buffers that look like copies of what was pruned, and that ``run`` does not read.

    A run can't show which channels of such a buffer belong to which unit. It counts if it has the unpruned shape of a
    tensor of its module, or of one inside, that became smaller, and if NaN in its place does not change the outputs.

    Args:
        model: the pruned model.
        original: the unpruned tensors by their names in the state dict.
        run: runs a model on the first batch.
    """
    tensors = {joined(name, key): (name, tensor) for name, _, key, tensor in named_tensors(model)}
    before = {full: value.shape for full, value in original.items() if full in tensors}
    pruned = [full for full, shape in before.items() if tensors[full][1].shape != shape]
    found = []
    for owner, module, key, tensor in named_tensors(model):
        if key not in module._buffers or not tensor.is_floating_point() or joined(owner, key) in pruned:
            continue
        if any(tensor.shape == before[full] and is_within(tensors[full][0], owner) for full in pruned):
            found.append((owner, key))
    if not found:
        return []
    copied = shared_copy(model)
    seen = run_alike(copied, run)
    if not _reads(copied, found, run, seen):  # the usual case takes one run, of however many buffers
        return [joined(owner, key) for owner, key in found]
    return [joined(owner, key) for owner, key in found if not _reads(copied, [(owner, key)], run, seen)]


def _reads(copied: nn.Module, places: Sequence[tuple[str, str]], run: Run, seen: list[Tensor]) -> bool:
    """Whether the outputs ``seen`` change with NaN in these buffers, each given by its module and name."""
    modules = [(copied.get_submodule(owner), key) for owner, key in places]
    kept = [module._buffers[key] for module, key in modules]
    try:
        for (module, key), buffer in zip(modules, kept, strict=True):
            module._buffers[key] = None if buffer is None else torch.full_like(buffer, torch.nan)
        outputs = run_alike(copied, run)
    except Exception:  # the model's own code, which does not accept NaN
        return True
    finally:
        for (module, key), buffer in zip(modules, kept, strict=True):
            module._buffers[key] = buffer
    return len(outputs) != len(seen) or not all(map(torch.equal, outputs, seen))
