"""obc.Scores: the mapping, its files and their faults, coverage, the table and the plot."""

from __future__ import annotations

import functools
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import nasty
import pytest
import torch
from parity import assert_equal
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import obc


@functools.cache
def cnn_scores(rows: str = "batch") -> obc.Scores:
    case = models.residual_cnn()
    return obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)


@functools.cache
def partly_unscored() -> obc.Scores:
    """One layer unused, one skipped."""
    case = nasty.branches(True, True)
    return obc.score(case.model, case.batches, case.loss, modules=lambda name, module: name != "late")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    cnn_scores().save(path)
    return path


# --- the mapping ---------------------------------------------------------------------------------------------------


def test_modules_stand_in_the_model_s_order() -> None:
    case = models.residual_cnn()
    scored = [name for name, module in case.model.named_modules() if name in cnn_scores()]
    assert list(cnn_scores()) == scored
    assert len(cnn_scores()) == len(scored) == 8


def test_channels_of_every_kind_of_module() -> None:
    scores = cnn_scores()
    shapes = {
        name: tuple(
            None if side is None else tuple(side.shape) for side in (channels.out_channels, channels.in_channels)
        )
        for name, channels in scores.items()
    }
    assert shapes["stem"] == ((8,), (3,))
    assert shapes["conv1"] == ((16,), (8,))
    assert shapes["norm1"] == ((16,), None)
    assert shapes["head"] == ((5,), (16,))
    for channels in scores.values():
        for side in (channels.out_channels, channels.in_channels):
            assert side is None or (side.dtype == torch.float32 and not side.requires_grad and bool((side >= 0).all()))


def test_scores_do_not_change_with_later_rows() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for batch in case.batches:
            with scorer.row():
                case.loss(case.model, batch).backward()
            if batch is case.batches[0]:
                first = scorer.scores()
                kept = first["conv1"].out_channels.clone()
    assert first.num_rows == 1
    assert torch.equal(first["conv1"].out_channels, kept)
    assert not torch.equal(scorer.scores()["conv1"].out_channels, kept)


def test_a_missing_module_says_why() -> None:
    with pytest.raises(KeyError, match=r"'unused'.*unscored.*no gradient"):
        partly_unscored()["unused"]
    with pytest.raises(KeyError, match=r"'nonsense'.*no such module"):
        partly_unscored()["nonsense"]
    assert "unused" not in partly_unscored()
    assert partly_unscored().get("unused") is None


def test_coverage_says_how_each_module_was_read() -> None:
    coverage = partly_unscored().coverage
    assert str(coverage["fc"]).startswith("gate")
    assert str(coverage["late_norm"]).startswith("norm gradient")
    assert str(coverage["unused"]).startswith("unscored: ")
    assert (coverage["unused"].scored, coverage["unused"].reason) == (False, "no gradient reached it in any row")
    assert "late" not in coverage  # not asked for, so nothing to report


def test_scores_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(cnn_scores()))
    assert_equal(copy, cnn_scores())
    assert copy.num_rows == cnn_scores().num_rows


# --- the table -----------------------------------------------------------------------------------------------------


def test_repr_is_a_table() -> None:
    lines = repr(cnn_scores()).splitlines()
    assert "ResidualCNN" in lines[0]
    assert "8 modules" in lines[0]
    assert "3 rows" in lines[0]
    body = {line.split()[0]: line for line in lines[2:]}
    assert list(body) == list(cnn_scores())
    largest = cnn_scores()["conv1"].out_channels.max()
    assert f"{largest:.2e}" in body["conv1"]
    assert body["conv1"].split()[1:3] == ["16", "8"]
    assert body["conv1"].endswith("gate, out channels from the gradient of the norm behind it")
    columns = {line.rindex(line.split("  ")[-1].strip()) for line in lines[1:2]} | {
        line.index(how) for line, how in ((body["stem"], "gate"), (body["norm"], "norm gradient"))
    }
    assert len(columns) == 1, "the last column is not aligned"


def test_repr_names_what_is_unscored() -> None:
    text = repr(partly_unscored())
    assert "1 unscored" in text.splitlines()[0]
    (line,) = [line for line in text.splitlines() if line.startswith("unused")]
    assert "unscored: no gradient" in line


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cnn_scores, lambda: cnn_scores("sample"), partly_unscored])
def test_a_saved_file_gives_the_same_scores(make: Callable[[], obc.Scores], tmp_path: Path) -> None:
    scores, path = make(), tmp_path / "scores.safetensors"
    scores.save(path)
    loaded = obc.Scores.load(path)
    assert_equal(loaded, scores)
    assert loaded.num_rows == scores.num_rows
    assert dict(loaded.coverage) == dict(scores.coverage)
    assert all(how.fields() == scores.coverage[name].fields() for name, how in loaded.coverage.items())
    assert loaded.metadata == scores.metadata
    assert repr(loaded) == repr(scores)


@pytest.mark.parametrize("form", ["obc.Scores/1", "obc.Scores/2"])
def test_files_of_earlier_formats_are_read(form: str, file: Path) -> None:
    """Their coverage is text alone."""
    tensors, header = header_of(file)
    assert header["format"] == "obc.Scores/3"
    text = {name: str(how) for name, how in cnn_scores().coverage.items()}
    save_file(tensors, str(file), metadata=header | {"format": form, "coverage": json.dumps(text)})
    loaded = obc.Scores.load(file)
    assert_equal(loaded, cnn_scores())
    assert {name: how.fields() for name, how in loaded.coverage.items()} == {
        name: how.fields() for name, how in cnn_scores().coverage.items()
    }


def test_paths_may_be_strings(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.safetensors")
    cnn_scores().save(path)
    assert_equal(obc.Scores.load(path), cnn_scores())


def test_a_file_says_what_it_is_of(file: Path) -> None:
    """safetensors with metadata: readable without obc, and without unpickling anything."""
    with safe_open(str(file), framework="pt") as opened:
        header = opened.metadata()
    text = json.dumps(header)
    for fact in ("ResidualCNN", "batch", "3"):
        assert fact in text
    assert header["num_rows"] == "3"
    assert json.loads(header["metadata"])["obc"]
    assert set(load_file(file)) == {
        f"{name}:{side}"
        for name, channels in cnn_scores().items()
        for side in ("out_channels", "in_channels")
        if getattr(channels, side) is not None
    }


def test_a_file_of_this_model_is_accepted(file: Path) -> None:
    assert_equal(obc.Scores.load(file, model=models.residual_cnn().model), cnn_scores())


def narrower_inside() -> nn.Module:
    """conv1 has as many out channels as before, but fewer in channels."""
    model = models.ResidualCNN()
    model.conv1 = nn.Conv2d(6, 16, 3)
    return model


def headless() -> nn.Module:
    model = models.ResidualCNN()
    model.head = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: models.ResidualCNN(width=6), "stem.*6.*8"),
        (narrower_inside, "conv1.*6.*8"),
        (headless, "head"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "stem"),
    ],
    ids=["other-widths", "other-in-channels", "layer-gone", "other-model"],
)
def test_a_file_of_another_model_is_refused(other: Callable[[], nn.Module], named: str, file: Path) -> None:
    with pytest.raises(ValueError, match=f"another model.*{named}"):
        obc.Scores.load(file, model=other())


def test_folded_groups_are_of_their_model(tmp_path: Path) -> None:
    case = models.convolutions(2)
    for fold_groups in (False, True):
        path = tmp_path / f"{fold_groups}.safetensors"
        obc.score(case.model, case.batches, case.loss, fold_groups=fold_groups).save(path)
        assert obc.Scores.load(path, model=case.model).num_rows == 3


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        obc.Scores.load(tmp_path / "absent.safetensors")


def test_a_folder_is_no_score_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; pass the path of a score file in it"):
        obc.Scores.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.99])
def test_a_truncated_file(kept: float, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"scores\.safetensors is not a score file, or is damaged"):
        obc.Scores.load(file)


def write_text(path: Path) -> None:
    path.write_text("not a score file at all, but long enough to have a header")


def write_torch(path: Path) -> None:
    torch.save({"conv1": torch.ones(3)}, path)


def write_weights(path: Path) -> None:
    save_file({"conv1.weight": torch.ones(3)}, str(path))


def write_other_format(path: Path) -> None:
    save_file({"conv1:out_channels": torch.ones(3)}, str(path), metadata={"format": "pt"})


@pytest.mark.parametrize("write", [write_text, write_torch, write_weights, write_other_format])
def test_a_foreign_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    write(path)
    with pytest.raises(ValueError, match=r"foreign\.safetensors is not a score file"):
        obc.Scores.load(path)


def header_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as opened:
        return load_file(path), dict(opened.metadata())


def without_rows(tensors: dict[str, Any], header: dict[str, str]) -> None:
    del header["num_rows"]


def rows_not_a_number(tensors: dict[str, Any], header: dict[str, str]) -> None:
    header["num_rows"] = "three"


def broken_coverage(tensors: dict[str, Any], header: dict[str, str]) -> None:
    header["coverage"] = "{"


def coverage_of_other_fields(tensors: dict[str, Any], header: dict[str, str]) -> None:
    header["coverage"] = json.dumps({"conv1": {"how": "gate", "why": "not"}})


def without_a_tensor(tensors: dict[str, Any], header: dict[str, str]) -> None:
    del tensors["conv1:out_channels"]


@pytest.mark.parametrize(
    "damage", [without_rows, rows_not_a_number, broken_coverage, coverage_of_other_fields, without_a_tensor]
)
def test_a_damaged_file(damage: Callable[[dict[str, Any], dict[str, str]], None], file: Path) -> None:
    tensors, header = header_of(file)
    damage(tensors, header)
    save_file(tensors, str(file), metadata=header)
    with pytest.raises(ValueError, match=r"scores\.safetensors is a damaged score file"):
        obc.Scores.load(file)


# --- the plot ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("make", [cnn_scores, partly_unscored])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_a_picture_of_every_module(make: Callable[[], obc.Scores], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores.{suffix}"
    make().plot(path)
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        drawn = path.read_text()
        assert all(f"<!-- {name} (" in drawn for name in make())


@pytest.mark.slow
def test_plot_shows_sorted_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    plot = Axes.plot

    def record(self: Axes, values: Any, *args: Any, **options: Any) -> Any:
        drawn.append(torch.as_tensor(values))
        return plot(self, values, *args, **options)

    monkeypatch.setattr(Axes, "plot", record)
    cnn_scores().plot(tmp_path / "scores.png")
    assert len(drawn) == len(cnn_scores())
    for values, channels in zip(drawn, cnn_scores().values(), strict=True):
        assert torch.equal(values, channels.out_channels.sort(descending=True).values.clamp_min(values.min()))


@pytest.mark.slow
def test_plot_leaves_matplotlib_alone(tmp_path: Path) -> None:
    """No backend is chosen and no figure stays open in pyplot."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    cnn_scores().plot(tmp_path / "scores.png")
    assert matplotlib.get_backend() == before
    assert plt.get_fignums() == []


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Scores\.plot needs matplotlib: pip install matplotlib"):
        cnn_scores().plot(tmp_path / "scores.png")
