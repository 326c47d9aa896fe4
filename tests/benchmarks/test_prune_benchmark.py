"""bench_selection: its generated task, its schedule, and that a killed run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from benchmarks import bench_selection as bench
from benchmarks.selection_tasks import TEXTURE_CLASSES, textures


def test_textures_follow_the_seed_and_hold_every_class_equally() -> None:
    one, again, other = textures(0), textures(0), textures(1)
    for split, twin in zip(vars(one).values(), vars(again).values(), strict=True):
        assert torch.equal(split.images, twin.images)
        assert torch.equal(split.labels, twin.labels)
        counts = split.labels.bincount(minlength=TEXTURE_CLASSES)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(one.train.images, other.train.images)
    assert not any(torch.equal(image, one.test.images[0]) for image in one.train.images)


def test_the_schedule_passes_every_ratio() -> None:
    shares = bench.schedule()
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == sum(bench.STEPS)
    assert {1 / ratio for ratio in bench.RATIOS} <= set(shares)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fake(network: bench.Network, method: str) -> dict[str, Any]:
        done.append(method)
        if len(done) == 2:
            raise KeyboardInterrupt
        states = {"raw": 0.1, "bn": 0.5, "seq": 0.7, "macs_ratio": 2.0}
        return {"ratios": {str(ratio): states for ratio in bench.RATIOS}, "parts": {"select": 1.0, "score": 3.0}}

    monkeypatch.setattr(bench, "prune_network", fake)
    monkeypatch.setattr(bench, "train", lambda model, *args, **options: model)
    out = tmp_path / "results.jsonl"
    arguments = ["--out", str(out), "--stage", "prune", "--seeds", "0", "--only", "digits/vgg", "--methods", "L1", "L2"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    assert bench.main([*arguments, "--json", str(tmp_path / "results.json")]) == 0
    assert done == ["L1", "L2", "L2"]
    keys = [json.loads(line).get("key") for line in out.read_text().splitlines()]
    assert keys == [None, "network/digits/vgg/0", "prune/digits/vgg/0/L1", None, "prune/digits/vgg/0/L2"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(written["provenance"])
    assert len(written["provenance"]) == 2
    assert [case["key"] for case in written["cases"]] == [key for key in keys if key is not None]


def test_learning_rates_are_chosen_on_the_validation_split(tmp_path: Path) -> None:
    results = bench.Results(tmp_path / "results.jsonl")
    for rate, validation, test in ((3e-4, 0.5, 0.9), (1e-3, 0.7, 0.6), (3e-3, 0.6, 0.8)):
        for seed in (0, 1):
            key = f"tune/digits/vgg/{seed}/L1/2.0/short/{rate}"
            results.add(key, {"validation": validation if seed == 0 else 0.0, "test": test})
    assert bench.best_rate(results, "digits/vgg/0/L1/2.0/short") == 1e-3
    assert bench.accuracies(results, "digits", "vgg", "L1", 2.0, "short") == {0: 60.0, 1: 60.0}


def test_fine_tuning_that_was_cut_short_is_not_reported(tmp_path: Path) -> None:
    results = bench.Results(tmp_path / "results.jsonl")
    results.add("tune/digits/vgg/0/L1/2.0/short/0.0003", {"validation": 0.5, "test": 0.9})
    assert bench.accuracies(results, "digits", "vgg", "L1", 2.0, "short") == {}
