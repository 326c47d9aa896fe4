"""Names shared by many families: Llama, Qwen, Mistral, Gemma, OLMo, Cohere and similar models."""

from obc.structures.transformers.block import Kind
from obc.structures.transformers.family import Family, register

register(
    Family(
        "usual",
        feed_forwards=(("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")),
        projections=(("q_proj", "k_proj", "v_proj"),),
        outputs=("o_proj", "out_proj"),
        attributes={
            "hidden_size": ("hidden_size", "hidden_dim", "embed_dim"),
            "inner_width": ("intermediate_size", "intermediate_dim", "ffn_dim", "inner_dim"),
            "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head"),
            "key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
            "attention_width": ("all_head_size", "embed_dim"),
            "head_size": ("head_dim", "attention_head_size", "head_size"),
            "experts": (
                "num_experts",
                "num_local_experts",
                "n_routed_experts",
                "moe_num_experts",
                "num_routed_experts",
            ),
        },
        config_keys={
            "hidden_size": ("hidden_size",),
            "inner_width": ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff"),
            "expert_width": ("moe_intermediate_size",),
            "key_value_heads": ("num_key_value_heads",),
            "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        },
        kinds=(
            Kind("ffn"),
            Kind("heads", whole=True, counted=True),
            Kind("query_heads", whole=True, counted=True, by_default=False),
            Kind("embedding", by_default=False),
        ),
    )
)
