"""The tables of README.md and docs/ that show a part of a result file, or a mean over its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import depth_table, real_table
from benchmarks.markdown import TableError, markdown, read, source

_MODELS = ("VGG-19", "ResNet-56", "Llama 16 M", "ViT 2.7 M")
_OPERATORS = {
    "weight_dot 4096x4096": "`weight_dot` 4096 x 4096",
    "weight_dot 512x512x3x3": "`weight_dot` 512 x 512 x 3 x 3",
    "channel_dot 64x64x32x32": "`channel_dot` (64, 64, 32, 32)",
    "channel_dot 64x512x4x4": "`channel_dot` (64, 512, 4, 4)",
    "channel_dot tokens 8x512x2048": "`channel_dot` tokens (8, 512, 2048)",
}
_JOINT, _INDEPENDENT = "JC joint, per MACs", "JC independent (paper)"


def _case(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for case in content["cases"]:
        if case["name"] == name:
            return case
    raise TableError(f"the results have no case {name!r}; run its benchmark with --out and --only {name!r}")


def _scoring_rows(results: Path) -> str:
    """Time of a steady row against forward and backward with weight gradients."""
    content = read(results, "bench_scoring_rows")
    cases = [_case(content, f"{model}, a steady row") for model in _MODELS]
    providers = {
        "forward + backward": "forward + backward with weight gradients",
        "floor": "floor: frozen weights, nothing read",
        "obc batch rows": "obc, batch rows",
        "obc sample rows": "obc, sample rows",
    }
    lines = [
        [label, *(f"{case['providers'][name]['against_baseline']['paired_median']:.2f}" for case in cases)]
        for name, label in providers.items()
    ]
    return markdown(["time of a row", *_MODELS], lines) + source(cases[0].get("provenance", content["provenance"]))


def _operators(results: Path) -> str:
    """Time against two plain reads (median of paired rounds) and against torch.compile (ratio of medians)."""
    content = read(results, "bench_ops")
    lines = []
    for name, label in _OPERATORS.items():
        case = _case(content, name)
        reads = next(target for target in case["targets"] if target["against"] == "two plain reads")
        times = {provider: row["median_ms"] for provider, row in case["providers"].items()}
        compiled = times["obc"] / times["torch.compile"]
        lines.append([label, f"{reads['paired_median']:.2f}", f"{compiled:.2f}"])
    return markdown(["", "time / two plain reads", "time / `torch.compile`"], lines) + source(content["provenance"])


def _criteria(results: Path) -> str:
    """Time of a criterion against a pass with weight gradients, and memory above the model: models across."""
    content = read(results, "bench_criteria")
    cases = content["cases"]
    lines = []
    for way in dict.fromkeys(name for case in cases for name in case["providers"]):
        cells = []
        for case in cases:
            row = case["providers"].get(way)
            if row is None:
                cells.append("-")
                continue
            memory = f", {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
            cells.append(f"{row['against_baseline']['paired_median']:.2f}{memory}")
        lines.append([way, *cells])
    return markdown([f"time / {cases[0]['baseline']}, memory", *(case["name"] for case in cases)], lines) + source(
        content["provenance"]
    )


# --- accuracies ----------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}"


def _compensation(results: Path) -> str:
    """Test accuracy in percent, mean over seeds: networks down, ways across."""
    content = read(results, "bench_compensation")
    names = list(dict.fromkeys(row["network"] for row in content["rows"]))
    ways = list(content["rows"][0]["accuracy"])
    lines = [
        [way, *(_spread([row["accuracy"][way] for row in content["rows"] if row["network"] == name]) for name in names)]
        for way in ways
    ]
    return markdown(["test accuracy, %", *names], lines) + source(content["provenance"])


def _compensation_costs(results: Path) -> str:
    """Seconds of compensation in epochs of forward passes of the unpruned network, and memory."""
    content = read(results, "bench_compensation")
    costs = {row["network"]: row["cost"] for row in content["rows"] if "cost" in row}
    ways = [key.removesuffix("_seconds") for key in next(iter(costs.values())) if key.endswith("_seconds")]
    lines = []
    for way in ways:
        cells = []
        for cost in costs.values():
            seconds, peak = cost[f"{way}_seconds"], cost[f"{way}_peak_bytes"] / 2**20
            cells.append(f"{seconds:.2f} s, {seconds / cost['epoch_seconds']:.1f} epochs, {peak:.1f} MiB")
        mode, _, samples = way.partition("_")
        lines.append(["an epoch of forward passes" if mode == "epoch" else f"{mode}, {samples} images", *cells])
    return markdown(["", *costs], lines) + source(content["provenance"])


def _factors(results: Path) -> str:
    """Test accuracy in percent after fine-tuning, mean over seeds."""
    content = read(results, "bench_factors")
    names, ways = (list(dict.fromkeys(row[key] for row in content["rows"])) for key in ("network", "way"))
    tests = {
        (name, way): [row["test"] for row in content["rows"] if (row["network"], row["way"]) == (name, way)]
        for name in names
        for way in ways
    }
    lines = [[way, *(_spread(tests[name, way]) for name in names)] for way in ways]
    return markdown(["test accuracy, %", *names], lines) + source(content["provenance"])


def _encoder(results: Path) -> str:
    """Cosine similarity of sentence embeddings, mean over seeds: criteria down, shares and states across."""
    content = read(results, "bench_compensation_encoder")
    rows = content["rows"]
    kinds = sorted({(row["sentences"], row["criterion"]) for row in rows})
    states = [state for state in ("naive", "ls", "seq", "correct") if any(state in row for row in rows)]
    columns = [(share, state) for share in (0.25, 0.5) for state in states]
    parts = []
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        lines = []
        for kind in kinds:
            kind_rows = [row for row in rows if (row["corpus"], row["sentences"], row["criterion"]) == (corpus, *kind)]
            if kind_rows:
                found = ([row.get(state) for row in kind_rows if row["share"] == share] for share, state in columns)
                facts = f"{kind[1]}, {kind[0]} sentences, n = {len({row['seed'] for row in kind_rows})}"
                lines.append([facts, *(_spread(values, 3) for values in found)])
        parts.append(markdown([corpus, *(f"{share:.0%} {state}" for share, state in columns)], lines))
    return "\n\n".join(parts) + source(rows[-1].get("provenance", content["provenance"]))


def _recovery(results: Path) -> str:
    """Test figures of recovered models, mean over seeds: a table for each model that was measured, ways down."""
    parts = []
    measured = [("encoder", "cosine similarity to the unpruned model"), ("smollm2", "perplexity")]
    if not (results / "bench_recovery_smollm2.json").exists():
        del measured[1]
    for model, shown in measured:
        found = read(results, f"bench_recovery_{model}")["rows"]
        seeds = max(row["seed"] for row in found) + 1
        lines = []
        for way in dict.fromkeys(row["way"] for row in found):
            cases = [row for row in found if row["way"] == way]
            rate = next((row["rate"] for row in cases if row["seed"] == seeds - 1), None)
            chosen = [row for row in cases if row["rate"] == rate]
            trained = f"{chosen[0]['trained_parameters'] / 1e6:.2f} M" if "trained_parameters" in chosen[0] else "-"
            step = f"{statistics.median(row['seconds'] for row in chosen) / chosen[0]['steps']:.2f}" if rate else "-"
            test = _spread([row["test"] for row in chosen], 4 if model == "encoder" else 2)
            lines.append([way, "-" if rate is None else f"{rate:.0e}", trained, step, test])
        first = found[0]
        head = [f"{model}, {first['steps']} steps", "rate", "trained", "s a step", f"{shown}, n = {seeds}"]
        parts.append(markdown(head, lines) + source(first["provenance"]))
    return "\n\n".join(parts)


# --- selection -----------------------------------------------------------------------------------------------------


def _select(results: Path) -> str:
    """Seconds and memory of one ``obc.select`` by channels and rows."""
    content = read(results, "bench_select")
    lines = [
        [
            f"{run['channels']:,} channels, {run['rows']:,} rows",
            run["form"],
            f"{run['removed']:,}",
            f"{run['seconds']:.2f}",
            f"{run['memory_mib']:.0f}",
            f"{run['rows_mib']:.0f}",
        ]
        for run in content["runs"]
    ]
    head = ["", "form", "removed", "seconds", "MiB", "MiB of the rows"]
    return markdown(head, lines) + source(content["provenance"])


def _joint_selection(results: Path) -> str:
    """Joint selection minus the paper's, in points of accuracy without fine-tuning: the mean over ratios by network."""
    content = read(results, "bench_selection")
    cases = {case["key"]: case.get("ratios", {}) for case in content["cases"]}
    states = {"raw": "as pruned", "bn": "BatchNorm recalibrated", "seq": "compensated"}
    lines = []
    for label, kinds in (("convolutional networks", ("resnet", "vgg")), ("ViTs", ("vit",))):
        differences: dict[str, list[float]] = {state: [] for state in states}
        for key, ratios in cases.items():
            stage, _, rest = key.partition("/")
            if stage != "prune" or rest.split("/")[1] not in kinds or not rest.endswith(f"/{_JOINT}"):
                continue
            other = cases[key.removesuffix(_JOINT) + _INDEPENDENT]
            for state, found in differences.items():
                gains = (ratios[ratio][state] - other[ratio][state] for ratio in ratios)
                found.append(statistics.mean(100 * gain for gain in gains))
        recalibrated = label != "ViTs"  # these have no BatchNorm
        cells = [_spread(found) if state != "bn" or recalibrated else "-" for state, found in differences.items()]
        lines.append([f"{len(differences['raw'])} small {label}", *cells])
    return markdown(["points of accuracy gained", *states.values()], lines) + source(content["provenance"][0])


# --- equivalent pruning ---------------------------------------------------------------------------------------------


def _equivalent(results: Path) -> str:
    """One training step against the naively pruned network's."""
    content = read(results, "bench_equivalent")
    ways = {"folded": "folded", "reduced": "reduced factors", "explicit": "explicit 1x1 layers"}
    lines = [
        [case["name"], *(f"{case['providers'][way]['against_baseline']['paired_median']:.2f}" for way in ways)]
        for case in content["cases"]
    ]
    return markdown(["time of a step / naive", *ways.values()], lines) + source(content["provenance"])


# --- large models --------------------------------------------------------------------------------------------------


def _large(results: Path) -> str:
    """Memory above the weights and seconds of a row: sizes down, ways across."""
    content = read(results, "bench_large")
    sizes, ways = (list(dict.fromkeys(row[key] for row in content["cases"])) for key in ("size", "way"))
    lines = []
    for size in sizes:
        size_rows = {row["way"]: row for row in content["cases"] if row["size"] == size}
        cells = []
        for way in ways:
            row = size_rows.get(way, {})
            said = (
                f"{row['peak_mib']:.0f}, {row['seconds_per_row']:.2f}" if "peak_mib" in row else row.get("failed", "-")
            )
            cells.append(said)
        weights = next(iter(size_rows.values()))["weights_mib"]
        lines.append([f"{size}, {weights:.0f} MiB of weights", *cells])
    return markdown(["MiB above the weights, s per row", *ways], lines) + source(content["provenance"])


# --- pretrained models ---------------------------------------------------------------------------------------------


def _real(results: Path) -> str:
    """The quality of pruned pretrained models: methods in rows, shares in columns, with paired differences to ours."""
    content = read(results, "bench_real")
    return "\n\n".join(
        f"**{title}**\n\n{markdown(head, rows)}" for title, head, rows in real_table.parts(content["cases"])
    ) + source(content["provenance"])


def _depth(results: Path) -> str:
    """Blocks, branches and widths of a language model, without training."""
    content = read(results, "bench_depth")
    return "\n".join(depth_table.table(content["cases"])) + source(content["provenance"])


SUMMARIES: dict[str, Callable[[Path], str]] = {
    "scoring-rows": _scoring_rows,
    "operators": _operators,
    "criteria": _criteria,
    "compensation": _compensation,
    "compensation-costs": _compensation_costs,
    "factors": _factors,
    "encoder": _encoder,
    "recovery": _recovery,
    "select": _select,
    "joint-selection": _joint_selection,
    "equivalent": _equivalent,
    "large": _large,
    "real": _real,
    "depth": _depth,
}
