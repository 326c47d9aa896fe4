"""Errors raised while a row is read."""

from __future__ import annotations

from obc.model.arguments import listed
from obc.model.errors import add_note


class ScoringError(RuntimeError):
    """A row could not be read. The message names the module; the model is left as it was."""


class RowError(ScoringError):
    """A row was dropped and can be repeated; the repetition is read in another way."""


class InplaceError(RowError):
    """An activation was changed in place after a gate had read it."""


class ChainError(RowError):
    """The model took another path than in the checking row, so a chain does not hold."""


class UseError(RowError):
    """A function got a weight that gates read, without a call of its layer."""


class SampleRowsError(ScoringError):
    """Some modules have no per-sample form: sample rows must come one sample at a time."""

    @classmethod
    def of(cls, names: list[str]) -> SampleRowsError:
        """The error for the modules ``names``."""
        shown = listed([repr(name) for name in names])
        return cls(
            f"no gate can read {shown} per sample; pass one sample a row, or leave them out with fallback='skip'"
        )


# torch's messages about a forward or backward pass of the caller's loop, and what to do about them there.
_REMEDIES = {
    "Inference tensors cannot be saved for backward": "in a loop of your own, pass clones of tensors that were made "
    "inside torch.inference_mode(), tensor.clone(), to the model and to the loss",
    "does not require grad and does not have a grad_fn": "the loss does not depend on the gates: run the model inside "
    "the scorer's `with` block, outside torch.no_grad() and torch.inference_mode(), and detach nothing on the way",
    "Expected to have finished reduction in the prior iteration": "DistributedDataParallel waits for gradients of the "
    "frozen weights; make the scorer of the DistributedDataParallel model itself, not of the model inside it",
}


def note_remedy(error: BaseException) -> None:
    """Add to an error of torch about the caller's loop a note on what to do there."""
    for fragment, remedy in _REMEDIES.items():
        if isinstance(error, RuntimeError) and fragment in str(error):
            add_note(error, f"obc.JacobianScorer: {remedy}")
