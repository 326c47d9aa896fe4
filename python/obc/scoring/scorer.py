"""The scorer: attaches to a model, reads one row per backward, adds up the squares, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from obc.model.arguments import one_of
from obc.model.batches import RowKind
from obc.model.processes import warn_of_own_batches
from obc.model.sharding import is_sharded
from obc.model.usable import refuse_inference, refuse_without_values
from obc.scoring.errors import RowError, ScoringError, note_remedy
from obc.scoring.parts import Parts, load_state, state_of
from obc.scoring.reading import refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.module_readers import RowReading
from obc.scoring.reading.reading_plan import ModuleFilter, make_plan
from obc.scoring.reading.row_counter import RowCounter
from obc.scoring.results.row_store import RowsTo, RowStore
from obc.scoring.results.scores import Scores
from obc.scoring.row_lifecycle import RowLifecycle
from obc.scoring.sharding import SharedRows
from obc.scoring.summing_up import scores_of

logger = logging.getLogger("obc")

Fallback = Literal["weight_grad", "skip"]
Combine = Literal["row", "scores"]


class JacobianScorer:
    """Scores of the Jacobian Criterion, row by row, for your own loop.

    S[c] = sum over rows n of (w_c . dL_n/dw_c)^2 for every out and in channel c of every conv, linear, norm and
    embedding (arXiv 2508.05521, the Jacobian Criterion), read from activation times gradient. No weight gradient is
    computed after the first row, and nothing of parameter size is kept.

    >>> scorer = obc.JacobianScorer(model)
    >>> with scorer:
    ...     for batch in batches:
    ...         with scorer.row():
    ...             loss_fn(model, batch).backward()
    >>> scores = scorer.scores()

    Put the model in eval mode first. Several backwards inside one ``row()`` add up to one row (micro-batches).
    Attach before ``torch.compile``.

    Args:
        model: any module. Frozen parameters are scored too; everything is restored on exit.
        rows: "batch": each row is the gradient of one loss. "sample": each sample along dim 0 is a row of its own;
            call backward on the *sum* of per-sample losses, once per ``row()``.
        modules: the modules to score, by default all: names, a predicate (name, module) -> bool, or a mapping from
            names to the sides to read, "in", "out" or both: ``{"conv2": ["in"]}``. Other channels get no gate and no
            memory. Tied weights are read if one of their uses is.
        check: compare gates with weight gradients in the first row, and read modules that disagree from their weight's
            gradient.
        strict: raise if a module ends unscored or a row is not finite.
        fallback: "weight_grad" reads modules that gates can't serve from their weight's gradient; "skip" leaves them
            unscored.
        process_group: the processes that score together, each with a model of its own or a part of one. Not needed for
            tensor parallelism, whose processes are found in the model. If that is combined with ``fully_shard``, pass
            the processes of the mesh's other dimensions.
        combine: "row": every process has a part of each row; parts are summed before squaring. "scores": every process
            has rows of its own; their squares are summed in :meth:`scores`, which all processes must call.
        fold_groups: add up the groups of a grouped convolution's in channels before squaring, as the paper's code
            does, so that ``in_channels`` has C_in / groups entries.
        keep_rows: also keep every row that counts, in ``scores().rows``. ``rows_bytes(n)`` tells beforehand what n
            take.
        rows_to: where rows are kept. "device": beside the current row. "host": in host memory, pinned if CUDA is
            available. A path: in a file, which later rows at the same path replace.
        chains: omit gates whose rows follow from other rows, if the graph of the checking row suggests it and its
            numbers confirm it (:mod:`obc.scoring.reading.chains`).

    Raises:
        ValueError: no module can be scored, or an argument is not one of the values above.
        ScoringError: on entering the ``with`` block, the model was compiled before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: RowKind = "batch",
        modules: ModuleFilter | None = None,
        check: bool = True,
        strict: bool = False,
        fallback: Fallback = "weight_grad",
        process_group: Any = None,
        combine: Combine = "row",
        fold_groups: bool = False,
        keep_rows: bool = False,
        rows_to: RowsTo = "device",
        chains: bool = True,
    ) -> None:
        _check_arguments(rows, fallback, combine, process_group)
        refuse_inference(model)
        if check:
            refuse_without_values(model)
        refusals.refuse_unreadable(model)
        self.model, self.rows, self.strict = model, rows, strict
        self.process_group, self.combine = process_group, combine
        if process_group is None:
            warn_of_own_batches(model)
        shared = SharedRows(model, process_group, combine == "row")
        per_sample, sharded = rows == "sample", is_sharded(model)
        if sharded and check:
            logger.info("rows are not checked against weight gradients: each process has only parts of them")
            check = False
        plan = make_plan(model, modules, per_sample, fold_groups)
        reading = RowReading(per_sample, check, plan.chains, sharded)
        reading.candidates = plan.candidates() if chains and check else None
        flats = list(plan.flats.values())
        counter = RowCounter(flats, per_sample, strict)
        store = RowStore(flats, rows_to) if keep_rows else None
        self._parts = Parts(model, strict, check, plan, reading, counter, shared, store)
        self._lifecycle = RowLifecycle(self._parts, fallback != "skip")

    @property
    def additions(self) -> int:
        """A number that grows whenever a backward adds to the present row."""
        return sum(flat.changes for flat in self._parts.flats)

    def __enter__(self) -> JacobianScorer:
        parts = self._parts
        if parts.attachment is not None:
            raise ScoringError("this scorer is attached already; leave its `with` block before entering it again")
        refusals.refuse_unreadable(self.model)
        attachment = Attachment(self.model, parts.plan, parts.reading)
        attachment.make()
        parts.attachment = attachment
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attachment, self._parts.attachment = self._parts.attachment, None
        assert attachment is not None
        attachment.undo()
        if error is None:
            self._parts.counter.name_faults()
        else:
            note_remedy(error)

    # --- rows -------------------------------------------------------------------------------------------------

    def row(self, loss_scale: float = 1.0, samples: int | None = None) -> contextlib.AbstractContextManager[None]:
        """One row: every backward inside the block adds to it; leaving the block squares it and adds it to the scores.

        An exception inside drops the row and leaves the scorer as it was. On a GPU a row after the checking row reads
        nothing back: if it is captured in a CUDA graph together with its forward, every replay is a row.

        Args:
            loss_scale: what the loss was multiplied by (``GradScaler.get_scale()``); rows are divided by it.
            samples: for sample rows, their number, to be compared with the activations. A compiled model needs it, and
                must run its forward inside the block.

        Raises:
            ScoringError: the scorer is not attached, rows are nested, gradients were replaced, or (``strict``) the row
                is not finite.
            RowError: an activation was changed in place, or the model took another path; the row can be repeated.
        """
        return self._lifecycle.row(loss_scale, samples)

    @property
    def can_check_on_a_sample(self) -> bool:
        """Whether the next row is the checking row, and one sample can be checked in its place."""
        return self._lifecycle.can_check_on_a_sample

    def check_on_a_sample(self) -> contextlib.AbstractContextManager[None]:
        """Check how modules are read on one sample: its backward runs inside the block and is not a row.

        Unless every module is read correctly on it, nothing is decided and the next row is the checking row. Chains
        that the sample suggests are used once a row of a whole batch has confirmed them.
        """
        return self._lifecycle.check_on_a_sample()

    def check_samples(self, losses: Tensor) -> None:
        """Check that dim 0 holds the samples: by their number, and in the checking row by backwards of single losses.

        Modules whose rows mix samples (BatchNorm in train mode, another memory layout) are read one sample at a time.

        Args:
            losses: (B,) per-sample losses with their graph, which is kept.
        """
        self._lifecycle.check.check_samples(losses)

    @property
    def spread(self) -> list[str]:
        """The look-ups made once for all samples that the checking row repeated for each sample."""
        return [reader.name for reader in self._parts.reading.spread]

    def unspread(self) -> RowError:
        """Stop repeating these look-ups; this row must be repeated."""
        return self._lifecycle.check.unspread()

    # --- results ----------------------------------------------------------------------------------------------

    def scores(self) -> Scores:
        """The scores of all rows so far.

        Raises:
            ScoringError: no finite row has ended.
        """
        return scores_of(self._parts, self.rows, self.process_group if self.combine == "scores" else None)

    @property
    def left_out(self) -> list[str]:
        """The rows that were left out so far, each with its reason."""
        return self._parts.counter.left_out

    def count_rows(self) -> int:
        """Rows, or samples, that were added so far. Reads from the device."""
        return self._parts.counter.count()

    def count_left_out(self) -> int:
        """Rows, or samples, that were left out so far because they were not finite. Reads from the device."""
        return self._parts.counter.count_left_out()

    def state_dict(self, kept_rows: bool = True) -> dict[str, Any]:
        """Everything needed to resume exactly: the sums, how each module is read, the counts, and the kept rows.

        Args:
            kept_rows: False omits the kept rows.
        """
        return state_of(self._parts, self.rows, kept_rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the :meth:`state_dict` of a scorer with the same model and options, outside the ``with`` block.

        Raises:
            ValueError: the state belongs to another model or other options; nothing was loaded.
            ScoringError: the scorer is attached.
        """
        load_state(self._parts, self.rows, state)

    # --- memory and devices -----------------------------------------------------------------------------------

    @property
    def groups_in_step(self) -> list[Any]:
        """The process groups that read every row together."""
        return self._parts.shared.groups

    @property
    def devices(self) -> set[torch.device]:
        """The devices that rows are read on."""
        return self._parts.devices

    @property
    def kept_bytes(self) -> int:
        """Bytes held between rows: the row, its gates, the sums, and kept rows in memory."""
        return self._parts.nbytes

    @property
    def row_store(self) -> RowStore | None:
        """The store of kept rows; None with ``keep_rows=False``."""
        return self._parts.store

    def rows_bytes(self, num_rows: int) -> int:
        """Bytes that ``num_rows`` kept rows take: four for every channel of every scored module."""
        return 4 * num_rows * sum(flat.size for flat in self._parts.flats)

    def reserve_rows(self, num_rows: int) -> None:
        """Make room for ``num_rows`` more kept rows at once, instead of by doubling.

        Call it before capturing a CUDA graph, with the number of its replays.

        Raises:
            ScoringError: the scorer does not keep rows.
        """
        if self._parts.store is None:
            raise ScoringError("this scorer keeps no rows: make it with keep_rows=True")
        self._parts.store.reserve(num_rows)


def _check_arguments(rows: str, fallback: str, combine: str, process_group: Any) -> None:
    one_of("rows", rows, get_args(RowKind))
    one_of("fallback", fallback, ("weight_grad", "skip"))
    one_of("combine", combine, ("row", "scores"))
    if combine == "scores" and process_group is None:
        raise ValueError(
            "combine='scores' needs the processes, got process_group=None: pass torch.distributed.group.WORLD, "
            "which is None until torch.distributed.init_process_group(); torchrun starts several processes"
        )
