"""Writes safetensors files tensor by tensor, so that large ones need no second copy in memory; and reads them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obc.files import atomic_write, refuse_non_paths

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def save_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of float64, float32, int64 and uint8 tensors. It replaces an earlier file atomically.

    Its header is the length of a JSON object in eight bytes, and the object: dtype, shape and position of each tensor.

    Raises:
        OSError: the file can't be written; an existing file is left unchanged.
    """
    # Widest dtypes first, so that each tensor is aligned for its dtype when the file is memory-mapped.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().numpy().data)


def load_tensors(path: str | PathLike[str], copy: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; as copies, where the file is about to be replaced.

    Raises:
        SafetensorError: the file is not a safetensors file, or is damaged.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return {key: one.clone() if copy else one for key, one in tensors.items()}, file.metadata() or {}


def load_format(
    path: str | PathLike[str],
    kind: str,
    formats: Sequence[str],
    error: type[Exception],
    remedy: str = "",
    copy: bool = False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file whose metadata has one of these formats, and the metadata.

    Args:
        kind: what such a file is called in messages.
        formats: permitted values of "format" in the metadata.
        error: what to raise if the file is another or damaged.
        remedy: the end of its message.
        copy: as for :func:`load_tensors`.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: it is a folder.
    """
    refuse_non_paths("path", path)
    if not Path(path).exists():
        raise FileNotFoundError(f"no {kind} at {path}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the path of a {kind} in it")
    try:
        tensors, header = load_tensors(path, copy)
    except SafetensorError as fault:
        raise error(f"{path} is not a {kind}, or is damaged: {fault}{remedy}") from fault
    if (found := header.get("format")) not in formats:
        same = found is not None and any(one.rpartition("/")[0] == found.rpartition("/")[0] for one in formats)
        what = f"is a {kind} of another version of obc" if same else f"is not a {kind}"
        raise error(f"{path} {what}: format {found!r}, expected {' or '.join(map(repr, formats))}{remedy}")
    return tensors, header


def numbered(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The tensors "name:0", "name:1" and so on."""
    keys = itertools.takewhile(lambda key: key in tensors, (f"{name}:{index}" for index in itertools.count()))
    return [tensors[key] for key in keys]
