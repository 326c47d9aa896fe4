"""lm-eval on a pruned model that was saved and loaded: a task of a local file, nothing fetched."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import obc
from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned

WORDS = [f"w{index}" for index in range(28)]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def documents() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[str]:
        return [WORDS[int(index)] for index in torch.randint(len(WORDS), (count,), generator=generator)]

    return [{"question": " ".join(words(4)), "choices": words(3), "answer": 1} for _ in range(24)]


def pruned(uniform: bool, folder: Path) -> Any:
    """A tiny Llama, pruned and saved: what lm-eval is given."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=32, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    structure = TransformersStructure(model, uniform=uniform)
    batches = [{"input_ids": torch.randint(31, (2, 12))} for _ in range(8)]
    result = obc.prune(model, batches=batches, labels=False, structure=structure, macs=0.7, steps=1, progress=False)
    tokenizer().save_pretrained(folder)
    if uniform:
        model.save_pretrained(folder)
        return str(folder)
    save_pruned(model, result.plan, folder)
    return load_pruned(folder)


def expected(model: Any, text: Any) -> float:
    """The share of documents whose right choice is the likeliest continuation."""
    right = 0
    for document in documents():
        ids = [
            text(f"{document['question']} {choice}", return_tensors="pt")["input_ids"] for choice in document["choices"]
        ]
        likelihoods = [float(model(one).logits[0, -2].log_softmax(-1)[one[0, -1]]) for one in ids]
        right += likelihoods.index(max(likelihoods)) == document["answer"]
    return right / len(documents())


@pytest.mark.slow  # its import alone takes several seconds
@pytest.mark.parametrize("uniform", [True, False], ids=["from_pretrained", "load_pruned"])
def test_lm_eval_measures_a_saved_pruned_model(uniform: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("a test fetches nothing")

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, documents())))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    given = pruned(uniform, tmp_path / "pruned")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned")
    model = HFLM(pretrained=given, tokenizer=loaded, device="cpu", batch_size=4)
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0, log_samples=False
    )
    own = transformers.LlamaForCausalLM.from_pretrained(given).eval() if uniform else given
    with torch.no_grad():
        right = expected(own, loaded)
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right)
    assert 0 < right < 1
