"""Keeps a transformers model from being saved into a folder that ``from_pretrained`` would load wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from obc.model.arguments import listed
from obc.model.kept import PlanError

_REMEDY = "obc.structures.transformers.save_pruned and load_pruned keep it"


def refuse_fresh_weights(model: Any, reason: str) -> None:
    """Make ``model.save_pretrained`` raise, because the config can't express that modules were removed."""
    _refuse_save_pretrained(
        model,
        "from_pretrained would give this model fresh weights, or other constants, where modules were removed "
        f"({reason}); {_REMEDY}",
    )


def refuse_dropped_biases(model: Any, layers: Sequence[str]) -> str:
    """Make ``model.save_pretrained`` raise, because no config can express the new biases of ``layers``; says so."""
    said = f"{listed(layers)} have a bias now that no config can express: from_pretrained would drop it; {_REMEDY}"
    _refuse_save_pretrained(model, said)
    return said


def _refuse_save_pretrained(model: Any, said: str) -> None:
    vars(model)["save_pretrained"] = partial(_raise, said)  # of a module, so that the model can be pickled


def _raise(said: str, *args: Any, **kwargs: Any) -> None:
    raise PlanError(said)
