"""The demo's results as tables and as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obc.demo.criteria import ROWS
from obc.demo.data import TEST_IMAGES
from obc.demo.run import STEPS, ModelResult

# Told apart by colour-blind readers too (Okabe and Ito).
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "osD^vP"
_DPI = 130


def protocol() -> str:
    """What the figures are, in words."""
    return (
        f"Accuracy on {TEST_IMAGES} held-out digits right after pruning, without fine-tuning; in brackets, times "
        "fewer MACs.\n"
        f"Torch-Pruning {version('torch-pruning')}, global ranking, 1/{STEPS} of the channels a step; Taylor and "
        f"Jacobian are scored anew on the\ntraining digits, in {ROWS} batches, before every step. Time and peak memory "
        f"are of scoring the unpruned network\nonce, on one thread: median of 3; most bytes that "
        "torch had allocated, above what it had before."
    )


def headline(result: ModelResult) -> str:
    return (
        f"{result.model}: {100 * result.accuracy:.1f} % unpruned, {result.macs / 1e6:.2f} M MACs, "
        f"{result.parameters / 1e3:.0f} k parameters"
    )


def table(result: ModelResult) -> str:
    """One line a criterion: accuracy and actual MACs at each target, scoring time, peak memory."""
    header = ["criterion", *[f"{p.target:g}x fewer MACs" for p in result.criteria[0].points], "scoring", "peak memory"]
    lines = [header]
    for of in result.criteria:
        cells = [f"{100 * p.accuracy:.1f} % ({p.macs_ratio:.2f}x)" for p in of.points]
        lines.append([of.criterion, *cells, f"{1000 * of.seconds:.1f} ms", f"{of.peak_bytes / 2**20:.2f} MiB"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]])
        for line in lines
    ]
    return "\n".join([headline(result), aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def draw(results: Sequence[ModelResult], path: Path) -> None:
    """The same as a PNG: per network a row of accuracy over MACs, scoring time and peak memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2 * len(results) + 1.1), layout="constrained")
    figure.suptitle("Digits: what each criterion keeps right after pruning, without fine-tuning", fontsize=14)
    grid = figure.subplots(len(results), 3, squeeze=False, width_ratios=(2.2, 1, 1))
    for (curves, times, peaks), result in zip(grid, results, strict=True):
        _draw_accuracy(curves, result)
        names = [of.criterion for of in result.criteria]
        _draw_bars(times, names, [1000 * of.seconds for of in result.criteria], "scoring once, ms", "{:.1f}")
        _draw_bars(peaks, names, [of.peak_bytes / 2**20 for of in result.criteria], "peak memory, MiB", "{:.2f}")
    figure.supxlabel(protocol(), fontsize=8.5)
    figure.savefig(path, dpi=_DPI)


def _draw_accuracy(axis: Any, result: ModelResult) -> None:
    for of, colour, marker in zip(result.criteria, _COLOURS, _MARKERS, strict=False):
        ratios = [1.0, *[point.macs_ratio for point in of.points]]
        values = [100 * value for value in (result.accuracy, *[point.accuracy for point in of.points])]
        axis.plot(ratios, values, color=colour, marker=marker, label=of.criterion, linewidth=2, markersize=7)
    axis.set_title(headline(result), fontsize=11, loc="left")
    axis.set_xlabel("times fewer MACs")
    axis.set_ylabel("held-out accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=10)


def _draw_bars(axis: Any, names: Sequence[str], values: Sequence[float], title: str, form: str) -> None:
    bars = axis.barh(names, values, color=_COLOURS[: len(names)])
    axis.bar_label(bars, labels=[form.format(value) for value in values], padding=3, fontsize=9)
    axis.set_title(title, fontsize=11, loc="left")
    axis.margins(x=0.22)
    axis.invert_yaxis()
