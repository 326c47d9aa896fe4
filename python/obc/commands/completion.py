"""``obc completion``: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from obc.commands.common import add_command, require

_DESCRIPTION = """\
Print a completion script; needs shtab: pip install shtab.

  bash   obc completion bash > ~/.local/share/bash-completion/completions/obc
  zsh    obc completion zsh > ~/.zfunc/_obc      with fpath+=~/.zfunc before compinit in ~/.zshrc

The script does not start Python when it completes."""


def add(commands: Any) -> None:
    """Add ``obc completion`` to the subparsers."""
    completion = add_command(commands, "completion", run, "print a completion script for a shell", _DESCRIPTION)
    completion.add_argument("shell", choices=("bash", "zsh"))


def run(parsed: argparse.Namespace) -> int:
    """Print the script of the parser that ``parsed`` came from."""
    require({"shtab": "shtab"})
    import shtab

    _complete_files(parsed.parser, shtab.FILE)
    print(shtab.complete(parsed.parser, parsed.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, kind: Any) -> None:
    """Make every path argument complete files."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = kind  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, kind)
