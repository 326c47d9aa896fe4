"""bench_structure on a small model: every case runs and is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from benchmarks import bench_structure


def test_every_case_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(bench_structure, "SIZES", sizes)
    monkeypatch.setattr(bench_structure, "VOCABULARY", 32)
    monkeypatch.setattr(bench_structure, "LAYERS", 3)
    out = tmp_path / "structure.json"
    assert bench_structure.main(["--quick", "--tokens", "8", "--threads", "1", "--out", str(out)]) == 0
    found = {case["name"]: case["seconds"] for case in json.loads(out.read_text())["cases"]}
    assert len(found) == 4
    assert all(seconds > 0 for seconds in found.values())
    assert capsys.readouterr().out.count("3 layers: ") == 4
