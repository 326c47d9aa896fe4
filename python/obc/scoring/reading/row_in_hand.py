"""The row that is being read: what backward adds to, and how the row is completed."""

from __future__ import annotations

from torch import Tensor, nn

from obc.scoring.errors import ScoringError
from obc.scoring.reading import refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.gradients import NormGradients
from obc.scoring.reading.module_readers import Reading
from obc.scoring.reading.reading_plan import Plan


class RowInHand:
    """One row, from its beginning until the flat rows hold all of it.

    Args:
        model: the model that is read.
        plan: what is read.
        reading: which kind of row is read.
        attachment: what is attached to the model.
        samples: the number of samples in the row, if the caller knows it.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, reading: Reading, attachment: Attachment, samples: int | None
    ) -> None:
        self._model, self._plan, self._reading, self._attachment = model, plan, reading, attachment
        self._samples = samples
        self._set_samples()
        for flat in plan.flats.values():
            flat.zero()
            flat.reference.zero_()
        for norms in self._norms:
            norms.bind()
        for source in plan.sources:
            source.gradient.magnitude = 0.0
        self._versions = {id(tensor): tensor._version for tensor in self._accumulators()}

    @property
    def _norms(self) -> list[NormGradients]:
        return self._attachment.norms

    def _set_samples(self) -> None:
        reading, samples = self._reading, self._samples
        reading.begin_row(samples)
        if samples is not None and reading.samples is None and reading.per_sample:
            reading.samples = samples
            for reader in self._plan.readers.values():
                for slot in reader.slots:
                    slot.bind_samples(samples)

    def _accumulators(self) -> list[Tensor]:
        """Every tensor that a backward adds to."""
        flats = [tensor for flat in self._plan.flats.values() for tensor in (flat.row, flat.reference, flat.samples)]
        return [tensor for tensor in (*flats, *(norms.gradient for norms in self._norms)) if tensor is not None]

    def complete(self, may_be_empty: bool) -> None:
        """Verify that the row was read as planned, and add what gates did not read: norms and chains.

        Args:
            may_be_empty: accept a row that no backward reached, because one of several processes may have no part in
                it.

        Raises:
            ScoringError: no backward added to it, gradients were replaced, or the samples don't fit.
            ChainError: the model took another path than in the checking row.
        """
        refusals.refuse_replaced_gradients(self._model, self._plan.flats.values(), self._norms)
        unchanged = all(tensor._version == self._versions.get(id(tensor), 0) for tensor in self._accumulators())
        if unchanged and not may_be_empty:
            raise ScoringError("no backward reached a scored module in this row; call loss.backward() inside it")
        refusals.refuse_samples(self._plan, self._reading, self._samples)
        for norms in self._norms:
            norms.add_to_row(norms.flat.row)
        if not self._reading.checking and self._reading.pending is None:
            self._plan.chains.refuse_unseen()
            self._plan.chains.fill()

    def drop(self) -> None:
        """Clear what was read so far."""
        self._reading.samples = None
        self._attachment.drop_gradients()
        for flat in self._plan.flats.values():
            flat.zero()
