"""Tables of `tiny`: sizes, and for each family of transformers its class and what it needs beyond the sizes.

A family is a directory of `transformers.models`. The keys are those of its configuration class; a dictionary under
the name of a part (`text_config`, `vision_config`, ...) goes to that part.
"""

from __future__ import annotations

from typing import Any

from transformers import PixtralVisionConfig

VOCAB = 128
EXPERTS = 8

# Sizes by the names that configurations use for them; a configuration takes those it knows. Towers for pictures
# and sound are cut down by the same table: they are built and saved, never run.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.1,
    # Towers.
    "depth": 1,
    "num_heads": 4,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "out_hidden_size": 32,
    "output_dim": 32,
    "text_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_intermediate_size": 32,
    "output_channels": 32,
    "downsample_hidden_size": 8,
    "downsample_channels": [32, 32],
    "mlp_dim": 32,
    "image_size": 32,
    "image_token_id": 120,
    "image_token_index": 120,
    "image_start_token_id": 121,
    "image_end_token_id": 122,
    "video_token_id": 123,
    "video_start_token_id": 124,
    "video_end_token_id": 125,
    "audio_token_id": 126,
    "vision_start_token_id": 121,
    "vision_end_token_id": 122,
}

# Multi-head latent attention has as many key heads as query heads.
_MLA = {"num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SPARSE_AFTER_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16}
_SAM = {"num_hidden_layers": 3, "global_attn_indexes": [1], "window_size": 2, "patch_size": 8}
_OCR = {
    "vision_config": {"sam_config": _SAM, "encoder_config": {"num_hidden_layers": 1}},
    "text_config": _SPARSE_AFTER_FIRST | {"num_key_value_heads": 4},
}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {"intermediate_size": 16}),
    "axk1": ("AXK1ForCausalLM", _MLA),
    "axk2": ("AXK2ForCausalLM", _MLA),
    "bailing_hybrid": ("BailingHybridForCausalLM", _MLA | {"layer_group_size": 2}),
    "beam": ("BeamForCausalLM", _SPARSE_AFTER_FIRST),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {"logit_scale": 1.0}),
    "deepseek": ("DeepseekForCausalLM", {"n_shared_experts": 2}),
    "deepseek_ocr2": ("DeepseekOcr2ForConditionalGeneration", _OCR),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _MLA),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _MLA),
    # The first layer routes by a table of token ids.
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        {"o_groups": 2, "o_lora_rank": 8, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    ),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note": (
        "Dots3NoteForCausalLM",
        _MLA
        | {
            "use_sliding_window": False,
            "head_dim": 12,
            "shared_experts_intermediate_size": 16,
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {"intermediate_size": 16}),
    "flint": ("FlintForCausalLM", {"num_hidden_layers": 4}),
    "gemma4": (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _MLA),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}},
    ),
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        {
            "text_config": _MLA
            | _SPARSE_AFTER_FIRST
            | {
                "qk_rope_head_dim": 0,
                "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            }
        },
    ),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _MLA),
    "gpt_oss": ("GptOssForCausalLM", {"intermediate_size": 16}),
    "granitemoe": ("GraniteMoeForCausalLM", {"intermediate_size": 16}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {"intermediate_size": 16}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "intermediate_size": 16,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {"intermediate_size": 16}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {"intermediate_size": 16}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "inkling": ("InklingForCausalLM", _INKLING | {"logits_mup_width_multiplier": 1.0}),
    "inkling2": ("Inkling2ForCausalLM", _INKLING | {"unpadded_vocab_size": VOCAB}),
    "jamba": (
        "JambaForCausalLM",
        {
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "mamba_d_state": 4,
        },
    ),
    "kimi_linear": ("KimiLinearForCausalLM", _MLA | _HYBRID),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama_moe": ("LlamaMoEForCausalLM", {"intermediate_size": 16 * EXPERTS, "score_scale_factor": 4.0}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {"intermediate_size": 16, "block_size": 8}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {"intermediate_size": 16}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {"intermediate_size": 16, "dense_intermediate_size": 32}),
    "mistral4": ("Mistral4ForCausalLM", _MLA),
    "mistral_large4": (
        "MistralLarge4ForConditionalGeneration",
        {
            "text_config": _MLA,
            "vision_config": PixtralVisionConfig(
                hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32
            ),
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 16}),
    "muse_spark": (
        "MuseSparkForConditionalGeneration",
        {
            "text_config": {"moe_hidden_size": 16, "output_multiplier": 1.0},
            "audio_config": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 16,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {"intermediate_size": 16}),
    "phimoe": ("PhimoeForCausalLM", {"intermediate_size": 16}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", _HYBRID),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", _HYBRID),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "vision_config": {"deepstack_visual_indexes": [0]},
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            "vision_start_token_id": 121,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "vision_config": {"deepstack_visual_indexes": [0]},
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        },
    ),
    "qwen4_exp": (
        "Qwen4ExpForCausalLM",
        _HYBRID
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
        },
    ),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "initializer_factor": 0.3,
        },
    ),
    "unlimited_ocr": ("UnlimitedOcrForConditionalGeneration", _OCR),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                "moe_intermediate_size": [16, 16],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            }
        },
    ),
}
"""Family -> class name, and configuration values beyond `SIZES`."""

NATIVE = ("deepseek", "llama_moe")
"""Families whose classes are equipoise's own."""

LEFT_OUT = {
    "diffusion_gemma": "block diffusion, not an autoregressive language model: its forward needs a canvas to denoise",
    "openai_privacy_filter": "a token classifier: transformers has no language-model class for it",
}
"""Modeling files behind transformers' experts interface that have no tiny model here, and why."""
