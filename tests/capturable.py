"""A small CNN and a Llama-like model whose own forward reads nothing back, so that a row of theirs can be captured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import Case, class_losses, seeded, token_losses
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention with grouped queries, then SwiGLU."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, hidden: int = 48) -> None:
        super().__init__()
        self.head = width // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.head)).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def llama_like(batches: int = 4) -> Case:
    """Embedding, two blocks, norm and head; next-token losses."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(40, 32), Block(), Block(), nn.RMSNorm(32), nn.Linear(32, 40, bias=False))

    model = seeded(build).eval()
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(40, (4, 10), generator=generator) for _ in range(batches)]
    return Case(model, tokens, token_losses, model)


def small_cnn(batches: int = 4) -> Case:
    """Two convolutions with norms, pooling and a head; cross entropy."""

    def build() -> nn.Module:
        first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(12, 5))

    model = seeded(build).eval()
    generator = torch.Generator().manual_seed(2)
    drawn = [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(batches)
    ]
    return Case(model, drawn, class_losses, model)
