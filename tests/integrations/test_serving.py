"""Pruned models run where models are served: in ONNX Runtime and in llama.cpp, with the outputs that they have here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import onnxruntime
import pytest
import torch
import xllamacpp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import obc
from obc.integrations.gguf import save_gguf
from obc.structures.transformers import TransformersStructure

TOKENS = torch.tensor([[5, 9, 33, 12, 7, 60, 3], [2, 8, 8, 41, 50, 1, 22]])
# Of log-probabilities of some units, computed in float32 with other orders of summation and other exponentials.
ROUNDING = 1e-3


def llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            max_position_embeddings=64,
            initializer_range=0.2,
            use_cache=False,
            **sizes,
        )
    ).eval()


def loss(model: Any, batch: Tensor) -> Tensor:
    found: Tensor = model(batch, labels=batch).loss
    return found


def pruned(uniform: bool, **options: Any) -> LlamaForCausalLM:
    model = llama()
    structure = TransformersStructure(model, uniform=uniform)
    obc.prune(model, batches=[TOKENS], loss_fn=loss, params=0.8, steps=1, structure=structure, **options)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


# --- ONNX Runtime -------------------------------------------------------------------------------------------------


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_a_pruned_language_model_runs_in_onnx_runtime(tmp_path: Path) -> None:
    model = pruned(uniform=True)
    assert model.config.intermediate_size < 96
    torch.onnx.export(model, (TOKENS,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    run = session(tmp_path / "model.onnx")
    (found,) = run.run(None, {run.get_inputs()[0].name: TOKENS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, TOKENS), atol=ROUNDING, rtol=0)


def test_a_pruned_network_runs_in_onnx_runtime_with_any_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 24, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    obc.prune(model, x, [x], lambda model, x: model(x).square().mean(), macs=0.5, steps=1)
    assert model[0].out_channels < 16
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    run = session(tmp_path / "model.onnx")
    for size in (1, 7):
        images = torch.randn(size, 3, 8, 8)
        (found,) = run.run(None, {run.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), atol=1e-5, rtol=1e-4)


# --- llama.cpp ----------------------------------------------------------------------------------------------------


def generated(path: Path, prompt: list[int], count: int, size: int) -> tuple[list[int], Tensor]:
    """(greedy tokens, (count, size) log-probabilities of all tokens at each step) of llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": size, "ignore_eos": True}
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    found = torch.full((count, size), -torch.inf)
    for row, step in zip(found, steps, strict=True):
        for entry in step["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return [step["id"] for step in steps], found


def check_in_llama_cpp(model: Any, folder: Path, architecture: str) -> None:
    gguf_files.write(llama(layers=4), folder / "unpruned.gguf")
    path = folder / "model.gguf"
    save_gguf(model, path, folder / "unpruned.gguf", dtype="f32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == architecture
    prompt = TOKENS[0].tolist()
    tokens, found = generated(path, prompt, 6, 64)
    whole = torch.tensor([prompt + tokens])
    expected = logits(model, whole)[0, len(prompt) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
    expected[:, gguf_files.END] = -torch.inf  # never chosen, but counted
    assert tokens == expected.argmax(-1).tolist()


def test_equal_widths_run_in_llama_cpp(tmp_path: Path) -> None:
    check_in_llama_cpp(pruned(uniform=True), tmp_path, "llama")


def test_widths_of_their_own_in_every_layer_run_in_llama_cpp(tmp_path: Path) -> None:
    """Key/value heads, query heads and inner channels differ from layer to layer, as in Llama-Nemotron."""
    model = llama()
    structure = TransformersStructure(model)
    structure.remove(
        {
            "model.layers.0.mlp.gate_proj": torch.arange(20),
            "model.layers.1.self_attn.q_proj": torch.tensor([0]),
            "model.layers.2.mlp.gate_proj": torch.arange(60),
        }
    )
    check_in_llama_cpp(model, tmp_path, "deci")


def test_fewer_layers_run_in_llama_cpp(tmp_path: Path) -> None:
    model = llama(layers=4)
    structure = TransformersStructure(model, kinds=["layers"])
    structure.remove({"model.layers.2": torch.tensor([0])})
    structure.compact()
    assert len(model.model.layers) == 3
    check_in_llama_cpp(model, tmp_path, "llama")


def test_biases_that_compensation_creates_run_in_llama_cpp(tmp_path: Path) -> None:
    model = pruned(uniform=True, compensate="mean")
    assert model.model.layers[0].mlp.down_proj.bias is not None
    check_in_llama_cpp(model, tmp_path, "llama")


def test_a_gguf_file_is_loaded_plain_and_pruned(tmp_path: Path) -> None:
    """transformers makes plain weights of a GGUF file, so that nothing is quantised when obc sees the model."""
    model = llama()
    gguf_files.write(model, tmp_path / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, TOKENS), logits(model, TOKENS), atol=ROUNDING, rtol=0)
    assert obc.dequantize(loaded) == []  # transformers forgets that it may save the model
    structure = TransformersStructure(loaded, uniform=True)
    obc.prune(loaded, batches=[TOKENS], loss_fn=loss, params=0.8, steps=1, structure=structure)
    loaded.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits(again, TOKENS), logits(loaded, TOKENS))


def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    gguf_files.write(llama(), tmp_path / "unpruned.gguf")

    def save(model: Any, **options: Any) -> None:
        save_gguf(model, tmp_path / "model.gguf", tmp_path / "unpruned.gguf", **options)

    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight has weights beyond the range of float16"):
        save(model)
    save(model, dtype="bf16")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(ValueError, match="dtype must be one of 'f32', 'f16', 'bf16', got 'q8_0'"):
        save(llama(), dtype="q8_0")
    model = llama()
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(16)
    with pytest.raises(obc.PlanError, match=r"no tensor 'model.layers.0.self_attn.q_norm.weight'"):
        save(model)
    model = llama()
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"the model has 70 tokens, .*unpruned.gguf 64"):
        save(model)
    model = llama()
    TransformersStructure(model, kinds=["sublayers"]).remove({"model.layers.1.mlp": torch.tensor([0])})
    with pytest.raises(obc.PlanError, match="layer 1 has no attention or no feed-forward block"):
        save(model)
    writer = gguf.GGUFWriter(tmp_path / "unpruned.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(obc.PlanError, match="the architecture 'gemma'"):
        save(llama())
    assert (tmp_path / "model.gguf").read_bytes() == before
