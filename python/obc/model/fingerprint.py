"""The state that must match when a run resumes from a checkpoint: the weights, and the states of torch's generators."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and bit sums of all parameters and buffers; integer sums, so exact everywhere.

    Tensors on the meta device have no bits.
    """
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        tensor = tensor.detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        integers = torch.int16 if tensor.element_size() % 2 == 0 else torch.uint8
        bits = torch.atleast_1d(tensor).contiguous().view(integers)
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def random_state() -> list[Tensor]:
    """The states of torch's generators: the CPU's, and CUDA's if it is in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Restore what :func:`random_state` returned; an empty list changes nothing."""
    if states:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state_all(list(states[1:]))
