"""``--log``, exit codes, completion, and that nothing but commands prints."""

from __future__ import annotations

import argparse
import ast
import itertools
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import obc
from obc import cli
from obc.commands.common import BROKEN_PIPE, INTERRUPTED, USAGE_ERROR, UsageError
from obc.commands.run_log import say

PACKAGE = Path(obc.__file__).parent
LONG = ("demo", "score", "prune", "recover", "evaluate", "bench")


def prints(source: str) -> list[int]:
    """The lines on which ``print`` is called."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_prints_are_found() -> None:
    assert prints("def f():\n    print(1)\n    pprint(2)\n    x.print(3)\n") == [2]


def test_only_commands_print() -> None:
    """Everything else speaks through logging, whose user decides what is shown."""
    allowed = {PACKAGE / "cli.py"}
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path not in allowed and "commands" not in path.relative_to(PACKAGE).parts
        for line in prints(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_progress_bars_know_notebooks() -> None:
    """tqdm.auto shows a widget in a notebook and text elsewhere; the plain module knows text alone."""
    imports = re.findall(
        r"^\s*(?:from|import) (tqdm[\w.]*)", "\n".join(p.read_text() for p in PACKAGE.rglob("*.py")), re.MULTILINE
    )
    assert set(imports) == {"tqdm.auto"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``obc info`` do something else, with ``--log``."""

    def replace(run: Any) -> None:
        def add(commands: Any) -> None:
            parser = commands.add_parser("info")
            parser.add_argument("--log", type=Path)
            parser.set_defaults(command=run)

        monkeypatch.setattr(cli.info, "add", add)

    return replace


def test_a_log_says_what_was_done(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = itertools.count()  # Python shows a warning once

    def run(parsed: argparse.Namespace) -> int:
        logging.getLogger("obc").info("step 3")
        logging.getLogger("obc").warning("a layer is narrow")
        logging.getLogger("obc.progress").info("batch 7")
        warnings.warn(f"deprecated {next(numbers)}", UserWarning, stacklevel=1)
        say("the result", "of two lines")
        return 0

    command(run)
    file = tmp_path / "new" / "run.log"
    for _ in range(2):
        assert cli.main(["info", "--log", str(file)]) == 0
    lines = file.read_text().splitlines()
    said = [re.sub(r"^\S+ \S+ ", "", line) for line in lines]
    assert len(said) == 2 * 9  # the second run is appended
    assert said[0] == f"INFO obc.commands: obc info --log {file}"
    assert said[1].startswith("INFO obc.commands: obc ")
    assert said[2:8] == [
        "INFO obc: step 3",
        "WARNING obc: a layer is narrow",
        "INFO obc.progress: batch 7",
        "WARNING obc.commands: deprecated 0",
        "INFO obc.commands: the result",
        "INFO obc.commands: of two lines",
    ]
    assert said[8].startswith("INFO obc.commands: ended after ")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in lines)
    assert capsys.readouterr().out == "the result\nof two lines\n" * 2
    assert not logging.getLogger("obc").handlers


def _refused(parsed: argparse.Namespace) -> int:
    raise UsageError("no such thing; take another")


def _interrupted(parsed: argparse.Namespace) -> int:
    raise KeyboardInterrupt


def _failed(parsed: argparse.Namespace) -> int:
    raise ZeroDivisionError("unforeseen")


@pytest.mark.parametrize(
    ("run", "code", "logged"),
    [(_refused, USAGE_ERROR, "refused: no such thing"), (_interrupted, INTERRUPTED, "interrupted after")],
)
def test_exit_codes(
    run: Any, code: int, logged: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run)
    assert cli.main(["info", "--log", str(tmp_path / "log")]) == code
    err = capsys.readouterr().err
    assert err.startswith("obc info: ")
    assert err.count("\n") == 1
    assert logged in (tmp_path / "log").read_text()


def test_what_is_not_foreseen_keeps_its_traceback(command: Any, tmp_path: Path) -> None:
    command(_failed)
    with pytest.raises(ZeroDivisionError):  # the interpreter prints it and exits with 1
        cli.main(["info", "--log", str(tmp_path / "log")])
    text = (tmp_path / "log").read_text()
    assert "failed after" in text
    assert "ZeroDivisionError: unforeseen" in text


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--log", str(tmp_path)]) == USAGE_ERROR
    assert "it is a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_goes_is_no_error() -> None:
    code = "import sys, obc.cli; sys.exit(obc.cli.main(['criteria']))"
    ran = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.stdout is not None
    ran.stdout.close()
    _, err = ran.communicate()
    assert (ran.returncode, err) == (BROKEN_PIPE, b"")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def test_every_long_command_can_log() -> None:
    logging_ones = {n for n, parser in parsers().items() if any(a.dest == "log" for a in parser._actions)}
    assert logging_ones == set(LONG)


def test_every_command_is_on_its_page_with_the_exit_codes() -> None:
    page = (PACKAGE.parents[1] / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert not [name for name in parsers() if f"obc {name}" not in page]
    for code in (0, 1, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE):
        assert f"| {code} |" in page


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert not [name for name in parsers() if name not in script]
    assert "--allocation" in script


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "obc.bash").write_text(capsys.readouterr().out)
    (tmp_path / "scores.safetensors").write_text("")
    script = """
        source obc.bash
        complete_words() {
          COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_obc; echo "${COMPREPLY[*]}"
        }
        complete_words obc rec; complete_words obc prune --mac; complete_words obc report sc
    """
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["recover", "--macs", "scores.safetensors"]
