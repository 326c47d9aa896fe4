"""OBC_AUTOTUNE=1: what is tried, what is chosen, and when nothing is timed; with a clock of the tests' own.

Run by ``tests/test_triton.py`` as ``launches.py`` is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obc import reference
from obc_kernels import autotune
from obc_kernels.channel_dot import ChannelDotConfig, channel_dot_triton
from obc_kernels.end_row import end_row_triton
from obc_kernels.fold import fold_triton
from obc_kernels.launch import recording
from obc_kernels.layout import Walk
from obc_kernels.weight_dot import weight_dot_triton
from obc_kernels.weight_moments import weight_moments_triton


class Clock:
    """Stands for ``autotune.seconds``: runs each call once, and says that the ``fastest``-th tried is the fastest."""

    def __init__(self) -> None:
        self.fastest = 0
        self.timed = 0

    def __call__(self, call: Callable[[], Any], device: torch.device) -> float:
        call()
        self.timed += 1
        return 1.0 if self.timed - 1 == self.fastest else 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Tuning is on, nothing is chosen yet, and time is the test's."""
    monkeypatch.setenv("OBC_AUTOTUNE", "1")
    monkeypatch.delenv("OBC_AUTOTUNE_FILE", raising=False)
    monkeypatch.setattr(autotune, "_choices", {})
    monkeypatch.setattr(autotune, "_read", None)
    clock = Clock()
    monkeypatch.setattr(autotune, "seconds", clock)
    return clock


A, G = (torch.randn(3, 70, 24, generator=torch.Generator().manual_seed(n)) for n in (0, 1))


def test_nothing_is_timed_unless_asked_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OBC_AUTOTUNE")
    channel_dot_triton(A, G, 2)
    assert clock.timed == 0
    assert autotune._choices == {}


def test_each_class_of_shapes_is_timed_once_and_its_bits_stay(clock: Clock) -> None:
    clock.fastest = 1
    first = channel_dot_triton(A, G, 2)
    tried = clock.timed
    assert tried > 1
    assert list(autotune._choices.values()) == ["half tile"]
    for _ in range(3):
        assert torch.equal(channel_dot_triton(A, G, 2), first)
    channel_dot_triton(A[:, :69].contiguous(), G[:, :69].contiguous(), 2)  # of the same class
    assert clock.timed == tried
    channel_dot_triton(A.double(), G.double(), 2)
    channel_dot_triton(A[..., :12], G[..., :12], 2)
    assert len(autotune._choices) == 3


def _fold() -> Tensor:
    return fold_triton(A[0].contiguous(), torch.ones(20, 70), torch.ones(24, 8))


def _end_row() -> list[Tensor]:
    scores, row = torch.ones(3000), torch.arange(3000.0)
    end_row_triton(scores, row, 2.0)
    return [scores, row]


CALLS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "channel_dot": (lambda: channel_dot_triton(A, G, 1), lambda: reference.channel_dot(A, G, 1)),
    "weight_dot": (lambda: weight_dot_triton(A, G), lambda: reference.weight_dot(A, G)),
    "weight_moments": (lambda: weight_moments_triton(A, G), lambda: reference.weight_moments(A, G)),
    "fold": (_fold, lambda: reference.fold(A[0], torch.ones(20, 70), torch.ones(24, 8))),
    "end_row": (_end_row, lambda: [1 + (torch.arange(3000.0) / 2).square(), torch.zeros(3000)]),
}


# weight_dot has the most variations: they take longer than all other tests of this file.
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name == "weight_dot" else name for name in CALLS]
)
def test_every_variation_is_right(family: str, clock: Clock) -> None:
    """Whichever is chosen: and timing leaves what is summed, and what is added to, as it was."""
    call, definition = CALLS[family]
    call()
    for fastest in range(clock.timed):
        autotune._choices.clear()
        clock.fastest, clock.timed = fastest, 0
        actual, truth = call(), definition()
        torch.testing.assert_close(
            [actual] if isinstance(actual, Tensor) else list(actual),
            [truth] if isinstance(truth, Tensor) else list(truth),
            rtol=1e-4,
            atol=1e-4,
        )
        (chosen,) = autotune._choices.values()
    assert chosen != autotune.HEURISTIC


def test_variations_begin_with_the_heuristic() -> None:
    walk = Walk.over(2, False, A, G)
    assert walk is not None
    name, config = next(iter(ChannelDotConfig.variations(walk, 4).items()))
    assert name == autotune.HEURISTIC
    assert config == ChannelDotConfig.from_heuristic(walk, 4)


def test_tensors_without_memory_and_recorded_launches_are_not_timed(clock: Clock) -> None:
    with recording(dry=True) as launches:
        channel_dot_triton(A.to("meta"), G.to("meta"), 2)
        channel_dot_triton(A, G, 2)
    assert launches
    assert clock.timed == 0


def test_parameters_that_the_device_has_no_room_for_are_passed_over(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    def seconds(call: Callable[[], Any], device: torch.device) -> float:
        if clock(call, device) and clock.timed < 3:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    monkeypatch.setattr(autotune, "seconds", seconds)
    channel_dot_triton(A, G, 2)
    (chosen,) = autotune._choices.values()
    assert chosen not in (autotune.HEURISTIC, "half tile")

    def never(call: Callable[[], Any], device: torch.device) -> float:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(autotune, "seconds", never)
    with pytest.raises(RuntimeError, match=r"no launch parameters for channel_dot .* fit this device"):
        channel_dot_triton(A.double(), G.double(), 2)


def test_choices_are_kept_in_a_file(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "choices.json"
    monkeypatch.setenv("OBC_AUTOTUNE_FILE", str(path))
    clock.fastest = 2
    first = channel_dot_triton(A, G, 2)
    (key,) = json.loads(path.read_text())
    assert key.startswith("channel_dot ")
    program = (
        "import torch; from obc_kernels import autotune; from obc_kernels.channel_dot import channel_dot_triton\n"
        "def fail(*_): raise AssertionError('timed again')\n"
        "autotune.seconds = fail\n"
        "a, g = (torch.randn(3, 70, 24, generator=torch.Generator().manual_seed(n)) for n in (0, 1))\n"
        "print(channel_dot_triton(a, g, 2).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == first.tolist()


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "does not hold launch parameters")])
def test_a_file_of_something_else_is_refused(
    content: str, message: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    monkeypatch.setenv("OBC_AUTOTUNE_FILE", str(path))
    with pytest.raises(ValueError, match=f"choices.json {message}"):
        channel_dot_triton(A, G, 2)
    assert path.read_text() == content


def test_a_choice_that_no_longer_exists_is_made_anew(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "choices.json"
    monkeypatch.setenv("OBC_AUTOTUNE_FILE", str(path))
    channel_dot_triton(A, G, 2)
    path.write_text(path.read_text().replace("heuristic", "of another version"))
    autotune._choices.clear()
    monkeypatch.setattr(autotune, "_read", None)
    clock.timed = 0
    channel_dot_triton(A, G, 2)
    assert clock.timed > 1
    assert "heuristic" in path.read_text()


def test_the_clock_of_the_interpreter_is_the_wall() -> None:
    assert 0 < autotune.seconds(lambda: channel_dot_triton(A, G, 2), torch.device("cpu")) < 60
