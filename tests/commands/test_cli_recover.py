"""obc recover and obc evaluate on a directory that obc prune wrote, and on what can't be recovered."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from directories import llama_directory
from PIL import Image

import obc
from obc import cli, quality
from obc.commands import model_directory
from obc.pruning import PruningReport
from obc.structures.transformers import TransformersStructure
from obc.structures.transformers.saving import is_saved_pruned


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_directory(tmp_path, initializer_range=0.3)


@pytest.fixture(params=["free", "uniform"])
def pruned(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Path:
    data, scores = tmp_path / "data.jsonl", tmp_path / "scores.safetensors"
    common = ["--device", "cpu"]
    arguments = ["score", llama, "--data", data, "--out", scores, "--batches", 20, "--seq-len", 8, *common]
    assert cli.main([*map(str, arguments)]) == 0
    uniform = ["--uniform"] if request.param == "uniform" else []
    arguments = ["prune", llama, "--scores", scores, "--ratio", 0.3, "--out", tmp_path / "pruned", *uniform, *common]
    assert cli.main([*map(str, arguments)]) == 0
    return tmp_path / "pruned"


def run(command: str, *arguments: object) -> int:
    return cli.main([command, *map(str, arguments), "--device", "cpu", "--seq-len", "8"])


def figure(pattern: str, text: str) -> list[float]:
    return [float(value.replace(",", "")) for value in re.findall(pattern, text)]


def divergence(path: Path, teacher: Path, data: Path) -> float:
    """The loss that training lowers, on the training data."""
    student, wanted = (model_directory.load(folder, None, torch.device("cpu")).model for folder in (path, teacher))
    ids = torch.tensor([json.loads(line)["input_ids"] for line in data.read_text().splitlines()])
    return obc.Distillation().loss(student, wanted, {"input_ids": ids}).item()


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("train", ["naive", "folded", "lora"])
def test_a_pruned_directory_is_recovered_and_evaluated(
    pruned: Path, llama: Path, tmp_path: Path, train: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    arguments = ["--teacher", llama, "--data", data, "--out", out, "--steps", 60, "--lr", 0.003, "--train", train]
    assert run("recover", pruned, *arguments) == 0
    assert "60 steps" in capsys.readouterr().out
    assert run("evaluate", out, "--data", data, "--reference", llama, "--measure") == 0
    printed = capsys.readouterr().out
    assert "windows of 8 tokens every 8" in printed
    assert "speed-up" in printed
    ours, theirs = figure(r"parameters: ([\d,]+)", printed)
    assert ours < theirs
    before, after = (divergence(path, llama, data) for path in (pruned, out))
    assert after < 0.9 * before
    (cosine,) = figure(r"cosine: ([\d.]+)", printed)
    assert -1 <= cosine <= 1


def test_perplexity_is_that_of_the_library(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    assert run("evaluate", llama, "--data", data, "--batches", 5, "--stride", 3) == 0
    (printed,) = figure(r"perplexity ([\d.]+)", capsys.readouterr().out)
    tokens = torch.tensor([json.loads(line)["input_ids"] for line in data.read_text().splitlines()][:20]).flatten()
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    expected = quality.perplexity(model, tokens, length=8, stride=3).perplexity
    assert printed == pytest.approx(expected, abs=0.01)


def test_a_recovered_directory_keeps_its_plan(
    pruned: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    assert run("recover", pruned, "--teacher", llama, "--data", data, "--out", out, "--steps", 1) == 0
    assert (out / "obc_plan.json").read_text() == (pruned / "obc_plan.json").read_text()
    before, after = (PruningReport.load(folder / "obc_report.json") for folder in (pruned, out))
    assert after.provenance.pop("recovered").startswith("1 steps at rate 0.0001, naive, against ")
    assert after == before
    assert is_saved_pruned(out) == is_saved_pruned(pruned)
    loader = "obc.structures.transformers.load_pruned" if is_saved_pruned(out) else "from_pretrained"
    assert f"written: {out}; {loader} loads it\nas a page: obc report {out}\n" in capsys.readouterr().out


def test_what_cannot_be_recovered_is_said_in_one_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    assert run("recover", llama, "--teacher", llama, "--data", data, "--out", llama) == 2
    assert "is the model's own directory" in capsys.readouterr().err
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    linked.symlink_to(llama)
    shutil.copytree(llama, copied)
    for teacher in (llama, linked, llama / ".." / llama.name):
        assert run("recover", llama, "--teacher", teacher, "--data", data, "--out", tmp_path / "out") == 2
        assert "is the pruned model's own directory, from which it has nothing to learn" in capsys.readouterr().err
    folded = ["--train", "folded", "--out", tmp_path / "out"]
    with pytest.warns(UserWarning, match="the teacher has the same weights"):
        assert run("recover", llama, "--teacher", copied, "--data", data, *folded) == 2
    assert "found nothing to fold" in capsys.readouterr().err
    assert run("evaluate", llama, "--data", data, "--stride", 9) == 2
    assert "stride=9" in capsys.readouterr().err


def test_a_model_without_a_head_is_recovered_by_its_hidden_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher, pruned, out, data = (tmp_path / name for name in ("bert", "pruned", "out", "data.jsonl"))
    model = transformers.BertModel(config)
    model.save_pretrained(teacher)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (40, 8), generator=generator)
    data.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    structure = TransformersStructure(model, kinds=("ffn",), uniform=True)
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    model.save_pretrained(pruned)

    def error(path: Path) -> float:
        with torch.no_grad():
            ours, wanted = (
                transformers.BertModel.from_pretrained(folder).eval()(ids).last_hidden_state
                for folder in (path, teacher)
            )
        return float((ours - wanted).square().sum() / wanted.square().sum())

    arguments = ["--teacher", teacher, "--data", data, "--out", out, "--steps", 40, "--lr", 0.01]
    assert run("recover", pruned, *arguments) == 0
    assert error(out) < 0.5 * error(pruned)
    first = figure(r"loss ([\d.]+) at the first step", capsys.readouterr().out)
    assert first[0] == pytest.approx(error(pruned), rel=0.5)  # of one batch, not of all


def test_a_model_of_one_logit_agrees_in_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=1,
    )
    folder, images = tmp_path / "vit", tmp_path / "images"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    images.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (40 * index, 90, 10)).save(images / f"{index}.png")
    assert cli.main([*map(str, ["evaluate", folder, "--reference", folder, "--data", images, "--device", "cpu"])]) == 0
    printed = capsys.readouterr().out
    assert "agreement" not in printed
    assert "cosine: 1.0000" in printed


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8
                )
            ),
            "is a ViTForImageClassification of 2 classes, and",
        ),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)
            ),
            "is a GPT2LMHeadModel of 20 tokens, and",
        ),
        (
            lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=24,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=16,
                )
            ),
            "is a LlamaForCausalLM of 24 tokens, and",
        ),
    ],
    ids=["images", "another class", "another vocabulary"],
)
def test_a_model_that_is_not_the_unpruned_one(
    other: Any, said: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, second = tmp_path / "data.jsonl", tmp_path / "other"
    other().save_pretrained(second)
    capsys.readouterr()
    for command, option, more in (
        ("evaluate", "--reference", ()),
        ("recover", "--teacher", ("--out", tmp_path / "out", "--steps", 1)),
    ):
        assert run(command, llama, option, second, "--data", data, *more) == 2
        assert capsys.readouterr().err == (
            f"obc {command}: {option} {second} {said} {llama} a LlamaForCausalLM of 20 tokens; pass the directory of "
            "the model that was pruned\n"
        )
