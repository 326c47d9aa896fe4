"""Calibration data from local files: text, JSON lines or a folder of images, as batches of equal shape."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obc.commands.common import UsageError, positive, require
from obc.commands.model_directory import IGNORED
from obc.model.evaluation import device_of

SEQUENCE = 2048  # tokens per sequence, if the model allows as many
MASKED_SHARE = 0.15  # share of the tokens, as in BERT's training
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_ENTRY = "give each line a 'text', or 'input_ids' (a list of token numbers)"


def add_options(parser: argparse.ArgumentParser, most: int) -> None:
    """Add the options by which :func:`batches` reads data; ``most`` is the default of ``--batches``."""
    parser.add_argument("--data", type=Path, required=True, help="a .txt or .jsonl file, or a folder of images")
    parser.add_argument(
        "--batches", type=positive, default=most, help="fewer if the data ends before (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=4, help="samples of a batch (default: %(default)s)")
    parser.add_argument(
        "--seq-len", type=positive, help=f"tokens of a sequence (default: {SEQUENCE}, or the model's most)"
    )


def batches(
    parsed: argparse.Namespace,
    model: Any,
    source: Path,
    loss: str,
    *,
    count: int | None = None,
    size: int | None = None,
    length: int = SEQUENCE,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[dict[str, Tensor]]:
    """Up to ``count`` batches of ``size`` samples; fewer if the data ends before.

    Text is cut into sequences of exactly ``--seq-len`` tokens. Documents follow one another, separated by the
    tokenizer's end token, so there is no padding.

    Args:
        parsed: ``--data``, a .txt or .jsonl file, or a folder of images (with one folder per class if the loss needs
            labels), and ``--seq-len``.
        model: the model; its configuration is used.
        source: the model's directory, with the tokenizer or the image processor.
        loss: one of ``model_directory.LOSSES`` except "auto".
        count: number of batches; by default ``--batches``.
        size: samples per batch; by default ``--batch-size``.
        length: tokens per sequence without ``--seq-len``; fewer if the model has positions for fewer.
        seed: seed of masks and of the order of images.
        device: where the batches lie; by default where the model does.
    """
    data = parsed.data
    count, size = count or parsed.batches, size or parsed.batch_size
    if not data.exists():
        raise UsageError(f"--data {data}: there is no such file or folder")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} reads a source and a target, and --data holds one kind of input; pass it as "
            "module:function to obc prune, or use obc in Python"
        )
    if data.is_dir():
        made = _image_batches(data, model, source, loss, count, size, seed)
    elif data.suffix in (".txt", ".jsonl"):
        made = _token_batches(data, model, source, loss, count, size, (parsed.seq_len, length), seed)
    else:
        raise UsageError(f"--data {data}: expected a .txt file, a .jsonl file or a folder of images")
    device = device or device_of(model)
    return [{name: value.to(device) for name, value in batch.items()} for batch in made]


def shape_of(batch: dict[str, Tensor]) -> str:
    """Samples by tokens, or by channels, height and width."""
    return " x ".join(map(str, batch.get("input_ids", batch.get("pixel_values")).shape))  # type: ignore[union-attr]


# --- text ----------------------------------------------------------------------------------------------------------


def _token_batches(
    data: Path, model: Any, source: Path, loss: str, count: int, size: int, lengths: tuple[int | None, int], seed: int
) -> Iterator[dict[str, Tensor]]:
    """Whole batches of whole sequences, masked if the loss needs it."""
    if loss == "label":
        raise UsageError(f"--data {data}: this model classifies images; pass a folder of images")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise UsageError(f"--data {data}: this model reads no tokens; pass a folder of images")
    tokenizer = tokenizer_of(source)
    length = _sequence_length(model, tokenizer, *lengths)
    start, end = ([], []) if loss != "masked-lm" else (_token(tokenizer, "cls"), _token(tokenizer, "sep"))
    if loss == "causal-lm" and length < 2:
        raise UsageError(f"--seq-len {length}: one token has no next token to predict; pass at least 2")
    inner = length - len(start) - len(end)
    found, left = _sequences(data, tokenizer, vocabulary, inner, count * size)
    if len(found) < size:
        raise UsageError(
            f"--data {data} has {len(found) * inner + left} tokens, and a batch takes {size} x {inner}; pass more "
            "text, or a smaller --seq-len or --batch-size"
        )
    sequences = [[*start, *sequence, *end] for sequence in found]
    ids = torch.tensor(sequences, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for batch in ids.split(size):
        if len(batch) < size:
            return
        yield _masked(batch, tokenizer, generator) if loss == "masked-lm" else {"input_ids": batch}


def tokenizer_of(source: Path) -> Any:
    """The tokenizer of a directory; None if it has none."""
    if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"can't load the tokenizer of {source}: {str(error).splitlines()[0]}") from error


def copy_tokenizer(source: Path, out: Path) -> None:
    """Write the tokenizer of a directory, if it has one, to another."""
    if (tokenizer := tokenizer_of(source)) is not None:
        tokenizer.save_pretrained(out)


def _sequence_length(model: Any, tokenizer: Any, asked: int | None, usual: int) -> int:
    """The requested number of tokens, else the usual one, within what model and tokenizer allow."""
    most = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    room = min((value for value in most if value), default=asked or usual)
    if asked is not None and asked > room:
        raise UsageError(f"--seq-len {asked}: the model has room for {room} tokens")
    return asked or min(usual, room)


def _token(tokenizer: Any, kind: str) -> list[int]:
    """The tokenizer's special token of this kind; empty if it has none."""
    token = getattr(tokenizer, f"{kind}_token_id", None)
    return [] if token is None else [token]


def _sequences(data: Path, tokenizer: Any, vocabulary: int, length: int, most: int) -> tuple[list[list[int]], int]:
    """Up to ``most`` sequences of ``length`` tokens, and how many tokens are left; reads no more than needed."""
    if length < 1:
        raise UsageError("--seq-len leaves no room for text")
    separator = _token(tokenizer, "eos") or _token(tokenizer, "sep")
    pending: list[int] = []
    found: list[list[int]] = []
    for tokens in _documents(data, tokenizer):
        if strange := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UsageError(
                f"--data {data}: token {strange[0]} is none of the model's {vocabulary} (0 to {vocabulary - 1}); use "
                "the tokenizer of this model"
            )
        pending += [*tokens, *separator]
        while len(pending) >= length and len(found) < most:
            found.append(pending[:length])
            del pending[:length]
        if len(found) == most:
            break
    return found, len(pending)


def _documents(data: Path, tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of every document: paragraphs of a text, lines of a .jsonl file."""
    try:
        with open(data, encoding="utf-8") as file:
            for number, document in enumerate(file if data.suffix == ".jsonl" else _paragraphs(file), 1):
                text = _entry(data, number, document) if data.suffix == ".jsonl" else document
                if isinstance(text, list):
                    yield text
                    continue
                if tokenizer is None:
                    raise UsageError(
                        f"--data {data}: the model's directory has no tokenizer (tokenizer.json); save it there, or "
                        f"pass a .jsonl file whose lines have 'input_ids'"
                    )
                yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise UsageError(f"--data {data} is not UTF-8 text: {error}") from error


def _paragraphs(file: Any) -> Iterator[str]:
    """Runs of lines between empty lines."""
    for filled, lines in itertools.groupby(file, lambda line: bool(line.strip())):
        if filled:
            yield "".join(lines)


def _entry(data: Path, number: int, line: str) -> str | list[int]:
    """A line's text or its token numbers; an empty line has no tokens."""
    if not line.strip():
        return []
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"--data {data}, line {number} is not JSON: {error}") from error
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    ids = entry.get("input_ids") if isinstance(entry, dict) else None
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return ids
    raise UsageError(f"--data {data}, line {number}: {_ENTRY}")


def _masked(ids: Tensor, tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Replace a share of the non-special tokens by the mask; the labels are the original tokens."""
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise UsageError("the model's directory has no tokenizer with a mask token; use --loss label-free")
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device="cpu"))
    chosen = (torch.rand(ids.shape, generator=generator, device="cpu") < MASKED_SHARE) & ~special
    return {"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, IGNORED)}


# --- images --------------------------------------------------------------------------------------------------------


def _image_batches(
    data: Path, model: Any, source: Path, loss: str, count: int, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Whole batches of images in random order, with labels if the loss needs them."""
    if getattr(model.config, "image_size", None) is None:
        raise UsageError(
            f"--data {data}: this model reads no images, or its config does not say their size (image_size); pass a "
            ".txt or .jsonl file, or the model as module:function to obc prune"
        )
    if loss in ("causal-lm", "masked-lm"):
        raise UsageError(f"--data {data}: --loss {loss} needs text; pass a .txt or .jsonl file")
    require({"PIL": "pillow"})
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGES)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    chosen = [files[index] for index in order[: count * size]]
    if len(chosen) < size:
        raise UsageError(
            f"--data {data} has {len(files)} images, a batch takes {size}; pass more, or a smaller --batch-size"
        )
    labels = _labels(chosen, model) if loss == "label" else None
    prepare = _preparation(model, source)
    for start in range(0, len(chosen) - size + 1, size):
        batch = {"pixel_values": torch.stack([prepare(path) for path in chosen[start : start + size]])}
        if labels is not None:
            batch["labels"] = torch.tensor(labels[start : start + size], device="cpu")
        yield batch


def _labels(files: Sequence[Path], model: Any) -> list[int]:
    """The class of every image by its folder's name: one of the model's label names, or a number."""
    known = {str(name): index for name, index in (model.config.label2id or {}).items()}
    classes = model.config.num_labels
    labels = []
    for path in files:
        name = path.parent.name
        label = known.get(name, int(name) if name.isdecimal() else None)
        if label is None or label >= classes:
            raise UsageError(
                f"--data: {path} is in folder {name!r}, which is not one of the model's {classes} classes; name the "
                f"folders by label or number, or use --loss label-free"
            )
        labels.append(label)
    return labels


def _preparation(model: Any, source: Path) -> Any:
    """File -> (C, H, W) float32, by the directory's image processor, else resized and scaled to [-1, 1]."""
    from PIL import Image, UnidentifiedImageError

    channels = getattr(model.config, "num_channels", 3)
    processor: Any = None
    if (source / "preprocessor_config.json").exists():
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    sides = model.config.image_size
    height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)

    def prepare(path: Path) -> Tensor:
        try:
            image = Image.open(path).convert("L" if channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"--data: {path} is not an image that Pillow can read: {error}") from error
        if processor is not None:
            return processor(image, return_tensors="pt")["pixel_values"][0]
        pixels = torch.frombuffer(bytearray(image.resize((width, height)).tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, channels).permute(2, 0, 1).float() / 127.5 - 1

    return prepare
