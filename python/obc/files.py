"""Writes files and folders completely or not at all, and reads JSON that may be damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import reprlib
import secrets
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints

# Inside a folder while files of two runs may be in it. It holds those of the new run that are not in place yet.
UNFINISHED = ".obc_unfinished"
_STAGE = ".obc_writing."
# What readers open first. They are absent while other files are put in place, so that nobody loads a mixture.
_LAST = ("plan.json", "obc_plan.json", "config.json")


def refuse_non_paths(name: str, value: object) -> None:
    """Raises TypeError if the argument's value is no path: of an integer, Python opens the file of that number."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be the path of a file, a str or os.PathLike, got {type(value).__name__}")


@contextlib.contextmanager
def os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the operating system that a library, such as safetensors, raises as its own become OSErrors again."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(number := int(found[1]), os.strerror(number), os.fspath(path)) from error


@contextlib.contextmanager
def made_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """``path`` as a folder; what was missing of it is removed again if it is empty when the block ends."""
    target = Path(path)
    missing = [one for one in (target, *target.parents) if not os.path.lexists(one)]
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield target
    finally:
        for one in missing:
            with contextlib.suppress(OSError):  # something is in it
                one.rmdir()


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int) -> None:
    """Write a figure of matplotlib completely or not at all, in the format of the path's suffix, by default PNG."""
    target = Path(path)
    target = target if target.suffix else target.with_name(f"{target.name}.png")
    with atomic_write(target) as file:
        figure.savefig(file, dpi=dpi, format=target.suffix[1:])


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files are all moved into ``path`` when the block ends, and only then.

    After an exception in the block, a full disk or the end of the process, the files in ``path`` are unchanged; after
    an exception there is no new folder. If the process ends while files are moved, ``path`` has no config.json or
    plan.json, and :func:`refuse_unfinished` names it. Files of other names stay, except for weights
    (model*.safetensors) of an earlier run. Modes follow the umask, or the file replaced.

    Raises:
        OSError: a file can't be written; no temporary folder is left.
    """
    with made_folder(path) as target:
        yield from _whole(target)


def _whole(target: Path) -> Iterator[Path]:
    for left in target.glob(f"{_STAGE}{'[0-9a-f]' * 16}"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    stage = target / f"{_STAGE}{secrets.token_hex(8)}"
    try:
        stage.mkdir()
        usual_mode = stage.stat().st_mode & 0o666
        with os_errors(target):
            yield stage
        files = sorted(file.relative_to(stage) for file in stage.rglob("*") if file.is_file())
        for name in files:
            with open(stage / name, "rb+") as file:  # before the mode is changed: it may become read-only
                replaced = target / name
                mode = replaced.stat().st_mode & 0o777 if replaced.exists() else usual_mode
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        if (target / UNFINISHED).exists():
            (target / UNFINISHED).rename(stage / "of an earlier run")
        stage.rename(target / UNFINISHED)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    stale = [left for left in target.glob("model*.safetensors*") if left.relative_to(target) not in files]
    for old in (*(target / name for name in reversed(_LAST)), *stale):
        old.unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: _LAST.index(name.name) if name.name in _LAST else -1):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(target / UNFINISHED / name, target / name)
    shutil.rmtree(target / UNFINISHED)


def refuse_unfinished(path: str | os.PathLike[str], error: type[Exception] = ValueError) -> None:
    """Raises ``error`` if a process ended while :func:`whole_folder` moved files into the folder."""
    if (Path(path) / UNFINISHED).exists():
        raise error(
            f"{os.fspath(path)} holds files of two runs, because the process that wrote it was killed; write it again, "
            f"or move the files of {Path(path) / UNFINISHED} into it and remove that folder"
        )


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends, and only then.

    After an exception in the block, a full disk or the end of the process, ``path`` is unchanged. If it is a symbolic
    link, the link stays and its target is replaced. A device or a pipe is written directly.

    >>> with atomic_write("scores.safetensors") as file:
    ...     file.write(content)

    Raises:
        OSError: the file can't be written; no temporary file is left.
    """
    refuse_non_paths("path", path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)} can't be written: there is no folder {target.parent}")
    # In the same folder, so that both are on one file system. Unlike tempfile's, a file made by open has the usual
    # mode.
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


def remove_left_over(path: str | os.PathLike[str]) -> None:
    """Remove the temporary file of a process that was killed inside :func:`atomic_write`."""
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f".{glob.escape(target.name[:100])}.{'[0-9a-f]' * 16}.tmp"):
        left.unlink(missing_ok=True)


def parse_json(text: str | bytes, kind: Any) -> Any:
    """Parse JSON as an object of the given kind (:func:`built`).

    >>> parse_json('{"conv1": [0, 2]}', dict[str, list[int] | None])

    Raises:
        ValueError: the text is not JSON (in UTF-8), is nested too deeply, or holds another kind of value.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    try:
        return built(value, kind)
    except ValueError:
        raise ValueError(f"expected {kind} in its JSON, got {reprlib.repr(value)}") from None


def read_fields(path: str | os.PathLike[str], format_name: str) -> dict[str, Any]:
    """The fields of a JSON file besides its ``format``.

    Raises:
        ValueError: it is not a JSON object, or has another format.
        OSError: the file can't be read.
    """
    refuse_non_paths("path", path)
    with open(path, "rb") as file:
        fields: dict[str, Any] = parse_json(file.read(), dict[str, Any])
    if fields.pop("format", None) != format_name:
        raise ValueError(f"its format is not {format_name!r}")
    return fields


def built(value: Any, kind: Any) -> Any:
    """Convert ``value``, as JSON gives it, to an object of ``kind``: str, int, float, None, lists, dicts, unions,
    tuples, literals and dataclasses, nested in any way.

    Fields with a default may be missing. Keys of dicts are strings, or numbers written as such.

    >>> built({"target": 0.5, "removed": {"conv1": 3}}, Step)

    Raises:
        ValueError: it is of another kind; the message names the field.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(value, kind)
    if origin in (Union, types.UnionType):
        return _first_built(value, parts)
    if origin in (list, Sequence) and type(value) is list:
        return [built(item, parts[0]) for item in value]
    if origin in (dict, Mapping) and type(value) is dict:
        return {int(name) if parts[0] is int else name: built(item, parts[1]) for name, item in value.items()}
    if origin is tuple and type(value) is list:
        parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(value) == len(parts):
            return tuple(built(item, part) for item, part in zip(value, parts, strict=True))
    if origin is Literal:
        known = isinstance(value, str) and value in parts
    elif kind is float:
        known = type(value) in (float, int)
    else:
        known = kind is Any or (origin is None and type(value) is kind)  # a bool is not an int
    if not known:
        raise ValueError(f"expected {kind}, got {reprlib.repr(value)}")
    return value


def _dataclass(value: Any, kind: type) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if type(value) is not dict or not value.keys() <= fields.keys():
        raise ValueError(f"expected the fields of {kind.__name__}, got {reprlib.repr(value)}")
    missing = dataclasses.MISSING
    needed = [n for n, field in fields.items() if field.default is missing and field.default_factory is missing]
    if lacking := [name for name in needed if name not in value]:
        raise ValueError(f"{kind.__name__} has no {lacking[0]!r}")
    hints, found = get_type_hints(kind), {}
    for name, item in value.items():
        try:
            found[name] = built(item, hints[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return kind(**found)


def _first_built(value: Any, kinds: Sequence[Any]) -> Any:
    last = ValueError(f"expected None, got {reprlib.repr(value)}")
    for kind in kinds:
        if kind is type(None) and value is not None:  # the other kind's fault is more informative
            continue
        try:
            return built(value, kind)
        except ValueError as error:
            last = error
    raise last
