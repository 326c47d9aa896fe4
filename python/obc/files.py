"""Writing a file completely or not at all, and reading JSON that may be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import secrets
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Union, get_args, get_origin


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write ``path`` with: it takes the place of ``path`` when the block ends, and only then.

    After an exception in the block, a full disk or the end of the process ``path`` is what it was. A symbolic link
    stays one, and what it points to is replaced; a device or a pipe is written as it stands.

    >>> with atomic_write("scores.safetensors") as file:
    ...     file.write(content)

    Raises:
        OSError: the file can't be written; nothing is left beside it.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)} can't be written: there is no folder {target.parent}")
    # Beside the target, so that both lie on one file system. Made by open, unlike tempfile's, it has the usual mode.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if target.exists():
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def parse_json(text: str | bytes, kind: Any) -> Any:
    """The value of a JSON text of a given kind: str, int, float, None, or a list, dict or union of kinds.

    >>> parse_json('{"conv1": [0, 2]}', dict[str, list[int] | None])

    Raises:
        ValueError: the text is no JSON (in UTF-8), is nested too deeply to be read, or holds something else.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not _is(value, kind):
        raise ValueError(f"expected {kind} in its JSON, got {reprlib.repr(value)}")
    return value


def _is(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        return type(value) is list and all(_is(item, parts[0]) for item in value)
    if origin is dict:
        return type(value) is dict and all(_is(item, parts[1]) for item in value.values())
    if origin in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is float:
        return type(value) in (float, int)
    return kind is Any or type(value) is kind  # a bool is no int
