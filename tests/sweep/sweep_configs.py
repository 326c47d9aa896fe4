"""A tiny configuration of any model type of the transformers library: what its sizes are called, and exceptions."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 64
POSITIONS = 64
IMAGE = 32

_EXPERTS = r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts"
# Name of a size -> its tiny value. The first rule that matches the whole name counts.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?vocab_size|vocab_size_.*|entity_vocab_size", VOCABULARY),
    (r"(pad|bos|eos|sep|cls|mask|unk|decoder_start|forced_eos|forced_bos)_token_id", 1),
    (r"(image|video|audio|boi|eoi|image_start|image_end|vision_start|vision_end)_token_(id|index)", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_.*_positions|max_seq_len|seq_length|context_length", POSITIONS),
    (r"num_(hidden|encoder|decoder|block|entity)?_?layers|n_layers?|(encoder|decoder)_layers|num_blocks?", 2),
    (
        r"hidden_size(_global)?|d_model|n_embd|embed_dim|embedding_size|dim_model|word_embed_proj_dim|emb_dim|hidden_dim",
        32,
    ),
    (
        r"vision_hidden_size|out_hidden_size|projection_dim|hidden_size_per_layer_input|attention_hidden_size|proj_dim",
        32,
    ),
    (
        r"(moe|shared|expert|shared_experts?|moe_shared_expert)_(intermediate|ffn|ffn_hidden)_(size|dim)|expert_hidden_size",
        24,
    ),
    (
        r"(ffn_)?intermediate_size(_mlp)?|(encoder|decoder)?_?ffn_dim|n_inner|d_ff|ffn_hidden_size|dim_ff|mlp_hidden_size",
        48,
    ),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|decoder_num_key_value_heads", 2),
    (r"(num_|n_)?(encoder_|decoder_)?(attention_)?heads?|n_head|num_attention_heads_.*", 4),
    (r"head_dim|d_kv|kv_channels|attention_head_dim|global_head_dim|swa_head_dim", 8),
    (r"v_head_dim|qk_nope_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim|index_head_dim", 4),
    (r"index_n_heads", 2),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 12),
    (_EXPERTS, 4),
    (r"num_experts_per_(tok|token)|moe_top_?k|top_k|moe_topk|moe_k|num_selected_experts|num_experts_per_token", 2),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group|num_limited_groups", 1),  # but see _sizes
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"sliding_window(_size)?|attention_window|local_attention|attention_chunk_size|index_topk", 16),
    (r"(mamba_|ssm_)?d_state|state_size|ssm_state_size|mamba_ssm_state_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"mamba_n_groups|n_groups|mamba_num_groups", 2),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"linear_num_(key|value)_heads", 2),
    (r"linear_(key|value)_head_dim", 8),
    (r"lru_width", 32),
    (r"image_size|input_size", IMAGE),
    (r"(spatial_)?patch_size", 8),
    (r"num_labels", 4),
    (r"initializer_range|init_std", 0.1),
)

# Model type, or task:model type -> sizes that the rules don't know or get wrong.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_head": 4},
    "ctrl": {"n_embd": 32, "dff": 48},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "falcon": {"num_ln_in_parallel_attn": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "openai-gpt": {"afn": "gelu"},
    "xlm": {"emb_dim": 32, "n_heads": 4},
    "xlnet": {"d_model": 32, "n_head": 4, "d_inner": 48, "n_layer": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "zamba": {
        "use_mamba_kernels": False, "attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {"use_mem_eff_path": False, "attention_hidden_size": 64, "attention_head_dim": 16},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "shieldgemma2")},
    **{
        name: {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE]]}  # two tiles and the whole
        for name in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    **{name: {"patch_embed_hidden_size": 192} for name in ("kosmos_2_5_vision_model", "pix2struct_vision_model")},
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "voxtral_encoder": {"intermediate_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 2}},
    "emu3": {"vocabulary_map": {"<image>": 2, "<|extra_200|>": 3}},
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"moe_intermediate_size": 24, "num_experts": 4, "top_k_experts": 2},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
        for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text")
    },
    "florence_vision": {
        "embed_dim": [16, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
        "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "projection_dim": 32,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "per_layer_config": {
            1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8},
        },
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"zero_expert_num": 1},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},  # two pairs
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "funnel": {"block_sizes": [1, 1], "d_inner": 48},
    "esmc": {"num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "num_self_attention_heads": 4},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "levit": {
        "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "patch_size": 16,
    },
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1, "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    # Models whose first layers are dense by default, or whose layers are all dense: one dense layer, one mixture.
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "flint": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 40},
    "gemma4_text": {
        "enable_moe_block": True, "moe_intermediate_size": 24, "num_experts": 4, "top_k_experts": 2,
    },
    **{
        name: {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part,
                "mrope_section": [width - 2 * (width // 3), width // 3, width // 3],
            },
        }
        for name, part, width in (
            ("glm4v_text", 1.0, 4), ("glm_ocr_text", 1.0, 4), ("glm4v_moe_text", 0.5, 2),
        )
    },
    "glm5_next_text": {
        "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4, "indexer_types": ["full", "full"],
        "mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 4, "hc_mult": 2,
    },
    "step3p5": {
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16, "num_sliding_attention_heads": 4, "share_expert_dim": 24, "query_pre_attn_scalar": 8,
    },
    "inkling2_vision": {"text_hidden_size": 32, "projection_hidden_dim": 48},
    "inkling2_loop_vision": {"text_hidden_size": 32, "projection_hidden_dim": 48},
    "muse_spark_text": {
        "layer_rope_theta": [10000.0, 0], "mlp_layer_types": ["dense", "sparse"], "moe_hidden_size": 32,
    },
    "muse_spark_audio": {
        "patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 63},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "convbert": {"conv_kernel_size": 3, "head_ratio": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8,
    },
    "masked:reformer": {"is_decoder": False},
    "longformer": {"attention_window": [8, 8]},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "donut-swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "segformer": {
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
        "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
    },
    "pvt": {
        "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
        "mlp_ratios": [2, 2, 2, 2], "sequence_reduction_ratios": [2, 2, 1, 1], "patch_sizes": [4, 2, 2, 2],
    },
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 12, 12, 16, 24], "patch_size": 2},
    "dinat": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4]},
    "focalnet": {
        "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "focal_levels": [1, 1], "focal_windows": [3, 3],
    },
    "imagegpt": {"vocab_size": 65},
    "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 1, 1]},
    "hiera": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32], "patch_stride": [4, 4],
        "num_query_pool": 1,
    },
}  # fmt: skip


# Sizes that a default configuration leaves open, and that a model can't be built without.
_OPEN = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_experts_per_tok",
)


def tiny_config(config_class: Any, task: str, model_type: str) -> Any:
    """A configuration whose sizes are tiny, and which holds every type of layer that the default one has."""
    overrides = OVERRIDES.get(model_type, {}) | OVERRIDES.get(f"{task}:{model_type}", {})
    return config_class(**_sizes(config_class(), overrides))


def _sizes(default: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the class of a configuration; those of the configurations inside are dicts with their model type."""
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            inner = OVERRIDES.get(value.model_type, {}) | overrides.get(name, {})
            values[name] = _sizes(value, inner) | {"model_type": value.model_type}
        elif (tiny := _tiny(name, value)) is not None:
            values[name] = tiny
    if "kv_lora_rank" in values:  # latent attention expands keys for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "n_group" in values:  # a token is sent to one of two groups of three experts
        experts = {name: 6 for name in values if re.fullmatch(_EXPERTS, name)}
        values |= {"n_group": 2, "topk_group": 1} | experts
    if "qk_rope_head_dim" in values and "head_dim" in values:
        rotary = default.head_dim in (default.qk_rope_head_dim, None)
        values["head_dim"] = values["qk_rope_head_dim"] + (0 if rotary else values.get("qk_nope_head_dim", 4))
    values |= _rotary_sections(default, values)
    values |= _layer_types(default, values)
    return values | {name: value for name, value in overrides.items() if not isinstance(values.get(name), dict)}


def _tiny(name: str, value: Any) -> Any:
    sized = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not sized and not (value is None and name in _OPEN):
        return None
    return next((tiny for pattern, tiny in RULES if re.fullmatch(pattern, name)), None)


def _rotary_sections(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Rotary angles of time, height and width share the tiny heads."""
    heads = values.get("num_attention_heads") or 1
    size = values.get("head_dim") or values.get("hidden_size", 0) // heads

    def sections(rope: Any) -> Any:
        if not isinstance(rope, dict):
            return rope
        found = {key: sections(value) for key, value in rope.items()}
        if rope.get("mrope_section"):
            half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
            found["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
        return found

    rope = getattr(default, "rope_parameters", None)
    return {"rope_parameters": sections(rope)} if isinstance(rope, dict) and "mrope_section" in repr(rope) else {}


def _layer_types(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """One layer of each type, and so many layers."""
    name = getattr(default, "attribute_map", {}).get("layer_types", "layer_types")
    kinds = getattr(default, name, None)
    if not kinds or isinstance(getattr(type(default), name, None), property):
        return {}
    chosen = list(dict.fromkeys(kinds))[:4]
    chosen = chosen if len(chosen) > 1 else chosen * 2
    layers = next((key for key in ("num_hidden_layers", "num_layers", "n_layer") if key in values), None)
    return {name: chosen} | ({layers: len(chosen)} if layers else {})
