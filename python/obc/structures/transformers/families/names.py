"""Families that need nothing but names: of their layers, of what has an entry for every head, of their counts.

The usual names come first, so that they take precedence.
"""

from obc.structures.transformers.block import Kind
from obc.structures.transformers.family import Family, register

_FAMILIES = (
    # Names shared by many families: Llama, Qwen, Mistral, Gemma, OLMo, Cohere and similar models.
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
            "attention_width": ("all_head_size", "embed_dim", "q_dim"),
            "key_value_width": ("kv_dim",),
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
            "shared_width": (
                "shared_expert_intermediate_size",
                "shared_intermediate_size",  # Granite, MiniMax-M3
                "moe_shared_expert_intermediate_size",  # Nemotron-H
                "share_expert_dim",  # Step 3.5 and 3.7
            ),
            "key_value_heads": ("num_key_value_heads",),
            "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        },
        kinds=(
            Kind("ffn"),
            Kind("heads", whole=True, counted=True),
            Kind("query_heads", whole=True, counted=True, by_default=False),
            Kind("embedding", by_default=False),
        ),
    ),
    # ALBERT: one block for all layers; its attention ends with the norm of the residual stream.
    Family("albert", feed_forwards=(("ffn", "ffn_output"),), headless=("LayerNorm",)),
    # BART, OPT, CLIP, SigLIP, Whisper and similar: ``fc1`` and ``fc2``; Phi calls its output projection ``dense``.
    Family("bart", feed_forwards=(("fc1", "fc2"),), outputs=("dense",)),
    # BERT, RoBERTa, ELECTRA, ViT, BEiT, Segformer, Reformer: projections in ``self``, the output in the module around.
    Family(
        "bert",
        feed_forwards=(("intermediate.dense", "output.dense"), ("dense.dense", "output.dense")),
        projections=(("query", "key", "value"),),
        outputs_around=("output.dense",),
        head_parameters={"relative_position_bias_table": 1},  # BEiT's and Swin's, in the attention or beside it
    ),
    # Conformers for speech: Wav2Vec2-BERT, Wav2Vec2-Conformer, Seamless, FastSpeech2, Parakeet, Nemotron, LASR. Their
    # positions have a projection and two biases of their own, or a table that all heads share.
    Family(
        "conformer",
        feed_forwards=(("linear1", "linear2"),),
        projections=(("linear_q", "linear_k", "linear_v"),),
        outputs=("linear_out",),
        head_parameters={"pos_bias_u": 0, "pos_bias_v": 0, "bias_u": 0, "bias_v": 0},
        head_layers=("linear_pos", "relative_k_proj"),
        headless=("distance_embedding",),
        forward_reads_config=("relative_k_proj",),
    ),
    # Attention as in diffusers, vit-pytorch and x-transformers; the conformers of Granite Speech, and Evolla's
    # resampler. It may begin with norms. Other tokens may take part, with projections of their own (SD3, Flux).
    # torchvision's MaxViT has its own name of the output projection.
    Family(
        "to_q",
        feed_forwards=(("net.0.proj", "net.2"),),
        fused_feed_forwards=(("net.0.proj", "net.2"),),
        projections=(("to_q", "to_k", "to_v"), ("to_q", "to_kv"), ("to_queries", "to_keys", "to_values")),
        fused_projections={"to_qkv": None},
        outputs=("to_out", "to_out.0", "merge"),
        further_outputs=("to_add_out",),
        head_parameters={
            **dict.fromkeys(("temperature", "mem_k", "mem_v", "qk_norm_q_scale", "qk_norm_k_scale"), 0),
            **dict.fromkeys(("rel_pos_bias.weight", "head_scale_params"), 1),
        },
        head_layers=(
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_gate", "to_gates", "to_gates.0", "to_out_gates.0"),
            *("to_residual_mix.0", "to_v_gate", "to_v_head_gate"),
        ),
        head_norms={"norm_q": "queries", "norm_k": "keys", "norm_added_q": "queries", "norm_added_k": "keys"},
        headless=(
            *("pre_norm", "rel_pos_emb", "norm_media", "norm_latents"),
            *("norm", "norm_context", "group_norm", "spatial_norm", "norm_cross"),
        ),
        attributes={
            "heads": ("heads", "sliceable_head_dim"),
            "key_value_heads": ("kv_heads",),
            "head_size": ("dim_head",),
        },
    ),
    # CTRL: its own names, and a feed-forward block that is a sequence.
    Family(
        "ctrl",
        feed_forwards=(("ffn.0", "ffn.2"),),
        projections=(("Wq", "Wk", "Wv"),),
        config_keys={"inner_width": ("dff",)},
    ),
    # DeBERTa-v2 and v3: attention to contents and to relative positions, which have projections of their own.
    Family(
        "deberta",
        projections=(("query_proj", "key_proj", "value_proj"),),
        head_layers=("pos_key_proj", "pos_query_proj"),
    ),
    # DistilBERT, XLM, Flaubert.
    Family(
        "distilbert",
        feed_forwards=(("lin1", "lin2"),),
        projections=(("q_lin", "k_lin", "v_lin"),),
        outputs=("out_lin",),
        attributes={"attention_width": ("dim",)},
    ),
    # EfficientNet, and ALIGN's image model: inverted residuals with a gate.
    Family("efficientnet", inverted_residuals=(("expansion", "depthwise_conv", "squeeze_excite", "projection"),)),
    # Funnel Transformer: its own names; biases and kernels of relative positions have an entry for every head.
    Family(
        "funnel",
        feed_forwards=(("ffn.linear_1", "ffn.linear_2"),),  # "linear_1" alone would also match LLaVA's projector
        projections=(("q_head", "k_head", "v_head"),),
        outputs=("post_proj",),
        head_parameters={"r_w_bias": 0, "r_r_bias": 0, "r_s_bias": 0, "r_kernel": 1, "seg_embed": 1},
        config_keys={"inner_width": ("d_inner",)},
        forward_reads_config=("q_head",),
    ),
    # Attention whose output has a gate per head or channel: Afmoe, Beam, MiniMax, LFM3, Laguna, HRM, HY-V4 and others.
    # Qwen3-Next and its successors compute the gates in the projection of queries.
    Family(
        "gated_attention",
        gated_queries=("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"),
        head_parameters={"gate_bias": 0},
        head_layers=("gate_proj", "g_proj", "output_gate"),
    ),
    # GPT-2, ImageGPT, and the feed-forward blocks of GPT-Neo and StarCoder2.
    Family(
        "gpt2",
        feed_forwards=(("c_fc", "c_proj"),),
        fused_projections={"c_attn": None},
        outputs=("c_proj",),
        attributes={"attention_width": ("split_size",)},
    ),
    # The shared experts of Granite's mixtures, in Granite 4's dense models the only feed-forward block: [gate | up].
    Family("granite", fused_feed_forwards=(("input_linear", "output_linear"),)),
    # Gemma 3n's LAuReL blocks: two layers of low rank beside the attention.
    Family(
        "gemma3n",
        feed_forwards=(("linear_left", "linear_right"),),
        config_keys={"inner_width": ("laurel_rank",)},
    ),
    # gpt-oss, Flint, Granite with sliding windows: every head has a sink, an additional logit in its softmax.
    Family("gpt_oss", head_parameters={"sinks": 0}),
    # LUKE, Nystromformer: further projections, or filters over positions, with a part for every head.
    Family(
        "luke",
        outputs_around=("output",),  # BigBird-Pegasus
        head_layers=("w2e_query", "e2w_query", "e2e_query", "conv"),
    ),
    # Attention as in Meta's Llama, gpt-fast, and textbooks (Dive into Deep Learning, The Annotated Transformer). Under
    # ``n_local_heads`` gpt-fast has the heads of keys and values, Llama those of queries.
    Family(
        "llama",
        projections=(
            *(("wq", "wk", "wv"), ("w_q", "w_k", "w_v"), ("W_q", "W_k", "W_v")),
            ("linears.0", "linears.1", "linears.2", "linears.3"),
        ),
        fused_projections={"wqkv": None},
        outputs=("wo", "w_o", "W_o", "linears.3"),
        attributes={
            "heads": ("n_local_heads", "h"),
            "key_value_heads": ("n_local_kv_heads", "n_local_heads"),
            "head_size": ("d_k",),
        },
    ),
    # Experts that are separate modules, with the layer names of older Mixtral code and Llama's files.
    Family("mixtral", feed_forwards=(("w1", "w3", "w2"),)),
    # Inverted residuals of MobileNetV2, MobileViT and MobileViTV2; V2 has feed-forward blocks of 1x1 convolutions.
    Family(
        "mobilevit",
        inverted_residuals=(("expand_1x1", "conv_3x3", "reduce_1x1"), ("conv1", "conv2")),
        kinds=(Kind("inverted_residual"),),
    ),
    # Moshi: layers inside wrapper modules; ``fc1`` is [gate | up].
    Family(
        "moshi",
        fused_feed_forwards=(("fc1", "fc2"),),
        projections=(("q_proj.linear", "k_proj.linear", "v_proj.linear"),),
        outputs=("o_proj.linear",),
    ),
    # OLMo 2 and 3, OLMoE, MiniMax-M2, Chameleon, BitNet: norms over all heads of queries, keys or the output. In BLT's
    # attention from bytes to patches, norms of these names come before the projections.
    Family(
        "olmo",
        head_norms={"q_norm": "queries", "k_norm": "keys", "attn_sub_norm": "queries"},
        input_norms=("BltCrossAttention",),
    ),
    # Perceiver: attention that begins with norms of its inputs; feed-forward blocks with their own names.
    Family("perceiver", feed_forwards=(("dense1", "dense2"),), headless=("layernorm1", "layernorm2")),
    # Phi-3: one projection of queries, keys and values, one of gate and up; its attention reads the config's heads.
    Family(
        "phi3",
        fused_feed_forwards=(("gate_up_proj", "down_proj"),),
        fused_projections={"qkv_proj": None},
        forward_reads_config=("qkv_proj",),
    ),
    # PVT, Segformer, Twins: attention whose keys and values come from a sequence shortened by a convolution.
    Family("pyramid", headless=("sequence_reduction", "spatial_reduction", "layer_norm", "sr")),
    # Swin V2: a scale for every head, and a bias for every head that two layers compute from positions.
    Family(
        "swinv2",
        head_parameters={"logit_scale": 0},
        head_layers=("continuous_position_bias_mlp.2",),
        headless=("continuous_position_bias_mlp.0",),
    ),
    # Vision encoders of Qwen-VL, GLM-V, BLIP, SAM and others: one projection, [all queries | all keys | all values].
    # Qwen2.5-Omni's has three, q, k and v as in T5. InternVL and Janus, Kosmos-2.5 and Pix2Struct have their own names
    # of the output projection.
    Family(
        "vision",
        feed_forwards=(("linear_fc1", "linear_fc2"), ("pwconv1", "pwconv2")),
        projections=(("q", "k", "v", "proj"), ("q", "kv", "proj"), ("qk", "v", "proj")),
        fused_projections={"qkv": None},
        outputs=("proj", "projection", "projection_layer", "output"),
        headless=("rel_pos_h", "rel_pos_w"),
        attributes={"attention_width": ("hidden_size_output", "attn_dim")},  # Hiera; timm
    ),
    # Wav2Vec2, HuBERT, WavLM, UniSpeech, SEW, Data2Vec audio, SpeechT5. WavLM gates its table of positions by head.
    Family("wav2vec2", feed_forwards=(("intermediate_dense", "output_dense"),)),
)

for _family in _FAMILIES:
    register(_family)
