"""One network of another library: built small, its groups found, half of each removed, compared, scored, pruned."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sweep_comparison import TOLERANCE, difference, masked, removed_units, tensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

import obc
from obc.model.evaluation import call
from obc.model.refusals import computing_hooks
from obc.scoring.errors import ScoringError
from obc.structures.traced import TorchPruningStructure

SCORES, FLOATS = 1e-3, torch.finfo(torch.float32)  # of scores
# The share of MACs that is executed, less the share that is predicted: products with a single channel left may run
# elementwise, which torch does not count.
COUNTED = -1e-2, 1e-3
BUDGET = 0.5
# What obc raises, with a message that is meant for a user.
CLEAR = (obc.PruningError, obc.PlanError, ScoringError, ValueError)

Inputs = Callable[[int, torch.Generator], Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture of a library, in small.

    Attributes:
        name: in the table.
        build: returns the network; random numbers are seeded.
        inputs: ``inputs(batch size, generator)`` returns what it is called with: a tensor, a tuple, or a dict.
        options: further arguments of ``TorchPruningStructure``, such as ``num_heads``.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)


def drawn(*shape: int) -> Inputs:
    """Inputs of one tensor of this shape after the batch size: ``drawn(3, 64, 64)`` are images."""
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator)


@dataclass
class Seen:
    """The findings about one architecture.

    Attributes:
        library: the library's file.
        name: of the architecture.
        built: why it was not built, or does not run forward and backward; empty where it does.
        groups: the number of groups that are proved.
        compared: how many of them hooks can mask; the others are compared by obc's own proof only.
        left_out: reason -> how many groups and layers.
        warnings: of the structure.
        error: the largest relative difference between the sliced and the masked network; None where nothing can go.
        half: the share of MACs that remains if every group loses half of its units.
        pruned: the share of MACs that ``obc.prune(macs=0.5)`` left.
        refused: why ``obc.prune``, or ``obc.score``, refused, in its own words.
        scored: the largest relative difference between scores and explicit autograd; None where nothing was compared.
        seconds: of CPU time for finding and proving the groups.
        wrong: what is wrong; empty where nothing is.
    """

    library: str
    name: str
    built: str = ""
    groups: int = 0
    compared: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: float | None = None
    half: float | None = None
    pruned: float | None = None
    refused: str = ""
    scored: float | None = None
    seconds: float = 0.0
    wrong: str = ""


def examine(library: str, architecture: Architecture) -> Seen:
    """Everything that is seen of one architecture."""
    seen = Seen(library, architecture.name)
    with _float64():
        try:
            model = built(architecture)
            inputs = drawn_inputs(architecture)
            outputs = _outputs(model, inputs)
            assert outputs, "no floating output"
            assert all(output.isfinite().all() for output in outputs), "outputs are not finite"
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(_loss(model, inputs), trained, allow_unused=True)
        except Exception as error:  # whatever a library's code raises is the reason
            seen.built = _said(error)
            return seen
        try:
            _compare(seen, architecture, model, inputs)
        except CLEAR as error:
            seen.refused = _said(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            seen.wrong = f"{_said(error)} at {Path(place.filename).name}:{place.lineno}"
    return seen


@contextmanager
def _float64() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def drawn_inputs(architecture: Architecture, batch: int = 2, seed: int = 0) -> Any:
    """Seeded inputs of an architecture, in the default dtype."""
    return architecture.inputs(batch, torch.Generator().manual_seed(seed))


def built(architecture: Architecture) -> nn.Module:
    """The network in float64 and eval mode; parameters and statistics are random, so that no start value hides a fault.

    BatchNorms get statistics of the network's own activations, moved at random: with any others the activations of a
    deep network would overflow. Parametrised layers become plain ones, as obc asks for.
    """
    torch.manual_seed(0)
    model = architecture.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter) * (0.3 * spread or 0.1))
            elif parameter.is_floating_point():
                parameter.mul_(0.75 + 0.5 * torch.rand_like(parameter)).add_(torch.randn_like(parameter) * 0.1)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            call(model.train(), drawn_inputs(architecture, 4, 2))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var.mul_(0.5 + torch.rand_like(norm.running_var)).clamp_(min=1e-3)
    if any(is_parametrized(module) or computing_hooks(module) for module in model.modules()):
        obc.plain_layers(model.eval(), drawn_inputs(architecture))
    return model.eval()


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # of what a variational model draws
    with torch.no_grad():
        return tensors(call(model, inputs))


def _compare(seen: Seen, architecture: Architecture, model: nn.Module, inputs: Any) -> None:
    started = time.process_time()
    structure = TorchPruningStructure(model, inputs, **architecture.options)
    _outputs(model, inputs)  # some keep activations, which have a graph after tracing and can't be copied
    seen.seconds = time.process_time() - started
    proof = structure.proof
    assert proof is not None
    seen.groups = len(proof.proved)
    seen.left_out = dict(Counter([*structure.left_out.values(), *proof.unproved.values()]))
    seen.warnings = structure.warnings
    if structure.groups:
        costs = structure.costs("macs")
        seen.half = costs.total(costs.widths - (costs.widths / 2).floor()) / costs.total()
        _sliced_and_masked(seen, architecture, model, structure)
    seen.scored = _scored(copy.deepcopy(model), inputs)
    if seen.scored is not None and seen.scored > SCORES:
        seen.wrong = seen.wrong or f"scores differ from explicit autograd by {seen.scored:.2g}"
    if not seen.wrong:
        _prune(seen, architecture, structure, inputs)


def _sliced_and_masked(seen: Seen, architecture: Architecture, model: nn.Module, structure: Any) -> None:
    """On the example inputs, on others of another batch size, in train mode, and after saving and loading."""
    units = removed_units(structure)
    original = copy.deepcopy(model)
    beyond = masked(original, structure, units)  # these were proved with the weights masked
    compared = {name: gone for name, gone in units.items() if name not in beyond}
    seen.compared = len(compared)
    pruned = copy.deepcopy(model)
    twin = structure.twin(pruned)
    twin.remove(compared)
    seen.error = structure.proof.error
    for batch, seed in (2, 0), (3, 1):
        inputs = drawn_inputs(architecture, batch, seed)
        seen.error = max(seen.error, difference(_outputs(pruned, inputs), _outputs(original, inputs)))
    if seen.error > TOLERANCE:
        seen.wrong = f"sliced and masked differ by {seen.error:.2g}"
        return
    original.train()
    trained = copy.deepcopy(pruned).train()
    state = torch.get_rng_state()
    theirs = _outputs(original, inputs)
    if torch.equal(torch.get_rng_state(), state):  # dropout would draw other numbers
        apart = difference(_outputs(trained, inputs), theirs)
        if apart > TOLERANCE:
            seen.wrong = f"sliced and masked differ by {apart:.2g} in train mode"
            return
    with tempfile.TemporaryDirectory() as folder:
        twin.plan.save(path := Path(folder) / "plan.json")
        reloaded = obc.PruningPlan.load(path).apply(copy.deepcopy(model))
        reloaded.load_state_dict(pruned.state_dict())
    if difference(_outputs(reloaded, inputs), _outputs(pruned, inputs)) > 0:
        seen.wrong = "the reloaded model differs"


def _loss(model: nn.Module, inputs: Any) -> Tensor:
    torch.manual_seed(0)
    outputs = tensors(call(model, inputs))
    return sum((output.square().mean() for output in outputs), torch.zeros((), dtype=torch.float64))


def _scored(model: nn.Module, inputs: Any) -> float | None:
    """One row of scores of some layers against their weights and biases times gradients; None where none was read."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    scores = obc.score(copy.deepcopy(model), [inputs], _loss, progress=False)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    chosen = layers[:: max(1, len(layers) // 6)][:6]
    plain = copy.deepcopy(model)  # gates read what a computed weight does, not the parameter that it is computed from
    obc.plain_layers(plain, inputs)
    held: dict[str, list[nn.Parameter]] = {}
    grads: dict[nn.Parameter, Tensor | None] = {}
    for one, gates in ((plain, True), (model, False)):
        names = [name for name in chosen if name in scores and (scores.coverage[name].how == "gate") == gates]
        own = {name: dict(one.get_submodule(name).named_parameters(recurse=False)) for name in names}
        held |= {name: [p for key, p in ones.items() if key in ("weight", "bias")] for name, ones in own.items()}
        flat = [p for name in names for p in held[name] if p.requires_grad]
        if flat:
            grads |= zip(flat, torch.autograd.grad(_loss(one, inputs), flat, allow_unused=True), strict=True)
    worst: float | None = None
    for name, parameters in held.items():
        values = scores[name].out_channels
        if values is None or any(grads.get(parameter) is None for parameter in parameters):
            continue
        expected = sum(
            (p * grads[p]).detach().flatten(1).sum(1) if p.dim() > 1 else (p * grads[p]).detach() for p in parameters
        )
        expected = expected.square()
        if FLOATS.tiny < float(expected.max()) < FLOATS.max:  # obc.score names or refuses modules of others
            worst = max(worst or 0.0, float((values.double() - expected).abs().max() / expected.max()))
    return worst


def _prune(seen: Seen, architecture: Architecture, structure: Any, inputs: Any) -> None:
    """The whole job; the network is pruned."""
    batches = [drawn_inputs(architecture, 2, seed) for seed in range(3, 7)]
    given = {"macs": BUDGET, "steps": 2, "forward_fn": call, "progress": False}
    result = obc.prune(structure.model, batches=batches, loss_fn=_loss, structure=structure, **given)
    report = result.report
    seen.pruned = report.macs_after / report.macs_before
    if seen.pruned > BUDGET + 1e-9:
        seen.wrong = f"obc.prune left {seen.pruned:.3f} of the MACs"
        return
    said = any("MACs" in warning for warning in [*seen.warnings, *report.warnings])
    measured = seen.pruned if report.macs_measured is None else report.macs_measured
    if not COUNTED[0] <= measured - seen.pruned <= COUNTED[1] and not said:
        seen.wrong = f"{measured:.3f} of the MACs are executed, {seen.pruned:.3f} were predicted"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
