"""Buffers that keep the shape of an unpruned weight because no run reads them, such as averages of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.names import is_within, joined, named_tensors
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike


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
