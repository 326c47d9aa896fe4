"""The life of a row: opened, read by backwards, completed, squared and counted; or dropped after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from obc.scoring.errors import ChainError, InplaceError, RowError, ScoringError, UseError
from obc.scoring.parts import Parts
from obc.scoring.reading import refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.checking_row import CheckingRow
from obc.scoring.reading.flat_row import end_row
from obc.scoring.reading.weight_uses import WeightUses, beside_gates


class RowInHand:
    """One row, from its beginning until the flat rows hold all of it.

    Args:
        samples: the number of samples in the row, if the caller knows it.

    Attributes:
        uses: to be entered while the model runs: what gates don't see.
    """

    def __init__(self, attachment: Attachment, samples: int | None) -> None:
        self._attachment, self._samples = attachment, samples
        self._plan, self._reading = attachment.plan, attachment.reading
        self.uses = WeightUses(self._plan.readers.values())
        self._set_samples()
        for flat in self._plan.flats.values():
            flat.zero()
            flat.reference.zero_()
        for norms in attachment.norms:
            norms.bind()
        for source in self._plan.sources:
            source.gradient.forget()
        self._versions = {id(tensor): tensor._version for tensor in self._accumulators()}

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
        return [
            tensor for tensor in (*flats, *(norms.gradient for norms in self._attachment.norms)) if tensor is not None
        ]

    def complete(self, may_be_empty: bool) -> None:
        """Verify that the row was read as planned, and add what gates did not read: norms and chains.

        Args:
            may_be_empty: accept a row that no backward reached, because one of several processes may have no part in
                it.

        Raises:
            ScoringError: no backward added to it, gradients were replaced, or the samples don't fit.
            UseError: functions use weights that gates read.
            ChainError: the model took another path than in the checking row.
        """
        if self.uses.functions and not self._reading.checking:
            reader, function = next(iter(self.uses.functions.items()))
            raise UseError(f"{reader.name!r}: {beside_gates(function)}")
        norm_gradients = self._attachment.norms
        refusals.refuse_replaced_gradients(self._attachment.model, self._plan.flats.values(), norm_gradients)
        unchanged = all(tensor._version == self._versions.get(id(tensor), 0) for tensor in self._accumulators())
        if unchanged and not may_be_empty:
            raise ScoringError(
                "no backward reached a scored module in this row: the loss must come from the model that is scored, as "
                "loss_fn gets it, and in a loop of your own loss.backward() be called inside the row"
            )
        refusals.refuse_samples(self._plan, self._reading, self._samples)
        for norms in norm_gradients:
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


class RowLifecycle:
    """Opens and ends the rows of a scorer, one at a time.

    Args:
        fall_back: read modules that gates can't serve from their weight's gradient, instead of leaving them unscored.

    Attributes:
        check: decides in the first row how every module is read.
    """

    def __init__(self, parts: Parts, fall_back: bool) -> None:
        self._parts = parts
        self.check = CheckingRow(parts.plan, parts.reading, parts.counter, fall_back)
        self._row: RowInHand | None = None

    @contextlib.contextmanager
    def row(self, loss_scale: float, samples: int | None) -> Iterator[None]:
        """See :meth:`obc.JacobianScorer.row`."""
        attachment = self._parts.attachment
        if attachment is None:
            raise ScoringError("the scorer is not attached: open rows inside `with scorer:`")
        if self._row is not None:
            raise ScoringError("rows can't be nested: leave the open `with scorer.row():` first")
        if loss_scale == 0:
            raise ValueError("loss_scale must not be 0")
        self._warn_train_mode(attachment)
        self.check.begin()
        self._row = RowInHand(attachment, samples)
        try:
            with self._row.uses:
                yield
            self._end(self._row, attachment, float(loss_scale))
        except BaseException as error:
            self._row.drop()
            if (repeatable := self._repeatable(error, self._row, attachment)) is not None:
                raise repeatable from error
            raise
        finally:
            self._forget()

    def _warn_train_mode(self, attachment: Attachment) -> None:
        if not attachment.warned_of_train_mode:
            attachment.warned_of_train_mode = True
            refusals.warn_train_mode(self._parts.model, stacklevel=4)

    def _forget(self) -> None:
        self._row = None
        self._parts.plan.chains.forget_row()

    def _end(self, row: RowInHand, attachment: Attachment, loss_scale: float) -> None:
        parts, reading, store = self._parts, self._parts.reading, self._parts.store
        row.complete(may_be_empty=parts.shared.in_step)
        # A checking row that is not finite is dropped, and the next row is checked.
        counts = not reading.checking or self._settle_check(row, attachment)
        if reading.pending is not None:
            self.check.confirm_pending(attachment)
        attachment.drop_gradients()
        parts.shared.add_up(parts.flats)
        samples = reading.samples or 1
        if reading.per_sample:
            for flat in parts.flats:  # if no gate was bound there are none, or those of an earlier row
                flat.sample_rows(samples)
        if store is not None and counts:
            store.make_room(samples)
        ended = end_row(parts.flats, loss_scale, add=counts)
        parts.counter.add(ended, dropped=not counts)
        if store is not None and counts:
            store.append(ended)
        reading.samples = None
        if parts.strict or parts.devices == {torch.device("cpu")}:
            parts.counter.name_faults()

    def _settle_check(self, row: RowInHand, attachment: Attachment) -> bool:
        settled = self.check.settle(attachment, row.uses.functions)
        if settled:
            self._parts.refuse_unscored(later_rows=True)
        return settled

    def _repeatable(self, error: BaseException, row_in_hand: RowInHand, attachment: Attachment) -> RowError | None:
        """The error to raise if reading was changed so that the row can be repeated; None if nothing helps."""
        plan, reading = self._parts.plan, self._parts.reading
        if isinstance(error, ChainError):
            plan.give_up_chains()
            row = self._leave_out(str(error))
            return ChainError(f"{row} was dropped: {error}; every row is read by gates from now on, so repeat this row")
        if isinstance(error, UseError):
            plan.give_up_chains()
            self.check.leave_gates(row_in_hand.uses.functions, attachment)
            row = self._leave_out(str(error))
            return UseError(
                f"{row} was dropped: {error}; it is read from its weight's gradient from now on if that can "
                "be, so repeat this row"
            )
        if refusals.is_inplace_error(error) and not reading.checking:
            for reader in plan.readers.values():
                reader.copy_from_now_on()
            why = "an activation was changed in place after a gate had read it"
            return InplaceError(
                f"{self._leave_out(why)} was dropped: {why}, which did not happen in the checking row; gates work on "
                "copies from now on, so repeat this row"
            )
        if isinstance(error, Exception) and not isinstance(error, ScoringError) and reading.spread:
            return self.check.unspread()
        return None

    def _leave_out(self, why: str) -> str:
        """Note why this row is left out; returns the row's name for messages."""
        row = self._parts.counter.row()
        self._parts.counter.left_out.append(f"{row}: {why}")
        return row

    @contextlib.contextmanager
    def check_on_a_sample(self) -> Iterator[None]:
        """See :meth:`obc.JacobianScorer.check_on_a_sample`."""
        attachment = self._parts.attachment
        if attachment is None or self._row is not None or not self.can_check_on_a_sample:
            raise ScoringError("the check on a sample comes before the first row of an attached scorer of batch rows")
        self.check.begin()
        self._row = RowInHand(attachment, None)
        settled = False
        try:
            with self._row.uses:
                yield
            self._row.complete(may_be_empty=False)
            settled = self.check.settle_on_a_sample(attachment, self._row.uses.functions)
        finally:
            if not settled:
                self.check.forget()
            self._row.drop()
            self._forget()

    @property
    def can_check_on_a_sample(self) -> bool:
        """Whether the next row is the checking row, and one sample can be checked in its place."""
        parts = self._parts
        return (
            parts.attachment is not None
            and parts.reading.checking
            and not parts.reading.per_sample
            and parts.shared.process_group is None
        )
