"""Funnel Transformer: its own names; biases and kernels of relative positions have an entry for every head."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "funnel",
        feed_forwards=(("ffn.linear_1", "ffn.linear_2"),),  # "linear_1" alone would also match LLaVA's projector
        projections=(("q_head", "k_head", "v_head"),),
        outputs=("post_proj",),
        head_parameters={"r_w_bias": 0, "r_r_bias": 0, "r_s_bias": 0, "r_kernel": 1, "seg_embed": 1},
        config_keys={"inner_width": ("d_inner",)},
        forward_reads_config=("q_head",),
    )
)
