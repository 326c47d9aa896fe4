"""The page docs/library_models.md: what was found of networks of other libraries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sweep_networks import Seen

HEADER = """# Networks of other libraries

`make sweep-libraries` installs these libraries into a folder of its own, builds their networks in small with random
weights and BatchNorm statistics in float64, makes parametrised layers plain (`obc.plain_layers`), and finds their
groups. It removes a random half of the units of each group and compares the sliced network with the network in which
hooks mask these units: on the example inputs, on others of another batch size, and in train mode. The sliced network is
saved and loaded, some scores are compared with explicit autograd, and `obc.prune(model, inputs, batches, loss,
macs=0.5)` prunes another copy.

- groups: how many are exact; "(n compared)" where hooks can't mask all of them: norms over channels see other
  statistics, attention and recurrent layers hide their channels. Those are compared by obc's own proof only.
- error: the largest relative difference.
- half: the share of MACs that remains if every group loses half of its units.
- pruned: the share that `obc.prune` left.
- left out because: how many groups and layers keep their width, with the most frequent reasons; where nothing is
  pruned to a half, what `obc.prune` said, or that the sweep's limit of CPU time ended it.

A network of a list that has no line here was not swept with this version.
"""
_REASONS = 3


def summary(rows: Sequence[Seen]) -> str:
    """One sentence of counts."""
    built = [row for row in rows if not row.built]
    wrong = sum(bool(row.wrong) for row in built)
    pruned = sum(row.pruned is not None and not row.wrong for row in built)
    refused = sum(row.pruned is None and not row.wrong for row in built)
    return (
        f"{len(rows)} networks: {len(built)} built, of which {pruned} are pruned to half of their MACs, {refused} are "
        f"refused with a reason or not done in time; {wrong} wrong, {len(rows) - len(built)} not built."
    )


def page(rows: Iterable[Seen], versions: Mapping[str, str], before: str = "") -> str:
    """The rows as Markdown, a section a library; sections of other libraries are taken from the page ``before``."""
    sections = {part.split()[0]: part.rstrip() for part in before.split("\n## ")[1:]}
    for library, version in versions.items():
        ours = sorted((row for row in rows if row.library == library), key=lambda row: row.name)
        lines = [f"{library} {version}", "", summary(ours), ""]
        lines += ["| network | groups | error | half | pruned | left out because |"]
        lines += ["| --- | --- | ---: | ---: | ---: | --- |"]
        sections[library] = "\n".join([*lines, *map(_row, ours)])
    return "\n## ".join([HEADER, *(f"{sections[library]}\n" for library in sorted(sections))])


def _row(row: Seen) -> str:
    groups = f"{row.groups}" + (f" ({row.compared} compared)" if row.compared < row.groups else "")
    figures = [
        "" if one is None else form.format(one)
        for one, form in ((row.error, "{:.0e}"), (row.half, "{:.2f}"), (row.pruned, "{:.2f}"))
    ]
    cells = [row.name, groups, *figures, reasons(row)]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def reasons(row: Seen) -> str:
    """What is wrong, or not built, or refused, and the most frequent reasons why something is left out."""
    if row.built or row.wrong:
        return f"WRONG: {row.wrong}" if row.wrong else f"not built: {row.built}"
    alike: Counter[str] = Counter()
    for reason, count in row.left_out.items():
        alike[general(reason)] += count
    said = [f"{count}: {reason}" for reason, count in alike.most_common(_REASONS)]
    rest = sum(alike.values()) - sum(count for _, count in alike.most_common(_REASONS))
    return "; ".join([*([row.refused] if row.refused else []), *said, *([f"{rest} more"] if rest else [])])


def general(reason: str) -> str:
    """A reason without names of layers and numbers, so that layers share it; of a long one the beginning."""
    reason = re.sub(r"'?\b(?!obc\.|torch\.)[A-Za-z_]\w*(?:\.\w+)+'?", "a layer", reason)
    reason = re.sub(r"a layer(?:(?:, | and )a layer)+", "layers", reason)
    reason = " ".join(re.sub(r"\d[\d.e+-]*", "N", reason).split())  # einops writes several lines
    return reason if len(reason) <= 160 else f"{reason[:157]}..."


def write_page(path: Path, rows: Sequence[Seen], versions: Mapping[str, str]) -> None:
    """Write the page; its sections of other libraries stay."""
    path.write_text(page(rows, versions, path.read_text() if path.is_file() else ""))
