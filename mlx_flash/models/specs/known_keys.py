"""The keys of config.json that are known: which are read, which change nothing, which may have one value only.

Data only, for key_checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the readers of our own decoders look at, and mlx-lm's architectures are told from what they found.
OWN = frozenset(
    [
        "rope_traditional",
        "activation_function",
        "attention_bias",
        "do_layer_norm_before",
        "enable_bias",
        "fatrelu_thresholds",
        "ffn_dim",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
        "word_embed_proj_dim",
        "activation_fn_name",
        "ffn_dim_divisor",
        "ffn_multipliers",
        "ffn_with_glu",
        "max_context_length",
        "model_dim",
        "normalize_qk_projections",
        "num_kv_heads",
        "num_query_heads",
        "num_transformer_layers",
        "rope_freq_constant",
        "share_input_output_layers",
    ]
)
OWN_MIXTURES = OWN | frozenset(
    [
        "clip_qkv",
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
    ]
)
# Read of every model: its kind, its ends, how its positions are told apart, how it is stored.
ALWAYS = frozenset(
    [
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "flash",
        "quantization",
        "quantization_config",
        "text_config",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "rope_local_base_freq",
        "original_max_position_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "max_position_embeddings",
    ]
)
# Read where the normal form is made, from which the keys follow that mlx-lm reads.
NORMALISED = frozenset(
    [
        "_sliding_window_pattern",
        "sliding_window_pattern",
        "full_attention_interval",
        "mlp_layer_types",
        "tie_word_embeddings",
        "head_dim",
    ]
)
HARMLESS: Mapping[str, frozenset[str]] = {
    "names, versions and files": frozenset(
        [
            "_name_or_path",
            "architectures",
            "auto_map",
            "transformers_version",
            "transformers.js_config",
            "name_or_path",
            "license",
            "tokenizer_class",
            "model_name",
            "version",
            "unsloth_fixed",
            "unsloth_version",
            "trl_version",
            "custom_pipelines",
        ]
    ),
    "how tensors are stored, which their headers say themselves": frozenset(
        ["dtype", "torch_dtype", "dtype_params", "torchscript", "use_bfloat16"]
    ),
    "tokens that no model computes with": frozenset(
        [
            "pad_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "cls_token_id",
            "unk_token_id",
            "eod_token_id",
            "mask_token_id",
            "suppress_tokens",
            "begin_suppress_tokens",
            "bad_words_ids",
            "prefix",
            "ignore_index",
            "image_token_id",
            "image_token_index",
            "video_token_id",
            "video_token_index",
            "vision_start_token_id",
            "vision_end_token_id",
            "vision_token_id",
            "boi_token_index",
            "eoi_token_index",
            "boi_token_id",
            "eoi_token_id",
            "audio_token_id",
            "boa_token_id",
            "eoa_token_id",
            "eoa_token_index",
        ]
    ),
    "training and initial weights": frozenset(
        [
            "attention_dropout",
            "attn_pdrop",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "embedding_dropout",
            "hidden_dropout",
            "resid_pdrop",
            "residual_dropout",
            "ffn_dropout",
            "attn_dropout",
            "attn_dropout_prob",
            "emb_dropout_prob",
            "summary_first_dropout",
            "activation_dropout",
            "layerdrop",
            "initializer_range",
            "initializer_factor",
            "init_std",
            "init_device",
            "initializer_cutoff_factor",
            "router_aux_loss_coef",
            "aux_loss_alpha",
            "seq_aux",
            "aux_loss_coeff",
            "router_z_loss_coef",
            "load_balance_coeff",
            "mtp_loss_scaling_factor",
            "router_jitter_noise",
            "input_jitter_noise",
            "output_router_logits",
            "rescale_prenorm_residual",
            "gradient_checkpointing",
            "pretraining_tp",
            "ep_size",
            "moe_capacity",
            "expert_dropout",
            "z_loss_coefficient",
            "max_loss_weight",
            "use_aux_loss",
            "moe_shared_expert_overlap",
        ]
    ),
    "which kernels compute it": frozenset(
        [
            "use_cache",
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_flash_attn_2_enabled",
            "use_flash_attn",
            "use_mamba_kernels",
            "use_mambapy",
            "use_associative_scan",
            "attention_softmax_in_fp32",
            "attn_config_impl",
            "scale_attention_softmax_in_fp32",
            "reorder_and_upcast_attn",
            "mamba_ssm_cache_dtype",
            "mamba_chunk_size",
            "chunk_size",
            "cache_implementation",
            "chunk_size_feed_forward",
            "fused_gate_up",
            "compile_config",
        ]
    ),
    "what transformers gives back beside the logits": frozenset(
        [
            "return_dict",
            "return_dict_in_generate",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "is_decoder",
            "is_encoder_decoder",
            "cross_attention_hidden_size",
            "add_cross_attention",
            "tie_encoder_decoder",
            "tf_legacy_loss",
            "num_logits_to_keep",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "finetuning_task",
            "task_specific_params",
            "pruned_heads",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ]
    ),
    "how transformers generates": frozenset(
        [
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "max_length",
            "min_length",
            "length_penalty",
            "no_repeat_ngram_size",
            "num_beams",
            "num_beam_groups",
            "diversity_penalty",
            "num_return_sequences",
            "repetition_penalty",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "remove_invalid_values",
        ]
    ),
    "pictures, sound and the predictors of later tokens, which are left out": frozenset(
        [
            "vision_config",
            "audio_config",
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "mm_tokens_per_image",
            "multimodal_projector_bias",
            "projector_hidden_act",
            "image_seq_length",
            "image_grid_pinpoints",
            "image_size",
            "spatial_merge_size",
            "projector_hidden_size",
            "merged_hidden_size",
            "mm_hidden_size",
            "num_nextn_predict_layers",
            "num_mtp_layers",
            "mtp_layer_types",
            "mtp_mlp_layer_types",
            "mtp_layers_block_type",
        ]
    ),
}

SILU = ("silu", "swish")
# model type -> key -> what it may be, because mlx-lm computes just that and does not look.
FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "afmoe": {"attention_bias": (False,)},
    "bailing_hybrid": {"attention_bias": (False,)},
    "deepseek_v2": {"mlp_bias": (False,), "scoring_func": ("softmax",)},
    "deepseek_v32": {"mlp_bias": (False,)},
    "ernie4_5_moe": {"moe_norm_min": (1e-12,)},
    "exaone_moe": {"attention_bias": (False,)},
    "gemma": {"use_bidirectional_attention": (False,)},
    "gemma2": {"use_bidirectional_attention": (False,)},
    "gemma3_text": {"use_bidirectional_attention": (False,)},
    "gemma4_text": {"attention_bias": (False,), "use_bidirectional_attention": (False, "vision")},
    "glm_moe_dsa": {"mlp_bias": (False,)},
    "granitemoehybrid": {"normalization_function": ("rmsnorm",)},
    "kimi_linear": {"attention_bias": (False,)},
    "laguna": {"gating": (True, "per-head"), "moe_apply_router_weight_on_input": (False,)},
    "mimo_v2_flash": {"attention_bias": (False,)},
    # Of MiniMax-Text-01, whose attention is linear in most layers; mlx-lm's model of this name is MiniMax-M2.
    "minimax": {"full_attn_alpha_factor": (), "linear_attn_alpha_factor": ()},
    "nemotron_h": {"mlp_hidden_act": ("relu2",), "mamba_hidden_act": SILU, "residual_in_fp32": (False,)},
    "openelm": {"normalization_layer_name": ("rms_norm",)},
    "opt": {"_remove_final_layer_norm": (False,), "layer_norm_elementwise_affine": (True,)},
}
# Of a mixture's experts, where it is another than SiLU.
EXPERT_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "gemma4_text": ("gelu_pytorch_tanh",),
    "minimax_m3_vl_text": (*SILU, "swigluoai"),
    "phixtral": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
}
# Read here, although mlx-lm's code does not: its modules are made those of the config.
READ_HERE: Mapping[str, frozenset[str]] = {
    "deepseek_v3": frozenset(("rope_interleave",)),
    "dots1": frozenset(("attention_bias",)),
    "gemma": frozenset(("attention_bias",)),
    "gemma2": frozenset(("attention_bias",)),
    "gemma3_text": frozenset(("attention_bias", "final_logit_softcapping")),
    "glm4_moe_lite": frozenset(("rope_interleave",)),
    "gpt2": frozenset(("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")),
    "gpt_bigcode": frozenset(("scale_attn_weights",)),
    "gpt_neox": frozenset(("attention_bias", "intermediate_size")),
    "gpt_oss": frozenset(("swiglu_alpha", "swiglu_limit")),
    "gptj": frozenset(("n_inner",)),
    "internlm3": frozenset(("head_dim",)),
    "mellum": frozenset(("attention_bias",)),
    "nanochat": frozenset(("attention_bias", "final_logit_softcapping", "rms_norm_eps")),
    "olmoe": frozenset(("clip_qkv",)),
    "phi": frozenset(("qk_layernorm",)),
    "qwen2_moe": frozenset(("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "qkv_bias")),
    "qwen3_moe": frozenset(("attention_bias",)),
    "starcoder2": frozenset(("use_bias",)),
}
# In the files, and computed nowhere, in transformers neither.
UNUSED: Mapping[str, frozenset[str]] = {
    "afmoe": frozenset(("global_attn_every_n_layers",)),
    "bailing_hybrid": frozenset(
        (
            "kda_lower_bound",
            "kda_safe_gate",
            "linear_conv_kernel_dim",
            "linear_head_dim",
            "linear_num_heads",
            "qk_head_dim",
            "short_conv_kernel_size",
        )
    ),
    "deepseek_v2": frozenset(("norm_topk_prob", "qk_head_dim")),
    "deepseek_v3": frozenset(("qk_head_dim",)),
    "deepseek_v32": frozenset(("qk_head_dim",)),
    "exaone_moe": frozenset(("first_k_dense_replace",)),
    "gemma4_text": frozenset(("per_layer_config",)),
    "glm4_moe_lite": frozenset(("qk_head_dim",)),
    "glm_moe_dsa": frozenset(("qk_head_dim", "indexer_types")),
    "gemma3_text": frozenset(("attn_logit_softcapping",)),
    "gpt_bigcode": frozenset(
        (
            "inference_runner",
            "max_batch_size",
            "max_sequence_length",
            "pad_key_length",
            "pre_allocate_kv_cache",
            "validate_runner_input",
        )
    ),
    # Seen in the tensors, as are the next ones.
    "gpt_oss": frozenset(("attention_bias", "experts_per_token", "initial_context_length")),
    "phi3": frozenset(("attention_bias",)),
    "phimoe": frozenset(("attention_bias", "lm_head_bias")),
    "kimi_linear": frozenset(
        ("qk_head_dim", "q_lora_rank", "linear_conv_kernel_dim", "linear_head_dim", "linear_num_heads")
    ),
    "llama4_text": frozenset(("moe_layers", "no_rope_layer_interval", "no_rope_layers")),
    "longcat_flash": frozenset(("qk_head_dim", "num_key_value_heads")),
    "mimo_v2_flash": frozenset(("first_k_dense_replace", "n_shared_experts")),
    "nemotron_h": frozenset(("expand", "time_step_floor")),
    "granitemoehybrid": frozenset(("mamba_expand", "init_method")),
    "openelm": frozenset(("num_gqa_groups", "qkv_multipliers", "rope_max_length")),  # the numbers of heads say it all
}
