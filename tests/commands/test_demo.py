"""The demo: its splits, networks, protocol and report."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install scikit-learn")
pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")

from benchmarks.small_vgg import VGG
from obc import cli
from obc.demo import criteria, finetune, models, recover, report, run
from obc.demo.criteria import CRITERIA, ROWS, batch_size
from obc.demo.data import TEST_IMAGES, VALIDATION_IMAGES, digits
from obc.demo.train import accuracy, train

SMALL = (
    run.Recipe("small CNN", lambda: models.ResidualCNN((8, 12), 1), epochs=2),
    run.Recipe("small transformer", lambda: models.Transformer(16, 2, 64, 2), epochs=2),
)


def test_splits_are_the_digits_once_and_follow_the_seed() -> None:
    data, again, other = digits(0), digits(0), digits(1)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1797 - VALIDATION_IMAGES - TEST_IMAGES, VALIDATION_IMAGES, TEST_IMAGES]
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.images, other.test.images)
    together = torch.cat([split.images.flatten(1) for split in splits])
    from_other = torch.cat([split.images.flatten(1) for split in (other.train, other.validation, other.test)])
    assert torch.equal(together.sort(0).values, from_other.sort(0).values)  # the same images, whatever the seed
    assert together.min() == -1
    assert together.max() == 1


def test_batches_hold_every_image_once() -> None:
    split = digits(0).validation
    order = torch.cat([labels for _, labels in split.batches(64)])
    assert torch.equal(order, split.labels)
    shuffled = list(split.batches(64, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in shuffled] == [64, 64, 64, 8]
    assert not torch.equal(torch.cat([labels for _, labels in shuffled]), order)
    images = torch.cat([images for images, _ in shuffled])
    assert torch.equal(images.flatten(1).sort(0).values, split.images.flatten(1).sort(0).values)
    assert len(list(digits(0).train.batches(batch_size(digits(0).train)))) == ROWS


@pytest.mark.parametrize("build", [models.ResidualCNN, VGG, models.Transformer])
def test_networks_classify_and_name_layers_of_their_own(build: type[nn.Module]) -> None:
    model = build()
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    own = set(model.modules())
    assert all(layer in own for layer in model.unpruned_layers())


def test_transformer_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="width 30 must be divisible by heads 4"):
        models.Transformer(width=30)


def test_training_learns_repeats_and_ends_in_eval_mode() -> None:
    data, accuracies = digits(0), []
    for _ in range(2):
        torch.manual_seed(0)
        model = train(VGG((8, 12), 1, 24), data.train, epochs=3)
        assert not any(module.training for module in model.modules())
        accuracies.append(accuracy(model, data.validation))
    assert accuracies[0] == accuracies[1] > 0.8
    model.train()
    accuracy(model, data.validation)
    assert all(module.training for module in model.modules())


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    kept = []

    def call() -> None:
        for _ in range(3):
            torch.ones(1000, 250)  # released at once
        kept.extend(torch.ones(1000, 250) for _ in range(2))

    assert run.peak_bytes(call) == 2 * 1000 * 250 * 4


def without_seconds(results: list[run.ModelResult]) -> list[run.ModelResult]:
    return [replace(r, criteria=tuple(replace(c, seconds=0.0) for c in r.criteria)) for r in results]


@pytest.mark.slow
def test_the_protocol_reaches_each_target_by_each_criterion_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STEPS", 8)
    monkeypatch.setattr(criteria, "ROWS", 4)
    said: list[str] = []
    threads = torch.get_num_threads()
    results = run.run(0, SMALL, targets=(1.3, 1.5), say=said.append)
    assert torch.get_num_threads() == threads
    assert [result.model for result in results] == ["small CNN", "small transformer"]
    assert len(said) == 1 + len(SMALL) * (1 + len(CRITERIA))
    for result in results:
        assert [criterion.criterion for criterion in result.criteria] == ["random", "L1", "Taylor", "Jacobian"]
        for criterion in result.criteria:
            assert [point.target for point in criterion.points] == [1.3, 1.5]
            assert all(point.macs_ratio >= point.target for point in criterion.points)
            for point in criterion.points:
                assert tuple(point.accuracy) == recover.WAYS
                without = {recover.RECALIBRATED} if result.model == "small transformer" else set()
                assert {way for way, value in point.accuracy.items() if value is None} == without
                assert all(0 <= value <= 1 for value in point.accuracy.values() if value is not None)
            assert criterion.seconds > 0
            assert criterion.peak_bytes > 0
    assert without_seconds(run.run(0, SMALL[1:], targets=(1.3, 1.5))) == without_seconds(results[1:])


def small_transformer() -> nn.Module:
    return models.Transformer(16, 2, 64, 2)


@pytest.mark.slow
def test_several_processes_find_what_one_does() -> None:
    recipe = run.Recipe("small transformer", small_transformer, epochs=1)
    alone, together = (run.run(0, [recipe], CRITERIA[:2], targets=(1.1,), processes=number) for number in (1, 2))
    assert without_seconds(alone) == without_seconds(together)


def test_a_target_out_of_reach_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"steps of pruning do not reach 1000\.0x fewer MACs"):
        run.run(0, SMALL[1:], CRITERIA[1:2], targets=(1000.0,))


def test_recovery_measures_copies_and_leaves_the_pruned_network_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("obc.recovery.chain_parts._MANY_PASSES", 0)
    data = digits(0)
    torch.manual_seed(0)
    original = train(models.ResidualCNN((8, 12), 1), data.train, epochs=2)
    model = copy.deepcopy(original)
    ((_, plan),) = run.steps(model, CRITERIA[1], data, [1.3])
    before = copy.deepcopy(model.state_dict())
    measured: list[nn.Module] = []
    values = recover.recovered(model, original, plan, data.train, lambda m: measured.append(m) or float(len(measured)))
    assert list(values.values()) == [1.0, 2.0, 3.0, 4.0]
    assert len({id(m) for m in measured}) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = torch.cat(recover.calibration(data.train))
    assert torch.equal(images, data.train.images[: recover.CALIBRATION_IMAGES])
    # What recovery promises: closer to the unpruned network's outputs on digits it never saw.
    with torch.no_grad():
        truth = original(data.test.images)
        raw, *recovered = ((m(data.test.images) - truth).square().mean() for m in measured)
    assert all(error < raw for error in recovered)
    assert not caplog.records  # the demo chose a slow way on purpose


@pytest.mark.slow
def test_fine_tuning_gives_every_way_the_same_start_and_chooses_by_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "EPOCHS", 1)
    monkeypatch.setattr(finetune, "LEARNING_RATES", (1e-7, 1e-2))
    monkeypatch.setattr(finetune, "TARGET", 1.5)
    monkeypatch.setattr(run, "STEPS", 8)
    monkeypatch.setattr(criteria, "ROWS", 4)
    said: list[str] = []
    (result,) = finetune.run(3, SMALL[:1], seeds=2, say=said.append)
    assert [line.split(",")[1] for line in said] == [" seed 3: 3 ways", " seed 4: 3 ways"]
    assert [way.way for way in result.ways] == ["naive", "compensated (ls) first", "Equivalent Pruning"]
    for way in result.ways:
        assert way.learning_rates == (1e-2, 1e-2)  # after two epochs there is much to learn, which 1e-7 can't
        assert min(way.accuracies) > max(result.pruned)
    (again,) = finetune.run(4, SMALL[:1], seeds=1)
    assert [way.accuracies for way in again.ways] == [way.accuracies[1:] for way in result.ways]


def test_fine_tuning_reads_the_test_split_for_the_chosen_network_only(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits(0)
    read: list[str] = []
    splits = {id(data.validation): "validation", id(data.test): "test"}

    def watched(model: nn.Module, split: object) -> float:
        read.append(splits[id(split)])
        return accuracy(model, split)

    monkeypatch.setattr(finetune, "accuracy", watched)
    way = finetune.Way("untrained", lambda pruned, data, rate, seed: pruned.model)
    model = models.Transformer(16, 2, 64, 1)
    finetune._best(way, finetune.Pruned(model, model, run.PruningPlan()), data, seed=0)
    assert read == ["validation"] * len(finetune.LEARNING_RATES) + ["test"]


def example_result() -> run.ModelResult:
    points = (
        run.PrunedNetwork(1.3, 1.31, dict(zip(recover.WAYS, (0.9, None, 0.91, 0.92), strict=True))),
        run.PrunedNetwork(2.0, 2.04, dict(zip(recover.WAYS, (0.512, None, 0.6, 0.7), strict=True))),
    )
    compared = (
        run.CriterionResult("random", points, 0.0004, 512),
        run.CriterionResult("Jacobian", points, 0.3, 3 * 2**20),
    )
    return run.ModelResult("residual CNN", 0.982, 1_667_210, 174_970, compared)


def words(line: str) -> str:
    """``line`` with single spaces."""
    return " ".join(line.split())


def test_table_shows_every_figure() -> None:
    lines = report.table(example_result()).splitlines()
    assert lines[0] == "residual CNN: 98.2 % unpruned, 1.67 M MACs, 175 k parameters"
    header, _, random, jacobian, gap, *_ = lines[1:]
    assert header.split("  ")[0] == "criterion"
    assert all(way in header for way in recover.WAYS)
    assert words(random) == "random 1.31x 90.0 % - 91.0 % 92.0 %"
    assert jacobian.split()[0] == "Jacobian"
    assert gap == ""
    assert words(lines[7]) == "Jacobian 2.04x 51.2 % - 60.0 % 70.0 %"
    assert words(lines[-1]) == "Jacobian 300.0 ms 3.00 MiB"
    assert len({len(line) for line in lines[1:8] if line}) == 1


def test_fine_tuning_table_shows_mean_range_and_learning_rates() -> None:
    tuned = finetune.FineTuned("naive", (0.001, 0.003), (0.95, 0.97))
    lines = report.fine_tuning_table(finetune.FineTuning("CNN", (0.98, 0.98), (0.5, 0.7), (tuned,))).splitlines()
    assert lines[0] == "CNN, 2x fewer MACs by the Jacobian Criterion"
    assert words(lines[-1]) == "naive 96.0 % 95.0 - 97.0 % 0.001, 0.003"
    assert words(lines[-2]) == "pruned, not fine-tuned 60.0 % 50.0 - 70.0 %"


def test_demo_draws_and_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seeds = []

    def quick(seed: int, say: object, processes: int) -> list[run.ModelResult]:
        seeds.append(seed)
        return [example_result()]

    monkeypatch.setattr(run, "run", quick)
    assert cli.main(["demo", "--seed", "7", "--out", str(tmp_path / "new")]) == 0
    assert seeds == [7]
    out = capsys.readouterr().out
    assert report.table(example_result()) in out
    assert report.protocol() in out
    picture = (tmp_path / "new" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "fine-tuned" not in out
    tuned = finetune.FineTuning("CNN", (0.98,), (0.5,), (finetune.FineTuned("naive", (0.001,), (0.95,)),))
    monkeypatch.setattr(finetune, "run", lambda seed, say: [tuned])
    assert cli.main(["demo", "--full", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert report.fine_tuning_table(tuned) in out
    assert report.fine_tuning_protocol() in out


@pytest.mark.slow
def test_the_networks_are_as_good_as_promised() -> None:
    data = digits(0)
    for recipe, floor in zip(run.RECIPES, (0.97, 0.94), strict=True):
        torch.manual_seed(0)
        assert accuracy(train(recipe.build(), data.train, epochs=recipe.epochs), data.test) > floor
