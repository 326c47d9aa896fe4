"""The first row, which is also the check, and the decisions at its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc.scoring.errors import RowError, SampleRowsError
from obc.scoring.reading import first_row, refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.chain_candidates import Pending
from obc.scoring.reading.module_readers import Reader, Reading
from obc.scoring.reading.reading_plan import Plan
from obc.scoring.reading.row_counter import RowCounter


class CheckingRow:
    """Decides in the first finite row how every module is read from then on.

    Args:
        plan: what is read; its readers hold the decisions.
        reading: which kind of row is read.
        counter: numbers rows for messages.
        fall_back: read modules that gates can't serve from their weight's gradient, instead of leaving them unscored.
    """

    def __init__(self, plan: Plan, reading: Reading, counter: RowCounter, fall_back: bool) -> None:
        self._plan, self._reading, self._counter, self._fall_back = plan, reading, counter, fall_back
        # Their state before this row.
        self._before: dict[Reader, tuple[Any, ...]] = {}
        self._fired: list[bool] = []
        if not reading.checking:
            first_row.settle_unchecked(plan, fall_back)

    def begin(self) -> None:
        """Save the state, to be restored if the row is repeated."""
        if self._reading.checking:
            self._before = {reader: reader.noted for reader in self._plan.readers.values()}
            self._fired = [source.gradient.fired for source in self._plan.sources]

    def forget(self) -> None:
        """Forget what a check on a sample noted; the next row is then an ordinary checking row."""
        for reader, noted in self._before.items():
            reader.noted = noted
        for source, fired in zip(self._plan.sources, self._fired, strict=True):
            source.gradient.fired = fired
        if self._reading.candidates is not None:
            self._reading.candidates = self._plan.candidates()

    def check_samples(self, losses: Tensor) -> None:
        """See :meth:`obc.JacobianScorer.check_samples`."""
        reading, samples = self._reading, losses.numel()
        if reading.samples is None:  # no gate was bound
            reading.samples, reading.begins = samples, False
        self._refuse_shared_count(samples)
        refusals.refuse_samples(self._plan, reading, samples)
        if not reading.checking or samples < 2:
            return
        for sample in (0, samples - 1):
            losses[sample].backward(retain_graph=True)
            for reader in first_row.mixed_samples(list(self._plan.readers.values()), sample):
                reader.reason = "its activations along dim 0 are not one sample each"
            for flat in self._plan.flats.values():
                flat.zero()
                flat.reference.zero_()

    def _refuse_shared_count(self, samples: int) -> None:
        """The first output may be computed once for all samples, and then does not tell their number."""
        reading, counted_by = self._reading, self._reading.counted_by
        if not reading.checking or counted_by is None or not reading.samples == 1 < samples:
            return
        if counted_by.rule.looks_up:
            counted_by.shared = True
            raise self._repeated(f"{counted_by.name!r} is looked up once for all samples")

    def unspread(self) -> RowError:
        """Stop spreading look-ups over the samples; this row must be repeated."""
        names = [reader.name for reader in self._reading.spread]
        for reader in self._reading.spread:
            reader.shared = True
        return self._repeated(f"the model does not run as before with {', '.join(names)} spread over the samples")

    def _repeated(self, why: str) -> RowError:
        """Forget what this row noted so far."""
        for reader, (reason, *_) in self._before.items():
            reader.reason = reason
        return RowError(f"{self._counter.row()} was dropped: {why}; repeat this row")

    def settle(self, attachment: Attachment) -> bool:
        """Compare, decide how every module is read, and put the right values in the current row.

        Returns:
            False if the row is not finite: it is left out, and the next row is checked.
        """
        reading, plan = self._reading, self._plan
        if not all(bool(flat.values.isfinite().all()) for flat in plan.flats.values()):
            return False
        fallen = first_row.settle(plan, self._fall_back)
        if reading.per_sample and (reading.samples or 1) > 1 and fallen:
            raise SampleRowsError.of(fallen)
        if reading.candidates is not None:
            plan.confirm_chains(reading.candidates, attachment.norms)
        self._end(attachment)
        return True

    def settle_on_a_sample(self, attachment: Attachment) -> bool:
        """End the check if one sample shows for every module that its gates read it correctly.

        Returns:
            False if it does not, so that a whole batch must be checked.
        """
        if not first_row.holds_on_a_sample(self._plan):
            return False
        if self._reading.candidates is not None:
            self._reading.pending = Pending(self._reading.candidates.found())
        self._end(attachment)
        return True

    def _end(self, attachment: Attachment) -> None:
        self._reading.checking, self._reading.candidates = False, None
        for flat in self._plan.flats.values():
            flat.reference = torch.empty(0)
        attachment.set_weight_gradients()

    def confirm_pending(self, attachment: Attachment) -> None:
        """Keep the chains that a sample suggested and the current batch confirms; does nothing if it isn't finite."""
        assert self._reading.pending is not None
        if all(bool(flat.values.isfinite().all()) for flat in self._plan.flats.values()):
            self._plan.confirm_chains(self._reading.pending, attachment.norms)
            self._reading.pending = None
