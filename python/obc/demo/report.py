"""The demo's results as tables and as one picture."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obc.demo.criteria import ROWS
from obc.demo.data import TEST_IMAGES, VALIDATION_IMAGES
from obc.demo.finetune import EPOCHS, LEARNING_RATES, SEEDS, TARGET, FineTuning
from obc.demo.recover import CALIBRATION_IMAGES, RAW, SEQUENTIAL, WAYS
from obc.demo.run import STEPS, ModelResult
from obc.files import save_figure

# Told apart by colour-blind readers too (Okabe and Ito).
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "osD^vP"
_DPI = 130
_LINE = 118


def protocol() -> str:
    """The meaning of the figures, in words."""
    return textwrap.fill(
        f"Accuracy on {TEST_IMAGES} held-out digits after pruning, without fine-tuning. Torch-Pruning "
        f"{version('torch-pruning')}, global ranking, 1/{STEPS} of the channels per step; Taylor and Jacobian are "
        f"scored again on the training digits, in {ROWS} batches, before every step. BN recalibrated: norm statistics "
        f"re-estimated. Compensated: least squares, layer-wise (ls) or sequential (seq), and norms recalibrated. "
        f"These see {CALIBRATION_IMAGES} training images and no labels. Time and peak memory are of scoring the "
        f"unpruned network once, on one thread: median of 3 rounds in which the criteria take turns; most bytes that "
        f"torch had allocated, above what it had before.",
        _LINE,
    )


def headline(result: ModelResult) -> str:
    """One line on the unpruned model."""
    return (
        f"{result.model}: {100 * result.accuracy:.1f} % unpruned, {result.macs / 1e6:.2f} M MACs, "
        f"{result.parameters / 1e3:.0f} k parameters"
    )


def table(result: ModelResult) -> str:
    """Per target one line per criterion: actual MACs, accuracy in every way; then the cost of scoring."""
    lines = [["criterion", "fewer MACs", *WAYS]]
    for points in zip(*(found.points for found in result.criteria), strict=True):
        for found, point in zip(result.criteria, points, strict=True):
            lines.append(
                [found.criterion, f"{point.macs_ratio:.2f}x", *(_percent(point.accuracy[way]) for way in WAYS)]
            )
    costs = [["criterion", "scoring", "peak memory"]]
    for found in result.criteria:
        costs.append([found.criterion, f"{1000 * found.seconds:.1f} ms", f"{found.peak_bytes / 2**20:.2f} MiB"])
    return "\n".join([headline(result), *_aligned(lines, len(result.criteria)), "", *_aligned(costs)])


def fine_tuning_table(result: FineTuning) -> str:
    """One line per way: mean and range over the seeds, and the learning rates that validation chose."""
    lines = [["fine-tuned", "mean", "lowest - highest", "learning rates chosen"]]
    plain = (("unpruned", result.unpruned), ("pruned, not fine-tuned", result.pruned))
    lines += [[name, _percent(statistics.fmean(values)), _range(values), ""] for name, values in plain]
    for found in result.ways:
        rates = ", ".join(f"{rate:g}" for rate in found.learning_rates)
        lines.append([found.way, _percent(found.mean), _range(found.accuracies), rates])
    return "\n".join([f"{result.model}, {TARGET:g}x fewer MACs by the Jacobian Criterion", *_aligned(lines)])


def fine_tuning_protocol() -> str:
    """The meaning of the fine-tuning's figures, in words."""
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    return textwrap.fill(
        f"Accuracy on {TEST_IMAGES} held-out digits after {EPOCHS} epochs of fine-tuning, AdamW, one-cycle schedule, "
        f"{SEEDS} seeds (of splits, weights and order). Every way has the same budget and tries the learning rates "
        f"{rates}; {VALIDATION_IMAGES} digits for validation choose.",
        _LINE,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _range(values: Sequence[float]) -> str:
    return f"{100 * min(values):.1f} - {100 * max(values):.1f} %"


def _aligned(lines: Sequence[Sequence[str]], group: int = 0) -> list[str]:
    """The lines in columns, a rule under the header, and a blank line after every ``group`` lines."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]])
        for line in lines
    ]
    body = text[1:]
    if group:
        parts = [body[start : start + group] for start in range(0, len(body), group)]
        body = [line for part in parts for line in ("", *part)][1:]
    return [text[0], "-" * len(text[0]), *body]


def draw(results: Sequence[ModelResult], path: Path) -> None:
    """The same as a PNG: a row per network with accuracy over MACs, raw and compensated, scoring time and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.2 * len(results) + 1.3), layout="constrained")
    figure.suptitle("Digits: what each criterion keeps after pruning, without fine-tuning", fontsize=14)
    grid = figure.subplots(len(results), 4, squeeze=False, width_ratios=(2, 2, 1, 1))
    for (raw, compensated, times, peaks), result in zip(grid, results, strict=True):
        raw.sharey(compensated)
        _draw_accuracy(raw, result, RAW, headline(result))
        _draw_accuracy(compensated, result, SEQUENTIAL, "the same networks, compensated")
        names = [found.criterion for found in result.criteria]
        _draw_bars(times, names, [1000 * found.seconds for found in result.criteria], "scoring once, ms", "{:.1f}")
        _draw_bars(peaks, names, [found.peak_bytes / 2**20 for found in result.criteria], "peak memory, MiB", "{:.2f}")
    figure.supxlabel(protocol(), fontsize=8.5)
    save_figure(figure, path, _DPI)


def _draw_accuracy(axis: Any, result: ModelResult, way: str, title: str) -> None:
    for found, colour, marker in zip(result.criteria, _COLOURS, _MARKERS, strict=False):
        ratios = [1.0, *[point.macs_ratio for point in found.points]]
        accuracies = [result.accuracy, *[point.accuracy[way] for point in found.points]]
        values = [math.nan if value is None else 100 * value for value in accuracies]
        axis.plot(ratios, values, color=colour, marker=marker, label=found.criterion, linewidth=2, markersize=7)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("times fewer MACs")
    axis.set_ylabel(f"held-out accuracy, {way}, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=10)


def _draw_bars(axis: Any, names: Sequence[str], values: Sequence[float], title: str, form: str) -> None:
    bars = axis.barh(names, values, color=_COLOURS[: len(names)])
    axis.bar_label(bars, labels=[form.format(value) for value in values], padding=3, fontsize=9)
    axis.set_title(title, fontsize=11, loc="left")
    axis.margins(x=0.22)
    axis.invert_yaxis()
