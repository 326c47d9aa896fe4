"""Pruned Llama models as GGUF files for llama.cpp, whatever the widths of their layers.

>>> save_gguf(pruned, "pruned.gguf", unpruned="SmolLM2-135M-Instruct.gguf")

The vocabulary, the chat template and the settings of the rotary embedding are those of the unpruned model's file, which
llama.cpp's ``convert_hf_to_gguf.py`` writes. Quantise the result with ``llama-quantize``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from obc.files import atomic_write
from obc.model.plan import PlanError

# llama.cpp reads one width for all layers in the first architecture, and one for each layer in the second.
_EQUAL, _FREE = "llama", "deci"
_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3's scaled embedding; the model has them as a buffer
# Written anew, or untrue of fewer parameters.
_DROPPED = ("GGUF.", "general.architecture", "general.size_label", "general.file_type", "general.quantization_version")


def save_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    unpruned: str | os.PathLike[str],
    *,
    dtype: Literal["f32", "f16", "bf16"] = "f16",
) -> None:
    """Write a pruned ``LlamaForCausalLM``, or a model with the same layers such as Mistral, to a GGUF file.

    Equal widths in all layers make a file of the architecture "llama", other widths one of "deci" (Llama-Nemotron), of
    which llama.cpp reads a width for each layer. Queries and keys are reordered, because in the rotary embedding
    llama.cpp pairs neighbouring channels of a head, and transformers its two halves.

    Args:
        model: the pruned model.
        path: the file; an earlier one is replaced once the new one is whole.
        unpruned: a GGUF file of the unpruned model, with any kind of weights.
        dtype: of the matrices; vectors are float32.

    Raises:
        PlanError: the architecture of the file ``unpruned`` is not "llama", or llama.cpp can't run such a model.
        ValueError: the vocabularies differ, weights are beyond the range of ``dtype``, or ``dtype`` is another.
    """
    if dtype not in _TYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _TYPES))}, got {dtype!r}")
    reader = gguf.GGUFReader(unpruned)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != _EQUAL or f"{_EQUAL}.expert_count" in reader.fields:
        raise PlanError(
            f"{os.fspath(unpruned)} has the architecture {architecture!r}, or experts: only dense Llama models can be "
            "written; for equal widths (uniform=True) use save_pretrained and convert_hf_to_gguf.py"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, reader.fields[f"{_EQUAL}.block_count"].contents())
    named = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) or "" for key in model.state_dict()}
    if unknown := [key for key, name in named.items() if not name]:
        raise PlanError(
            f"llama.cpp's Llama has no tensor {unknown[0]!r}: {type(model).__name__} can't be written as GGUF"
        )
    llama: Any = model
    layers = [_Layer.of(place, layer) for place, layer in enumerate(llama.model.layers)]
    equal = len(set(layers)) == 1
    head_dim = layers[0].head_dim
    tensors = dict(_tensors(llama, named, head_dim))
    tensors |= {one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors if one.name == _ROPE_FACTORS}
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    if len(tensors["token_embd.weight"]) != vocabulary:
        raise ValueError(
            f"the model has {len(tensors['token_embd.weight'])} tokens, {os.fspath(unpruned)} {vocabulary}: it is not "
            "the file of this model"
        )
    kind, file_type = _TYPES[dtype]
    stored = {name: _stored(name, tensor, kind) for name, tensor in tensors.items()}

    def width(counts: list[int]) -> Any:
        return counts[0] if equal else counts

    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, _EQUAL if equal else _FREE)
        _copy_fields(reader, writer)
        writer.add_file_type(file_type)
        writer.add_vocab_size(vocabulary)
        writer.add_embedding_length(tensors["token_embd.weight"].shape[1])
        writer.add_block_count(len(layers))
        writer.add_feed_forward_length(width([layer.inner for layer in layers]))
        writer.add_head_count(width([layer.heads for layer in layers]))
        writer.add_head_count_kv(width([layer.key_value_heads for layer in layers]))
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        for name, (values, stored_as) in stored.items():
            writer.add_tensor(name, values, raw_dtype=stored_as)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@dataclass(frozen=True)
class _Layer:
    """Widths of a layer."""

    heads: int
    key_value_heads: int
    inner: int
    head_dim: int

    @classmethod
    def of(cls, place: int, layer: Any) -> _Layer:
        attention, inner = layer.self_attn, layer.mlp
        if not hasattr(attention, "q_proj") or not hasattr(inner, "gate_proj"):
            # llama.cpp reads such layers, but loses the attention of one that has no feed-forward block.
            raise PlanError(f"layer {place} has no attention or no feed-forward block: llama.cpp can't run such layers")
        return cls(
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            inner.gate_proj.out_features,
            attention.head_dim,
        )


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Everything but the widths, under the name of the architecture that is written."""
    widths = {"vocab_size", "embedding_length", "block_count", "feed_forward_length"}
    widths |= {f"attention.{what}" for what in ("head_count", "head_count_kv", "key_length", "value_length")}
    for key, field in reader.fields.items():
        inner = key.removeprefix(f"{_EQUAL}.")
        if key.startswith(_DROPPED) or (inner != key and inner in widths):
            continue
        name = key if inner == key else f"{writer.arch}.{inner}"
        parts = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], parts)


def _tensors(model: Any, named: Mapping[str, str], head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Name in the file -> weight, with queries and keys in llama.cpp's order."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for key, tensor in model.state_dict().items():
        name = named[key]
        if tied and name == "output.weight":
            continue
        if ".attn_q." in name or ".attn_k." in name:
            halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield name, tensor


def _stored(name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> tuple[Any, gguf.GGMLQuantizationType]:
    """(values, kind) as the file holds them: vectors in float32."""
    values = tensor.detach().cpu().float().contiguous().numpy()
    if values.ndim == 1:
        return values, gguf.GGMLQuantizationType.F32
    if kind is gguf.GGMLQuantizationType.F16 and float(np.abs(values).max(initial=0)) > np.finfo(np.float16).max:
        raise ValueError(f"{name} has weights beyond the range of float16; pass dtype='bf16' or 'f32'")
    return gguf.quants.quantize(values, kind), kind
