"""Mutation testing by a sample: one small change of the source at a time, and whether a test notices.

    python tests/mutation.py --sample 60 --seed 0        # of all areas; --only scoring for one

Changes comparisons, arithmetic, and/or, not, numbers, truth values, conditions and return values, and leaves out
statements; not messages, annotations and logs. Tests run on a copy, in a process forked after torch was imported. Exits
with 1 where mutants survive that docs/mutation.md does not explain.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # imported once, for all forks

ROOT = Path(__file__).resolve().parent.parent
# Source files below python/obc, and the tests that should notice, the quick ones first.
AREAS = {
    "reference": ("reference.py", "reference end_row fold"),
    "scoring": (
        "scoring/**/*.py",
        "scores kept_rows micro_batch scorer_hazards scorer_errors scorer checkpoint label_free scorer_precision files "
        "transformers_groups faults scorer_compile fuzz_models",
    ),
    "recovery": ("recovery/*.py", "plan moments equivalent compensate files"),
}
TIMEOUT = 600.0
SWAPPED = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
SWAPPED |= {after: before for before, after in SWAPPED.items()}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPUTED |= {ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}


@dataclass(frozen=True)
class Mutant:
    path: Path
    line: int
    before: str
    after: str
    source: str

    @property
    def entry(self) -> str:
        """How docs/mutation.md names it: without the line, which moves."""
        return f"`{self.path.relative_to(ROOT / 'python/obc')}`: `{self.before}` -> `{self.after}`"

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.before}  ->  {self.after}"


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """The replacement of a node."""
    copy = deepcopy(node)
    if isinstance(copy, ast.Compare) and type(copy.ops[0]) in SWAPPED:
        copy.ops[0] = SWAPPED[type(copy.ops[0])]()
        yield copy
    elif isinstance(copy, ast.BinOp) and type(copy.op) in COMPUTED:
        copy.op = COMPUTED[type(copy.op)]()
        yield copy
    elif isinstance(copy, ast.BoolOp):
        copy.op = ast.Or() if isinstance(copy.op, ast.And) else ast.And()
        yield copy
    elif isinstance(copy, ast.UnaryOp) and isinstance(copy.op, (ast.Not, ast.USub)):
        yield copy.operand
    elif isinstance(copy, ast.Constant) and type(copy.value) in (bool, int, float):
        yield ast.Constant(not copy.value if isinstance(copy.value, bool) else copy.value + 1)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def left_alone(node: ast.AST) -> bool:
    """Messages, assertions (``strict=True`` is one), logs, warnings."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.ImportFrom, ast.Import)):
        return True
    text = ast.unparse(node) if isinstance(node, ast.Expr) else ""
    return text.startswith(("logger.", "warnings.", "'", '"'))


def mutants(path: Path) -> Iterator[Mutant]:
    tree = ast.parse(path.read_text())

    def visit(node: ast.AST) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or left_alone(child):
                    continue
                for new in changed(child):
                    place(node, field, index, new)
                    source = ast.unparse(ast.fix_missing_locations(tree))
                    before, after = (" ".join(ast.unparse(ast.fix_missing_locations(n)).split()) for n in (child, new))
                    yield Mutant(path, getattr(child, "lineno", 0), before[:70], after[:70], source)
                    place(node, field, index, child)
                yield from visit(child)

    yield from visit(tree)


def place(node: ast.AST, field: str, index: int | None, new: ast.AST) -> None:
    if index is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[index] = new


def noticed(copy: Path, tests: list[str]) -> str | None:
    """The failure of the tests in a separate process; None if they passed."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(copy)
        paths = [str(copy / "python"), str(copy)]
        sys.path[:0], os.environ["PYTHONPATH"] = paths, os.pathsep.join(paths)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests]))
    for _ in range(int(10 * TIMEOUT)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if status == 0 else "failed"
        time.sleep(0.1)
    os.killpg(pid, 9)
    os.waitpid(pid, 0)
    return "timed out"


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing by a sample.")
    parser.add_argument("--sample", type=int, default=60, help="mutants, shared among the areas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=AREAS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    explained = (ROOT / "docs" / "mutation.md").read_text()
    areas = [options.only] if options.only else list(AREAS)
    survivors, total = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "obc"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "results", "__pycache__"))
        for area in areas:
            pattern, names = AREAS[area]
            files = [path for name in names.split() for path in ROOT.glob(f"tests/*/test_{name}.py")]
            tests = [str(path.relative_to(ROOT)) for path in files]
            if noticed(copy, tests):
                print((copy / "output").read_text()[-3000:])
                print(f"{area}: the tests fail without a mutant")
                return 2
            found = [mutant for path in sorted((ROOT / "python/obc").glob(pattern)) for mutant in mutants(path)]
            chosen = random.Random(options.seed).sample(found, min(len(found), options.sample // len(areas)))
            print(f"{area}: {len(chosen)} of {len(found)} mutants", flush=True)
            for mutant in chosen:
                target = copy / mutant.path.relative_to(ROOT)
                target.write_text(mutant.source)
                how = noticed(copy, tests)
                shutil.copy(mutant.path, target)
                if how is None:
                    survivors.append(mutant)
                print(f"  {how or 'SURVIVED'}: {mutant}", flush=True)
            total += len(chosen)
    left = [mutant for mutant in survivors if mutant.entry not in explained]
    print(f"{total} mutants, {total - len(survivors)} noticed, {len(survivors)} survived, {len(left)} not explained")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
