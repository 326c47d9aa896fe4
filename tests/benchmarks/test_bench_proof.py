"""bench_proof: what it counts, on a small Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from benchmarks import bench_proof as bench


def test_the_proof_takes_as_many_passes_however_much_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(rows: int, batch: int) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, use_cache=False, **sizes)).eval()
        return model, None, [(tokens, tokens) for tokens in torch.randint(32, (rows, batch, 8)).unbind()]

    monkeypatch.setattr(bench, "NETWORKS", {"small": small})
    out = tmp_path / "proof.json"
    for rows in ("2", "4"):
        assert bench.main(["--rows", rows, "--batch", "2", "--steps", "2", "--threads", "1", "--out", str(out)]) == 0
        (case,) = json.loads(out.read_text())["cases"]
        # The model once, two tries of two models, three at the end; the first row of scoring may repeat its batch.
        assert case["passes"] == 8
        assert case["all_passes"] >= 8 + 2 * int(rows)
        assert case["groups"] == 4
        assert case["error"] < case["tolerance"]
    assert "small" in capsys.readouterr().out
