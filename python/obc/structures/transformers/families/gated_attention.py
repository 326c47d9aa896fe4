"""Attention whose output has a gate per head or channel: Afmoe, Beam, MiniMax, LFM3, Laguna, HRM, HY-V4 and others.

Qwen3-Next and its successors compute the gates in the projection of queries.
"""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "gated_attention",
        gated_queries=("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"),
        head_parameters={"gate_bias": 0},
        head_layers=("gate_proj", "g_proj", "output_gate"),
    )
)
