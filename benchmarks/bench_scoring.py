"""Speed and memory of scoring: ``python -m benchmarks.bench_scoring``.

One table for a steady row and one for a whole run (the checking row included) of each model. The floor, also the
limit of the tables, is forward and backward with frozen weights and nothing read: activation gradients alone. "GB/s"
counts the parameters, read once in a row. After the tables: how far peak memory grows from 2 to 32 rows on the Llama,
each in a process of its own (``--memory`` prints that alone); and what a row keeps for its backward, beside what the
floor keeps (``--kept``).
"""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from benchmarks.harness import Case, Provider, Target, main
from obc import ops, reference

RUN_ROWS = 50  # rows of a whole run, as in the paper; the checking row is one of them
MEMORY_ROWS = (2, 32)
MEMORY_TARGET_MIB = 20.0
FLOOR, PLAIN = "floor", "forward + backward"
BATCH_ROWS, SAMPLE_ROWS = "obc batch rows", "obc sample rows"
CONSUMER_ROWS = "obc batch rows, inputs alone"  # what obc.prune reads
SAMPLE_TARGET = Target(SAMPLE_ROWS, BATCH_ROWS, 1.1)
CONSUMER_TARGET = Target(CONSUMER_ROWS, FLOOR, 1.03)
# Scores of two ways to compute them in float32; see tests/parity.py for the reason of the figure.
AGREEMENT = 1e-3


@dataclass
class Subject:
    """A model, a maker of batches, and a loss with one value per sample; targets against the floor and PLAIN."""

    model: nn.Module
    batches: list[Any]
    losses: Callable[[nn.Module, Any], Tensor]
    against_floor: float | None = None
    against_plain: float | None = None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.losses(model, batch).mean()

    def targets(self, provider: str) -> list[Target]:
        pairs = ((FLOOR, self.against_floor), (PLAIN, self.against_plain))
        return [Target(provider, against, ratio) for against, ratio in pairs if ratio is not None]


# --- models --------------------------------------------------------------------------------------------------------


def _class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(getattr(output, "logits", output), batch[1], reduction="none")


def _token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def _images(count: int) -> list[Any]:
    return [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(count)]


def vgg19() -> Subject:
    """VGG-19 with BatchNorm for images of 32 x 32."""
    layers: list[nn.Module] = []
    width = 3
    for stage, (out, depth) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(depth):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            width = out
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))
    return Subject(model.eval(), _images(RUN_ROWS), _class_losses, 1.03, 0.75)


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet56() -> Subject:
    """ResNet-56 for images of 32 x 32."""
    widths = [16] + [width for width in (16, 32, 64) for _ in range(9)]
    blocks = [_Block(before, width, 1 + (before != width)) for before, width in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return Subject(model.eval(), _images(RUN_ROWS), _class_losses, 1.08)


def llama(rows: int = RUN_ROWS) -> Subject:
    """A Llama of 16 million parameters with grouped queries; sequences of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        use_cache=False,
    )
    batches = [torch.randint(4096, (4, 128)) for _ in range(rows)]
    return Subject(LlamaForCausalLM(config).eval(), batches, _token_losses, 1.08, 0.80)


def vit() -> Subject:
    """A ViT of 2.7 million parameters on 65 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_labels=10,
    )
    return Subject(ViTForImageClassification(config).eval(), _images(RUN_ROWS), _class_losses, 1.06, 0.95)


def small_cnn() -> Subject:
    """Small enough for the gradients of every sample at once."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 2)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return Subject(model.eval(), _images(RUN_ROWS), _class_losses, 1.15, 1.0)


# --- ways to score -------------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _plain_row(subject: Subject, model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    subject.loss(model, batch).backward()


def _frozen(model: nn.Module) -> nn.Module:
    """A copy with frozen weights in which gradients still flow back to the first layer's input."""
    model = copy.deepcopy(model).requires_grad_(False)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding)))
    if isinstance(first, nn.Embedding):
        first.register_forward_hook(lambda module, args, output: output.requires_grad_())
    else:
        first.register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(),))
    return model


def _authors_run(subject: Subject, model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Keep every batch's weight gradients and contract them at the end, as the paper's code does."""
    weights = _weights(model)
    stored: list[list[Tensor]] = []
    for batch in batches:
        _plain_row(subject, model, batch)
        stored.append([weight.grad.clone() for weight in weights if weight.grad is not None])
    scores = []
    for weight, grads in zip(weights, zip(*stored, strict=True), strict=True):
        rows = (torch.stack(grads) * weight.detach()).flatten(2).sum(2)
        scores.append(rows.square().sum(0))
    return scores


def contract_and_drop(weight: Tensor) -> None:
    """A hook for gradients that have come: the weight's is contracted by weight_dot, and gone."""
    assert weight.grad is not None
    ops.weight_dot(weight.detach(), weight.grad)
    weight.grad = None


def contracting(model: nn.Module) -> nn.Module:
    """``model`` itself; its weight gradients are contracted and dropped as soon as they exist."""
    for weight in _weights(model):
        weight.register_post_accumulate_grad_hook(contract_and_drop)
    return model


def _inputs_alone(model: nn.Module) -> dict[str, list[str]]:
    """The sides to read if only inputs of layers are read."""
    return {name: ["in"] for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def _steady(subject: Subject, rows: str, compiled: bool = False, modules: Any = None) -> Callable[[], None]:
    """One row of an attached scorer that has its checking row behind it. It stays attached, on a copy of its own."""
    model, batch = copy.deepcopy(subject.model), subject.batches[0]
    scorer = obc.JacobianScorer(model, rows=rows, modules=modules)
    scorer.__enter__()
    if compiled:
        model = torch.compile(model, fullgraph=True)

    def row() -> None:
        with scorer.row():
            losses = subject.losses(model, batch)
            (losses.sum() if rows == "sample" else losses.mean()).backward()

    row()  # the checking row
    row()  # the row that makes the gates in C++
    return row


def _vmap(subject: Subject) -> Callable[[], None]:
    """torch.func: the gradients of every sample, then the rows."""
    model = copy.deepcopy(subject.model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    x, labels = subject.batches[0]

    def row() -> None:
        for name, grad in gradients(parameters, x, labels).items():
            if grad.dim() > 2:
                (grad * parameters[name]).flatten(2).sum(2).square().sum(0)

    return row


# --- tables --------------------------------------------------------------------------------------------------------


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def steady_row(make: Callable[[], Subject], per_sample: bool = False) -> Case:
    """One row after the checking row."""
    torch.manual_seed(0)
    subject = make()
    batch, plain, frozen = subject.batches[0], copy.deepcopy(subject.model), _frozen(subject.model)
    contracted = contracting(copy.deepcopy(subject.model))
    providers = [
        Provider(PLAIN, lambda: _plain_row(subject, plain, batch)),
        Provider(BATCH_ROWS, _steady(subject, "batch")),
        Provider(CONSUMER_ROWS, _steady(subject, "batch", modules=_inputs_alone(subject.model))),
        Provider(SAMPLE_ROWS, _steady(subject, "sample")),
        Provider("contracted at once", lambda: _plain_row(subject, contracted, batch)),
        *([Provider("vmap(grad)", _vmap(subject))] if per_sample else []),
    ]
    return Case(
        providers,
        baseline=PLAIN,
        limit=Provider(FLOOR, lambda: subject.loss(frozen, batch).backward()),
        bytes_moved=_bytes(subject.model),
        check=lambda result: None,
        unchecked=frozenset(provider.name for provider in providers),
        targets=[*subject.targets(BATCH_ROWS), CONSUMER_TARGET, SAMPLE_TARGET],
    )


def compiled_row(make: Callable[[], Subject]) -> Case:
    """One row after the checking row, of a model of images that torch.compile has captured whole, gates and all."""
    torch._dynamo.reset()  # models of the case before count against its limit
    torch.manual_seed(0)
    subject = make()
    batch, plain = subject.batches[0], copy.deepcopy(subject.model)
    compiled = torch.compile(copy.deepcopy(subject.model), fullgraph=True)
    frozen = torch.compile(copy.deepcopy(subject.model).requires_grad_(False), fullgraph=True)
    watched = (batch[0].clone().requires_grad_(), batch[1])
    providers = [
        Provider(PLAIN, lambda: _plain_row(subject, plain, batch)),
        Provider(f"{PLAIN}, compiled", lambda: _plain_row(subject, compiled, batch)),
        Provider(BATCH_ROWS, _steady(subject, "batch")),
        Provider(f"{BATCH_ROWS}, compiled", _steady(subject, "batch", compiled=True)),
    ]
    return Case(
        providers,
        baseline=PLAIN,
        limit=Provider(f"{FLOOR}, compiled", lambda: subject.loss(frozen, watched).backward()),
        bytes_moved=_bytes(subject.model),
        check=lambda result: None,
        unchecked=frozenset(provider.name for provider in providers),
    )


def whole_run(make: Callable[[], Subject]) -> Case:
    """RUN_ROWS rows, attaching, checking and detaching included."""
    torch.manual_seed(0)
    subject = make()
    plain, frozen = copy.deepcopy(subject.model), _frozen(subject.model)
    expected = expected_scores(subject)
    names = [n for n, m in subject.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def score(rows: str) -> obc.Scores:
        loss = subject.losses if rows == "sample" else subject.loss
        return obc.score(subject.model, subject.batches, loss, rows=rows, progress=False)

    def plainly(model: nn.Module) -> None:
        for batch in subject.batches:
            _plain_row(subject, model, batch)

    def check(result: Any) -> None:
        found = [result[name].out_channels for name in names] if isinstance(result, obc.Scores) else result
        for name, value, truth in zip(names, found, expected, strict=True):
            error = float((value - truth).abs().max() / truth.abs().max())
            assert error <= AGREEMENT, f"{name}: relative error {error:.1e}"

    return Case(
        [
            Provider(PLAIN, lambda: plainly(plain)),
            Provider(BATCH_ROWS, lambda: score("batch")),
            Provider(SAMPLE_ROWS, lambda: score("sample")),
            Provider("authors' way", lambda: _authors_run(subject, plain, subject.batches)),
        ],
        baseline=PLAIN,
        limit=Provider(FLOOR, lambda: plainly(frozen)),
        bytes_moved=RUN_ROWS * _bytes(subject.model),
        check=check,
        unchecked=frozenset({PLAIN, SAMPLE_ROWS, "authors' way"}),
        targets=[*subject.targets(BATCH_ROWS), SAMPLE_TARGET],
    )


def expected_scores(subject: Subject) -> list[Tensor]:
    """Out-channel scores from plain weight and bias gradients by the reference's definition."""
    model = copy.deepcopy(subject.model)
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    total = [torch.zeros(m.weight.shape[0]) for m in modules]
    for batch in subject.batches:
        _plain_row(subject, model, batch)
        for scores, module in zip(total, modules, strict=True):
            bias, bias_grad = module.bias, None if module.bias is None else module.bias.grad
            with torch.no_grad():
                scores += reference.weight_dot(module.weight, module.weight.grad, bias, bias_grad)[0].square()
    return total


MODELS = {"VGG-19": vgg19, "ResNet-56": resnet56, "Llama 16 M": llama, "ViT 2.7 M": vit}
CASES: dict[str, Callable[[], Case]] = {
    **{f"{name}, a steady row": lambda make=make: steady_row(make) for name, make in MODELS.items()},
    **{f"{name}, a run of {RUN_ROWS} rows": lambda make=make: whole_run(make) for name, make in MODELS.items()},
    "small CNN, a steady row": lambda: steady_row(small_cnn, per_sample=True),
    **{
        f"{name}, a compiled row": lambda make=make: compiled_row(make)
        for name, make in {"small CNN": small_cnn, "ResNet-56": resnet56, "ViT 2.7 M": vit}.items()
    },
}


# --- memory --------------------------------------------------------------------------------------------------------


def _peak_mib(way: str, rows: int) -> float:
    """Peak resident memory of a process that scores so many rows.

    What it frees returns to the system at once: blocks that malloc keeps differ by 20 MiB from run to run.
    """
    command = [sys.executable, "-m", "benchmarks.bench_scoring", "--peak-of", way, str(rows)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def _print_peak(way: str, rows: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    subject = llama(rows)
    if way == "obc":
        obc.score(subject.model, subject.batches, subject.loss, progress=False)
    else:
        _authors_run(subject, subject.model, subject.batches)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts in KiB


def print_memory() -> None:
    """The growth of peak memory with the number of rows."""
    few, many = MEMORY_ROWS
    for way in ("obc", "authors"):
        growth = _peak_mib(way, many) - _peak_mib(way, few)
        line = f"Llama 16 M, {way}: peak memory grows by {growth:.1f} MiB from {few} to {many} rows"
        if way == "obc":
            line += f" (target: less than {MEMORY_TARGET_MIB:g}): {'met' if growth < MEMORY_TARGET_MIB else 'missed'}"
        print(line, flush=True)


# --- what is kept for the backward ---------------------------------------------------------------------------------


def _kept_mib(model: nn.Module, forward: Callable[[], Tensor]) -> float:
    """MiB of the storages that autograd saves in one forward pass, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(kept.values()) / 2**20


def _kept_by_rows(subject: Subject, modules: Any = None) -> float:
    model, batch = copy.deepcopy(subject.model), subject.batches[0]
    scorer = obc.JacobianScorer(model, modules=modules)
    with scorer:
        with scorer.row():
            subject.loss(model, batch).backward()
        with scorer.row():
            return _kept_mib(model, lambda: subject.loss(model, batch))


def print_kept() -> None:
    """The memory of activations kept for a backward: at the floor, in a row, and in a row of inputs alone."""
    for name, make in {**MODELS, "small CNN": small_cnn}.items():
        torch.manual_seed(0)
        subject = make()
        frozen = _frozen(subject.model)
        floor = _kept_mib(frozen, lambda subject=subject, frozen=frozen: subject.loss(frozen, subject.batches[0]))
        rows, consumers = _kept_by_rows(subject), _kept_by_rows(subject, _inputs_alone(subject.model))
        print(
            f"{name}: {floor:.1f} MiB kept for the backward at the floor, {rows - floor:+.1f} in a row, "
            f"{consumers - floor:+.1f} in a row of layers' inputs alone",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        _print_peak(sys.argv[2], int(sys.argv[3]))
        sys.exit()
    alone = {"--memory": print_memory, "--kept": print_kept}
    if sys.argv[1:2] and sys.argv[1] in alone:
        alone[sys.argv[1]]()
        sys.exit()
    status = main("bench_scoring", CASES)
    if not any(argument.startswith("--only") for argument in sys.argv):
        print_memory()
        print_kept()
    sys.exit(status)
