"""The pages build without warnings, are complete, keep promised lengths, and name existing source files."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from obc import criteria
from obc.pruning.arguments import has_rows

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EVERYWHERE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

# What a stranger needs to find.
TOPICS = (
    *("architecture", "scoring", "glossary", "environment", "files", "large_models", "measured", "install", "pruning"),
    *("extending/criterion", "extending/operator", "extending/transformer_family", "api/index"),
    *("tutorials/cnn", "tutorials/llm", "tutorials/own_loop", "tutorials/recovery"),
)


# Public names that are modules, whose members have pages.
_MODULES = ("backends", "criteria", "equivalent", "ops", "quality", "reference", "statistics")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_the_network_and_lists_every_public_name(tmp_path: Path) -> None:
    """One test, because a build takes seconds and parallel tests would each make their own."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    for topic in TOPICS:
        assert (tmp_path / f"{topic}.html").is_file()
    for page in tmp_path.rglob("*.html"):
        assert not _LOADING.findall(page.read_text(encoding="utf-8")), page
    documented = _documented(tmp_path / "objects.inv")
    missing = []
    for package in ("obc", "obc.statistics", "obc.scoring", "obc.selection", "obc.pruning", "obc.recovery"):
        names = importlib.import_module(package).__all__
        missing += [f"{package}.{name}" for name in names if name not in documented and name not in _MODULES]
    assert not missing, f"add them to a page of docs/api: {missing}"


# A page that loads anything from another host.
_LOADING = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](?:https?:)?//""")


def _documented(inventory: Path) -> set[str]:
    """The last part of every Python name in the reference."""
    from sphinx.util.inventory import InventoryFile

    with inventory.open("rb") as file:
        loaded = InventoryFile.load(file, "", lambda base, path: path)
    entries = getattr(loaded, "data", loaded)  # a mapping before Sphinx 8.2
    return {name.rpartition(".")[2] for kind, names in entries.items() if kind.startswith("py:") for name in names}


def test_readme_fits_two_screens() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120


def test_readme_says_what_has_not_run_on_a_gpu() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "The Triton and CUDA kernels have not run on a GPU" in text


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """Sphinx checks those between the pages of docs/."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


_ROOTS = ("python/", "csrc/", "obc_kernels/", "tests/", "benchmarks/", "docs/", "examples/")
_PACKAGE = tuple(f"{folder.name}/" for folder in (ROOT / "python" / "obc").iterdir() if folder.is_dir())


@pytest.mark.parametrize("page", EVERYWHERE, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w./]+/[\w.]*)`", page.read_text(encoding="utf-8"))
    for name in named:
        if name.startswith(_ROOTS):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
        elif name.startswith(_PACKAGE):
            assert (ROOT / "python" / "obc" / name).exists(), f"{page.name} names {name} in python/obc"


def _source(*suffixes: str) -> str:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    paths = [ROOT / name for name in listed.splitlines() if name.endswith(suffixes)]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


def test_every_environment_variable_is_on_its_page() -> None:
    reads = r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](OBC_\w+|TRITON_INTERPRET)["']"""
    used = set(re.findall(reads, _source(".py", ".cpp", ".h", ".cu", ".cuh")))
    used |= set(importlib.import_module("obc.info").ENVIRONMENT)
    assert len(used) >= 8
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    assert not {name for name in used if f"`{name}`" not in page}


def test_every_file_format_is_on_its_page() -> None:
    formats = set(re.findall(r"""["'](obc\.[A-Za-z_.]+(?:/\d+)?) ?["']""", _source(".py")))
    formats = {name for name in formats if "/" in name}
    assert len(formats) >= 5
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    assert not {name for name in formats if f"`{name}" not in page}


def test_the_glossary_defines_each_word_once() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = [term.strip().lower() for head in re.findall(r"^## (.+)$", text, re.MULTILINE) for term in head.split(",")]
    assert len(terms) == len(set(terms))
    words = ["row", "slot", "gate", "chain", "unit", "group", "slice", "side", "plan", "fold", "statistic", "criterion"]
    assert set(words) <= {word for term in terms for word in term.split()}


def _run(script: str) -> dict[str, Any]:
    """The names that a script of docs/ defines."""
    return runpy.run_path(str(DOCS / script))


def test_the_pictures_are_those_that_the_script_draws() -> None:
    for name, draw in _run("drawings.py")["PICTURES"].items():
        assert (DOCS / "_static" / name).read_text(encoding="utf-8") == draw(), "run python docs/drawings.py"


def test_the_table_of_criteria_is_what_they_say_about_themselves() -> None:
    written = (DOCS / "criteria.md").read_text(encoding="utf-8")
    assert written == _run("criteria_table.py")["page"](), "run python docs/criteria_table.py"


def test_the_families_of_criteria_in_the_guide_are_complete() -> None:
    """Every criterion is in one family, and the first family has those that have rows."""
    text = (DOCS / "pruning.md").read_text(encoding="utf-8").split("| family | names |")[1].split("\n\n")[0]
    families = [re.findall(r'`"(\w+)"`', line) for line in text.splitlines()[2:]]
    assert families[0] == [name for name in criteria.available() if has_rows(criteria.get(name))]
    named = {name for family in families for name in family}
    assert named == set(criteria.available())


def test_at_least_twenty_systems_of_the_field_have_a_criterion() -> None:
    script = _run("criteria_table.py")
    with_criterion = script["WITH_CRITERION"]
    assert len(with_criterion) >= 20
    assert {name for name, _ in with_criterion.values()} <= set(criteria.available())
    assert not set(with_criterion) & set(script["ELSEWHERE"])


def test_the_tables_of_operators_are_those_of_the_code() -> None:
    script = _run("operators_table.py")
    for path in script["PAGES"]:
        assert path.read_text(encoding="utf-8") == script["page"](path), "run python docs/operators_table.py"


def test_the_architecture_shows_every_folder() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for folder in _PACKAGE:
        if not folder.startswith(("_", "__pycache__")):
            assert f"`{folder}`" in page, folder


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or a member of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(thing, part) and part not in getattr(thing, "__annotations__", {}):
                return False
            thing = getattr(thing, part, None)
        return True
    return False


def test_what_docstrings_refer_to_exists() -> None:
    pattern = r":(?:func|class|meth|mod|attr|data|exc):`~?((?:obc|obc_kernels)(?:\.\w+)+)`"
    named = set(re.findall(pattern, _source(".py", ".md")))
    assert len(named) >= 20
    assert not {name for name in named if not _exists(name)}


def test_names_in_code_font_exist() -> None:
    """Of pages, docstrings and comments; formats of files (obc.Scores/3) and the logger are no names of Python."""
    paths = (*EVERYWHERE, *(ROOT / "python" / "obc").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    named = set(re.findall(r"`(obc(?:\.[A-Za-z_]\w*)+)(?![\w.]*/)", text))
    assert len(named) >= 100
    assert not {name for name in named if not _exists(name)} - {"obc.progress"}


BY_A_SWEEP = {DOCS / "transformers_models.md", DOCS / "library_models.md"}
WRITTEN_BY_HAND = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")) - BY_A_SWEEP)]


def _prose(text: str) -> list[str]:
    """Lines of a page outside code, tables, pictures and lines that a script writes."""
    outside = re.sub(r"^(```|:::).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in outside.splitlines() if not re.match(r"\||<|!\[|\*\*.*\*\*$|Void", line)]


@pytest.mark.parametrize("path", WRITTEN_BY_HAND, ids=lambda path: path.name)
def test_lines_of_prose_fit_into_120_columns(path: Path) -> None:
    words = [line for line in _prose(path.read_text(encoding="utf-8")) if len(line) > 120]
    assert [line for line in words if len(line.split()) > 2] == []
