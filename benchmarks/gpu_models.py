"""Models of real size from configuration, with random weights, because times do not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model, a batch and the loss; ``entry`` is a floating input or embedding whose gradient forces a backward."""

    name: str
    model: nn.Module
    batch: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    loss_from_entry: Callable[[nn.Module, Tensor], Tensor]
    entry: Tensor


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a residual connection."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50_model() -> nn.Sequential:
    """The layers of ResNet-50."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride=2 if stage and not block else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def resnet50(device: str, small: bool = False) -> Workload:
    """ResNet-50 in bfloat16 and channels-last memory on 64 images of 224 x 224; small: on two of 32 x 32."""
    model = resnet50_model().to(device, torch.bfloat16).to(memory_format=torch.channels_last).eval()
    images = torch.randn((2, 3, 32, 32) if small else (64, 3, 224, 224), device=device, dtype=torch.bfloat16)
    return _classifier("ResNet-50", model, images.contiguous(memory_format=torch.channels_last), 1000)


class BasicBlock(nn.Module):
    """Two 3x3 with a residual connection; where the width grows, the shortcut is a strided slice filled with zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride, self.more = (2, out_channels - in_channels) if out_channels != in_channels else (1, 0)
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, self.stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(self.body(x) + shortcut)


def resnet56_model() -> nn.Sequential:
    """The layers of ResNet-56 for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(9):
            layers.append(BasicBlock(channels, width))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet56(device: str, small: bool = False) -> Workload:
    """ResNet-56 in float32 on 64 images of 32 x 32: many small layers, bound by launches; small: on two images."""
    images = torch.randn(2 if small else 64, 3, 32, 32, device=device)
    return _classifier("ResNet-56", resnet56_model().to(device).eval(), images, 10)


def _classifier(name: str, model: nn.Module, images: Tensor, classes: int) -> Workload:
    labels = torch.randint(classes, (images.shape[0],), device=images.device)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch).float(), labels)

    return Workload(name, model, images, loss, loss, images)


def vit_b(device: str, small: bool = False) -> Workload:
    """ViT-B/16 in bfloat16 on 64 images of 224 x 224; small: two layers of width 48 on two of 32 x 32."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = 32 if small else 224
    config = ViTConfig(**(sizes if small else {}), image_size=size, num_labels=1000)
    model = _random_model(lambda: ViTForImageClassification(config), device)
    images = torch.randn(2 if small else 64, 3, size, size, device=device, dtype=torch.bfloat16)
    labels = torch.randint(1000, (images.shape[0],), device=device)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=batch).logits.float(), labels)

    return Workload("ViT-B", model, images, loss, loss, images)


def llama_8b(device: str, small: bool = False) -> Workload:
    """The layers of Llama-3 8B in bfloat16 on one sequence of 2048 tokens; small: two layers of width 256, on 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256 if small else 4096,
        intermediate_size=512 if small else 14_336,
        num_hidden_layers=2 if small else 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=320 if small else 128_256,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = _random_model(lambda: LlamaForCausalLM(config), device)
    ids = torch.randint(config.vocab_size, (1, 16 if small else 2048), device=device)
    embedded = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    return Workload(
        "Llama 8 B",
        model,
        ids,
        lambda model, ids: model(input_ids=ids, labels=ids).loss,
        lambda model, entry: model(inputs_embeds=entry, labels=ids).loss,
        embedded,
    )


def half_b_llama(device: str, small: bool = False) -> nn.Module:
    """A Llama of half a billion weights in bfloat16, eight layers of width 2048; small: two of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64 if small else 2048,
        intermediate_size=96 if small else 5632,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 8,
        vocab_size=320 if small else 32_000,
        use_cache=False,
    )
    return _random_model(lambda: LlamaForCausalLM(config), device)


def _random_model(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """Made on the device and in bfloat16 from the start: 8 billion weights in float32 would not fit everywhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def llama_8b_layer() -> list[tuple[int, ...]]:
    """The weights of one layer of Llama-3 8B."""
    return [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


def resnet50_weights() -> list[tuple[int, ...]]:
    """The weights of ResNet-50's convolutions and its linear layer."""
    return [tuple(m.weight.shape) for m in resnet50_model().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
