"""Scores that have the same bits, and those that are equal up to rounding.

The same bits, with one build of torch on one machine, for the same batches in the same order:

- from run to run, in one process or several, whatever its memory held before;
- whether the run was resumed, or rows were kept;
- with any number of threads, of everything that obc computes. So scores differ between numbers of threads only where
  torch's own activations or gradients do. On the CPU, torch 2.13 gives other bits on other numbers of threads in: 1 x 1
  convolutions; the weight and bias gradients of convolutions and of LayerNorm, of which the latter two enter the score
  of a norm in batch rows; elementwise functions such as SiLU, at the ends of the threads' shares; the mean or sum of a
  whole tensor.

Equal to rounding only: a batch in micro-batches against the batch at once (another order of additions, and other
algorithms for convolutions of other sizes), samples in one batch against batches of one sample, a choice of modules
against all, a first row that is no check against one that is, and so obc.score, which checks on a sample before its
rows, against an own loop (torch runs other kernels where no weight's gradient is wanted), other backends, machines and
builds. On CUDA, torch adds atomically in the backward of embedding and index_add, among others, which differs from run
to run unless torch.use_deterministic_algorithms(True).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import oracle
import pytest
import torch
from cases import poison_heap
from models import OWN, Case
from nasty import NASTY
from parity import TOLERANCE, assert_equal, errors, score_in_a_loop
from torch import Tensor, nn

import obc

FAMILIES: dict[str, Callable[[], Case]] = {**OWN, **NASTY}
READ_ALIKE = ["residual-cnn", "norms", "in-place-after-conv", "functional-weight", "checkpoint"]
ROWS = ["batch", "sample"]


def score(case: Case, rows: str, **options: object) -> obc.Scores:
    return obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, **options)


def digest(scores: obc.Scores) -> str:
    """A hash of the bits of every score."""
    sums = hashlib.sha256()
    for name, channels in scores.items():
        for side in (channels.out_channels, channels.in_channels):
            sums.update(name.encode() + (b"" if side is None else side.numpy().tobytes()))
    return sums.hexdigest()


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(members=9)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_have_the_same_bits(family: str, rows: str) -> None:
    first = score(FAMILIES[family](), rows)
    poison_heap()
    assert_equal(score(FAMILIES[family](), rows), first)


@pytest.mark.slow
def test_processes_have_the_same_bits() -> None:
    script = "import models, test_determinism as t; print(t.digest(t.score(models.residual_cnn(), 'batch')))"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, *sys.path])}
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("family", READ_ALIKE)
def test_ways_of_reading_have_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a separate loop with kept rows, resumed after every row.

    All of them check in the first row, as an own loop does: where a norm's weight has a gradient too, torch may round
    that of its input another way.
    """
    monkeypatch.setattr(obc.JacobianScorer, "can_check_on_a_sample", False)
    case = FAMILIES[family]()
    expected = score(case, "batch")
    assert_equal(score_in_a_loop(obc.JacobianScorer(case.model), case), expected)
    assert_equal(score(case, "batch", keep_rows=True), expected)
    scorer = obc.JacobianScorer(case.model)
    for batch in case.batches:
        state, scorer = scorer.state_dict(), obc.JacobianScorer(case.model)
        scorer.load_state_dict(state)
        score_in_a_loop(scorer, case, [batch])
    assert_equal(scorer.scores(), expected)


# --- threads -------------------------------------------------------------------------------------------------------


def torchs_own(case: Case) -> list[Tensor]:
    """The values that torch computes before obc reads them: inputs, outputs and gradients of layers and norms."""
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        seen.append(tensor.detach().clone())
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: seen.append(grad.clone()))

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        for value in args:
            if isinstance(value, Tensor):
                keep(value)

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            keep(output)

    model = case.oracle_model
    for module in oracle.scorable(model).values():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    for batch in case.batches:
        model.zero_grad()
        case.loss(model, batch).backward()
        norms = [module for module in oracle.scorable(model).values() if oracle.is_norm(module)]
        seen += [p.grad.clone() for norm in norms for p in norm.parameters(recurse=False) if p.grad is not None]
    return seen


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def change_of_threads(family: str) -> bool:
    """Whether other numbers of threads change torch's values; if not, the scores' bits are the same too."""
    torch.set_num_threads(1)
    expected, before = score(FAMILIES[family](), "batch"), torchs_own(FAMILIES[family]())
    changed = False
    for count in (2, 3):
        torch.set_num_threads(count)
        scores = score(FAMILIES[family](), "batch")
        if same(torchs_own(FAMILIES[family]()), before):
            assert_equal(scores, expected)
        else:
            changed = True
            assert max(errors(scores, exact(expected)).values()) <= TOLERANCE
    return changed


THIRD = list(FAMILIES)[::3]
OTHERS = pytest.param([family for family in FAMILIES if family not in THIRD], marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("families", [THIRD, OTHERS], ids=["a third", "the others"])
def test_threads_change_scores_only_where_they_change_torch(families: list[str], threads: None) -> None:
    same_for_torch = [family for family in families if not change_of_threads(family)]
    assert len(same_for_torch) >= 5, same_for_torch  # otherwise nothing would have been compared exactly


class Wide(nn.Module):
    """Operations that torch splits among threads without changing a bit, large enough to be split, and all of obc's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.group = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.fc, self.rms, self.head = nn.Linear(32, 128), nn.RMSNorm(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.group(self.conv2(x))).flatten(2).transpose(1, 2)
        return self.head(self.rms(torch.relu(self.fc(x))).mean(1))


@pytest.mark.parametrize("rows", ROWS)
def test_threads_do_not_change_a_large_model(rows: str, threads: None) -> None:
    def case() -> Case:
        return models.case(Wide, models.floats(8, 16, 16, batches=1, batch=8))

    torch.set_num_threads(1)
    expected, before = score(case(), rows), torchs_own(case())
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same(torchs_own(case()), before), "this torch gives other bits: choose other layers"
        assert_equal(score(case(), rows), expected)


# --- equal to rounding ---------------------------------------------------------------------------------------------


def exact(scores: obc.Scores) -> oracle.Rows:
    """Scores as the oracle has them, to be compared with."""
    sides = {name: (channels.out_channels, channels.in_channels) for name, channels in scores.items()}
    return {name: tuple(None if side is None else side.double() for side in pair) for name, pair in sides.items()}


@pytest.mark.parametrize("rows", ROWS)
def test_micro_batches_are_equal_to_rounding(rows: str) -> None:
    case = models.residual_cnn()
    parts = score(case, rows, micro_batch=2)
    assert max(errors(parts, exact(score(case, rows))).values()) <= TOLERANCE
    assert_equal(score(case, rows, micro_batch=2), parts)


@pytest.mark.parametrize("rows", ROWS)
def test_a_choice_of_modules_is_equal_to_rounding(rows: str) -> None:
    case = OWN["norms"]()
    some = score(case, rows, modules=["conv2"])
    assert max(errors(some, exact(score(case, rows)), ["conv2"]).values()) <= TOLERANCE


@pytest.mark.parametrize("rows", ROWS)
def test_a_first_row_without_a_check_is_equal_to_rounding(rows: str) -> None:
    case = OWN["norms"]()
    assert max(errors(score(case, rows, check=False), exact(score(case, rows))).values()) <= TOLERANCE


@pytest.mark.parametrize("family", READ_ALIKE)
def test_a_check_on_a_sample_is_equal_to_rounding(family: str) -> None:
    """obc.score checks on a sample before its rows, an own loop in its first row; kept rows change no bit of either."""
    case = FAMILIES[family]()
    scores = score(case, "batch")
    assert_equal(score(case, "batch", keep_rows=True), scores)
    loop = score_in_a_loop(obc.JacobianScorer(case.model), case)
    # A sum of squares of float32 rows: a hundred times their rounding. 7e-7 was seen, in the norms.
    assert max(errors(scores, exact(loop)).values()) <= 100 * torch.finfo(torch.float32).eps
