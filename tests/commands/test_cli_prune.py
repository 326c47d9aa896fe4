"""``obc prune``: your own function, or a transformers directory by its scores; and refusals."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

import transformers
from directories import llama_directory
from safetensors.torch import load_file

import obc
from obc import cli
from obc.integrations.transformers import load_pruned

ENTRY = """
import torch
from torch import nn
from torch.nn import functional as F


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(24):
        yield torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def good():
    return model(), batches(), loss


def named():
    return {"model": model(), "batches": list(batches()), "loss_fn": loss, "ignored_layers": ["0"]}


def with_example():
    return model(), [{"x": x, "y": y} for x, y in batches()], lambda m, b: loss(m, (b["x"], b["y"])), torch.zeros(1, 4)


bad = {
    "pair": (1, 2),
    "model": (1, [1], loss),
    "loss": (model(), [1], None),
    "batches": (model(), 7, loss),
    "empty": (model(), [], loss),
    "lacking": {"model": model(), "batches": [1]},
    "unknown": {"model": model(), "batches": [1], "loss_fn": loss, "epochs": 3},
    "example": (model(), [{"x": 1}], loss),
}
for name, value in bad.items():
    globals()[f"bad_{name}"] = lambda value=value: value


def broken():
    raise RuntimeError("my own fault")


def with_argument(x):
    return x


number = 3
"""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with the functions above, in the current folder."""
    (tmp_path / "recipes_of_mine.py").write_text(ENTRY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "recipes_of_mine"
    sys.modules.pop("recipes_of_mine", None)


def prune(*arguments: object) -> int:
    return cli.main(["prune", *map(str, arguments)])


@pytest.mark.parametrize("function", ["good", "named", "with_example"])
def test_an_entry_point_is_pruned_and_written(
    function: str, entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prune(f"{entry}:{function}", "--macs", 0.6, "--steps", 2, "--out", out) == 0
    module = sys.modules[entry]
    original = module.model()
    plan, state = obc.PruningPlan.load(out / "plan.json"), load_file(out / "model.safetensors")
    report = json.loads((out / "report.json").read_text())
    assert report["macs_after"] <= 0.6 * report["macs_before"]
    assert report["macs_before"] == 4 * 12 + 12 * 10 + 10 * 3
    assert report["parameters_after"] == sum(tensor.numel() for tensor in state.values())
    widths = [len(state[f"{layer}.weight"]) for layer in (0, 2)]
    assert (widths[0] == 12) == (function == "named")  # the first layer was to be ignored
    pruned = torch.nn.Sequential(
        torch.nn.Linear(4, widths[0]),
        torch.nn.ReLU(),
        torch.nn.Linear(*widths),
        torch.nn.ReLU(),
        torch.nn.Linear(widths[1], 3),
    )
    pruned.load_state_dict(state)
    plan.verify(original.state_dict(), pruned)
    assert "written: " in capsys.readouterr().out


def test_a_full_disk_is_said_in_one_line_and_the_earlier_output_stays(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prune(f"{entry}:good", "--macs", 0.6, "--steps", 2, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        assert prune(f"{entry}:good", "--macs", 0.5, "--steps", 2, "--out", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("obc prune: [Errno 27] File too large: ")
    assert said.endswith("/out'; make room, or choose another place to write to")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_budget_may_be_of_parameters(entry: str, tmp_path: Path) -> None:
    assert prune(f"{entry}:good", "--params", 0.5, "--steps", 2, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"] == "parameters"
    assert report["parameters_after"] <= 0.5 * report["parameters_before"]
    assert report["steps"][-1]["parameters"] == report["parameters_after"] / report["parameters_before"]


def test_options_reach_the_library(entry: str, tmp_path: Path) -> None:
    arguments = ["--ratio", 0.4, "--criterion", "l1", "--selection", "independent", "--steps", 1, "--ignore", "2"]
    assert prune(f"{entry}:good", *arguments, "--compensate", "ls", "--out", tmp_path / "out") == 0
    module = sys.modules[entry]
    expected = obc.prune(
        module.model(),
        torch.zeros(1, 4),
        list(module.batches()),
        module.loss,
        macs=0.6,
        criterion="l1",
        selection="independent",
        steps=1,
        ignored_layers=["2"],
        compensate="ls",
        progress=False,
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found, dict(expected.model.state_dict()))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere", "neither a directory nor module:function"),
        ("nowhere --data text.txt", "'nowhere' is neither a directory nor module:function"),
        ("recipes_of_mine.py", "the name of a function that returns a model, such as recipes_of_mine:subject"),
        ("recipes_of_mine:with_argument", "is called without arguments: missing a required argument: 'x'"),
        ("recipes_of_mine.py:good", "write the module's name, recipes_of_mine:good"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("no_such.module:f", "no module 'no_such.module'"),
        ("recipes_of_mine:nothing", "has no 'nothing'"),
        ("recipes_of_mine:number", "is not callable: int"),
        ("recipes_of_mine:bad_pair", "must return (model, batches, loss_fn), got a tuple of 2"),
        ("recipes_of_mine:bad_model", "the model must be a torch.nn.Module, got int"),
        ("recipes_of_mine:bad_loss", "loss_fn must be callable"),
        ("recipes_of_mine:bad_batches", "batches must be iterable, got int"),
        ("recipes_of_mine:bad_empty", "batches is empty"),
        ("recipes_of_mine:bad_lacking", "returned no 'loss_fn'"),
        ("recipes_of_mine:bad_unknown", "returned 'epochs'"),
        ("recipes_of_mine:bad_example", "no example_inputs can be taken"),
        ("recipes_of_mine:good --criterion nonsense", "criterion must be one of"),
        ("recipes_of_mine:good --ignore head", "head"),
        ("recipes_of_mine:good --macs 0.001", "out of reach"),
        ("recipes_of_mine:good --scores file", "--scores is for a model directory"),
        ("recipes_of_mine:good --uniform", "--uniform is for a model directory"),
    ],
)
@pytest.mark.usefixtures("entry")
def test_what_cannot_be_pruned_is_said_in_one_line(
    target: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(*target.split(), "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("obc prune: ")
    assert reason in said


def test_what_the_function_raises_is_passed_on(entry: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="my own fault"):
        prune(f"{entry}:broken", "--out", tmp_path / "out")


@pytest.mark.parametrize("option", ["--macs", "--params"])
@pytest.mark.parametrize("share", ["0", "1", "1.5", "half", "50%", "nan"])
def test_shares_lie_between_0_and_1(share: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune("module:function", option, share, "--out", "out")
    assert f"{option}: must be a share above 0 and below 1, such as 0.7, got '{share}'" in capsys.readouterr().err


def test_there_is_one_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune("module:function", "--params", 0.5, "--ratio", 0.5, "--out", "out")
    assert "--ratio: not allowed with argument --params" in capsys.readouterr().err


# --- directories ---------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_directory(tmp_path)


@pytest.fixture(params=["rows", "scores"])
def scores(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    keep = ["--keep-rows"] if request.param == "rows" else []
    arguments = ["score", llama, "--data", tmp_path / "data.jsonl", "--out", path, "--batches", 40, "--seq-len", 8]
    assert cli.main([*map(str, arguments), "--device", "cpu", "--batch-size", "1", *keep]) == 0
    return path


@pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning")
def test_a_directory_is_pruned_again_and_again_without_a_forward_pass(
    llama: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        forward = transformers.LlamaForCausalLM.forward
        patched.setattr(transformers.LlamaForCausalLM, "forward", lambda *args, **more: pytest.fail("a forward pass"))
        for ratio in (0.2, 0.4):
            arguments = ["--scores", scores, "--ratio", ratio, "--device", "cpu"]
            assert prune(llama, *arguments, "--out", tmp_path / str(ratio)) == 0
    assert transformers.LlamaForCausalLM.forward is forward
    original = transformers.LlamaForCausalLM.from_pretrained(llama)
    sizes = []
    for ratio in (0.2, 0.4):
        pruned = load_pruned(tmp_path / str(ratio))
        obc.PruningPlan.load(tmp_path / str(ratio) / "obc_plan.json").verify(original.state_dict(), pruned)
        assert pruned(torch.arange(8)[None]).logits.isfinite().all()
        sizes.append(sum(parameter.numel() for parameter in pruned.parameters()))
    assert sizes[0] > sizes[1]
    assert "MACs of one token: " in capsys.readouterr().out


@pytest.mark.sampled(members=2)
@pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning")
@pytest.mark.parametrize("options", [[], ["--uniform"]], ids=["free", "uniform"])
def test_a_directory_is_pruned_to_a_share_of_its_parameters(
    options: list[str], llama: Path, scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert prune(llama, "--scores", scores, "--params", 0.8, *options, "--device", "cpu", "--out", out) == 0
    whole = transformers.LlamaForCausalLM.from_pretrained(llama)
    pruned = transformers.LlamaForCausalLM.from_pretrained(out) if options else load_pruned(out)
    before, after = (sum(parameter.numel() for parameter in network.parameters()) for network in (whole, pruned))
    assert after <= 0.8 * before


@pytest.mark.parametrize(
    ("options", "spared", "cap"),
    [
        (["--max-pruning-ratio", 0.5], "", 0.5),
        (["--max-pruning-ratio", "0=0.25"], "", None),
        (["--protected-blocks", "1,0"], "0", None),
        (["--protected-blocks", "1,0", "--max-pruning-ratio", "2=0.7"], "0", None),
    ],
)
def test_caps_of_an_entry_point(options: list[Any], spared: str, cap: float | None, entry: str, tmp_path: Path) -> None:
    assert prune(f"{entry}:good", "--macs", 0.6, "--steps", 2, *options, "--out", tmp_path / "out") == 0
    widths = json.loads((tmp_path / "out" / "report.json").read_text())["widths"]
    assert not spared or widths[spared][1] == widths[spared][0]
    if options[1] == "0=0.25":
        assert widths["0"][1] >= 9
    if cap is not None:
        assert all(after >= (1 - cap) * before for before, after in widths.values())


@pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning")
@pytest.mark.parametrize("scores", ["scores"], indirect=True)
def test_caps_of_a_directory(llama: Path, scores: Path, tmp_path: Path) -> None:
    arguments = ["--scores", scores, "--ratio", 0.2, "--device", "cpu", "--protected-blocks", "1,0"]
    assert prune(llama, *arguments, "--max-pruning-ratio", 0.75, "--out", tmp_path / "out") == 0
    widths = json.loads((tmp_path / "out" / "obc_report.json").read_text())["widths"]
    for name, (before, after) in widths.items():
        assert after == before if ".layers.0." in name else after >= 0.25 * before, name
    assert any(after < before for before, after in widths.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--max-pruning-ratio", "half"], "such as 0.8"), (["--protected-blocks", "1,x"], "such as 4,2")],
)
def test_caps_that_are_none(
    options: list[str], said: str, entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prune(f"{entry}:good", *options, "--out", tmp_path / "out")
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning")
def test_equal_widths_load_by_from_pretrained(llama: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--scores", scores, "--ratio", 0.3, "--uniform", "--round-to", 8, "--device", "cpu", "--out", out]
    assert prune(llama, *arguments) == 0
    pruned = transformers.LlamaForCausalLM.from_pretrained(out)
    assert pruned.config.intermediate_size % 8 == 0
    assert pruned.config.intermediate_size < 32
    original = transformers.LlamaForCausalLM.from_pretrained(llama)
    obc.PruningPlan.load(out / "obc_plan.json").verify(original.state_dict(), pruned)


@pytest.mark.filterwarnings("ignore:.*rows are fewer:UserWarning")
@pytest.mark.parametrize("scores", ["rows"], indirect=True)
def test_compensation_of_a_directory(
    llama: Path, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--scores", scores, "--ratio", 0.3, "--device", "cpu", "--out", tmp_path / "out"]
    data = ["--compensate", "ls", "--data", tmp_path / "data.jsonl", "--seq-len", 8]
    assert prune(llama, *arguments, *data) == 0
    naive, compensated = (
        float(word) for word in capsys.readouterr().out.split("output error ")[1].split(",")[0].split(" -> ")
    )
    assert compensated <= naive
    assert load_pruned(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all()


def _other(llama: Path, tmp_path: Path) -> Path:
    config = transformers.LlamaConfig.from_pretrained(llama)
    config.intermediate_size = 40
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("scores", ["scores"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda llama, scores, tmp: [llama], "--data is missing"),
        (lambda llama, scores, tmp: [llama, "--scores", tmp / "none"], "no score file"),
        (lambda llama, scores, tmp: [_other(llama, tmp), "--scores", scores], "scores are of another model"),
        (lambda llama, scores, tmp: [llama, "--scores", scores, "--steps", 3], "--steps is not for --scores"),
        (lambda llama, scores, tmp: [llama, "--scores", scores, "--compensate", "ls"], "--compensate needs --data"),
        (lambda llama, scores, tmp: [llama, "--scores", scores, "--ratio", 0.999], "remain if every prunable group"),
        (lambda llama, scores, tmp: [llama, "--scores", scores, "--out", llama], "the model's own directory"),
        (lambda llama, scores, tmp: [tmp, "--scores", scores], "has no config.json"),
    ],
    ids=["no-scores", "no-file", "other-model", "entry-option", "no-data", "too-much", "onto-itself", "no-model"],
)
def test_directories_that_cannot_be_pruned(
    arguments: Callable[..., list[Any]],
    reason: str,
    llama: Path,
    scores: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in llama.iterdir()}
    given = arguments(llama, scores, tmp_path)
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    assert prune(*given, *out, "--device", "cpu") == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in llama.iterdir()} == before
