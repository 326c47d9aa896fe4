"""The benchmark of pretrained models, on a tiny one with random weights: cases, resumption, table, data."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import obc
from benchmarks import bench_real, bench_real_costs, photographs, real_sources, real_table, real_tasks
from benchmarks.efficientnet_lite import DEVIATION, MEAN, EfficientNetLite0
from obc.integrations.transformers import TransformersStructure

SIZES = {"calibration": 6, "test": 3, "length": 12}
ARGUMENTS = ["--model", "tiny", "--draws", "0", "--shares", "0.25", "--threads", "1"]
ARGUMENTS += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def tiny() -> real_tasks.Task:
    return real_tasks.tiny(0, *SIZES.values())


def test_cases_are_measured_once_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "real.json"
    few = [*ARGUMENTS, "--out", str(out), "--methods", "magnitude+none", "magnitude+correct"]
    bench_real.main(few)
    first = json.loads(out.read_text())["cases"]
    assert [(case["selection"], case["compensation"]) for case in first] == [
        ("none", "none"),
        ("magnitude", "none"),
        ("magnitude", "correct"),
    ]
    task = tiny()
    with torch.no_grad():
        losses = [float(task.model(input_ids=batch, labels=batch).loss) for batch in task.test]
    assert first[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert first[0]["shown"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    capsys.readouterr()
    bench_real.main([*few, "wanda-sp+none", "tyr+obs", "llm-pruner+none", "--minutes", "100"])
    cases = json.loads(out.read_text())["cases"]
    assert cases[:3] == first
    assert len(cases) == 6
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("draw 0") for line in lines) == 3  # only what was new ran
    bench_real.main([*few, "minitron+none", "flap+mean", "--minutes", "0"])
    assert len(json.loads(out.read_text())["cases"]) == 7  # the minutes were over after one


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("selection", ["jacobian", "slimgpt"])
def test_a_criterion_that_scored_once_chooses_as_one_that_scores_anew(selection: str) -> None:
    task, chosen = tiny(), bench_real.SELECTIONS[selection]
    once = bench_real.replace(chosen, criterion=bench_real.Once(chosen.criterion))
    for share in (0.25, 0.4):
        plans = [bench_real.prune(task, one, share).plan for one in (chosen, once)]
        for name, kept in plans[0].items():
            for a, b in zip(
                (kept.out_channels, kept.in_channels),
                (plans[1][name].out_channels, plans[1][name].in_channels),
                strict=True,
            ):
                assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.slow
def test_in_steps_a_compensated_model_is_scored_and_pruned_again(tmp_path: Path) -> None:
    out = tmp_path / "real.json"
    bench_real.main([*ARGUMENTS, "--out", str(out), "--methods", "jacobian+none", "jacobian+steps"])
    losses = {case["compensation"]: case["losses"] for case in json.loads(out.read_text())["cases"] if case["share"]}
    task, steps = tiny(), []
    model = copy.deepcopy(task.model)
    obc.prune(
        model,
        batches=task.calibration,
        loss_fn=task.loss,
        blocks=0.75,
        criterion="jacobian",
        steps=4,
        compensate="correct",
        compensate_every_step=True,
        structure=TransformersStructure(model),
        forward_fn=task.forward,
        on_step=lambda result: steps.append(result.plan),
    )
    assert len(steps) == 4
    with torch.no_grad():
        expected = [float(model(input_ids=batch, labels=batch).loss) for batch in task.test]
    assert losses["steps"] == pytest.approx(expected, abs=1e-5)
    assert losses["steps"] != losses["none"]


def test_the_share_is_that_of_the_prunable_parameters() -> None:
    task = tiny()
    pruned = bench_real.prune(task, bench_real.SELECTIONS["magnitude"], 0.25).model
    total, kept = (
        sum(p.numel() for p in model.get_submodule("model.layers").parameters()) for model in (task.model, pruned)
    )
    assert kept <= 0.75 * total + 200 < kept + 600  # a unit is at most two heads; norms are not prunable


def test_grail_is_ridge_regression_of_the_input_on_its_kept_part() -> None:
    task = tiny()
    result = bench_real.prune(task, bench_real.SELECTIONS["magnitude"], 0.25)
    name = "model.layers.0.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = task.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in task.calibration:
            task.forward(task.model, batch)
    handle.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    kept = result.plan[name].in_channels
    gram = x.T @ x / len(x)
    part = gram[kept][:, kept]
    ridge = bench_real._GRAIL_RIDGE * part.diagonal().mean() * torch.eye(len(kept))
    mapped = gram[:, kept] @ torch.linalg.inv(part + ridge)
    bench_real.reconstruct(task, result.model, result.plan, "grail")
    expected = task.model.get_submodule(name).weight.double() @ mapped
    torch.testing.assert_close(result.model.get_submodule(name).weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_differences_are_paired_by_sample_over_all_draws() -> None:
    def case(selection: str, draw: int, losses: list[float]) -> dict[str, object]:
        facts = {"model": "m", "kinds": "all", "calibration": 1, "test": 3, "length": 2, "what": "loss", "share": 0.5}
        facts |= {"draw": draw, "selection": selection, "compensation": "correct" if selection != "none" else "none"}
        return facts | {"losses": losses, "shown": statistics.mean(losses)}

    cases = [case("none", draw, [0.0] * 3) for draw in (0, 1)]
    cases += [case("jacobian", 0, [1.0, 2.0, 3.0]), case("jacobian", 1, [2.0, 2.0, 2.0])]
    cases += [case("flap", 0, [1.5, 2.0, 4.0]), case("flap", 1, [2.0, 3.0, 2.5]), case("tyr", 1, [3.0, 2.0, 4.0])]
    ((title, head, rows),) = real_table.parts(cases)
    assert title == "m: loss; 1 batches to calibrate, 3 samples to test, 2 draws; unpruned 0"
    assert head == ["method", "50.0%"]
    differences = [0.5, 0.0, 1.0, 0.0, 1.0, 0.5]
    error = statistics.stdev(differences) / math.sqrt(6)
    assert rows[:2] == [["jacobian+correct", "2"], ["flap+correct", f"2.5 (+0.500 ± {error:.3f})"]]
    error = statistics.stdev([1.0, 0.0, 2.0]) / math.sqrt(3)
    assert rows[2] == ["tyr+correct", f"3 [1 draw] (+1.000 ± {error:.3f})"]
    ((_, _, rows),) = real_table.parts([case for case in cases if case["draw"] == 1 or case["selection"] == "none"])
    assert rows[0] == ["jacobian+correct", "2 [1 draw]"]


def test_what_is_unknown_or_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        bench_real.main(["--methods", "flap"])
    monkeypatch.setattr(real_sources, "_DOC", tmp_path)
    for document in real_sources.DOCUMENTS.values():
        with pytest.raises(FileNotFoundError, match="apt-get install "):
            document()


def test_sequences_are_disjoint_pieces() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    text = " ".join(map(str, range(103)))
    pieces = real_sources.sequences(tokenizer, text, 5, 10, seed=0)
    assert pieces.shape == (5, 10)
    assert len(set(pieces.flatten().tolist())) == 50
    assert all((piece - piece[0]).tolist() == list(range(10)) for piece in pieces)
    assert not torch.equal(pieces, real_sources.sequences(tokenizer, text, 5, 10, seed=1))
    with pytest.raises(ValueError, match="10 pieces of 10 tokens, asked for 11"):
        real_sources.sequences(tokenizer, text, 11, 10, seed=0)


def test_sentences_are_different_ones_of_fit_length() -> None:
    text = " ".join(f"{'word ' * 9}number {'x' * (n + 1)}." for n in range(6)) + " Too short. " + "long " * 40 + "."
    found = real_sources.sentences(text, 5, seed=0)
    assert len(set(found)) == 5
    assert all(len(sentence.split()) == 11 for sentence in found)
    with pytest.raises(ValueError, match="6 sentences of 8 to 30 words, asked for 7"):
        real_sources.sentences(text, 7, seed=0)


def test_efficientnet_lite0_has_the_published_size_and_pads_as_tensorflow_does() -> None:
    """4.65 million parameters, 407 million MACs at 224 x 224 (the model's page says 4.7 and 407)."""
    model = EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    macs = 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() // output.shape[1] * module.weight.numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert 380e6 < macs < 410e6
    conv = model._conv_stem
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        padded = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), conv.weight, stride=2)
        torch.testing.assert_close(conv(x), padded)


def test_development_images_and_the_rest_share_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source has a colour of its own, so that an image tells what it was made of."""
    image = pytest.importorskip("PIL.Image")
    stamps = [tmp_path / f"{place}.png" for place in range(7)]
    for place, stamp in enumerate(stamps):
        image.new("RGBA", (40, 40), (place, 100, 0, 255)).save(stamp)
    colours = {name: torch.full((3, 300, 300), 20 + place) for place, name in enumerate(photographs._BACKGROUNDS)}
    templates = [tmp_path / f"{place}.jpg" for place in range(5)]
    monkeypatch.setattr(photographs, "STAMPS", tmp_path)
    monkeypatch.setattr(photographs, "_background", colours.__getitem__)
    monkeypatch.setattr(photographs, "_calibration_sources", lambda: templates)
    monkeypatch.setattr(photographs, "_opened", lambda path: torch.full((3, 300, 300), 200 + int(path.stem)))

    def seen(part: photographs.Part) -> tuple[set[int], set[int]]:
        """The numbers of the cut-outs, and of the photographs that were cropped."""
        images = torch.cat(photographs.calibration_batches(4, 12, seed=0, crops=True, part=part))
        red = (images[:, 0] * DEVIATION + MEAN).round().int()
        pasted = {int(value) for image in red[::2] for value in image.unique() if value < 7}
        return pasted, {int(image[0, 0]) for image in red[1::2]}

    cut_outs, cropped = zip(*map(seen, ("all", "rest", "development")), strict=True)
    assert cut_outs == ({*range(7)}, {1, 2, 4, 5}, {0, 3, 6})
    assert cropped[0] == {*range(20, 32), *range(200, 205)}
    assert cropped[2] == {20, 23, 26, 29, 200, 203}
    assert cropped[1] == cropped[0] - cropped[2]


def test_costs_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.json"
    bench_real_costs.main(
        ["--model", "tiny", "--calibration", "6", "--length", "12", "--threads", "1", "--out", str(out)]
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert row["mode"] == "correct"
    assert row["forward_passes"] > 1  # both models run over the data
    assert row["stream_mib"] == pytest.approx(2 * 6 * 12 * 32 * 4 / 2**20)
    assert "forward passes of" in capsys.readouterr().out
