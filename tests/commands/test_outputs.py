"""What a command writes is whole or not there: when it is interrupted, when the disk is full, and when its output would
be its own input."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")

from directories import llama_directory
from test_demo import example_result

import obc
from obc import cli
from obc.commands import prune_scored
from obc.demo import run as demo_run
from obc.pruning.report import PruningReport

ENTRY = """
import torch
from torch import nn

def good():
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    return model, [torch.randn(8, 4) for _ in range(4)], lambda model, batch: model(batch).square().mean()
"""
COMMON = ["--data", "data.jsonl", "--device", "cpu", "--seq-len", "8", "--batches", "4"]
FEW = [option for option in COMMON if option not in ("--seq-len", "8")]
# Command -> arguments that take a second at most, the option --out and its value apart, and what is replaced by an
# interrupt. {out} is a folder or a file in two folders that are missing.
COMMANDS: dict[str, tuple[list[str], Any, str]] = {
    "score": (["score", "llama", *COMMON], obc, "score"),
    "statistics": (["score", "llama", *COMMON, "--statistics", "moments"], obc, "collect"),
    "statistics on disk": (
        ["score", "llama", *COMMON, "--statistics", "moments", "--by-block", "disk"],
        obc,
        "collect",
    ),
    "entry": (["prune", "recipes_of_outputs:good", "--macs", "0.6", "--steps", "1"], obc, "prune"),
    "directory": (["prune", "llama", *FEW, "--params", "0.8", "--steps", "1"], obc, "prune"),
    "scores": (
        ["prune", "llama", "--scores", "scores", "--ratio", "0.3", "--device", "cpu"],
        prune_scored._ScoredJob,
        "run",
    ),
    "recover": (["recover", "pruned", "--teacher", "llama", *COMMON, "--steps", "1"], obc, "recover"),
    "report": (["report", "pruned"], PruningReport, "html"),
    "demo": (["demo"], demo_run, "run"),
    "bench": (["bench", "ops"], subprocess, "run"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a Llama, its scores, what they pruned, and an entry point."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "recipes_of_outputs.py").write_text(ENTRY)
    llama_directory(tmp_path, initializer_range=0.3)
    assert cli.main(["score", "llama", *COMMON, "--out", "scores"]) == 0
    assert cli.main([*COMMANDS["scores"][0], "--out", "pruned"]) == 0
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_leaves_nothing(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, owner, name = COMMANDS[command]
    before = contents(folder)
    monkeypatch.setattr(owner, name, interrupted)
    assert cli.main([*arguments, "--out", "new/folders/out"]) == 130
    assert contents(folder) == before
    assert capsys.readouterr().err.endswith(": interrupted\n")


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])  # its benchmarks write
def test_a_full_disk_leaves_nothing_and_then_the_output_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_run, "run", lambda seed, say, processes: [example_result()])
    arguments, _, _ = COMMANDS[command]
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert cli.main([*arguments, "--out", "new/folders/out"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert capsys.readouterr().err.splitlines()[-1].endswith("make room, or choose another place to write to")
    assert cli.main([*arguments, "--out", "new/folders/out"]) == 0
    assert contents(folder / "new" / "folders").keys() >= {"out"}


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "llama", *COMMON, "--out", "llama/model.safetensors"], "a file in the model's own directory"),
        (["score", "llama", *COMMON, "--out", "llama/../data.jsonl"], "--data too"),
        (["score", "llama", *COMMON, "--out", "new.safetensors", "--checkpoint", "data.jsonl"], "--data too"),
        (["score", "llama", *COMMON, "--out", "same", "--checkpoint", "same"], "--checkpoint too"),
        (["score", "llama", *COMMON, "--out", "linked/config.json"], "a file in the model's own directory"),
        (["score", "llama", *COMMON, "--log", "data.jsonl"], "--data too"),
        (["prune", "llama", *FEW, "--params", "0.8", "--out", "linked"], "the model's own directory"),
        (["prune", "llama", "--scores", "scores", "--ratio", "0.3", "--out", "scores"], "--scores too"),
        (["recover", "pruned", "--teacher", "llama", *COMMON, "--out", "llama"], "--teacher too"),
        (["recover", "pruned", "--teacher", "llama", *COMMON, "--out", "pruned"], "the model's own directory"),
        (
            ["recover", "pruned", "--teacher", "llama", *COMMON, "--out", "o", "--checkpoint", "llama/config.json"],
            "a file in --teacher",
        ),
        (["report", "pruned/obc_report.json", "--out", "pruned/obc_report.json"], "what is drawn"),
        (["report", "pruned", "--out", "pruned/obc_report.json"], "a file in what is drawn"),
        (["report", "scores", "--scores", "other", "--out", "other"], "--scores too"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_no_command_writes_over_what_it_reads(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "linked").symlink_to(folder / "llama")
    before = contents(folder)
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert f" is {said}" in capsys.readouterr().err
    assert contents(folder) == before


def test_results_may_lie_in_what_is_read_and_be_written_again(folder: Path) -> None:
    for _ in range(2):
        assert cli.main(["score", "llama", *COMMON, "--out", "llama/scores.safetensors", "--log", "llama/log.txt"]) == 0
        assert cli.main(["report", "pruned", "--out", "pruned/report.html"]) == 0
    assert cli.main(["report", "pruned", "--out", "/dev/null"]) == 0


CALLS: dict[str, Callable[[Path], object]] = {
    "plot": lambda path: obc.Scores.load("scores").plot(path),
    "save": lambda path: obc.Scores.load("scores").save(path),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_file_that_was_there(call: str, folder: Path) -> None:
    path = folder / "file.png"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            CALLS[call](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
