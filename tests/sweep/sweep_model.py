"""One model type of the transformers library: built tiny, its groups found, removed, compared, scored, saved, loaded.

python tests/sweep/sweep_model.py TASK MODEL_TYPE prints one JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from sweep_comparison import TOLERANCE, difference, masked, removed_units, tensors
from sweep_configs import tiny_config
from sweep_inputs import FEATURES, inputs_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import obc
from obc.scoring.errors import ScoringError
from obc.structures.proof import prove
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}
SCORES = 1e-3  # of scores, which are float32
LARGEST = 20_000_000  # parameters of a configuration that is still called tiny


@dataclass
class Found:
    """The findings about one model type.

    Attributes:
        built: why it was not built or does not run; empty where it does.
        kinds: kind of unit -> how many groups are proved.
        unproved: kind of unit -> how many groups the inputs don't reach.
        left_out: reason -> how many groups.
        error: largest relative difference between the sliced and the masked model; None where nothing was removed.
        reloaded: difference after saving and loading; None where that was not tried.
        scored: largest relative difference between scores and explicit autograd; None where nothing was compared.
        wrong: what is wrong; empty where nothing is.
        groups: a digest of everything that was found before anything was removed: slices, counts, config, what is left
            out. Where it is the same, so is the rest, unless the code that removes and compares has changed.
    """

    task: str
    model_type: str
    built: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    unproved: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    reloaded: float | None = None
    scored: float | None = None
    wrong: str = ""
    groups: str = ""


def model_types(task: str) -> list[str]:
    """The names that transformers maps to a model of the task."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in getattr(modeling_auto, f"{TASKS[task]}_NAMES") if name in CONFIG_MAPPING_NAMES]


def model_class(task: str, model_type: str) -> tuple[Any, Any]:
    """(config class, model class) of a model type."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = getattr(modeling_auto, f"{TASKS[task]}_NAMES")[model_type]
    return CONFIG_MAPPING[model_type], getattr(transformers, names if isinstance(names, str) else names[0])


class _Float64(TorchFunctionMode):
    """Turns float32 requests into float64, because models compute norms and rotary angles in float32 in any dtype."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **named)


@contextlib.contextmanager
def in_float64(model_class: Any) -> Iterator[None]:
    """Instances of the class are built and run in float64 throughout, and draw the same numbers in every run."""
    forward, dtype = model_class.forward, torch.get_default_dtype()

    @functools.wraps(forward)
    def precise(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        with _Float64():
            return forward(*args, **kwargs)

    model_class.forward = precise
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        model_class.forward = forward
        torch.set_default_dtype(dtype)


def built(task: str, model_type: str) -> Any:
    """The tiny model in float64, its parameters random, so that no start value hides a fault."""
    config_class, chosen = model_class(task, model_type)
    config = tiny_config(config_class, task, model_type)
    if not isinstance(config, chosen.config_class):  # of the language part of a larger model
        inner = [value for value in vars(config).values() if isinstance(value, chosen.config_class)]
        config = inner[0] if inner else config.get_text_config() if task == "causal" else config
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # some can't be built so
        size = sum(parameter.numel() for parameter in chosen(copy.deepcopy(config)).parameters())
        assert size <= LARGEST, f"{size / 1e6:.0f} million parameters: sweep_configs does not know its sizes"
    torch.manual_seed(0)
    model = _eager(chosen(config).double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


def _eager(model: Any) -> Any:
    """Experts one by one: grouped products know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def run(model: Any, batch: dict[str, Any]) -> list[Any]:
    """What a model returns for a batch, and its features of the batch's images and sounds."""
    returned = [model(**{key: value for key, value in batch.items() if key not in FEATURES})]
    for method in (key for key in FEATURES if key in batch):
        torch.manual_seed(0)
        with _Float64():
            returned.append(getattr(model, method)(**batch[method]))
    return returned


def outputs_of(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The floating tensors among that, caches left out."""
    return [tensor for returned in run(model, batch) for tensor in tensors(returned)]


def _with_features(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with images and sounds too, where the model has a part for them that runs."""
    for method, candidates in FEATURES.items():
        for inputs in candidates(model):
            with contextlib.suppress(Exception), torch.no_grad():
                if all(output.isfinite().all() for output in outputs_of(model, {**batch, method: inputs})):
                    batch = {**batch, method: inputs}
                    break
    return batch


def examine(task: str, model_type: str, known: str | None = None) -> Found | None:
    """Everything that is seen of one model type; None where its groups have the digest ``known``."""
    found = Found(task, model_type)
    try:
        _, chosen = model_class(task, model_type)
    except Exception as error:
        found.built = _said(error)
        return found
    with in_float64(chosen):
        try:
            model = built(task, model_type)
            batch = _with_features(model, inputs_of(task, model))
            with torch.no_grad():
                outputs = outputs_of(model, batch)
            assert outputs, "no floating output"
            assert all(output.isfinite().all() for output in outputs), "outputs are not finite"
        except Exception as error:  # whatever a model raises is the reason
            found.built = _said(error)
            return found
        try:
            found.groups = _digest(TransformersStructure(model))
            if found.groups == known:
                return None
            _compared(found, model, batch)
        except Exception as error:
            found.wrong = _said(error)
    return found


def _digest(structure: TransformersStructure) -> str:
    digest = hashlib.sha256(repr(sorted(structure.left_out.items())).encode())
    for name, block in structure.blocks.items():
        group = block.group
        slices = [
            (part.module, part.side, part.channels.tolist(), structure.weights.axes(block, part))
            for part in group.slices
        ]
        rest = (block.counters, dict(block.config), dict(block.config_fixed), block.reads_config, block.min_units)
        digest.update(repr((name, group.kind, slices, rest)).encode())
    return digest.hexdigest()[:16]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _compared(found: Found, model: Any, batch: dict[str, Any]) -> None:
    structure = TransformersStructure(model)
    proof = prove(structure, lambda network: run(network, batch))
    found.left_out = dict(Counter(structure.left_out.values()))
    for group in structure.groups:
        if group.name in proof.proved:
            found.kinds[group.kind] = found.kinds.get(group.kind, 0) + 1
        elif "did not run" in (reason := proof.unproved.get(group.name, "no smaller width is permitted")):
            found.unproved[group.kind] = found.unproved.get(group.kind, 0) + 1
        else:
            found.left_out[reason] = found.left_out.get(reason, 0) + 1
    if not structure.groups:
        return
    units = removed_units(structure)
    original = copy.deepcopy(model)
    beyond = masked(original, structure, units)  # these were proved with the weights masked
    compared = {name: gone for name, gone in units.items() if name not in beyond}
    pruned = TransformersStructure(copy.deepcopy(model))
    pruned.remove(compared)
    with torch.no_grad():
        found.error = max(
            proof.error, difference(outputs_of(pruned.model, batch), outputs_of(original, batch)) if compared else 0.0
        )
    if found.error > TOLERANCE:
        found.wrong = f"sliced and masked differ by {found.error:.2g}"
        return
    pruned = TransformersStructure(copy.deepcopy(model))
    pruned.remove(units)
    with torch.no_grad():
        sliced = outputs_of(pruned.model, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(pruned.model, pruned.plan, folder)
        loaded = _eager(load_pruned(folder, type(model)).double())
        with torch.no_grad():
            found.reloaded = difference(outputs_of(loaded, batch), sliced)
    if found.reloaded > TOLERANCE:
        found.wrong = f"the reloaded model differs by {found.reloaded:.2g}"
        return
    try:
        found.scored = _scored(model, batch)
    except ScoringError as refusal:
        found.left_out[f"obc.score refuses the model: {refusal}"] = 1
    if found.scored is not None and found.scored > SCORES:
        found.wrong = f"scores differ from explicit autograd by {found.scored:.2g}"


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return sum((output.square().mean() for output in outputs_of(model, batch)), torch.zeros((), dtype=torch.float64))


def _scored(model: Any, batch: dict[str, Any]) -> float | None:
    """One row of scores against weight times gradient, for some linear layers; None where autograd fails."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = layers[:: max(1, len(layers) // 4)][:4]
    weights = {name: model.get_submodule(name).weight for name in chosen}
    try:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(_loss(model, batch), [*weights.values(), *trained], allow_unused=True)
    except Exception:  # Reformer's reversible layers run backward in training mode only
        return None
    scores = obc.score(model, [batch], _loss, progress=False)
    worst = 0.0
    for (name, weight), grad in zip(weights.items(), grads, strict=False):
        values = scores[name].in_channels if name in scores else None
        if grad is None or values is None:
            continue
        expected = (weight * grad).sum(0).square().detach()
        if float(expected.max()) > 0:
            worst = max(worst, float((values.double() - expected).abs().max() / expected.max()))
    return worst


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seen = examine(sys.argv[1], sys.argv[2])
    assert seen is not None
    print(json.dumps(asdict(seen)))
