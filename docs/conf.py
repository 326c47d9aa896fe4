"""How the pages of docs/ become a site: ``make docs``. Nothing is fetched; every warning is an error there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

import obc.distribution  # noqa: E402 - found only now

project = "obc"
author = "the obc contributors"
release = version = obc.distribution.obc_version() or "source tree"
project_copyright = "the obc contributors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
templates_path: list[str] = []

# Links are checked: a heading's anchor like a page.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# The signature stands as in the source; types once, there.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "obc"
html_static_path = ["_static"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"


# --- docstrings ----------------------------------------------------------------------------------------------------
# They are written to be read in the source: a formula such as |w| or C*W*D is text there, no markup.

_EMPHASIS = r"(?<![\w*])\*\w(?:[^*]*\w)?\*(?![\w*])"
_KEPT = re.compile(rf"(``.*?``|:[a-z:]+:`.*?`|`[^`]+`_?|{_EMPHASIS})")
_NO_MARKUP = re.compile(r"[|*]|(?<=\w)_(?!\w)")


def _plain_formulas(line: str) -> str:
    """The line with every sign escaped that would begin markup without ending it."""
    parts = _KEPT.split(line)
    parts[::2] = [_NO_MARKUP.sub(lambda sign: f"\\{sign[0]}", part) for part in parts[::2]]
    return "".join(parts)


def _process_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", "===", "..")):
            lines[number] = _plain_formulas(line)
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # napoleon takes what stands before a colon in the first line for a type


def setup(app: Any) -> None:
    # Before napoleon, which writes markup of its own.
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)
