"""Tiny models with their batches and losses: what the scorer's tests score, and the oracle's too.

A loss casts its inputs to the model's dtype, so that one batch serves the float32 model and the oracle's float64
copy. No loss is homogeneous or linear in the outputs: a sum of outputs would make many rows vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCHES, BATCH = 3, 4


@dataclass
class Case:
    """A model in eval mode, its batches, and a loss that gives one value per sample."""

    model: nn.Module
    batches: list[Any]
    losses: Callable[[nn.Module, Any], Tensor]
    # What the oracle differentiates: the model itself, or one with the same layers and values whose forward plain
    # autograd can differentiate by weights and inputs (without the in-place operation under test, say).
    oracle_model: nn.Module

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch: the row of ``rows="batch"``."""
        return self.losses(model, batch).mean()

    def loss_fn(self, rows: str) -> Callable[[nn.Module, Any], Tensor]:
        return self.losses if rows == "sample" else self.loss


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def regression_losses(output: Tensor, target: Tensor) -> Tensor:
    """(B,) smooth losses of an output of any shape (B, ...); ``target`` is a (B,) vector of numbers."""
    flat = output.flatten(1)
    phase = target.to(flat.dtype).unsqueeze(1) + torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return (flat - phase.sin()).square().mean(1) + flat.sin().mean(1)


def vector_losses(model: nn.Module, batch: Any) -> Tensor:
    """Losses of a model of one floating input."""
    x, target = batch
    return regression_losses(model(x.to(dtype_of(model))), target)


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    x, labels = batch
    return F.cross_entropy(model(x.to(dtype_of(model))), labels, reduction="none")


def class_loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean cross-entropy of a batch (x, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """Mean next-token loss of each sequence of a language model that returns logits (B, T, V)."""
    tokens = batch
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.unflatten(0, (tokens.shape[0], -1)).mean(1)


def floats(*shape: int, seed: int = 0, batches: int = BATCHES, batch: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Batches of (x, target), x of (batch, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, *shape, generator=generator), torch.randn(batch, generator=generator))
        for _ in range(batches)
    ]


def labelled(*shape: int, classes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(x, torch.randint(0, classes, (BATCH,), generator=generator)) for x, _ in floats(*shape, seed=seed)]


def labelled_images(size: int, count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Batches of ``BATCH`` images (3, size, size) and labels of five classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, 3, size, size, generator=generator).to(dtype),
            torch.randint(5, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def tokens(vocabulary: int, length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (BATCH, length), generator=generator) for _ in range(BATCHES)]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms, biases and running statistics values unlike their defaults, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and name.endswith("bias")):
                tensor.normal_(0, 0.2, generator=generator)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(build(), seed)


def case(
    build: Callable[[], nn.Module],
    batches: list[Any],
    losses: Callable[[nn.Module, Any], Tensor] = vector_losses,
    oracle: Callable[[], nn.Module] | None = None,
) -> Case:
    """``oracle`` builds the twin that plain autograd can differentiate; it receives the model's values."""
    model = seeded(build).eval()
    if oracle is None:
        return Case(model, batches, losses, model)
    twin = oracle().eval()
    twin.load_state_dict(model.state_dict())
    return Case(model, batches, losses, twin)


# --- convolutional networks --------------------------------------------------------------------------------------


class ResidualCNN(nn.Module):
    """A network with in-place ReLUs after norms, an in-place residual sum, a stride, a shortcut and a head."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.head(self.relu(y).mean((2, 3)))


def residual_cnn() -> Case:
    return case(ResidualCNN, labelled(3, 8, 8, classes=5), class_losses)


def convolutions(dims: int) -> Case:
    """Strides, dilations, groups, depthwise, every padding mode and transposed convolutions in ``dims`` dimensions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]

    def build() -> nn.Module:
        return nn.Sequential(
            conv(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.GELU(),
            conv(8, 12, 3, stride=2, padding=2, dilation=2, groups=4, padding_mode="circular", bias=False),
            nn.GELU(),
            conv(12, 12, 3, padding="same", groups=12),
            nn.GELU(),
            transposed(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.GELU(),
            conv(8, 16, 1, groups=8, padding_mode="replicate", padding=1),
            nn.GELU(),
            transposed(16, 6, 2, dilation=2, bias=False),
        )

    return case(build, floats(3, *[6] * dims))


class Norms(nn.Module):
    """Every norm with parameters, each behind a layer to which it isn't blind (GELU breaks scale invariance)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.batch = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv3, self.instance = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.fc1, self.last = nn.Linear(8, 10), nn.LayerNorm(10)
        self.fc2, self.rms = nn.Linear(10, 12), nn.RMSNorm(12)
        self.flat = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.batch(self.conv1(x)))
        x = F.gelu(self.group(self.conv2(x)))
        x = F.gelu(self.instance(F.gelu(self.conv3(x))))
        x = x.flatten(2).transpose(1, 2)
        x = F.gelu(self.last(F.gelu(self.fc1(x))))
        x = self.rms(F.gelu(self.fc2(x))).mean(1)
        return self.head(F.gelu(self.flat(x)))


def norms() -> Case:
    return case(Norms, floats(3, 4, 4))


def wide_layer_norm() -> Case:
    """A LayerNorm over several dimensions, whose channels are the last one; no gate reads it."""
    return case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 2, 5]), nn.GELU(), nn.Linear(5, 3)), floats(3, 4, 7)
    )


class Linears(nn.Module):
    """Linear layers on inputs of two, three and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.three, self.two = nn.Linear(5, 6), nn.Linear(6, 7, bias=False), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.four(x)).mean(2)
        x = F.gelu(self.three(x)).mean(1)
        return self.two(x)


def linears() -> Case:
    return case(Linears, floats(3, 2, 5))


# --- language models of our own ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head is its embedding: one parameter with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + F.gelu(self.mix(self.norm(x))).cumsum(1)
        return self.head(x)


def tied() -> Case:
    return case(Tied, tokens(11, 6), token_losses)


class Embedded(nn.Module):
    """An embedding with a live, non-zero padding row, under a scale; the padding row's gradient is defined as 0."""

    def __init__(self, scale: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0, **options)
        self.scale = scale
        self.fc = nn.Linear(6, 9)
        with torch.no_grad():
            self.embedding.weight[0].normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.embedding(x) * self.scale).cumsum(1))


def padded_embedding() -> Case:
    return case(Embedded, tokens(9, 7), token_losses)


def embedding_by_frequency() -> Case:
    """Autograd divides the gradient of each row by how often the batch has it; rows are of that gradient."""
    return case(lambda: Embedded(scale_grad_by_freq=True), tokens(9, 7), token_losses)


def sparse_embedding() -> Case:
    return case(lambda: Embedded(sparse=True), tokens(9, 7), token_losses)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sums, self.means = nn.EmbeddingBag(9, 6, mode="sum"), nn.EmbeddingBag(9, 6, mode="mean", padding_idx=0)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.sums(x) * self.means(x)))


def bag_losses(model: nn.Module, batch: Any) -> Tensor:
    return regression_losses(model(batch), batch[:, 0])


def embedding_bags() -> Case:
    return case(Bags, tokens(9, 7), bag_losses)


def scaled_embedding() -> Case:
    return case(lambda: Embedded(scale=2.5), tokens(9, 7), token_losses)


class ScaledEmbedding(nn.Embedding):
    """The scale is part of the embedding's own forward, as in Gemma."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class SelfScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = ScaledEmbedding(9, 6, padding_idx=0)
        self.fc = nn.Linear(6, 9)
        with torch.no_grad():
            self.embedding.weight[0].normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.embedding(x)).cumsum(1))


def self_scaled_embedding() -> Case:
    return case(SelfScaled, tokens(9, 7), token_losses)


# --- transformers models from configurations ---------------------------------------------------------------------


def logit_losses(model: nn.Module, batch: Any) -> Tensor:
    """Class losses of a transformers vision model: forward by keyword only."""
    pixels, labels = batch
    logits = model(pixel_values=pixels.to(dtype_of(model))).logits
    return F.cross_entropy(logits, labels, reduction="none")


def text_losses(model: nn.Module, batch: Any) -> Tensor:
    """Class losses of a transformers text classifier, the last two tokens of every second sequence masked."""
    mask = torch.ones_like(batch)
    mask[::2, -2:] = 0
    logits = model(input_ids=batch, attention_mask=mask).logits
    return F.cross_entropy(logits, batch[:, 0] % logits.shape[1], reduction="none")


def from_config(
    kind: str, head: str, batches: list[Any], losses: Callable[[nn.Module, Any], Tensor], **sizes: Any
) -> Case:
    """A model of the transformers library, of the classes ``<kind>Config`` and ``<kind><head>``."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, kind + head)
    return case(lambda: model(config), batches, losses)


def language_model(kind: str, head: str = "ForCausalLM", **sizes: Any) -> Case:
    sizes = {"vocab_size": 31, "use_cache": False, "initializer_range": 0.1} | sizes
    return from_config(kind, head, tokens(31, 8), token_losses, **sizes)


def llama() -> Case:
    return language_model(
        "Llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )


def llama_tied() -> Case:
    return language_model(
        "Llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )


def gemma() -> Case:
    """Norms that scale by 1 + weight, and an embedding that scales its own output."""
    return language_model(
        "Gemma",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )


def gpt2() -> Case:
    """Linear layers that store their weight (in, out)."""
    return language_model(
        "GPT2", "LMHeadModel", n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False
    )


_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 5,
    "initializer_range": 0.1,
}


def bert() -> Case:
    sizes = {"vocab_size": 31, "max_position_embeddings": 32} | _ENCODER
    return from_config("Bert", "ForSequenceClassification", tokens(31, 8), text_losses, **sizes)


def vit() -> Case:
    images = labelled(3, 16, 16, classes=5)
    return from_config("ViT", "ForImageClassification", images, logit_losses, image_size=16, patch_size=4, **_ENCODER)


def calibrated(fresh: Case) -> Case:
    """Fill the running statistics by a pass in train mode: in untrained deep networks activations else fade to zero."""
    fresh.model.train()
    with torch.no_grad():
        fresh.loss(fresh.model, fresh.batches[0])
    fresh.model.eval()
    return fresh


def image_model(kind: str, **sizes: Any) -> Case:
    images = labelled(3, 32, 32, classes=5)
    return calibrated(from_config(kind, "ForImageClassification", images, logit_losses, num_labels=5, **sizes))


def resnet() -> Case:
    return image_model("ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck")


def mobilenet() -> Case:
    return image_model("MobileNetV2", image_size=32, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)


def mamba() -> Case:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "expand": 2}
    return language_model("Mamba", use_mambapy=False, tie_word_embeddings=False, **sizes)


OWN: dict[str, Callable[[], Case]] = {
    "residual-cnn": residual_cnn,
    "conv-1d": lambda: convolutions(1),
    "conv-2d": lambda: convolutions(2),
    "conv-3d": lambda: convolutions(3),
    "norms": norms,
    "wide-layer-norm": wide_layer_norm,
    "linears": linears,
    "tied": tied,
    "padded-embedding": padded_embedding,
    "scaled-embedding": scaled_embedding,
    "self-scaled-embedding": self_scaled_embedding,
    "sparse-embedding": sparse_embedding,
    "embedding-bags": embedding_bags,
}

TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "llama-gqa": llama,
    "gemma": gemma,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "resnet": resnet,
    "mobilenet-v2": mobilenet,
    "mamba": mamba,
}
