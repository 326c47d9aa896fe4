"""Draws the pictures of the pages: ``python docs/drawings.py`` writes docs/_static/*.svg."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

STATIC = Path(__file__).parent / "_static"

# A card of its own colour, so that the picture reads the same on light and on dark pages.
_STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2937; }
  .title { font-size: 15px; font-weight: 600; text-anchor: middle; }
  .note { font-size: 12px; fill: #4b5563; text-anchor: middle; }
  .box { stroke-width: 1.5; rx: 8px; }
  .data { fill: #ffffff; stroke: #6b7280; }
  .work { fill: #dbeafe; stroke: #2563eb; }
  .kernel { fill: #dcfce7; stroke: #16a34a; }
  .base { fill: #fef3c7; stroke: #d97706; }
  .loop { fill: #eff6ff; stroke: #93c5fd; stroke-dasharray: 5 4; }
  .arrow { stroke: #4b5563; stroke-width: 1.8; fill: none; marker-end: url(#head); }
"""
_HEAD = """<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L10,5 L0,10 z" fill="#4b5563"/></marker></defs>"""


def _box(x: float, y: float, width: float, height: float, kind: str, title: str, notes: Sequence[str] = ()) -> str:
    middle, lines = x + width / 2, [title, *notes]
    first = y + height / 2 - 8.5 * (len(lines) - 1) + 5
    parts = [f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>']
    for index, line in enumerate(lines):
        style = "title" if index == 0 else "note"
        parts.append(f'<text class="{style}" x="{middle:g}" y="{first + 17 * index:g}">{escape(line)}</text>')
    return "\n".join(parts)


def _arrow(*points: tuple[float, float]) -> str:
    return f'<path class="arrow" d="M{" L".join(f"{x:g},{y:g}" for x, y in points)}"/>'


def _picture(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    card = f'<rect x="0" y="0" width="{width}" height="{height}" rx="12" fill="#f9fafb"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{_STYLE}</style>", _HEAD, card, *parts, "</svg>", ""])


def pipeline() -> str:
    """A drawing of ``obc.prune``."""
    parts = ['<rect class="box loop" x="170" y="24" width="452" height="182"/>']
    parts.append('<text class="note" x="396" y="194">in steps, 8 by default, until the budget is met</text>')
    parts.append(_box(20, 62, 120, 84, "data", "your model", ["batches,", "a loss"]))
    names = (
        ("score", ["one row a batch:", "w · ∂L/∂w", "per channel"]),
        ("select", ["the set whose", "effects on the", "loss cancel best"]),
        ("remove", ["channels, heads,", "experts; the plan", "records what stays"]),
    )
    for index, (title, notes) in enumerate(names):
        parts.append(_box(186 + 144 * index, 50, 132, 108, "work", title, notes))
    for start in (140, 318, 462):
        parts.append(_arrow((start, 104), (start + (46 if start == 140 else 12), 104)))
    parts.append(_arrow((540, 158), (540, 174), (252, 174), (252, 160)))
    parts.append(_box(652, 50, 132, 108, "work", "compensate", ["by least squares,", "without labels,", "optional"]))
    parts.append(_arrow((606, 104), (650, 104)))
    parts.append(_box(814, 62, 126, 84, "data", "pruned model", ["plain PyTorch,", "and its plan"]))
    parts.append(_arrow((784, 104), (812, 104)))
    return _picture(960, 230, "obc.prune: score, select, remove in steps, then compensate", parts)


def architecture() -> str:
    """The folders as floors: imports run down."""
    floors = (
        (
            "work",
            [("commands/", "obc score, obc prune …"), ("demo/", "obc demo"), ("quality.py", "obc.quality")],
        ),
        ("work", [("integrations/", "Torch-Pruning, NumPy, transformers")]),
        ("work", [("pruning/", "obc.prune")]),
        ("work", [("recovery/", "obc.compensate, equivalent_pruning, recover")]),
        ("work", [("criteria/", "one score a unit"), ("structures/", "what can be removed")]),
        ("work", [("statistics/", "obc.collect: moments, Gram matrices …")]),
        ("work", [("scoring/", "obc.score: rows of the Jacobian"), ("selection/", "obc.select")]),
        ("kernel", [("ops/", "schemas, checks, autograd")]),
        ("kernel", [("backends/", "which implementation runs")]),
        (
            "kernel",
            [("csrc/cpu", "C++"), ("csrc/cuda", "CUDA"), ("obc_kernels", "Triton"), ("reference.py", "PyTorch")],
        ),
    )
    parts, left, width, height, gap = [], 204, 566, 50, 10
    for floor, (kind, boxes) in enumerate(floors):
        each = (width - 8 * (len(boxes) - 1)) / len(boxes)
        for index, (title, note) in enumerate(boxes):
            parts.append(
                _box(left + index * (each + 8), 20 + floor * (height + gap), each, height, kind, title, [note])
            )
    bottom = 20 + len(floors) * (height + gap) - gap
    notes = ["where channels lie,", "groups, plans, costs:", "facts that every", "floor may use"]
    parts.append(_box(44, 20, 148, bottom - 20, "base", "model/", notes))
    parts.append(_arrow((28, 24), (28, bottom - 4)))
    parts.append(f'<text class="note" transform="translate(18 {bottom / 2:g}) rotate(-90)">imports run down</text>')
    return _picture(790, bottom + 20, "The folders of obc as floors", parts)


PICTURES = {"pipeline.svg": pipeline, "architecture.svg": architecture}

if __name__ == "__main__":
    STATIC.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (STATIC / name).write_text(draw(), encoding="utf-8")
