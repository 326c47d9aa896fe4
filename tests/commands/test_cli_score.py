"""``obc score``: local directories, their data and their losses; and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
pytest.importorskip("PIL", reason="Pillow is missing: pip install pillow")

import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import obc
from obc import cli
from obc.commands import data

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=16, **{f"{kind}_token": name for kind, name in names.items()}
    )


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model, with a tokenizer where asked; returns its directory."""

    def write(kind: str, with_tokenizer: bool = False) -> Path:
        torch.manual_seed(0)
        made = {
            "llama": lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(vocab_size=20, max_position_embeddings=12, **SMALL)
            ),
            "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **SMALL)),
            "albert": lambda: transformers.AlbertForMaskedLM(
                transformers.AlbertConfig(vocab_size=20, embedding_size=8, **SMALL)
            ),
            "encoder": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL)),
            "vit": lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
            ),
        }[kind]()
        path = tmp_path / kind
        made.save_pretrained(path)
        if with_tokenizer:
            tokenizer().save_pretrained(path)
        return path

    return write


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """30 documents of 7 tokens."""
    path = tmp_path / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(20, (30, 7), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox\njumps over\n\n\na lazy dog\n\n" * 40)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (10, 12), (80 * label, 20 * index, 7)).save(folder / str(label) / f"{index}.png")
    return folder


def run(*arguments: object) -> int:
    return cli.main(["score", *map(str, arguments), "--device", "cpu"])


def test_scores_of_token_numbers_are_those_of_the_library(
    save: Callable[..., Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = save("llama"), tmp_path / "out" / "scores.safetensors"
    assert run(path, "--data", ids, "--out", out, "--batches", 3, "--batch-size", 2, "--seq-len", 10) == 0
    tokens = [token for line in ids.read_text().splitlines() for token in json.loads(line)["input_ids"]]
    batches = torch.tensor(tokens[:60]).view(3, 2, 10)

    def next_token(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    model = transformers.LlamaForCausalLM.from_pretrained(path)
    expected, found = obc.score(model, list(batches), next_token, progress=False), obc.Scores.load(out, model)
    assert found.num_rows == 3
    assert found.metadata["loss"] == "causal-lm"
    assert set(found) == set(expected)
    for name, channels in expected.items():
        torch.testing.assert_close(found[name].out_channels, channels.out_channels, rtol=1e-4, atol=0)
    printed = capsys.readouterr().out
    assert "3 batches of 2 x 10, loss causal-lm" in printed
    assert f"{len(expected)} modules scored by 3 rows" in printed


@pytest.mark.parametrize(
    ("kind", "options", "loss", "rows"),
    [
        ("llama", [], "causal-lm", 5),
        ("llama", ["--rows", "sample", "--loss", "label-free"], "label-free", 10),
        ("llama", ["--loss", "kl"], "kl", 5),
        ("llama", ["--dtype", "bf16"], "causal-lm", 5),
        ("bert", [], "masked-lm", 5),
        ("encoder", [], "label-free", 5),
    ],
    ids=["causal", "sample", "kl", "bf16", "masked", "no-head"],
)
def test_text_is_scored_by_the_loss_of_the_head(
    kind: str, options: list[str], loss: str, rows: int, save: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    path, out = save(kind, with_tokenizer=True), tmp_path / "scores.safetensors"
    assert run(path, "--data", text, "--out", out, "--batches", 5, "--batch-size", 2, *options) == 0
    scores = obc.Scores.load(out)
    assert (scores.metadata["loss"], scores.num_rows) == (loss, rows)
    assert all(channels.out_channels.isfinite().all() for channels in scores.values())


@pytest.mark.parametrize("options", [[], ["--loss", "label-free"]], ids=["label", "label-free"])
def test_images_are_scored(
    options: list[str], save: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.safetensors"
    assert run(save("vit"), "--data", images, "--out", out, "--batch-size", 2, *options) == 0
    assert obc.Scores.load(out).num_rows == 4
    printed = capsys.readouterr().out
    assert "gives 4 batches of the 50 asked for" in printed
    assert "smaller --batches, --batch-size take less time" in printed


@pytest.mark.parametrize(("micro_batch", "parts"), [(None, 1), (1, 2)])
def test_activations_are_computed_again_in_backward(
    micro_batch: int | None,
    parts: int,
    save: Callable[..., Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every part of a row goes through the layer twice, and the scores are the same."""
    path, plain, out = save("llama"), tmp_path / "plain", tmp_path / "out"
    options = ["--data", ids, "--batches", 3, "--batch-size", 2, "--seq-len", 10]
    assert run(path, *options, "--out", plain) == 0
    samples: list[int] = []
    block = transformers.models.llama.modeling_llama.LlamaMLP
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: samples.append(len(x)) or forward(self, x))
    parting = [] if micro_batch is None else ["--micro-batch", micro_batch]
    assert run(path, *options, "--out", out, "--checkpointing", *parting) == 0
    assert samples[-2 * parts :] == [2 // parts] * 2 * parts
    assert len(samples) >= 2 * parts * 3
    expected, found = obc.Scores.load(plain), obc.Scores.load(out)
    for name, channels in expected.items():
        torch.testing.assert_close(found[name].out_channels, channels.out_channels, rtol=1e-4, atol=0)


def test_sequences_follow_the_documents_without_padding(text: Path) -> None:
    words = tokenizer()
    (first, second), _ = data._sequences(text, words, 20, 8, 2)
    paragraph = words("the quick brown fox jumps over", add_special_tokens=False)["input_ids"]
    end, other = words.sep_token_id, words("a lazy dog", add_special_tokens=False)["input_ids"]
    assert first + second == ([*paragraph, end, *other, end, *paragraph])[:16]


def test_masks_leave_special_tokens_and_label_what_they_hide() -> None:
    words = tokenizer()
    plain = torch.randint(5, len(WORDS), (50, 14))
    plain[:, 0], plain[:, -1] = words.cls_token_id, words.sep_token_id
    batch = data._masked(plain, words, torch.Generator().manual_seed(0))
    hidden = batch["input_ids"] == words.mask_token_id
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), plain)
    assert (batch["labels"][~hidden] == -100).all()
    assert not hidden[:, [0, -1]].any()
    # Binomial: 600 tokens, 15 % of them, five standard deviations.
    assert abs(hidden.sum() - 0.15 * 600) < 5 * (600 * 0.15 * 0.85) ** 0.5


def test_pixels_without_a_processor_are_scaled(save: Callable[..., Path], images: Path) -> None:
    path = save("vit")
    model = transformers.ViTForImageClassification.from_pretrained(path)
    pixels = data._preparation(model, path)(images / "2" / "1.png")
    expected = torch.tensor([160.0, 20.0, 7.0]) / 127.5 - 1
    torch.testing.assert_close(pixels, expected[:, None, None].expand(3, 8, 8))


Arguments = Callable[[Callable[..., Path], Path, Path], list[object]]


def _written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def _cut_short(folder: Path) -> Path:
    """A model directory whose download broke off."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda save, ids, tmp: [tmp / "none", "--data", ids], "is not a directory"),
        (lambda save, ids, tmp: [tmp, "--data", ids], "has no config.json"),
        (lambda save, ids, tmp: [save("llama"), "--data", tmp / "none.txt"], "there is no such file"),
        (lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.csv", "")], "expected a .txt file"),
        (lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.txt", "word")], "has no tokenizer"),
        (lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.jsonl", "{")], "line 1 is not JSON"),
        (lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.jsonl", '{"a": 1}')], "give each line a"),
        (
            lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.jsonl", '{"input_ids": [20]}')],
            "token 20 is none of the model's 20 (0 to 19); use the tokenizer of this model",
        ),
        (lambda save, ids, tmp: [save("llama"), "--data", ids, "--seq-len", 13], "the model has room for 12 tokens"),
        (lambda save, ids, tmp: [save("llama"), "--data", ids, "--batch-size", 99], "a batch takes 99 x 12; pass more"),
        (
            lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.jsonl", '{"input_ids": [1, 2]}')],
            "has 2 tokens, and a batch takes 4 x 12; pass more text, or a smaller --seq-len or --batch-size",
        ),
        (
            lambda save, ids, tmp: [save("llama"), "--data", _written(tmp / "a.jsonl", "")],
            "has 0 tokens, and a batch takes 4 x 12",
        ),
        (
            lambda save, ids, tmp: [_cut_short(save("llama")), "--data", ids],
            "can't load LlamaForCausalLM from",
        ),
        (lambda save, ids, tmp: [save("llama"), "--data", ids, "--seq-len", 1], "no next token to predict"),
        (lambda save, ids, tmp: [save("llama"), "--data", ids, "--loss", "masked-lm"], "needs another head"),
        (lambda save, ids, tmp: [save("encoder"), "--data", ids, "--loss", "kl"], "use --loss label-free"),
        (lambda save, ids, tmp: [save("llama"), "--data", tmp], "reads no images"),
        (
            lambda save, ids, tmp: [save("albert"), "--data", ids, "--checkpointing"],
            "--checkpointing: this version of transformers can't checkpoint activations of AlbertForMaskedLM",
        ),
        (lambda save, ids, tmp: [save("bert"), "--data", ids, "--seq-len", 9], "no tokenizer with a mask token"),
        (lambda save, ids, tmp: [save("vit"), "--data", ids], "this model classifies images"),
        (lambda save, ids, tmp: [save("vit"), "--data", tmp, "--batch-size", 1], "has 0 images"),
        (lambda save, ids, tmp: [save("llama"), "--data", ids, "--out", tmp], "it is a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_scored_is_said_in_one_line(
    arguments: Arguments,
    reason: str,
    save: Callable[..., Path],
    ids: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments(save, ids, tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("obc score: ")
    assert reason in said
    assert not (tmp_path / "scores.safetensors").exists()


def test_weights_that_are_pickled_are_not_opened(
    save: Callable[..., Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save("llama")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert run(path, "--data", ids, "--out", tmp_path / "s") == 2
    assert "safetensors" in capsys.readouterr().err


def test_images_of_unknown_classes_are_refused(
    save: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "2").rename(images / "cats")
    assert run(save("vit"), "--data", images, "--out", tmp_path / "s", "--batch-size", 9) == 2
    assert "'cats', which is not one of the model's 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_a_device_out_of_reach_is_refused(
    device: str, save: Callable[..., Path], ids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(save("llama")), "--data", str(ids), "--device", device]) == 2
    assert f"--device {device}: " in capsys.readouterr().err


def test_statistics_are_collected_and_a_directory_is_pruned_by_them(
    save: Callable[..., Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, pruned = save("llama"), tmp_path / "statistics", tmp_path / "pruned"
    arguments = ["score", str(model), "--data", str(ids), "--batches", "3", "--batch-size", "2", "--out", str(out)]
    assert cli.main([*arguments, "--statistics", "moments, gram"]) == 0
    statistics = obc.Statistics.load(out)
    assert statistics.collected == ("moments", "gram")
    assert set(statistics.gram) == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    prune = ["prune", str(model), "--scores", str(out), "--ratio", "0.2", "--out", str(pruned)]
    by_criterion = [*prune, "--criterion", "flap", "--allocation", "uniform"]
    assert cli.main([*by_criterion, "--compensate", "mean", "--data", str(ids)]) == 0
    assert "biases took over means" in capsys.readouterr().out
    from obc.structures.transformers import load_pruned

    loaded = load_pruned(pruned) if (pruned / "obc_plan.json").exists() else None
    assert loaded is not None
    assert loaded.model.layers[0].mlp.down_proj.in_features < 24
    refused = {
        ("--criterion", "reap"): "which was not collected",
        ("--criterion", "masked"): "runs the model itself",
        ("--criterion", "flop"): "criterion must be one of",
        ("--allocation", "uniform"): "needs --criterion",
        (): "is not a score file but one of statistics (Statistics of LlamaForCausalLM over ",
    }
    for options, message in refused.items():
        assert cli.main([*prune, *options]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*arguments, "--statistics", "grams"]) == 2
    assert "statistics are 'rows', 'moments'" in capsys.readouterr().err
    assert cli.main([*arguments, "--statistics", "masked"]) == 2
    assert "--statistics masked: this criterion needs no statistics" in capsys.readouterr().err


def test_statistics_of_other_groups_are_refused(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from obc.structures.transformers import TransformersStructure

    model, out = save("llama"), tmp_path / "statistics"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    groups = TransformersStructure(loaded, ["ffn"]).groups
    batches = [{"input_ids": torch.arange(8)[None]}]
    obc.collect(loaded, batches, statistics=["moments"], groups=groups, progress=False).save(out)
    prune = ["prune", str(model), "--scores", str(out), "--ratio", "0.1", "--out", str(tmp_path / "pruned")]
    for criterion in ("flap", "wanda_sp", "minitron"):
        assert cli.main([*prune, "--criterion", criterion]) == 2
        said = capsys.readouterr().err
        assert f"the criterion '{criterion}' needs the statistic 'moments' of 'model.layers.0.self_attn.o_proj'" in said
        assert "for the groups 'model.layers.0.self_attn.q_proj'" in said
        assert f"collect them by obc score MODEL_DIR --statistics {criterion}" in said
    assert cli.main([*prune, "--criterion", "flap", "--kinds", "ffn"]) == 0


def test_groups_without_scores_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """REAP scores experts, and heads keep all units."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20, max_position_embeddings=12, num_local_experts=4, num_key_value_heads=2, **SMALL
    )
    model, out = transformers.MixtralForCausalLM(config), tmp_path / "statistics"
    model.save_pretrained(tmp_path / "mixtral")
    obc.collect(model, [{"input_ids": torch.arange(16)[None]}], statistics=["experts"], progress=False).save(out)
    prune = [
        "prune",
        str(tmp_path / "mixtral"),
        "--scores",
        str(out),
        "--criterion",
        "reap",
        "--kinds",
        "heads",
        "experts",
    ]
    prune += ["--out", str(tmp_path / "pruned")]
    assert cli.main([*prune, "--params", "0.9"]) == 0
    heads, why = "model.layers.0.self_attn.q_proj", f"the criterion 'reap' scores nothing in it from {out}"
    assert f"{heads}: not pruned: {why}" in capsys.readouterr().out
    assert cli.main([*prune, "--params", "0.01"]) == 2
    assert f"and all units of {heads}, which have no scores" in capsys.readouterr().err


@pytest.mark.parametrize("where", [[], ["host"], ["disk"]])
def test_statistics_are_collected_block_by_block(
    where: list[str], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**SMALL, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, max_position_embeddings=12, **config))
    model.save_pretrained(tmp_path / "model")
    arguments = ["score", str(tmp_path / "model"), "--data", str(ids), "--batches", "2", "--batch-size", "2"]
    collected = [*arguments, "--statistics", "moments,gram"]
    assert cli.main([*collected, "--out", str(tmp_path / "whole")]) == 0
    assert cli.main([*collected, "--by-block", *where, "--out", str(tmp_path / "blocks")]) == 0
    whole, blocks = (obc.Statistics.load(tmp_path / name) for name in ("whole", "blocks"))
    assert list(blocks.gram) == list(whole.gram)
    assert len(blocks.gram) == 4
    for layer, found in blocks.gram.items():
        torch.testing.assert_close(found.total, whole.gram[layer].total, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(blocks.moments[layer].absolute, whole.moments[layer].absolute, rtol=1e-5, atol=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("hidden_states")) == []
    assert cli.main([*arguments, "--statistics", "rows", "--by-block"]) == 2
    assert "collect it without by_block" in capsys.readouterr().err
    assert cli.main([*arguments, "--by-block"]) == 2
    assert "name some with --statistics" in capsys.readouterr().err
