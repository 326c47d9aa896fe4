"""obc prune MODEL_DIR --data: scored on the data, pruned and compensated in steps, and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from directories import llama_directory
from PIL import Image
from torch import Tensor

import obc
from obc import cli
from obc.model.errors import PruningError
from obc.scoring import label_free_loss
from obc.structures.transformers import TransformersStructure, load_pruned
from obc.structures.transformers.saving import is_saved_pruned

pytestmark = pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning", "ignore:fewer calibration:UserWarning")


def prune(*arguments: Any) -> int:
    return cli.main(["prune", *map(str, arguments), "--device", "cpu"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_directory(tmp_path)


def sequences(folder: Path, length: int) -> list[Tensor]:
    """What the command reads from data.jsonl, without a tokenizer: all tokens in a row, cut."""
    tokens = [
        token for line in (folder / "data.jsonl").read_text().splitlines() for token in json.loads(line)["input_ids"]
    ]
    return list(torch.tensor(tokens)[: len(tokens) // length * length].view(-1, 1, length))


def test_what_the_command_saves_by_itself_is_no_warning(
    llama: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It chooses how to save, and says how the folder is loaded; in Python save_pretrained would need the warning."""
    data, scores = tmp_path / "data.jsonl", tmp_path / "scores.safetensors"
    assert cli.main(["score", str(llama), "--data", str(data), "--out", str(scores), "--device", "cpu"]) == 0
    for how in (["--data", data, "--seq-len", 16, "--batches", 24, "--steps", 1], ["--scores", scores]):
        out = tmp_path / how[0].strip("-")
        assert prune(llama, *how, "--params", 0.8, "--out", out) == 0
        said = capsys.readouterr()
        assert is_saved_pruned(out)
        assert "load_pruned loads it: layers keep different" in said.out
        assert "save_pretrained" not in said.out + said.err + caplog.text + (out / "obc_report.json").read_text()


@pytest.mark.parametrize(
    "uniform", [pytest.param(False, id="free"), pytest.param(True, marks=pytest.mark.slow, id="uniform")]
)
def test_it_writes_what_obc_prune_makes(uniform: bool, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--uniform"] if uniform else []
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 16, "--batches", 24]
    assert prune(llama, *data, "--params", 0.8, *options, "--out", out) == 0
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    structure = TransformersStructure(model, uniform=uniform)
    torch.manual_seed(0)
    obc.prune(
        model,
        batches=[{"input_ids": ids} for ids in sequences(tmp_path, 16)[:24]],
        loss_fn=label_free_loss(metric="kl"),
        structure=structure,
        criterion="token_jacobian",
        params=0.8,
        steps=4,
        compensate="correct",
        progress=False,
    )
    load = transformers.LlamaForCausalLM.from_pretrained if uniform else load_pruned
    pruned = load(out).eval()
    tokens = torch.arange(16)[None]
    assert torch.equal(pruned(tokens).logits, model(tokens).logits)
    assert pruned.num_parameters() <= 0.8 * transformers.LlamaForCausalLM.from_pretrained(llama).num_parameters()
    assert json.loads((out / "obc_report.json").read_text())["compensation"]


def test_options_of_scoring_and_compensation(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another criterion with another loss, in steps of its own; one layer is spared; biases take over means."""
    out = tmp_path / "out"
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 4, "--batch-size", 2]
    chosen = ["--criterion", "taylor", "--loss", "causal-lm", "--steps", 2, "--ignore", "model.layers.0.mlp.gate_proj"]
    assert prune(llama, *data, *chosen, "--params", 0.8, "--compensate", "mean", "--out", out) == 0
    said = capsys.readouterr().out
    assert "4 batches of 2 x 8, loss causal-lm" in said
    assert "layers have biases now that no config can express" in said
    report = json.loads((out / "obc_report.json").read_text())
    assert (len(report["steps"]), report["provenance"]["criterion"], report["provenance"]["loss"]) == (
        2,
        "taylor",
        "causal-lm",
    )
    pruned: Any = load_pruned(out)
    assert pruned.model.layers[0].mlp.gate_proj.out_features == 32
    assert pruned.model.layers[1].mlp.down_proj.bias is not None


def test_nothing_is_compensated_with_none(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8]
    assert prune(llama, *data, "--params", 0.8, "--compensate", "none", "--out", out) == 0
    original = transformers.LlamaForCausalLM.from_pretrained(llama)
    obc.PruningPlan.load(out / "obc_plan.json").verify(original.state_dict(), load_pruned(out))  # values are slices


def some_images(folder: Path) -> Path:
    folder.mkdir()
    for index in range(8):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


def test_images_without_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    assert (
        prune(tmp_path / "vit", "--data", some_images(tmp_path / "images"), "--params", 0.8, "--uniform", "--out", out)
        == 0
    )
    pruned = transformers.ViTForImageClassification.from_pretrained(out)
    assert pruned.num_parameters() <= 0.8 * transformers.ViTForImageClassification(config).num_parameters()


def test_a_model_without_a_head_is_scored_by_its_hidden_states(tmp_path: Path, capsys: Any) -> None:
    llama = llama_directory(tmp_path)
    transformers.LlamaModel.from_pretrained(llama).save_pretrained(tmp_path / "headless")
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 4]
    assert prune(tmp_path / "headless", *data, "--params", 0.9, "--out", tmp_path / "out") == 0
    assert "loss label-free" in capsys.readouterr().out


def test_images_that_the_model_cuts_into_windows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
    config = transformers.SwinConfig(image_size=16, patch_size=2, num_labels=5, **sizes)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    out = tmp_path / "out"
    assert prune(tmp_path / "swin", "--data", some_images(tmp_path / "images"), "--params", 0.9, "--out", out) == 0
    assert load_pruned(out)(torch.rand(1, 3, 16, 16)).logits.isfinite().all()


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize(
    ("head", "labels", "loss"),
    [
        ("ForSequenceClassification", 3, "kl"),
        ("ForTokenClassification", 3, "kl"),
        ("ForSequenceClassification", 1, "label-free"),
        ("ForMaskedLM", 2, "kl"),
    ],
)
def test_the_head_is_kept(head: str, labels: int, loss: str, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    llama_directory(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = getattr(transformers, f"Bert{head}")(transformers.BertConfig(vocab_size=20, num_labels=labels, **sizes))
    model.save_pretrained(tmp_path / "bert")
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 4, "--compensate", "none"]
    assert prune(tmp_path / "bert", *data, "--params", 0.9, "--out", tmp_path / "out") == 0
    assert f"loss {loss}\n" in capsys.readouterr().out
    pruned: Any = load_pruned(tmp_path / "out")
    assert type(pruned) is type(model)
    head_of = {"ForMaskedLM": "cls.predictions.decoder"}.get(head, "classifier")
    assert torch.equal(pruned.get_submodule(head_of).weight, model.get_submodule(head_of).weight)


def encoder_decoder(folder: Path) -> str:
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 1, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, **sizes)).save_pretrained(folder)
    return "reads a source and a target"


def without_head(folder: Path) -> str:
    """Says that it is a language model, and holds the weights of one without its head."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder.parent / "llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    model.save_pretrained(folder, state_dict=state)
    return "lacks 1 weights of LlamaForCausalLM, which would be random: lm_head.weight"


def unknown(folder: Path) -> str:
    transformers.LlamaForCausalLM.from_pretrained(folder.parent / "llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForEverything"]}))
    return "LlamaForEverything, which this transformers does not have"


def two_inputs(folder: Path) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": 20, **sizes}, {"image_size": 16, "patch_size": 8, **sizes}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return "CLIPModel: calling it on a batch"


@pytest.mark.parametrize("make", [encoder_decoder, without_head, unknown, two_inputs])
def test_models_that_the_data_do_not_fit(make: Any, tmp_path: Path, capsys: Any) -> None:
    llama_directory(tmp_path)
    said = make(tmp_path / "model")
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 4]
    assert prune(tmp_path / "model", *data, "--params", 0.9, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*"))


def test_the_folder_to_write_to_is_tried_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(obc, "prune", lambda *args, **options: pytest.fail("minutes of work"))
    assert prune(llama, "--data", tmp_path / "data.jsonl", "--seq-len", 8, "--out", tmp_path / "file" / "out") == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["data", "scores"])
def test_a_pruned_directory_is_pruned_again(how: str, tmp_path: Path) -> None:
    """Whole blocks, widths, and blocks again: each folder loads, and its plan is of the unpruned model."""
    model = llama_directory(tmp_path, num_hidden_layers=4)
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 4]
    for number, (kind, blocks) in enumerate((("layers", 0.75), ("ffn", 0.97), ("layers", 0.7))):
        source, out = tmp_path / f"out{number - 1}" if number else model, tmp_path / f"out{number}"
        criterion = "block_influence" if kind == "layers" else "flap"
        given = [*data, "--steps", 1, "--compensate", "none"]
        if how == "scores":
            given = ["--scores", tmp_path / "statistics.safetensors"]
            options = ["--statistics", criterion, "--batch-size", 1, "--device", "cpu", "--out", given[1]]
            assert cli.main(["score", *map(str, (source, *data, *options))]) == 0
        assert prune(source, *given, "--criterion", criterion, "--kinds", kind, "--blocks", blocks, "--out", out) == 0
        pruned = load_pruned(out) if is_saved_pruned(out) else transformers.LlamaForCausalLM.from_pretrained(out)
        plan = obc.PruningPlan.load(out / "obc_plan.json")
        plan.verify(transformers.LlamaForCausalLM.from_pretrained(model).state_dict(), pruned)
        assert json.loads((out / "config.json").read_text())["use_cache"]
    assert len(plan.depth.lists["model.layers"].removed) == 2


def test_a_structure_that_continues_a_plan_is_refused(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama_directory(tmp_path))
    first = TransformersStructure(model)
    first.remove({first.groups[0].name: torch.tensor([0])})
    batches, loss = [{"input_ids": torch.arange(8)[None]}], label_free_loss()
    with pytest.raises(PruningError, match=r"result\.plan\.after\(earlier_plan\)"):
        obc.prune(model, batches=batches, loss_fn=loss, structure=TransformersStructure(model, plan=first.plan))


@pytest.mark.parametrize("options", [["--criterion", "block_influence"], ["--criterion", "l1", "--allocation", "tail"]])
def test_what_needs_whole_blocks_says_which_option_gives_them(
    options: Any, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    data = ["--data", tmp_path / "data.jsonl", "--seq-len", 8, "--batches", 2]
    assert prune(llama, *data, *options, "--blocks", 0.8, "--out", tmp_path / "out") == 2
    assert "--kinds layers of obc prune" in capsys.readouterr().err


def test_kinds_that_the_model_has_not_are_answered_by_those_it_has(llama: Path, tmp_path: Path, capsys: Any) -> None:
    assert prune(llama, "--data", tmp_path / "data.jsonl", "--kinds", "experts", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "obc prune: --kinds experts: LlamaForCausalLM has no such groups; it has heads, ffn"
    )
