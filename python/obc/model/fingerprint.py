"""What a run that resumes from a checkpoint must find again: the same weights, and the states of torch's generators."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """A hash over names, shapes and sums of the bits of every parameter and buffer; integers, so exact everywhere.

    What is on the meta device has no bits.
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
    """The states of torch's generators: the CPU's, and those of CUDA devices where they are in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Set torch's generators to what :func:`random_state` gave; nothing for no states."""
    if states:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state_all(list(states[1:]))
