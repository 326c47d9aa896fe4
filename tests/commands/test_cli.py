"""The command line: its output, and errors that exit with 2 and one clear line."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from directories import llama_directory

import obc
import obc_command
from obc import cli
from obc.commands import info
from obc.commands.common import INTERRUPTED


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes modules look as if they were not installed."""

    def hide(*modules: str) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else found(name))

    return hide


@pytest.mark.parametrize(
    ("modules", "packages"),
    [(["sklearn"], "scikit-learn"), (["torch_pruning", "matplotlib"], "torch-pruning matplotlib")],
    ids=["one", "two"],
)
def test_demo_without_its_packages_says_how_to_get_them(
    modules: list[str], packages: str, without: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without(*modules)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("obc demo: needs ")
    assert err.count("\n") == 1
    assert f"pip install {packages}\n" in err
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_info_prints_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = obc.info()
    assert f"torch: {facts['torch']}" in lines
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{key}:" if isinstance(value, dict) else f"{key}: {value}" for key, value in facts.items()
    ]
    for backend in facts["backends"]:
        assert f"  {backend}:" in lines


def test_nested_facts_are_indented_and_absent_ones_are_said() -> None:
    facts = {"one": 1, "inner": {"yes": True, "none": None, "list": [1, 2], "deeper": {"no": False}}}
    assert info.lines(facts) == [
        "one: 1",
        "inner:",
        "  yes: yes",
        "  none: not set",
        "  list: 1, 2",
        "  deeper:",
        "    no: no",
    ]


@pytest.mark.parametrize("arguments", [[], ["prune-everything"], ["demo", "--seed", "three"]], ids=str)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("obc")
    assert line.endswith("--help")


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers_of(command)


def test_every_parsed_option_says_what_it_expects(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse alone would name the function that parses the text: "invalid _share value"."""
    asked = 0
    for parser in parsers_of(cli._parser()):
        for action in parser._actions:
            if action.type in (None, Path, int, float):
                continue
            with pytest.raises(SystemExit):
                parser.parse_args([action.option_strings[0], "no such value"])
            said = capsys.readouterr().err
            assert said.startswith(f"{parser.prog}: argument {action.option_strings[0]}: must be a ")
            assert "got 'no such value'" in said
            asked += 1
    assert asked > 20


@pytest.mark.slow
def test_help_of_the_module_loads_no_demo() -> None:
    """Help must not need the demo's packages, nor take their time."""
    code = (
        "import sys, obc.cli\n"
        "try: obc.cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('sklearn', 'torch_pruning', 'matplotlib', 'transformers', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "--seed" in ran.stdout


def test_python_runs_the_package_as_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "obc", "criteria", "nothing"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "obc: unrecognized arguments: nothing; see obc --help\n"


SLOW = [
    pytest.param(module, marks=pytest.mark.slow)
    for module in ("torch", "obc.commands.prune", "transformers.models.llama")
]


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("module", ["argparse", "obc.scoring", "transformers", *SLOW])
def test_ctrl_c_while_a_module_is_imported(module: str, tmp_path: Path) -> None:
    """transformers turns the interruption into a ModuleNotFoundError."""
    folder = llama_directory(tmp_path)
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background shells start with it ignored
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name.startswith({module!r}) and not sent:\n"
        "            sent.append(name); os.kill(os.getpid(), signal.SIGINT)\n"
        "sent = []\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from obc_command import main\n"
        "code = main()\n"
        "print(*sent)\n"
        "sys.exit(code)"
    )
    arguments = ["evaluate", str(folder), "--data", str(tmp_path / "data.jsonl"), "--seq-len", "8"]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.stdout.startswith(module)
    assert ran.stderr in ("obc: interrupted\n", "obc evaluate: interrupted\n")
    assert ran.returncode == INTERRUPTED
    assert obc_command.INTERRUPTED == INTERRUPTED


@pytest.mark.slow
def test_a_sigint_that_the_parent_ignores_stays_ignored() -> None:
    """As nohup and shells in the background set it."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from obc_command import main\n"
        "sys.argv = ['obc', 'criteria']\n"
        "sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGINT) if event == 'import' else None)\n"
        "sys.exit(main())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
