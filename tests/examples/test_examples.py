"""Every script of examples/ runs as its first lines say, in small."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# script -> (how it is started, its arguments, what it prints)
RUNS: dict[str, tuple[list[str], list[str], str]] = {
    "prune_image_model.py": ([], ["--epochs", "3"], "fine-tuned: accuracy"),
    "prune_llm.py": ([], ["--tiny", "--seq-len", "32", "--steps", "4", "OUT"], "recovered: perplexity"),
    "prune_detector.py": ([], [], "(4, 8, 16, 16)"),
    "with_torch_pruning.py": ([], [], "Linear(in_features="),
    "own_criterion.py": ([], ["--epochs", "1"], "activation_energy: accuracy"),
    "two_processes.py": (TWO_PROCESSES, [], "8 rows on 2 processes"),
    "recover_on_two_processes.py": (TWO_PROCESSES, [], "the same on every process: True"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


# tests/docs runs the tutorial on a CNN, which says the same as the first.
SLOW = (
    "own_criterion.py",
    "prune_detector.py",
    "prune_image_model.py",
    "recover_on_two_processes.py",
    "two_processes.py",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(RUNS)]
)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher, arguments, expected = RUNS[name]
    words = [str(tmp_path / word) if word == "OUT" else word for word in arguments]
    if not launcher:  # in this process, which has imported everything
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert expected in capsys.readouterr().out
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *launcher, str(EXAMPLES / name), *words]
    code, stdout, stderr = run_to_the_end(command, tmp_path, environment, seconds=300)
    assert code == 0, stdout[-2000:] + stderr[-4000:]
    assert expected in stdout, stdout[-2000:]


def run_to_the_end(command: list[str], folder: Path, environment: dict[str, str], seconds: int) -> tuple[int, str, str]:
    """Exit code and output. A late launcher is terminated, not killed: then it ends its processes too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            stdout, stderr = process.communicate()
            stderr += f"\nterminated after {seconds} s"
    return process.returncode, stdout, stderr
