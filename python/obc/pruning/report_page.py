"""The report of a pruning as a page, and as a fragment for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obc.page.charts import bar, change, curves, figure
from obc.page.document import Section, document, fragment
from obc.page.markup import Html, element, facts, reasons, safe, table

Report = Mapping[str, Any]  # as PruningReport.as_dict returns it


def pruning_page(report: Report, further: Sequence[Section] = ()) -> str:
    """The whole page; ``further`` sections, such as those of a score file, come before the last one."""
    sections = [
        Section("budgets", "Budgets", _budgets(report)),
        Section("widths", "Widths", _widths(report)),
        Section("scores", "Scores of groups", _scores(report)),
        Section("left-out", "What was left out", _left_out(report)),
        Section("proof", "What was proved", _proof(report)),
        Section("compensation", "Compensation", _compensation(report)),
        Section("steps", "Steps and time", _steps(report)),
        Section("warnings", "Warnings", _warnings(report)),
        *further,
        Section(
            "provenance",
            "Provenance",
            facts(report["provenance"]) if report["provenance"] else element("p", "The report does not say."),
        ),
    ]
    return document(f"Pruning of {report['provenance'].get('model', 'a model')}", sections, _verdict(report))


def pruning_fragment(report: Report) -> str:
    """Budgets, widths and the verdict, for a notebook."""
    warnings = [element("p", "Warning: ", warning) for warning in report["warnings"]]
    return fragment(_costs(report), _widths(report), _verdict(report), *warnings)


def _verdict(report: Report) -> Html:
    if report["error"] is None or report["tolerance"] is None:
        return element("p", "Not compared with the masked unpruned model.", class_="verdict poor")
    said = f"Equals the masked unpruned model up to {report['error']:.1e}; rounding explains {report['tolerance']:.1e}."
    return element("p", said, class_="verdict good")


_COUNTED = ("MACs", "parameters")
_NAMES = {"blocks": "prunable parameters", "active_params": "active parameters"}


def _costs(report: Report) -> Html:
    changes = {name: (report[f"{name.lower()}_before"], report[f"{name.lower()}_after"], "") for name in _COUNTED}
    changes |= {
        _NAMES.get(name, name): (known["before"], known["after"], known["counted"])
        for name, known in report["known"].items()
    }
    rows = [[name, *change(before, after), counted] for name, (before, after, counted) in changes.items()]
    return table(["", "", "before → after", "remain", "counted"], rows, label="every budget before and after")


def _budgets(report: Report) -> Html:
    parts = [_costs(report)]
    if report["macs_measured"] is not None:
        parts.append(
            element("p", f"MACs counted on the first batch, all matrix products: {report['macs_measured']:.1%} remain.")
        )
    if (speed := report["speed"]) is not None:
        said = f"measured speed-up: {speed['before'] / speed['after']:.2f}"
        parts.append(element("p", f"{said} ({speed['before']:.4g} → {speed['after']:.4g} {speed['counted']})"))
    return safe(*parts)


def _steps(report: Report) -> Html:
    parts = []
    steps = [
        [
            index,
            f"{step['target']:.3f}",
            f"{step['macs']:.3f}",
            f"{step['parameters']:.3f}",
            f"{step['remaining']:.3f}",
            sum(step["removed"].values()),
        ]
        for index, step in enumerate(report["steps"], 1)
    ]
    if steps:
        head = ["step", f"target, of {report['budget']}", "MACs", "parameters", "budget", "units removed"]
        parts += [table(head, steps, label="the share that remained after every step")]
    if report["seconds"]:
        spent = [[name, f"{seconds:.2f}"] for name, seconds in report["seconds"].items()]
        parts += [element("h3", "Time"), table(["part", "seconds"], spent, label="seconds by part")]
    return safe(*parts) if parts else element("p", "The report has no steps.")


def _widths(report: Report) -> Html:
    widths = report["widths"]
    if not widths:
        return element("p", "No group was pruned.")
    longest = max(before for before, _ in widths.values())
    rows = [[element("code", name), *change(before, after, longest)] for name, (before, after) in widths.items()]
    return table(["group", "", "units", "remain"], rows, label="units of every group before and after")


def _scores(report: Report) -> Html:
    if not report["scores"]:
        return element("p", "The report has no scores.")
    pictures = []
    for name, values in report["scores"].items():
        before, after = report["widths"].get(name, (0, 0))
        gone = (before - after) / before if before else None
        picture, bounds = curves({"in": values}, mark=gone)
        count = f"{before - after} of {before} removed; " if before else ""
        pictures.append(figure(picture, element("code", name), element("br"), f"{count}{bounds}"))
    said = (
        "Scores of every group's units before anything was removed, smallest first; logarithmic. The dashed line "
        "marks the share of units that all steps removed. Each step scores again, and joint selection chooses sets, so "
        "the removed units are not always those left of the line."
    )
    return safe(element("p", said), element("div", *pictures, class_="layers"))


def _left_out(report: Report) -> Html:
    return safe(
        element("h3", "Not pruned"),
        reasons(report["left_out"], "Every group that was found could be pruned."),
        element("h3", "Not scored"),
        reasons(report["unscored"], "Every layer that was asked for was scored."),
    )


def _proof(report: Report) -> Html:
    parts = [_verdict(report)]
    proof = report["proof"]
    if proof is not None:
        parts.append(
            facts(
                {
                    "groups tried and right": len(proof["proved"]),
                    "largest error of a group": f"{proof['error']:.1e} (rounding explains {proof['tolerance']:.1e})",
                    "groups wrong, left out": len(proof["left_out"]),
                    "forward passes": proof["passes"],
                    "seconds": f"{proof['seconds']:.2f}",
                }
            )
        )
    return safe(*parts, element("h3", "Not proved"), reasons(report["unproved"], "Nothing is without a proof."))


def _compensation(report: Report) -> Html:
    means, found = report["means"], report["compensation"]
    if means is not None:
        return safe(
            element("p", f"{len(means['absorbed'])} biases took over means; {len(means['created'])} of them are new."),
            reasons(means["left"], "Every consumer could."),
        )
    if found is None:
        return element("p", "The model was not compensated.")
    parts = [
        facts(
            {
                "held-out error before": f"{found['naive_error']:.4f}",
                "after": f"{found['final_error']:.4f}",
                "BatchNorm statistics": "estimated anew" if found["norms_recalibrated"] else "as they were",
            }
        )
    ]
    rows, marked = [], {}
    for index, (name, layer) in enumerate(found["layers"].items()):
        stream = "error_before" in layer
        before, after = (layer[key] for key in (("error_before", "error_after") if stream else _INPUT_ERRORS))
        rows.append(
            [
                element("code", name),
                bar(after / before if before else 0.0),
                f"{before:.4f} → {after:.4f}",
                ("stream" if layer["on_stream"] else "output") if stream else "input",
                f"{layer['ridge']:g}",
                "yes" if layer["applied"] else "left naive",
            ]
        )
        if not layer["applied"]:
            marked[index] = "bad"
    head = ["layer", "", "relative squared error", "of its", "ridge", "applied"]
    parts.append(table(head, rows, label="compensation of every layer", words=True, marked=marked))
    return safe(*parts, *(element("p", note) for note in found["notes"]))


_INPUT_ERRORS = ("input_error_before", "input_error_after")


def _warnings(report: Report) -> Html:
    if not report["warnings"]:
        return element("p", "None.")
    return element("ul", *(element("li", warning) for warning in report["warnings"]))
