"""Local transformers directories for the command line: the model, and the loss for its kind.

Nothing is downloaded, no code in the directory is run, and weights are read from safetensors only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from obc.commands.common import UsageError
from obc.files import refuse_unfinished
from obc.model.arguments import listed
from obc.model.batches import RowKind
from obc.model.errors import explained
from obc.model.evaluation import checkpoints_activations, main_output
from obc.model.plan import PruningPlan
from obc.scoring.label_free import Metric, label_free_loss

PACKAGES = {"transformers": "transformers"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LABEL_FREE: dict[str, Metric] = {"label-free": "euclidean", "kl": "kl"}
LOSSES = ("auto", "causal-lm", "masked-lm", "label", *LABEL_FREE)

Batch = Mapping[str, Any]
Losses = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the label of a token that does not count

# The end of an architecture's name in config.json -> the loss of its head. What is not here has no logits, or unknown
# ones, and is scored by its outputs as they are.
_LOSSES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForImageClassification": "label",
    "ForSequenceClassification": "kl",
    "ForTokenClassification": "kl",
}


@dataclass(frozen=True)
class ModelDirectory:
    """A model from a local directory.

    Attributes:
        model: in eval mode, on its device.
        loss: the kind of loss for scoring it.
        path: the directory.
        plan: what an earlier `obc prune` of the directory's model kept, or None.
    """

    model: Any
    loss: str
    path: Path
    plan: PruningPlan | None

    def restore_cache(self) -> None:
        """Let the config say again whether the model keeps a cache, as it is to be saved."""
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = config_of(self.path).use_cache


def config_of(path: Path) -> Any:
    """The transformers config in a directory.

    Raises:
        UsageError: there is none, or transformers can't read it.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; pass one written by save_pretrained (nothing is fetched)")
    refuse_unfinished(path, UsageError)
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} has no config.json; pass a directory written by save_pretrained")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}/config.json is not one that this transformers can read: {_line(error)}") from error


def load(path: Path, dtype: str | None, device: torch.device, loss: str = "auto") -> ModelDirectory:
    """Load the model of a directory written by ``save_pretrained`` or obc's ``save_pruned``.

    Args:
        dtype: None keeps the saved dtype.
        loss: one of :data:`LOSSES`; "auto" follows the model's head.
    """
    import transformers

    from obc.structures.transformers.saving import PLAN_FILE, is_saved_pruned, load_pruned

    config = config_of(path)
    named = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, named, None)
    if model_class is None:
        raise UsageError(f"{path}/config.json names the architecture {named}, which this transformers does not have")
    own = _loss_of_head(named, config)
    possible = list(dict.fromkeys((own, *(LABEL_FREE if own != "label-free" else ()))))
    if loss != "auto" and loss not in possible:
        raise UsageError(f"--loss {loss} needs another head than {named} has; use --loss " + " or ".join(possible))
    wanted = DTYPES[dtype] if dtype else "auto"
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        plan = PruningPlan.load(path / PLAN_FILE) if (path / PLAN_FILE).is_file() else None
        if is_saved_pruned(path):
            model = load_pruned(path)
            model = model if wanted == "auto" else model.to(wanted)
        else:
            model, found = model_class.from_pretrained(
                path,
                dtype=wanted,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            if missing := sorted(found["missing_keys"]):
                raise UsageError(
                    f"{path} lacks {len(missing)} weights of {named}, which would be random: {listed(missing)}; save "
                    "the whole model there"
                )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"can't load {named} from {path}: {_line(error)}; the directory must hold safetensors weights of an "
            "architecture that this transformers knows"
        ) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # it holds keys and values for later tokens, which scoring does not need
    return ModelDirectory(model.to(device).eval(), own if loss == "auto" else loss, path, plan)


def refuse_unlike(pruned: ModelDirectory, unpruned: ModelDirectory, option: str) -> None:
    """Raise unless two directories hold models that can be compared: of one class, with the same tokens or classes."""

    def said(one: ModelDirectory) -> str:
        config = one.model.config.get_text_config()
        reads = getattr(config, "vocab_size", None)
        what = f"{config.num_labels} classes" if reads is None else f"{reads} tokens"
        return f"a {type(one.model).__name__} of {what}"

    if said(pruned) != said(unpruned):
        raise UsageError(
            f"{option} {unpruned.path} is {said(unpruned)}, and {pruned.path} {said(pruned)}; pass the directory of "
            "the model that was pruned"
        )


def _loss_of_head(architecture: str, config: Any) -> str:
    """The loss of an architecture's head; "label-free" if it has none, or one whose outputs are no logits."""
    own = next((loss for ending, loss in _LOSSES.items() if architecture.endswith(ending)), "label-free")
    return "label-free" if own in ("label", "kl") and config.num_labels < 2 else own


def recompute_activations(model: Any) -> None:
    """Switch on activation checkpointing: backward recomputes each layer's activations, and forward keeps none."""
    if getattr(model, "supports_gradient_checkpointing", False):
        # The second is its older name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if not any(checkpoints_activations(module) for module in model.modules()):
        raise UsageError(
            f"--checkpointing: this version of transformers can't checkpoint activations of {type(model).__name__} "
            "outside training; save memory with --micro-batch"
        )


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the options of how a directory's model is loaded."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="(default: the one the model was saved in)")
    parser.add_argument("--device", help="cpu, cuda:0 ... (default: the first GPU, else the CPU)")


def device_of(name: str | None) -> torch.device:
    """The device with this name; None means the first GPU, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {_line(error)}; use cpu, or a device that this torch can reach") from error
    return device


def loss_of(kind: str, rows: RowKind, seed: int) -> Losses:
    """The loss of a kind: the mean over the samples for batch rows, the vector (B,) for sample rows.

    causal-lm: mean cross-entropy of the next token.
    masked-lm: mean cross-entropy of the masked tokens.
    label: cross-entropy of the batch's labels.
    label-free, kl: random projections of the outputs, in the metric of the Kullback-Leibler divergence with "kl"
    (:func:`obc.scoring.label_free.label_free_loss`).
    """
    if kind in LABEL_FREE:
        return label_free_loss(rows=rows, seed=seed, metric=LABEL_FREE[kind])
    sample_losses = {"causal-lm": _next_token, "masked-lm": _masked, "label": _labelled}[kind]
    return sample_losses if rows == "sample" else lambda model, batch: sample_losses(model, batch).mean()


def _called(model: nn.Module, batch: Batch) -> Any:
    """The output without passing labels, from which the model would compute its own loss, a mean over the batch."""
    return model(**{name: value for name, value in batch.items() if name != "labels"})


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return _called(model, batch).logits


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over each sample's tokens with a label."""
    token_losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return token_losses.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    return _token_losses(_logits(model, batch)[:, :-1], batch["input_ids"][:, 1:])


def _masked(model: nn.Module, batch: Batch) -> Tensor:
    return _token_losses(_logits(model, batch), batch["labels"])


def _labelled(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(_logits(model, batch).float(), batch["labels"], reduction="none")


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """The logits on a batch, or the last hidden state if the model has no head; labels are not passed."""
    remedy = "pass it as module:function to obc prune, or use obc in Python"
    with explained(model, f"calling it on a batch of {', '.join(batch)}", remedy):
        outputs = _called(model, batch)
    name, found = main_output(outputs) or ("", None)
    if not name or found is None:
        raise UsageError(
            f"{type(model).__name__} returns {', '.join(outputs)}, neither logits nor a last hidden state; {remedy}"
        )
    return found


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
