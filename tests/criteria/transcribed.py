"""Which criterion is held against its formula on which model: a table that the tests fill by being decorated."""

from __future__ import annotations

import inspect
import itertools
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from obc import criteria

Test = TypeVar("Test", bound=Callable[..., Any])

# Model -> its kind. In traced models the groups are those that Torch-Pruning finds. It finds only one in the small ViT,
# which therefore does not represent its kind.
KIND_OF = {
    "chain": "CNN",
    "flatten": "CNN",
    "grouped": "CNN",
    "resnet": "CNN",
    "traced-vit": "other",
    "vit": "ViT",
    "llama": "Llama",
    "mixtral": "mixture",
    "qwen2-moe": "mixture",
    "deepseek-v3": "mixture",
    "gpt-oss": "mixture",
}
KINDS = ("CNN", "ViT", "Llama", "mixture")
FOUR = ("chain", "vit", "llama", "mixtral")
ALL = ("chain", "flatten", "grouped", "resnet", "traced-vit", "vit", "llama", "mixtral")

_NO_EXPERTS = "it has no mixture of experts"
_NO_BLOCKS = "none of its modules is a list of residual blocks"
_NO_BATCH_NORM = "it has no BatchNorm"

# (criterion, kind of model) -> why there is nothing to score; test_every_formula.py sees that obc says so.
EXEMPT: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        itertools.product(("reap", "expert_frequency", "expert_norm"), ("CNN", "ViT", "Llama")), _NO_EXPERTS
    ),
    **dict.fromkeys(
        itertools.product(("block_influence", "angular_distance", "entropy", "cfsp"), ("CNN",)), _NO_BLOCKS
    ),
    **dict.fromkeys(itertools.product(("bn_scale",), ("ViT", "Llama", "mixture")), _NO_BATCH_NORM),
    ("token_jacobian", "CNN"): "its layers see different numbers of positions, so that rows don't belong together",
}

# Criterion, or "criterion(switch=value)" -> kinds of models.
TRANSCRIBED: dict[str, set[str]] = {}


def transcribes(*names: str, models: Sequence[str] = FOUR) -> Callable[[Test], Test]:
    """Run a test with ``name`` from ``models``, and note that it transcribes these criteria on each of them.

    Args:
        names: of criteria; with a switch in another position than the registered one, as "flap(code=True)".
        models: of :data:`KIND_OF`.
    """

    def decorate(test: Test) -> Test:
        for name in names:
            TRANSCRIBED.setdefault(name, set()).update(KIND_OF[model] for model in models)
        return typing.cast(Test, pytest.mark.parametrize("name", models)(test))

    return decorate


def wanted() -> list[str]:
    """Every registered criterion, and it with each of its switches in every other position."""
    return [one for name in criteria.available() for one in (name, *switched(name, criteria.get(name)))]


def switched(name: str, criterion: Any) -> list[str]:
    """The other positions of what its constructor takes a truth value, or one of some words, for."""
    kind = type(criterion)
    if kind.__init__ is object.__init__:
        return []
    hints = typing.get_type_hints(kind.__init__)
    found = []
    for option, parameter in inspect.signature(kind).parameters.items():
        here = getattr(criterion, option, parameter.default)
        for value in positions(hints.get(option)):
            others = {one: getattr(criterion, one) for one in ("form",) if hasattr(criterion, one)}
            if value != here and kind(**{**others, option: value}).name == name:  # else registered under its own name
                found.append(f"{name}({option}={value!r})")
    return found


def positions(hint: Any) -> list[Any]:
    """What an option of this type can be, where that is a few values."""
    if hint is bool:
        return [False, True]
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [positions(part) for part in typing.get_args(hint)]
        return [*itertools.chain(*parts), *([None] if any(parts) and type(None) in typing.get_args(hint) else [])]
    return []


def missing(names: Sequence[str]) -> list[tuple[str, str]]:
    """(criterion, kind of model) without a transcription or an exemption."""
    return [
        (name, kind)
        for name in names
        for kind in KINDS
        if kind not in TRANSCRIBED.get(name, ()) and (name.partition("(")[0], kind) not in EXEMPT
    ]
