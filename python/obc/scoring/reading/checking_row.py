"""The checking first row reads gates and weight gradients side by side, so that nothing is guessed.

Every weight stays trainable for one row and its gradient is contracted into a reference row. If a module's gates
disagree with it (its forward was bypassed, its weight is also used elsewhere, its output is scaled …), the module is
read from its weight's gradient from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from obc.model.arguments import listed
from obc.model.autocast import tf32_is_allowed
from obc.scoring.errors import RowError, SampleRowsError
from obc.scoring.reading import refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.chain_candidates import Pending
from obc.scoring.reading.flat_row import Slot
from obc.scoring.reading.gradients import WeightGradient
from obc.scoring.reading.module_readers import ModuleReader, RowReading
from obc.scoring.reading.reading_plan import GradientSource, Plan
from obc.scoring.reading.row_counter import RowCounter
from obc.scoring.reading.weight_uses import beside_gates

Uses = Mapping[ModuleReader, str]
logger = logging.getLogger("obc")

# Largest accepted difference between a gate and the weight gradient, relative to the layer's largest entry. Correct
# float32 gates differed by at most 3.2e-6; half precision rounds activations and gradients separately.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# The same of the sums over both sides' gates, a single number, which other layers could meet by chance.
_SUM_TOLERANCE = {**_TOLERANCE, torch.float32: 3e-5, torch.float64: 1e-9}
# GPUs may multiply float32 with eleven bits (TF32, cuDNN's default for convolutions): activations and weight
# gradients are then rounded separately, by 5e-4 of each product.
_TF32_TOLERANCE = 1e-2

# If a layer's rows cancel (a convolution before a BatchNorm in train mode scores zero), both are rounding noise of the
# sum of |w| |g|: a difference below this many ulps of that sum is not a disagreement.
_NOISE_ULPS = 16

# A forward that normalises its weight makes the weight's own rows zero up to rounding and to the epsilon of the
# normalisation: below this share of what its gates read.
_NORMALISED = 1e-2
NORMALISED = "its forward normalises its weight, so that weight times gradient is zero"


class CheckingRow:
    """Decides in the first finite row how every module is read from then on.

    Args:
        plan: what is read; its readers hold the decisions.
        counter: numbers rows for messages.
        fall_back: read modules that gates can't serve from their weight's gradient, instead of leaving them unscored.
    """

    def __init__(self, plan: Plan, reading: RowReading, counter: RowCounter, fall_back: bool) -> None:
        self._plan, self._reading, self._counter, self._fall_back = plan, reading, counter, fall_back
        # Their state before this row.
        self._before: dict[ModuleReader, tuple[Any, ...]] = {}
        self._fired: list[bool] = []
        if not reading.checking:
            settle_unchecked(plan, fall_back)

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
            for reader in mixed_samples(list(self._plan.readers.values()), sample):
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

    def settle(self, attachment: Attachment, uses: Uses) -> bool:
        """Compare, decide how every module is read, and put the right values in the current row.

        Args:
            uses: functions that got weights without calling their layers.

        Returns:
            False if the row is not finite: it is left out, and the next row is checked.
        """
        reading, plan = self._reading, self._plan
        if not all(bool(flat.values.isfinite().all()) for flat in plan.flats.values()):
            return False
        fallen = settle(plan, self._fall_back, uses)
        if reading.per_sample and (reading.samples or 1) > 1 and fallen:
            raise SampleRowsError.of(fallen)
        if reading.candidates is not None:
            plan.confirm_chains(reading.candidates, attachment.norms)
        self._end(attachment)
        return True

    def settle_on_a_sample(self, attachment: Attachment, uses: Uses) -> bool:
        """End the check if one sample shows for every module that its gates read it correctly, and nothing else does.

        Returns:
            False if it does not, so that a whole batch must be checked.
        """
        if uses or not holds_on_a_sample(self._plan):
            return False
        if self._reading.candidates is not None:
            self._reading.pending = Pending(self._reading.candidates.found())
        self._end(attachment)
        return True

    def leave_gates(self, uses: Uses, attachment: Attachment) -> None:
        """Read these readers' modules from their weights' gradients from now on, or leave them unscored."""
        for source in self._plan.sources:
            if (reason := _beside_gates(source.readers, uses)) is not None:
                _fall_back(source, self._fall_back, reason)
        for reader in self._plan.without_source():
            if reader in uses:
                reader.scored, reader.reason = False, beside_gates(uses[reader])
        attachment.set_weight_gradients()

    def _end(self, attachment: Attachment) -> None:
        self._reading.checking, self._reading.candidates = False, None
        for flat in self._plan.flats.values():
            flat.reference = torch.empty(0, device="cpu")
        attachment.set_weight_gradients()

    def confirm_pending(self, attachment: Attachment) -> None:
        """Keep the chains that a sample suggested and the current batch confirms; does nothing if it isn't finite."""
        assert self._reading.pending is not None
        if all(bool(flat.values.isfinite().all()) for flat in self._plan.flats.values()):
            self._plan.confirm_chains(self._reading.pending, attachment.norms)
            self._reading.pending = None


def settle(plan: Plan, fall_back: bool, uses: Uses) -> list[str]:
    """Decide how every module is read from now on, and put the right values in the current row.

    Args:
        plan: its readers' ``how``, ``reason`` and ``scored`` are set.
        fall_back: read modules that gates can't serve from their weight's gradient, instead of leaving them unscored.
        uses: functions that got weights without calling their layers; a later row may show what they do.

    Returns:
        The modules that are read from their weight's gradient.
    """
    fallen = []
    for source in plan.sources:
        reason = _compare(source.readers, source.gradient) if source.gradient.seen else None
        reason = reason or _beside_gates(source.readers, uses)
        if reason is not None:
            _take_reference(source.readers)
            _fall_back(source, fall_back, reason)
            if reason.startswith(NORMALISED):
                names = listed([reader.name for reader in source.readers])
                logger.warning(
                    "scores of %s are rounding errors: %s; obc.plain_layers makes a plain layer with that weight of it",
                    names,
                    reason,
                )
            fallen += [reader.name for reader in source.readers if source.gradient.fired and reader.scored]
    for reader in plan.without_source():
        if reader in uses:
            reader.reason = reader.reason or beside_gates(uses[reader])
        _look_at(reader)
    return fallen


def _beside_gates(readers: list[ModuleReader], uses: Uses) -> str | None:
    return next((beside_gates(uses[reader]) for reader in readers if reader in uses), None)


def holds_on_a_sample(plan: Plan) -> bool:
    """Whether a checking row of one sample showed for every module that its gates read it correctly.

    If not, if a module was not reached, or if its row is zero, a whole batch must be checked.
    """
    for source in plan.sources:
        if source.gradient.seen and _compare(source.readers, source.gradient) is not None:
            return False
        if any(reader.reason == NORMALISED for reader in source.readers):  # of a sample, two sums prove little
            return False
        if source.gradient.seen and not all(bool(slot.of(slot.flat.reference).any()) for slot in source.gradient.slots):
            return False
    for reader in plan.without_source():
        reader.notice_changes()
        if reader.reason is not None or not (reader.called and reader.reached):
            return False
    return all(bool(flat.row.isfinite().all()) for flat in plan.flats.values())


def settle_unchecked(plan: Plan, fall_back: bool) -> None:
    """Settle without a checking row: only modules known to be read wrongly by gates are changed."""
    for source in plan.sources:
        if any(reader.reason is not None for reader in source.readers):
            _fall_back(source, fall_back)


def _fall_back(source: GradientSource, scored: bool, reason: str | None = None) -> None:
    for reader in source.readers:
        reader.how, reader.scored = "weight gradient", scored and not source.partial
        reader.reason = reader.reason or reason
        if source.partial:
            reader.reason = f"{reader.reason}; its weight's gradient can't replace them, because others share its bias"
        logger.info("module %r is not read by gates: %s", reader.name, reader.reason)


def _disagreement(slot: Slot, source: WeightGradient, half: torch.dtype | None) -> str | None:
    """Why the slot's gates can't be trusted, or None if they agree with the weight's gradient."""
    flat = slot.flat
    gates, reference = _gates(slot), slot.of(flat.reference)
    largest = float(reference.abs().max()) if slot.size else 0.0
    difference = float((gates - reference).abs().max()) if slot.size else 0.0
    noise = _NOISE_ULPS * torch.finfo(flat.dtype).eps * source.magnitude
    if difference <= _tolerance(half or flat.dtype, flat.device) * largest + noise:
        return None
    return f"gate and weight gradient differ by {difference / max(largest, 1e-38):.1e} of the layer's largest entry"


def _tolerance(dtype: torch.dtype, device: torch.device, tolerances: Mapping[torch.dtype, float] = _TOLERANCE) -> float:
    """The largest accepted difference between a gate and the weight gradient, for the precision of the products."""
    if dtype == torch.float32 and device.type == "cuda" and tf32_is_allowed():
        return _TF32_TOLERANCE
    return tolerances[dtype]


def _compare(readers: list[ModuleReader], source: WeightGradient) -> str | None:
    """Why the readers of one weight must be read from its gradient, or None if their gates are right."""
    for reader in readers:
        reader.used = source.fired
        reader.notice_changes()
        if reader.reason is not None:
            return reader.reason
    if not source.fired:
        return "no gradient reached it in the checking row"
    if not any(reader.called for reader in readers):
        return "its parameters are used without calling its forward"
    half = _half_precision(readers)
    for slot in source.slots:
        if (reason := _disagreement(slot, source, half)) is not None:
            return _unless_normalised(readers, source, half, reason)
    return None


def _unless_normalised(
    readers: list[ModuleReader], source: WeightGradient, half: torch.dtype | None, reason: str
) -> str | None:
    """``reason``, or None if forward normalises the weight and the gates read what the normalised weight does.

    The loss does not change with the scale of a channel that forward normalises, so w . dL/dw = 0 (Euler). The weight v
    that it makes of it acts: the gates read v . dL/dv of out and in channels, which have the same sum.
    """
    if not source.unbiased:  # a bias alone has a gradient
        return reason
    rows = [(_gates(slot), slot.of(slot.flat.reference), source.unbiased[slot]) for slot in source.slots]
    # Biases, whose row the gates read too, are what the reference has beside the weight's row.
    computed = [gates - (reference - weight) for gates, reference, weight in rows]
    largest = [
        (float(weight.abs().max()), float(one.abs().max())) for (*_, weight), one in zip(rows, computed, strict=True)
    ]
    if all(own > _NORMALISED * gated for own, gated in largest):
        return reason
    flat = source.slots[0].flat
    share = _tolerance(half or flat.dtype, flat.device, _SUM_TOLERANCE)
    allowed = share * float(sum(one.abs().sum() for one in computed))
    fits = len(readers) == 1 and len(computed) == 2 and abs(float(computed[0].sum() - computed[1].sum())) <= allowed
    source.misfit = source.misfit or not fits  # what one row disproves, another can't prove
    if not source.misfit:
        readers[0].reason = NORMALISED
        return None
    return f"{NORMALISED}, and its gates do not fit a layer with the normalised weight"


def _gates(slot: Slot) -> Tensor:
    """The row that the slot's gates read."""
    return slot.of(slot.flat.row) if slot.flat.samples is None else slot.of(slot.flat.samples).sum(1)


def _look_at(reader: ModuleReader) -> None:
    """Check a reader whose weight has no gradient to compare with; it is unscored if its gates fail."""
    reader.notice_changes()
    if reader.reason is None and reader.called and not reader.reached:
        reader.reason = "no gradient came through it in the checking row"
    if reader.reason is not None:
        reader.scored = False


def _take_reference(readers: list[ModuleReader]) -> None:
    """Replace the gates' row by the reference row in the slots of these readers."""
    for slot in _slots_of(readers):
        flat = slot.flat
        if flat.samples is not None:
            slot.of(flat.samples).zero_()
        slot.of(flat.row).copy_(slot.of(flat.reference))


def mixed_samples(readers: list[ModuleReader], sample: int) -> list[ModuleReader]:
    """The readers whose rows mix samples: the backward of one sample's loss leaves non-zero rows for other samples."""
    return [reader for reader in readers if any(_others_are_not_zero(slot, sample) for slot in reader.slots)]


def _others_are_not_zero(slot: Slot, sample: int) -> bool:
    samples = slot.flat.samples
    if samples is None:
        return False
    others = torch.arange(samples.shape[1], device=samples.device) != sample
    return bool(slot.of(samples)[:, others].any())


def _slots_of(readers: list[ModuleReader]) -> list[Slot]:
    return list(dict.fromkeys(slot for reader in readers for slot in reader.slots))


def _half_precision(readers: list[ModuleReader]) -> torch.dtype | None:
    """The half precision of these readers' activations, by their own dtype or by autocast; or None."""
    dtypes = {dtype for reader in readers for dtype in reader.activation_dtypes}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
