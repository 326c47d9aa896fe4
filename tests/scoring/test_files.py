"""Files of scores and plans: written whole or not at all, read without trust in what they hold."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import obc
from obc.files import atomic_write, parse_json, remove_left_over, whole_folder
from obc.recovery import Kept, PlanError, PruningPlan
from obc.scoring import ScoresError
from obc.scoring.results.scores import ChannelScores

ROOT = Path(__file__).resolve().parents[2]


def some_scores(channels: int = 3) -> obc.Scores:
    values = torch.arange(channels, dtype=torch.float32)
    return obc.Scores(
        {"conv": ChannelScores(values, values[:2]), "norm": ChannelScores(values)},
        num_rows=2,
        coverage={"conv": "gate", "norm": "norm gradient"},
        metadata={"model": "Net", "rows": "batch"},
    )


def some_plan(channels: int = 3) -> PruningPlan:
    kept = torch.arange(channels)
    return PruningPlan({"conv": Kept(kept), "head": Kept(None, kept, in_repeat=4), "position": Kept(kept, dim=2)})


SAVED: dict[str, Callable[[], Any]] = {"scores": some_scores, "plan": some_plan}
LOADERS: dict[str, tuple[Callable[[Any], Any], type[ValueError]]] = {
    "scores": (obc.Scores.load, ScoresError),
    "plan": (PruningPlan.load, PlanError),
}


@contextlib.contextmanager
def limited(which: int, size: int) -> Iterator[None]:
    """A resource of this process held below ``size`` bytes."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextlib.contextmanager
def little_memory(megabytes: int = 200) -> Iterator[None]:
    """Not much more address space than the process has now: what asks for gigabytes fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + megabytes * 2**20):
        yield


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with atomic_write(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["file"]


def write_and_raise(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, SystemExit])
def test_a_failure_while_writing_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    for before in (None, b"before"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(error):
            write_and_raise(path, error)
        assert os.listdir(tmp_path) == ([] if before is None else ["file"])
        assert before is None or path.read_bytes() == before


@pytest.mark.slow
def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file[1]"
    path.write_bytes(b"before")
    script = """
        import os, signal, sys
        from obc.files import atomic_write
        with atomic_write(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path])
    assert done.returncode < 0
    assert path.read_bytes() == b"before"
    (tmp_path / ".file1.0123456789abcdef.tmp").touch()  # of another file
    assert len(os.listdir(tmp_path)) == 3
    remove_left_over(path)
    assert sorted(os.listdir(tmp_path)) == [".file1.0123456789abcdef.tmp", "file[1]"]


KILLED_AT_EVERY_CALL = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    from obc.files import refuse_unfinished, whole_folder

    def write(folder, run, *names):
        with whole_folder(folder) as stage:
            for name in names:
                (stage / name).write_text(run)

    def state(folder):
        found = {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}
        try:
            refuse_unfinished(folder)
        except ValueError:
            return "unfinished", found
        return "finished", found

    NEW = ["config.json", "model.safetensors", "plan.json", "report.json"]
    states = []
    for before in json.loads(sys.argv[2]):
        for last in range(1000):
            folder = Path(sys.argv[1]) / f"{len(before)}-{last}"
            if before:
                write(folder, "old", *before)
                (folder / "notes.txt").write_text("mine")
            child = os.fork()
            if child == 0:
                calls = []
                def count(event, arguments):
                    if event.startswith(("os.", "open", "shutil.")) and event not in ("os.scandir", "os.kill"):
                        if len(calls) == last:
                            os.kill(os.getpid(), signal.SIGKILL)
                        calls.append(event)
                sys.addaudithook(count)
                write(folder, "new", *NEW)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            found = state(folder) if folder.exists() else ("finished", {})
            write(folder, "again", *NEW)
            states.append([before, ended, *found, state(folder), sorted(map(str, folder.rglob("*")))])
            if ended == 0:
                break
    print(json.dumps(states))
"""
NEW_FILES = ["config.json", "model.safetensors", "plan.json", "report.json"]


@pytest.mark.slow
def test_a_folder_is_the_old_one_the_new_one_or_says_that_it_is_unfinished(tmp_path: Path) -> None:
    """Killed at each call of the operating system: over a sharded model, and over nothing."""
    old = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "plan.json",
        "report.json",
    ]
    script = textwrap.dedent(KILLED_AT_EVERY_CALL)
    arguments = [sys.executable, "-c", script, tmp_path, json.dumps([old, []])]
    states = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert [ended for _, ended, *_ in states].count(0) == 2
    seen = set()
    for before, ended, said, found, again, everything in states:
        kept = {"notes.txt": "mine"} if before else {}
        was, becomes = dict.fromkeys(before, "old") | kept, dict.fromkeys(NEW_FILES, "new") | kept
        kind = "old" if found == was else "new" if found == becomes else "mixed"
        seen.add((kind, said))
        assert ended == 0 or ended == -9
        assert kind != "mixed" or (said == "unfinished" and "config.json" not in found)
        assert ended or (kind, said) == ("new", "finished")
        assert again == ["finished", dict.fromkeys(NEW_FILES, "again") | kept]
        assert len(everything) == len(again[1]), everything
    assert {("old", "finished"), ("mixed", "unfinished"), ("new", "finished")} <= seen


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_a_folder_follow_the_umask_and_replaced_ones_keep_their_mode(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):
            with whole_folder(tmp_path) as stage:
                save_file({"x": torch.ones(2)}, stage / "model.safetensors")
                (stage / "report.json").touch()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
            (tmp_path / "report.json").chmod(0o640)
    finally:
        os.umask(before)
    assert modes == {"model.safetensors": 0o666 & ~umask, "report.json": 0o640}


def test_a_failure_inside_a_folder_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("before")
    with (
        limited(resource.RLIMIT_FSIZE, 100),
        pytest.raises(OSError, match="File too large"),
        whole_folder(tmp_path) as stage,
    ):
        save_file({"x": torch.ones(1000)}, stage / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "before"


def test_a_file_has_the_usual_mode_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    for mode in (stat.S_IMODE(usual.stat().st_mode), 0o640):
        if path.exists():
            path.chmod(mode)
        with atomic_write(path) as file:
            file.write(b"content")
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        with atomic_write(link) as file:
            file.write(content)
        assert link.is_symlink()
        assert target.read_bytes() == content


@pytest.mark.parametrize("what", SAVED)
def test_a_full_device(what: str) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        SAVED[what](100_000).save("/dev/full")


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("room", [0, 1, 10_000])
def test_a_full_disk(what: str, room: int, tmp_path: Path) -> None:
    """The disk is full after ``room`` bytes: the old file is intact, and nothing else is left."""
    path = tmp_path / "file"
    SAVED[what](5).save(path)
    before = path.read_bytes()
    with limited(resource.RLIMIT_FSIZE, room), pytest.raises(OSError, match="File too large"):
        SAVED[what](100_000).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    SAVED[what](100_000).save(path)
    assert len(LOADERS[what][0](path)) == len(SAVED[what]())


@pytest.mark.parametrize("what", SAVED)
def test_places_that_are_no_files(what: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/file can't be written: there is no folder"):
        SAVED[what]().save(tmp_path / "absent" / "file")
    with pytest.raises(IsADirectoryError):
        SAVED[what]().save(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"directory|is a folder"):
        LOADERS[what][0](tmp_path)
    with pytest.raises(FileNotFoundError):
        LOADERS[what][0](tmp_path / "absent")
    assert os.listdir(tmp_path) == []


# --- damaged and foreign files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", SAVED)
def test_every_truncation_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    SAVED[what]().save(path)
    whole = path.read_bytes()
    load, error = LOADERS[what]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(error, match="file"):
            load(path)
    path.write_bytes(whole)
    assert len(load(path)) == len(SAVED[what]())


@pytest.mark.parametrize("what", SAVED)
def test_changed_bytes_are_refused_or_harmless(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    SAVED[what]().save(path)
    whole = path.read_bytes()
    load, error = LOADERS[what]
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        changed = bytearray(whole)
        for position in torch.randint(len(whole), (2,), generator=generator).tolist():
            changed[position] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(changed)
        with little_memory(), contextlib.suppress(error):
            repr(load(path))


def safetensors(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def score_file(tensors: dict[str, Any] | None = None, data: bytes = bytes(12), **metadata: Any) -> bytes:
    """A score file of one module with these changes; None omits an entry of the metadata."""
    known = {
        "format": "obc.Scores/1",
        "num_rows": "2",
        "coverage": '{"conv": "gate"}',
        "metadata": "{}",
        "modules": '["conv"]',
    }
    header = {name: value for name, value in (known | metadata).items() if value is not None}
    return safetensors({"__metadata__": header, **(tensors or {"conv:out_channels": entry(0, 12, [3])})}, data)


DEEP = "[" * 100_000
FOREIGN_SCORES = {
    "huge-header": safetensors(b"{}", length=2**63),
    "header-of-gigabytes": safetensors(b"{}", length=2**33),
    "header-of-no-text": safetensors(b"\xff\xfe\x00\x80"),
    "header-that-is-a-list": safetensors(b"[]"),
    "header-nested-deeply": safetensors(DEEP.encode()),
    "overlapping": score_file({"conv:out_channels": entry(0, 12, [3]), "norm:out_channels": entry(4, 12, [2])}),
    "with-a-gap": score_file({"conv:out_channels": entry(4, 12, [2])}),
    "beyond-the-end": score_file({"conv:out_channels": entry(0, 2**40, [2**38])}),
    "shape-without-its-bytes": score_file({"conv:out_channels": entry(0, 12, [2**40])}),
    "shape-that-overflows": score_file({"conv:out_channels": entry(0, 12, [2**62, 2**62])}),
    "negative-shape": score_file({"conv:out_channels": entry(0, 12, [-3])}),
    "unknown-dtype": score_file({"conv:out_channels": entry(0, 12, [3], "X9")}),
    "integers": score_file({"conv:out_channels": entry(0, 12, [3], "I32")}),
    "half-precision": score_file({"conv:out_channels": entry(0, 12, [6], "F16")}),
    "matrix": score_file({"conv:out_channels": entry(0, 12, [3, 1])}),
    "number": score_file({"conv:out_channels": entry(0, 4, [])}, bytes(4)),
    "without-metadata": safetensors({"conv:out_channels": entry(0, 12, [3])}, bytes(12)),
    "without-rows": score_file(num_rows=None),
    "rows-nested-deeply": score_file(num_rows=DEEP),
    "rows-of-many-digits": score_file(num_rows="9" * 100_000),
    "rows-that-are-true": score_file(num_rows="true"),
    "rows-that-are-infinite": score_file(num_rows="Infinity"),
    "coverage-nested-deeply": score_file(coverage=DEEP),
    "coverage-of-numbers": score_file(coverage='{"conv": 1}'),
    "coverage-that-is-a-list": score_file(coverage="[]"),
    "modules-that-are-a-number": score_file(modules="3"),
    "modules-of-numbers": score_file(modules="[3]"),
    "modules-of-lists": score_file(modules="[[]]"),
    "module-without-scores": score_file(modules='["conv", "other"]'),
    "metadata-of-lists": score_file(metadata='{"model": []}'),
}


@pytest.mark.parametrize("name", FOREIGN_SCORES)
def test_a_crafted_score_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(FOREIGN_SCORES[name])
    with little_memory(), pytest.raises(ScoresError, match=r"file is (not a score file|a damaged score file)"):
        obc.Scores.load(path)


def test_the_score_file_that_they_are_crafted_from_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(score_file())
    assert list(obc.Scores.load(tmp_path / "file")) == ["conv"]


def plan_file(entry: object, **more: Any) -> str:
    return json.dumps({"format": "obc.PruningPlan", "version": 1, "layers": {"conv": entry}} | more)


FOREIGN_PLANS = {
    "empty": "",
    "no-text": b"\xff\xfe{}",
    "nested-deeply": DEEP,
    "nested-deeply-inside": plan_file({"out_channels": 0}).replace("0", DEEP),
    "number-of-many-digits": plan_file({"out_channels": 0}).replace("0", "9" * 100_000),
    "a-list": "[]",
    "without-layers": '{"format": "obc.PruningPlan", "version": 1}',
    "layers-that-are-a-list": plan_file({}, layers=[]),
    "layer-that-is-a-list": plan_file([]),
    "layer-that-is-a-number": plan_file(3),
    "unknown-field": plan_file({"__class__": "os.system"}),
    "indices-of-text": plan_file({"out_channels": ["a"]}),
    "indices-that-are-text": plan_file({"out_channels": "0, 1"}),
    "fractions": plan_file({"out_channels": [0.5]}),
    "booleans": plan_file({"out_channels": [True]}),
    "not-a-number": plan_file({"out_channels": [float("nan")]}),
    "ragged": plan_file({"out_channels": [[0], [1, 2]]}),
    "negative": plan_file({"out_channels": [-1]}),
    "huge": plan_file({"in_channels": [2**62]}),
    "beyond-64-bits": plan_file({"in_channels": [2**70]}),
    "repeat-of-nothing": plan_file({"in_repeat": 0}),
    "negative-repeat": plan_file({"in_repeat": -3}),
    "huge-repeat": plan_file({"in_channels": [0], "in_repeat": 2**62}),
    "blocks-of-text": plan_file({"out_blocks": "2"}),
    "blocks-of-nothing": plan_file({"out_blocks": None}),
    "dim-of-text": plan_file({"dim": "0"}),
}


@pytest.mark.parametrize("name", FOREIGN_PLANS)
def test_a_crafted_plan_file_is_refused(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "file", FOREIGN_PLANS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with little_memory(), pytest.raises(PlanError, match=r"file is (not a pruning plan|a damaged pruning plan)"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    "kept",
    [
        {"out_channels": [2**30]},
        {"in_channels": [2**30]},
        {"in_channels": list(range(9)), "in_repeat": 2**31 - 1},
        {"in_channels": [0], "in_repeat": 2**31 - 1},
        {"out_channels": [0, 1], "dim": 7},
    ],
)
def test_a_plan_whose_numbers_are_too_large_for_its_model_is_refused(kept: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(plan_file(kept))
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(9, 4, 3)})
    plan = PruningPlan.load(path)
    with little_memory(), pytest.raises(PlanError, match=r"conv\.weight: the plan does not fit"):
        plan.verify(model.state_dict(), model)


@pytest.mark.parametrize("depth", [10, 100, *range(700, 1000, 10), 2000, 5000, 20_000])
def test_json_of_any_depth_is_refused(depth: int) -> None:
    """Also where the parser can still read it and a message can hardly print it."""
    with pytest.raises(ValueError, match=r"nested too deeply|expected dict\[str, str\] in its JSON"):
        parse_json("[" * depth + "]" * depth, dict[str, str])


def test_json_of_another_kind_is_refused_with_its_beginning() -> None:
    assert parse_json('{"a": [1, null]}', dict[str, list[int | None]]) == {"a": [1, None]}
    assert parse_json("3", float) == 3
    with pytest.raises(ValueError, match=r"expected list\[int\] in its JSON, got \[1, True\]"):
        parse_json("[1, true]", list[int])


# --- no code from data ---------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("write", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_pickle_is_refused_and_not_run(what: str, write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    path, evidence = tmp_path / "file", tmp_path / "run"
    write(Malicious(evidence), path)
    load, error = LOADERS[what]
    with pytest.raises(error, match="file is not a"):
        load(path)
    assert not evidence.exists()
    pickle.loads(pickle.dumps(Malicious(evidence)))
    assert evidence.exists(), "the pickle was not malicious"


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}


def unsafe(path: Path) -> list[str]:
    """Every place of a source file that unpickles, or makes code of text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        what = None
        if isinstance(node, ast.Import):
            what = next((alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS), None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            what = node.module
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            weights_only = options.get("weights_only")
            loads = called in ("torch.load", "torch.hub.load", "numpy.load", "np.load")
            allowed = isinstance(weights_only, ast.Constant) and weights_only.value is True
            pickles = "allow_pickle" in options
            if called in EVALUATORS or (loads and not allowed) or pickles:
                what = called
        if what:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {what}")
    return found


def test_nothing_in_the_package_unpickles_or_makes_code_of_text() -> None:
    sources = [*(ROOT / "python" / "obc").rglob("*.py"), *(ROOT / "obc_kernels").rglob("*.py")]
    assert len(sources) > 40
    assert [place for path in sources for place in unsafe(path)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "source.py"
    path.write_text(source)
    assert len(unsafe(path)) == 1
    path.write_text("torch.load(path, weights_only=True); re.compile(text); model.eval()")
    assert unsafe(path) == []
