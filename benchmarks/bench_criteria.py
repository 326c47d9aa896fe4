"""The cost of scoring by each criterion: ``python -m benchmarks.bench_criteria``.

Time and peak memory of scoring every layer once from the same batches, data and forward passes included:

- L1: sums of absolute weights; no data.
- Taylor: the gradient of the summed batch losses, contracted once.
- Fisher (OBD): squared gradients of every weight added over the batches, times the squared weights.
- Hessian: as Torch-Pruning's users run it, one backward a sample and ``accumulate_grad``. Torch-Pruning 1.6.1 asks
  whether a *name* is among its keys, which are parameters, so that every call overwrites the one before: what is timed
  is the cost of the protocol; the scores that it leaves are the last sample's.
- JC, the authors' way: every batch's weight gradients kept, contracted at the end.
- JC, contracted at once: weight gradients contracted and dropped as they come, by obc's ``weight_dot``.
- JC by obc: batch rows and sample rows.
- JC by per-sample gradients of Opacus and of ``torch.func``: of every sample, then contracted.

The limit is forward and backward with frozen weights: no criterion that reads gradients can be faster. Memory is of a
process of its own, above the model. A way that a library refuses for a model is listed with its reason (``REFUSALS``);
any other error ends the run. After the tables: how time and memory grow with rows, batch and parameters, on the Llama
(``--growth``).

Opacus is optional: ``pip install --no-deps opacus opt-einsum`` leaves torch as it is.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from benchmarks import isolated
from benchmarks.bench_scoring import AGREEMENT, PLAIN, Subject, contract_and_drop, expected_scores, vgg19
from benchmarks.gpu_models import resnet50_model
from benchmarks.harness import Case, Provider, Result, Target, chosen, measure, parser_of, provenance, update

ROWS = 8
BATCH = 8
FLOOR = "frozen forward + backward"
OPACUS = "per-sample gradients, Opacus"
FUNC = "per-sample gradients, torch.func"


# --- models --------------------------------------------------------------------------------------------------------


def _class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(getattr(output, "logits", output), batch[1], reduction="none")


def _token_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch[1][:, 1:], reduction="none").mean(1)


def _images(rows: int, batch: int, side: int, classes: int) -> list[Any]:
    return [(torch.randn(batch, 3, side, side), torch.randint(classes, (batch,))) for _ in range(rows)]


def _vgg(rows: int, batch: int) -> Subject:
    model = vgg19().model
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # Opacus's hooks forbid it; the others don't mind
    return Subject(model, _images(rows, batch, 32, 10), _class_losses)


def _resnet(rows: int, batch: int) -> Subject:
    return Subject(resnet50_model().eval(), _images(rows, batch, 96, 1000), _class_losses)


def _vit(rows: int, batch: int) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=96,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_labels=1000,
    )
    return Subject(ViTForImageClassification(config).eval(), _images(rows, batch, 96, 1000), _class_losses)


def _llama(rows: int, batch: int, width: int = 512) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_cache=False,
    )
    tokens = [torch.randint(4096, (batch, 128)) for _ in range(rows)]
    return Subject(LlamaForCausalLM(config).eval(), [(ids, ids) for ids in tokens], _token_losses)


MODELS: dict[str, Callable[[int, int], Subject]] = {
    "VGG-19, 32 x 32": _vgg,
    "ResNet-50, 96 x 96": _resnet,
    "ViT-S, 96 x 96": _vit,
    "Llama-like, 8 x 512, 128 tokens": _llama,
}


# --- ways ----------------------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _backward(subject: Subject, model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    subject.loss(model, batch).backward()


def _grad(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _contract(weight: Tensor, grad: Tensor) -> Tensor:
    """(C_out,) or, of per-sample gradients, (B, C_out): the sum of weight times gradient."""
    return (weight.detach() * grad).flatten(1 + grad.dim() - weight.dim()).sum(-1)


def plain(subject: Subject) -> None:
    for batch in subject.batches:
        _backward(subject, subject.model, batch)


def l1(subject: Subject) -> list[Tensor]:
    return [weight.detach().abs().flatten(1).sum(1) for weight in _weights(subject.model)]


def taylor(subject: Subject) -> list[Tensor]:
    subject.model.zero_grad()
    for batch in subject.batches:
        subject.loss(subject.model, batch).backward()
    return [_contract(weight, _grad(weight)).abs() for weight in _weights(subject.model)]


def fisher(subject: Subject) -> list[Tensor]:
    weights = _weights(subject.model)
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in subject.batches:
        _backward(subject, subject.model, batch)
        for squares, weight in zip(total, weights, strict=True):
            squares.addcmul_(_grad(weight), _grad(weight))
    return [(squares * weight.detach() ** 2).flatten(1).sum(1) for squares, weight in zip(total, weights, strict=True)]


def hessian(subject: Subject) -> None:
    import torch_pruning as tp

    importance = tp.importance.GroupHessianImportance()
    importance.zero_grad()
    for batch in subject.batches:
        for loss in subject.losses(subject.model, batch):
            subject.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(subject.model)


def authors(subject: Subject) -> list[Tensor]:
    weights = _weights(subject.model)
    stored: list[list[Tensor]] = []
    for batch in subject.batches:
        _backward(subject, subject.model, batch)
        stored.append([_grad(weight).clone() for weight in weights])
    found = []
    for weight, grads in zip(weights, zip(*stored, strict=True), strict=True):
        found.append(_contract(weight, torch.stack(grads)).square().sum(0))
    return found


def at_once(subject: Subject) -> None:
    handles = [weight.register_post_accumulate_grad_hook(contract_and_drop) for weight in _weights(subject.model)]
    for batch in subject.batches:
        _backward(subject, subject.model, batch)
    for handle in handles:
        handle.remove()


def by_obc(subject: Subject, rows: str) -> obc.Scores:
    loss = subject.losses if rows == "sample" else subject.loss
    return obc.score(subject.model, subject.batches, loss, rows=rows, progress=False)  # type: ignore[arg-type]


def for_opacus(subject: Subject) -> Subject:
    """A copy that Opacus takes: it records in training mode only, and refuses BatchNorm unless that is frozen."""
    model = copy.deepcopy(subject.model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return Subject(model, subject.batches, subject.losses)


def by_opacus(subject: Subject) -> None:
    from opacus.grad_sample import GradSampleModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(subject.model, strict=False)
        for batch in subject.batches:
            wrapped.zero_grad()
            subject.losses(wrapped, batch).sum().backward()
            for weight in _weights(subject.model):
                recorded = weight.grad_sample  # type: ignore[attr-defined]
                if recorded is None:
                    raise NotImplementedError(f"no per-sample gradients of a weight of shape {tuple(weight.shape)}")
                _contract(weight, recorded).square().sum(0)
        wrapped.zero_grad()
        wrapped.to_standard_module()


def by_func(subject: Subject) -> None:
    model = subject.model
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def call(inputs: Tensor) -> Any:
            return torch.func.functional_call(model, parameters, (inputs,))

        return subject.losses(call, (x[None], y[None]))[0]  # type: ignore[arg-type]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for x, y in subject.batches:
        for name, grad in gradients(values, x, y).items():
            if values[name].dim() > 1:
                _contract(values[name], grad).square().sum(0)


WAYS: dict[str, Callable[[Subject], Any]] = {
    PLAIN: plain,
    "L1": l1,
    "Taylor": taylor,
    "Fisher (OBD)": fisher,
    "Hessian (Torch-Pruning)": hessian,
    "JC, authors' way": authors,
    "JC, contracted at once": at_once,
    "obc, JC batch rows": partial(by_obc, rows="batch"),
    "obc, JC sample rows": partial(by_obc, rows="sample"),
    OPACUS: by_opacus,
    FUNC: by_func,
}


@dataclass(frozen=True)
class Refusal:
    """How a library says that it does not take a model: an error of this kind, with one of these in its message."""

    kind: type[Exception]
    messages: tuple[str, ...] = ("",)

    def covers(self, error: Exception) -> bool:
        return isinstance(error, self.kind) and any(message in str(error) for message in self.messages)


REFUSALS = {
    OPACUS: (
        Refusal(NotImplementedError),  # layers with buffers, weights that it did not see in use
        Refusal(RuntimeError, ("is a view and is being modified inplace",)),  # its hooks keep layers' outputs
    ),
    FUNC: (
        Refusal(
            RuntimeError,
            (
                "vmap: ",  # control flow and shapes that depend on data, random numbers
                "that would mutate a captured Tensor",  # statistics of a BatchNorm in training mode
                "Batch norm got a batched tensor",  # those of an InstanceNorm
                "Cannot access data pointer of Tensor",  # NumPy
            ),
        ),
    ),
}


def refusal(way: str, error: Exception) -> str | None:
    """Why the library of this way does not take the model; None where the error is a fault."""
    if not any(kind.covers(error) for kind in REFUSALS.get(way, ())):
        return None
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def frozen(subject: Subject) -> Callable[[], None]:
    """Forward and backward of all batches with frozen weights, down to the first layer's input."""
    model = copy.deepcopy(subject.model).requires_grad_(False)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding)))
    first.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def run() -> None:
        for batch in subject.batches:
            subject.loss(model, batch).backward()

    return run


# --- tables --------------------------------------------------------------------------------------------------------


OBC_ROWS = "obc, JC batch rows"
TARGETS = [Target(OBC_ROWS, "Taylor", 1.0)]


def case_of(
    make: Callable[[int, int], Subject], rows: int, batch: int, ways: Sequence[str] = tuple(WAYS)
) -> tuple[Case, dict[str, str]]:
    """The case, and way -> why it can't be run on this model."""
    torch.manual_seed(0)
    subject = make(rows, batch)
    expected = expected_scores(subject)
    names = [n for n, m in subject.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    refused, providers = {}, []
    for name in ways:
        way, own = WAYS[name], subject
        if name == OPACUS:
            if importlib.util.find_spec("opacus") is None:
                refused[name] = "Opacus is not installed: pip install --no-deps opacus opt-einsum"
                continue
            own = for_opacus(subject)
        try:
            way(Subject(own.model, own.batches[:1], own.losses))
        except Exception as error:
            if (why := refusal(name, error)) is None:
                raise
            refused[name] = why
            continue
        providers.append(Provider(name, partial(way, own)))

    def check(scores: obc.Scores) -> None:
        for name, truth in zip(names, expected, strict=True):
            found = scores[name].out_channels
            assert found is not None
            error = float((found - truth).abs().max() / truth.abs().max())
            assert error < AGREEMENT, f"{name}: relative error {error:.1e}"

    bytes_moved = rows * sum(parameter.nbytes for parameter in subject.model.parameters())
    unchecked = frozenset(ways) - {OBC_ROWS}
    limit = Provider(FLOOR, frozen(subject))
    targets = [target for target in TARGETS if {target.provider, target.against} <= set(ways)]
    return Case(providers, ways[0], limit, bytes_moved, check, unchecked, targets), refused


def child(model: str, way: str, rows: int, batch: int, width: int, threads: int) -> dict[str, Any]:
    """Seconds and peak memory of one way, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    subject = _llama(rows, batch, width) if width else MODELS[model](rows, batch)
    subject = for_opacus(subject) if way == OPACUS else subject
    with torch.no_grad():
        subject.loss(subject.model, subject.batches[0])
    found = isolated.measure(partial(WAYS[way], subject))
    return found | {"parameters": sum(parameter.numel() for parameter in subject.model.parameters())}


def in_a_process(model: str, way: str, rows: int, batch: int, threads: int, width: int = 0) -> dict[str, Any]:
    return isolated.run("bench_criteria", ["--child", model, way, rows, batch, width, threads])


GROWTH_WAYS = ("Taylor", "Fisher (OBD)", "JC, authors' way", "obc, JC batch rows", "obc, JC sample rows")
GROWTH = {
    "rows": [(rows, 4, 256) for rows in (4, 16, 64)],
    "batch": [(4, batch, 256) for batch in (2, 8, 32)],
    "parameters": [(4, 4, width) for width in (256, 512, 1024)],
}


def growth(threads: int, quick: bool) -> list[dict[str, Any]]:
    """Time and memory on the Llama as rows, samples of a row, or parameters grow."""
    found = []
    for what, points in GROWTH.items():
        for way in GROWTH_WAYS:
            for rows, batch, width in points[: 1 if quick else None]:
                result = in_a_process("Llama-like, 8 x 512, 128 tokens", way, rows, batch, threads, width)
                name = f"growth with {what}: {way}, {rows} rows of {batch}, width {width}"
                said = result.get("failed") or f"{result['seconds'] / rows:.3f} s a row, {result['peak_mib']:.0f} MiB"
                print(f"{name}: {said}", flush=True)
                found.append({"name": name, "way": way, "rows": rows, "batch": batch, "width": width, **result})
    return found


def _mib(found: dict[str, Any]) -> str:
    return f"{found['peak_mib']:.0f} MiB above the model"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_criteria", repeats=5)
    parser.add_argument("--rows", type=int, default=ROWS, help="batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="those compared, by default all")
    parser.add_argument("--growth", action="store_true", help="only how time and memory grow, on the Llama")
    parser.add_argument("--child", nargs=6, help="one way in this process: model, way, rows, batch, width, threads")
    arguments = parser.parse_args(argv)
    if arguments.child:
        model, way, *numbers = arguments.child
        print(json.dumps(child(model, way, *map(int, numbers))))
        return 0
    titles = chosen(list(MODELS), arguments, parser)
    facts = provenance(arguments.repeats, arguments.threads) | {"rows": arguments.rows, "batch": arguments.batch}
    if arguments.growth:
        results = growth(arguments.threads, arguments.quick)
        if arguments.out:
            update(arguments.out.with_name("bench_criteria_growth.json"), facts, results)
        return 0
    print(f"{facts['cpu']}, {arguments.threads} threads, {arguments.rows} rows of {arguments.batch}, float32\n")
    for title in titles:
        case, refused = case_of(MODELS[title], arguments.rows, arguments.batch, arguments.ways)
        result: Result = measure(title, case, arguments.repeats, arguments.threads)
        print(result.table(), flush=True)
        content = result.as_dict() | {"refused": refused}
        del case, result
        for way, row in content["providers"].items():
            if way in WAYS:
                alone = in_a_process(title, way, arguments.rows, arguments.batch, arguments.threads)
                row |= {key: value for key, value in alone.items() if key != "seconds"}
                print(f"  {way}: {alone.get('failed') or _mib(alone)}", flush=True)
        for way, why in refused.items():
            print(f"  {way}: not run: {why}")
        if arguments.out:
            update(arguments.out, facts, [content])
    return 0


if __name__ == "__main__":
    sys.exit(main())
