"""The benchmark of pretrained models, on a tiny one with random weights: cases, resumption, table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import bench_real, real_sources

ARGUMENTS = ["--model", "tiny", "--draws", "0", "--shares", "0.25", "--threads", "1"]
ARGUMENTS += ["--calibration", "6", "--test", "3", "--length", "12"]


def test_cases_are_measured_once_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "real.json"
    few = [*ARGUMENTS, "--criteria", "l2", "--compensation", "none", "correct", "--out", str(out)]
    bench_real.main(few)
    first = json.loads(out.read_text())["cases"]
    assert [(case["criterion"], case["compensation"]) for case in first] == [
        ("none", "none"),
        ("l2", "none"),
        ("l2", "correct"),
    ]
    task = bench_real.tiny(0, 6, 3, 12)
    with torch.no_grad():
        losses = [float(task.model(input_ids=batch, labels=batch).loss) for batch in task.test]
    assert first[0]["losses"] == pytest.approx(losses)
    assert first[0]["shown"] == pytest.approx(math.exp(sum(losses) / 3))
    capsys.readouterr()
    bench_real.main([*few, "--criteria", "l2", "wanda_sp"])
    cases = json.loads(out.read_text())["cases"]
    assert cases[:3] == first
    assert len(cases) == 5
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("draw 0") for line in lines) == 2  # only what was new ran
    assert sum("(best)" in line for line in lines) == 2  # unpruned, and one of the criteria in both columns


def test_the_share_is_that_of_the_blocks() -> None:
    task = bench_real.tiny(0, 6, 3, 12)
    pruned = bench_real.prune(task, "l2", 0.25).model
    kept = sum(parameter.numel() for parameter in pruned.get_submodule("model.layers").parameters())
    assert kept <= 0.75 * task.blocks < kept + 200  # a unit is at most a head of 96 x 8 x 2 parameters away


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="pip install of-it"):
        real_sources.package_folder("a_package_that_is_not_there", "pip install of-it")
    monkeypatch.setattr(real_sources, "_DOC", tmp_path)
    for document in real_sources.DOCUMENTS.values():
        with pytest.raises(FileNotFoundError, match="apt-get install "):
            document()


def test_sequences_are_disjoint_pieces() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    text = " ".join(map(str, range(103)))
    pieces = real_sources.sequences(tokenizer, text, 5, 10, seed=0)
    assert pieces.shape == (5, 10)
    assert len(set(pieces.flatten().tolist())) == 50
    assert all((piece - piece[0]).tolist() == list(range(10)) for piece in pieces)
    assert not torch.equal(pieces, real_sources.sequences(tokenizer, text, 5, 10, seed=1))
    with pytest.raises(ValueError, match="10 pieces of 10 tokens, asked for 11"):
        real_sources.sequences(tokenizer, text, 11, 10, seed=0)
