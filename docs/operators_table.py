"""Writes the tables of operators in README.md and docs/operators.md from the table in obc.backends.operators."""

from __future__ import annotations

from pathlib import Path

from obc.backends.operators import LIBRARIES, TABLE, Operator

DOCS = Path(__file__).parent
MARK = "<!-- operators -->\n"  # before the table, which ends at an empty line


def _about(operator: Operator) -> str:
    return operator.about.replace("|", "\\|")


def _arguments(operator: Operator) -> str:
    """The schema's arguments without types and defaults."""
    arguments = operator.schema[1 : operator.schema.index(") -> ")].split(", ")
    return ", ".join(argument.split(" ")[1].split("=")[0] for argument in arguments)


def _with_backends() -> str:
    head = "| operator | reference | CPU (C++) | Triton | CUDA |\n| --- | --- | --- | --- | --- |\n"
    lines = []
    for operator in TABLE:
        cpu, cuda = ("✓" if library in operator.libraries else "GEMM" for library in LIBRARIES)
        lines.append(f"| `{operator.name}`: {_about(operator)} | ✓ | {cpu} | ✓ | {cuda} |\n")
    return head + "".join(lines)


def _with_arguments() -> str:
    head = "| operator | computes |\n| --- | --- |\n"
    return head + "".join(f"| `{one.name}({_arguments(one)})` | {_about(one)} |\n" for one in TABLE)


PAGES = {DOCS.parent / "README.md": _with_backends, DOCS / "operators.md": _with_arguments}


def page(path: Path) -> str:
    """The text of a page with its table written anew."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(MARK)
    _, end, after = rest.partition("\n\n")
    return before + mark + PAGES[path]().rstrip() + end + after


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
