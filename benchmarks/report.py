"""Result files as pictures: ``python -m benchmarks.report benchmarks/results/bench_ops.json --out ops.png``.

Of cases of the harness: each provider's time against the baseline, with its quartiles, one panel a case. Of
``bench_large``: memory above the weights against the weights, one line a way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Told apart by colour-blind readers too (Okabe and Ito).
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#999999")
_COLUMNS = 3


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The picture of one result file."""
    from matplotlib.figure import Figure

    cases = content["cases"]
    timed = [case for case in cases if "providers" in case]
    facts = content["provenance"]
    if timed:
        lines = -(-len(timed) // _COLUMNS)
        longest = max(len(case["providers"]) for case in timed)
        figure = Figure(figsize=(5.4 * _COLUMNS, (0.9 + 0.32 * longest) * lines + 0.6), layout="constrained")
        panels = figure.subplots(lines, _COLUMNS, squeeze=False).flat
        for panel, case in zip(panels, timed, strict=False):
            _draw_ratios(panel, case)
        for panel in list(panels)[len(timed) :]:
            panel.set_visible(False)
    else:
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        _draw_growth(figure.subplots(), cases)
    source = f"{facts['command']}\n{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    figure.supxlabel(f"{source}, commit {facts['commit'][:12]}", fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_ratios(panel: Any, case: Mapping[str, Any]) -> None:
    names = list(case["providers"])
    ratios = [case["providers"][name]["against_baseline"] for name in names]
    middle = [ratio["paired_median"] for ratio in ratios]
    below = [max(0.0, ratio["paired_median"] - ratio["q25"]) for ratio in ratios]
    above = [max(0.0, ratio["q75"] - ratio["paired_median"]) for ratio in ratios]
    colours = [_COLOURS[0] if name.startswith(("obc", "folded")) else _COLOURS[-1] for name in names]
    bars = panel.barh(names, middle, xerr=(below, above), color=colours, ecolor="#333333")
    panel.bar_label(bars, labels=[f"{value:.2f}" for value in middle], padding=4, fontsize=8)
    panel.axvline(1, color="#333333", linewidth=0.8)
    panel.set_title(case["name"] + (" (void)" if case["void"] else ""), fontsize=9, loc="left")
    panel.set_xlabel(f"time / {case['baseline']}", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.18)
    panel.invert_yaxis()


def _draw_growth(panel: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    measured = [case for case in cases if "peak_mib" in case]
    for colour, way in zip(_COLOURS, dict.fromkeys(case["way"] for case in measured), strict=False):
        points = sorted((case["weights_mib"], case["peak_mib"]) for case in measured if case["way"] == way)
        panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=way)
    panel.set_xlabel("weights, MiB")
    panel.set_ylabel("peak memory above the weights, MiB")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draw result files.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="(default: the file's name with .png)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results.with_suffix(".png")
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), out)
    print(f"drawn: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
