"""Shared parts of the commands: parsers, one-line errors, and checks of installed packages."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

_Value = TypeVar("_Value")

# Exit codes; 0 is success, 1 an error that obc did not foresee.
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells report a process that SIGINT ended
BROKEN_PIPE = 141  # as shells report a process that SIGPIPE ended
# What a model's directory holds that is not obc's, and how messages call what a command reads without an option.
_OF_A_MODEL = re.compile(r"model.*\.safetensors.*|.*\.(json|txt|model|bin)")
_READ = {"model": "the model's own directory", "target": "the model's own directory", "source": "what is drawn"}
# What `obc prune` writes beside a model, for module:function and for a transformers directory.
REPORT_FILES = ("report.json", "obc_report.json")


class UsageError(Exception):
    """The request can't be carried out; the message says why and what to do. The command line exits with 2."""


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a command to the subparsers: ``summary`` is its line in the list, ``description`` keeps its line breaks."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=run)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with an argument; argparse prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end the process with the code of a wrong request."""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def expecting(what: str) -> Callable[[Callable[[str], _Value]], Callable[[str], _Value]]:
    """Decorates a parser of an argument's text: if it raises ValueError, the user reads what is expected."""

    def decorate(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
        @functools.wraps(parse)
        def parsed(text: str) -> _Value:
            try:
                return parse(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

        return parsed

    return decorate


@expecting("a whole number of at least 1")
def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


@contextlib.contextmanager
def refusing(*errors: type[Exception], start: str = "") -> Iterator[None]:
    """Inside the block, these errors say, after ``start``, that the request can't be carried out, and why."""
    try:
        yield
    except errors as error:
        raise UsageError(f"{start}{error}") from error


def require(packages: Mapping[str, str]) -> None:
    """Raise unless ``packages`` are installed: import name -> name of the package."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def refuse_overwriting(parsed: argparse.Namespace) -> None:
    """Raise if the command would write over what it reads, or two of its results into one file."""
    given = {name: Path(value) for name, value in vars(parsed).items() if isinstance(value, Path) or name == "target"}
    for option in ("out", "checkpoint", "log"):
        path = given.pop(option, None)
        if path is None or (path.exists() and not (path.is_file() or path.is_dir())):  # such as /dev/null
            continue
        for name, other in given.items():
            own = _READ.get(name, f"--{name} too")
            if path.resolve() == other.resolve():
                raise UsageError(f"--{option} {path} is {own}; choose another")
            inside = option != "log" and path.is_file() and path.resolve().parent == other.resolve()
            if inside and _OF_A_MODEL.fullmatch(path.name):  # a log is added to
                raise UsageError(f"--{option} {path} is a file in {own}; choose another")


def folder(path: Path) -> Path:
    """``path``, after a check that it is a folder that can be written, or can be made. It is made with its files."""
    found = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if not found.is_dir():
        raise UsageError(f"can't make the folder {path}: {found} is no folder; choose another --out")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UsageError(f"can't write into the folder {found}: it is read-only; choose another --out")
    return path


def writable(path: Path) -> Path:
    """``path``, after a check that it can be written as a file, in a folder that is there or can be made."""
    if path.is_dir():
        raise UsageError(f"can't write {path}: it is a folder; --out names a file")
    folder(path.parent)
    return path
