"""The first row, which is also the check: how it is read, and what is decided at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from obc.scoring.errors import RowError, SampleRowsError
from obc.scoring.reading import first_row, refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.module_readers import Reader, Reading
from obc.scoring.reading.reading_plan import Plan
from obc.scoring.reading.row_counter import RowCounter


class CheckingRow:
    """Decides in the first finite row how every module is read from then on.

    Args:
        plan: what is read; the decisions are noted in its readers.
        reading: which kind of row is read.
        counter: gives the number of the row for messages.
        fall_back: read modules that no gate serves from their weight's gradient; otherwise they are left unscored.
    """

    def __init__(self, plan: Plan, reading: Reading, counter: RowCounter, fall_back: bool) -> None:
        self._plan, self._reading, self._counter, self._fall_back = plan, reading, counter, fall_back
        self._reasons: dict[Reader, str | None] = {}  # their values before this row
        if not reading.checking:
            first_row.settle_unchecked(plan, fall_back)

    def begin(self) -> None:
        """Note the present state, which is restored if the row is repeated."""
        if self._reading.checking:
            self._reasons = {reader: reader.reason for reader in self._plan.readers.values()}

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
        """The first output may be made once for all samples; then it does not tell how many samples there are."""
        reading, counted_by = self._reading, self._reading.counted_by
        if not reading.checking or counted_by is None or not reading.samples == 1 < samples:
            return
        if counted_by.rule.looks_up:
            counted_by.shared = True
            raise self._repeated(f"{counted_by.name!r} is looked up once for all samples")

    def unspread(self) -> RowError:
        """Stop spreading look-ups over the samples; this row has to be repeated."""
        names = [reader.name for reader in self._reading.spread]
        for reader in self._reading.spread:
            reader.shared = True
        return self._repeated(f"the model does not run as before with {', '.join(names)} spread over the samples")

    def _repeated(self, why: str) -> RowError:
        """Forget what this row noted so far."""
        for reader, reason in self._reasons.items():
            reader.reason = reason
        return RowError(f"{self._counter.row()} was dropped: {why}; repeat this row")

    def settle(self, attachment: Attachment) -> bool:
        """Compare, decide how every module is read, and put the right values in the row in hand.

        Returns:
            False where the row is not finite: it is left out, and the next one is checked.
        """
        reading, plan = self._reading, self._plan
        if not all(bool(flat.values.isfinite().all()) for flat in plan.flats.values()):
            return False
        fallen = first_row.settle(plan, self._fall_back)
        if reading.per_sample and (reading.samples or 1) > 1 and fallen:
            raise SampleRowsError.of(fallen)
        reading.checking = False
        if reading.candidates is not None:
            plan.confirm_chains(reading.candidates, attachment.norms)
            reading.candidates = None
        for flat in plan.flats.values():
            flat.reference = torch.empty(0)
        attachment.set_weight_gradients()
        return True
