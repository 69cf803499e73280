"""Writes tests/fixtures/families: one small random model per family and variant, an adapter for it, and what
transformers and PEFT compute with them in fp32. The Rust tests compare engraft's numbers with these.

    python tests/python/families.py                      (torch 2.11.0, transformers 5.17.0, peft 0.21.2)
    python tests/python/families.py --family qwen3_moe --hidden 48 --layers 6 --seed 3 --weights --out /tmp/parity

No weight is stored. Element `i` (row-major) of the tensor called `name` is made from the two alone, in wrapping u64 and
with one rounding to f32 for each of the two last operations:

    h = splitmix64((fnv1a64(name) ^ seed) + i * 0x9e3779b97f4a7c15)
    u = (h >> 40) / 2^23 - 1                             in [-1, 1), exact
    value = f32(offset + f32(scale * u))

A tensor of indices below `scale` has "i64" for its offset; with n columns, element `i` of it is

    value = ((h >> 40 of element i - i mod n) + i mod n) mod scale

Per model:

    config.json                  as the hub has it: `rope_theta`, `rope_scaling` and what transformers derives left out
    tensors.json                 [[name, shape, offset, scale]] of the checkpoint, in its published layout
    adapter/adapter_config.json  with which PEFT loads the adapter onto the transformers model
    adapter/adapter_tensors.json [[key, shape, offset, scale]] of `adapter_model.safetensors`
    peft/...                     the same for an adapter as PEFT's own `all-linear` lays it out, for checkpoints that
                                 store their experts apart, which transformers fuses
    reference.safetensors
        ids (T) i64              three documents end to end; every document is run on its own, from position 0
        offsets (4) i64          where they begin and end
        mask (T) i64             1 where a token is a supervised target; the first token of a document never is
        base_logits (T, V)       without the adapter
        logits (T, V)            with it
        loss (1)                 mean cross-entropy over the supervised targets of all documents, with the adapter
        grad.<key>               its gradient, for each key of the adapter
        prompt (P), generated (8)  i64: what the adapted model continues greedily, the same with a cache and without
        aux_loss (2)             the unweighted load-balancing loss of the first document, without and with the adapter,
                                 where transformers has one
        aux_grad.<key>           its gradient with respect to the adapters of the routers
        peft_logits (T, V)       with the adapter of peft/

With `--weights`, `model.safetensors`, `adapter/adapter_model.safetensors` and `peft/adapter_model.safetensors` are
written too, so that the folder is a checkpoint that transformers and PEFT read.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import mobilellm  # noqa: F401 (makes its type known to transformers)
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "families"
RANK, ALPHA = 3, 6
TIED = 1e-5  # of a score, that another one is behind
PROMPT, GENERATED = 17, 8
LENGTHS = (19, 7, 29)  # two of them longer than every window, chunk and original context below

DROP = object()  # takes a field out of COMMON

# Odd sizes on purpose: hardly a power of two, and no two widths agree by accident.
COMMON = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclasses.dataclass
class Variant:
    """One model: its type, the fields that differ from COMMON, and how its checkpoint is laid out."""

    model_type: str
    options: dict
    # Published names by those that save_pretrained writes: (pattern, replacement), one after the other.
    renamed: list = dataclasses.field(default_factory=list)
    # The names of modules in an adapter by those in transformers, likewise.
    adapted: list = dataclasses.field(default_factory=list)
    # Experts are published fused though save_pretrained takes them apart.
    fused: bool = False
    # Fused experts are [experts, in, out] rather than [experts, out, in].
    transposed: bool = False
    # Offset and scale of some tensors, as RULES has them.
    rules: list = dataclasses.field(default_factory=list)
    # Adapters with these in their keys have no gradient.
    untrained: str = r"(?!)"
    # How transformers computes attention.
    attention: str = "eager"
    # The model_type of the config that has this one as its `text_config`.
    wrapper: str | None = None
    # The other fields of that config, where transformers makes the larger model of it: it has other parts, which no
    # adapter touches and no token reaches.
    parts: dict | None = None
    # What makes the model.
    maker: type = AutoModelForCausalLM
    # Tokens of each document.
    lengths: tuple = LENGTHS


# Widths where the architecture has no `head_dim` of its own: hidden_size / heads.
WHOLE = {"head_dim": DROP, "num_attention_heads": 3, "num_key_value_heads": 1}
BARE = {"head_dim": DROP, "num_key_value_heads": DROP, "num_attention_heads": 3}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
DELTA_NET = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 11,
    "head_dim": 12,
}
LATENT = {
    "head_dim": DROP,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}
# No layer has experts.
DENSE_LATENT = {**LATENT, "first_k_dense_replace": 2, "num_hidden_layers": 2, "rope_theta": 10000.0}
MROPE = {
    "rope_type": "default",
    "rope_theta": 10000000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [1, 1, 1],
    "mrope_interleaved": True,
}
DELTA_NET_EXPERTS = {
    **EXPERTS,
    **DELTA_NET,
    "intermediate_size": DROP,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 22,
    "rope_parameters": MROPE,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.1}
WRAPPED = [(r"^model\.(?!language_model\.)", "model.language_model.")]
APART = [(r"^lm_head\.", "language_model.lm_head."), (r"^model\.language_model\.", "language_model.model."), (r"^model\.", "")]
MIXTRAL_NAMES = [(r"\.mlp(\.|$)", r".block_sparse_moe\1")]

VARIANTS = {
    "llama": Variant("llama", {"rope_theta": 10000.0}),
    "mobilellm": Variant(
        "mobilellm", {"rope_theta": 10000.0, "layer_sharing": True, "share_embedding": True, "tie_word_embeddings": False}
    ),
    "smollm3": Variant(
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "rope_theta": 5000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": Variant("mistral", {"sliding_window": 9, "rope_theta": 10000.0}),
    "ministral": Variant(
        "ministral",
        {
            "num_hidden_layers": 3,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_theta": 10000.0,
        },
    ),
    # As published: the config says nothing of the head, which is in the files.
    "mistral3": Variant(
        "mistral",
        {"sliding_window": None, "rope_theta": 1000000.0},
        renamed=APART,
        wrapper="mistral3",
        parts={
            "spatial_merge_size": 2,
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 14,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 8,
                "patch_size": 4,
            },
        },
        maker=AutoModelForImageTextToText,
    ),
    "ministral3": Variant(
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.4,
            },
        },
    ),
    "mixtral": Variant(
        "mixtral",
        {
            "intermediate_size": 14,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 11,
            "rope_theta": 1000000.0,
        },
        adapted=MIXTRAL_NAMES,
    ),
    "qwen2": Variant(
        "qwen2",
        {
            **WHOLE,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": Variant(
        "qwen2_moe",
        {
            **WHOLE,
            **EXPERTS,
            "num_hidden_layers": 3,
            "shared_expert_intermediate_size": 22,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "rope_theta": 1000000.0,
        },
    ),
    "qwen2_moe-normalised": Variant(
        "qwen2_moe",
        {
            **WHOLE,
            **EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 22,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3": Variant(
        "qwen3",
        {
            "num_hidden_layers": 3,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": Variant(
        "qwen3_moe",
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3_moe-sliding": Variant(
        "qwen3_moe",
        {
            **EXPERTS,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3_next": Variant(
        "qwen3_next",
        {
            **EXPERTS,
            **DELTA_NET,
            "num_hidden_layers": 4,
            "full_attention_interval": 2,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 22,
            "norm_topk_prob": True,
            "mlp_only_layers": [2],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000000.0,
        },
    ),
    "qwen3_5_text": Variant(
        "qwen3_5_text",
        {
            **DELTA_NET,
            "num_hidden_layers": 3,
            "full_attention_interval": 3,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": MROPE,
        },
    ),
    # Documents of several chunks of the delta rule's 64 tokens.
    "qwen3_5_text-long": Variant(
        "qwen3_5_text",
        {
            **DELTA_NET,
            "linear_key_head_dim": 16,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "max_position_embeddings": 512,
            "rope_parameters": MROPE,
        },
        lengths=(150, 63, 71),
    ),
    "qwen3_5": Variant(
        "qwen3_5_text",
        {
            **DELTA_NET,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "attention_bias": True,
            "rope_parameters": MROPE,
            "tie_word_embeddings": True,
        },
        renamed=WRAPPED,
        wrapper="qwen3_5",
    ),
    # As transformers saves the text model alone.
    "qwen3_5_moe_text": Variant("qwen3_5_moe_text", DELTA_NET_EXPERTS),
    "qwen3_5_moe": Variant(
        "qwen3_5_moe_text",
        DELTA_NET_EXPERTS,
        renamed=WRAPPED,
        fused=True,
        wrapper="qwen3_5_moe",
    ),
    "gemma": Variant("gemma", {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}),
    "gemma2": Variant(
        "gemma2",
        {
            "num_hidden_layers": 3,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 14,
            "sliding_window": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 7.0,
            "rope_theta": 10000.0,
        },
    ),
    "gemma3_text": Variant(
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 14,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 9.0,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    # As published since the 4B: a model that sees, whose files call the language model a part.
    "gemma3": Variant(
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 14,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        renamed=APART,
        wrapper="gemma3",
        parts={
            "mm_tokens_per_image": 4,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 12,
                "intermediate_size": 14,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_use_head": False,
            },
        },
    ),
    # As the small ones: inputs per layer, keys and values shared by the last layers, whose MLP is twice as wide.
    "gemma4_text": Variant(
        "gemma4_text",
        {
            "num_hidden_layers": 5,
            "hidden_activation": "gelu_pytorch_tanh",
            "global_head_dim": 14,
            "sliding_window": 9,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "hidden_size_per_layer_input": 7,
            "vocab_size_per_layer_input": 61,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 9.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    # As published: a model that sees, the language model a part of it.
    "gemma4": Variant(
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "global_head_dim": 14,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 5,
            "vocab_size_per_layer_input": 61,
            "num_kv_shared_layers": 1,
            "final_logit_softcapping": 9.0,
            "pad_token_id": 0,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        wrapper="gemma4",
        parts={
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 12,
                "intermediate_size": 14,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
        },
    ),
    # As the large ones: experts beside the MLP, values that are the keys, and other heads where attention is full.
    "gemma4_text-experts": Variant(
        "gemma4_text",
        {
            "num_hidden_layers": 3,
            "hidden_activation": "gelu_pytorch_tanh",
            "global_head_dim": 14,
            "num_global_key_value_heads": 3,
            "attention_k_eq_v": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 14,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": Variant(
        "phi3", {**WHOLE, "sliding_window": 9, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    ),
    # Two of the documents are longer than the 16 positions it was made for; one is not.
    "phi3-longrope": Variant(
        "phi3",
        {
            **WHOLE,
            "sliding_window": None,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.6,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.3, 1.7], "long_factor": [1.5, 3.0, 5.0]},
            "tie_word_embeddings": True,
        },
    ),
    # Its two lists are the same: transformers 5.17 uses the short one for long documents too, only the scale changes.
    "phimoe": Variant(
        "phimoe",
        {
            **WHOLE,
            "intermediate_size": 14,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.3,
            "input_jitter_noise": 0.0,
            "attention_bias": True,
            "lm_head_bias": True,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.1, 1.3, 1.7, 2.0, 2.5],
                "long_factor": [1.1, 1.3, 1.7, 2.0, 2.5],
                "short_mscale": 1.1,
                "long_mscale": 1.4,
                "original_max_position_embeddings": 16,
            },
        },
        # PEFT knows the router by transformers' name only.
        adapted=[(r"\.mlp\.experts", ".block_sparse_moe.experts")],
    ),
    "llama4": Variant(
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 14,
            "intermediate_size_mlp": 38,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 9,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 4,
            "attn_scale": 0.3,
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        renamed=[(r"^(model|lm_head)\.", r"language_model.\1.")],
        transposed=True,
        wrapper="llama4",
    ),
    "deepseek_v2": Variant(
        "deepseek_v2",
        {
            **LATENT,
            "num_hidden_layers": 3,
            "q_lora_rank": 17,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_theta": 10000.0,
            "rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2-lite": Variant(
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "rope_theta": 10000.0,
        },
    ),
    "deepseek_v3": Variant(
        "deepseek_v3",
        {
            **LATENT,
            "num_hidden_layers": 3,
            "q_lora_rank": 17,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 1,
            "rope_interleave": True,
            "rope_theta": 10000.0,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3-halves": Variant(
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.3,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
            "attention_bias": True,
            "rope_theta": 10000.0,
        },
    ),
    "deepseek_v2-dense": Variant(
        "deepseek_v2",
        {
            **DENSE_LATENT,
            "q_lora_rank": 17,
            "v_head_dim": 23,
            "mlp_bias": True,
            "attention_bias": True,
            "rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3-dense": Variant(
        "deepseek_v3",
        {
            **DENSE_LATENT,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": True,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v4": Variant(
        "deepseek_v4",
        {
            "intermediate_size": DROP,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "q_lora_rank": 17,
            "qk_rope_head_dim": 6,
            "o_groups": 3,
            "o_lora_rank": 7,
            "sliding_window": 9,
            "compress_ratios": [0, 4, 128, 4],
            "compress_rate_csa": 3,
            "compress_rate_hca": 5,
            "index_n_heads": 13,
            "index_head_dim": 8,
            "index_topk": 3,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "num_hash_layers": 1,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "swiglu_limit": 1.5,
            "hc_mult": 3,
            "hc_sinkhorn_iters": 4,
            "rope_theta": 10000.0,
            "compress_rope_theta": 5000.0,
            "rope_scaling": YARN,
        },
        renamed=[
            (r"^model\.", ""),
            (r"^embed_tokens\.", "embed."),
            (r"^lm_head\.", "head."),
            (r"^hc_head\.hc_", "hc_head_"),
        ],
        # What is looked at is chosen, not weighted, by these.
        untrained=r"\.indexer\.",
    ),
    "gpt_neox": Variant(
        "gpt_neox",
        {**BARE, "hidden_act": "gelu", "use_parallel_residual": True, "rotary_pct": 0.6, "rotary_emb_base": 10000},
        renamed=[(r"^lm_head\.", "embed_out.")],
    ),
    "gpt_neox-sequential": Variant(
        "gpt_neox",
        {
            **BARE,
            "hidden_act": "gelu_fast",
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": 500,
        },
        renamed=[(r"^lm_head\.", "embed_out.")],
    ),
    # Nine heads: the slopes of ALiBi are powers of two for the first eight only.
    "bloom": Variant(
        "bloom",
        {
            **BARE,
            "intermediate_size": DROP,
            "num_hidden_layers": DROP,
            "num_attention_heads": DROP,
            "max_position_embeddings": DROP,
            "n_layer": 2,
            "n_head": 9,
            "hidden_size": 36,
            "tie_word_embeddings": True,
        },
        renamed=[(r"^transformer\.", "")],
    ),
    "falcon": Variant(
        "falcon",
        {
            **BARE,
            "intermediate_size": DROP,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "falcon-grouped": Variant(
        "falcon",
        {
            **BARE,
            "intermediate_size": DROP,
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "ffn_hidden_size": 38,
            "new_decoder_architecture": True,
            "parallel_attn": True,
            "alibi": False,
            "bias": True,
            "tie_word_embeddings": False,
        },
    ),
    # Not eager, which adds the ALiBi twice in transformers 5.17.
    "falcon-alibi": Variant(
        "falcon",
        {
            **BARE,
            "intermediate_size": DROP,
            "hidden_size": 36,
            "num_attention_heads": 9,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            "alibi": True,
            "bias": True,
            "tie_word_embeddings": True,
        },
        attention="sdpa",
    ),
    "gpt_oss": Variant(
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 14,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.0,
                "beta_slow": 0.1,
                "truncate": False,
            },
        },
        transposed=True,
        # Large enough that the SwiGLU is clamped here and there.
        rules=[(r"experts\.gate_up_proj$", 0.0, lambda fan_in: 8.0 / fan_in**0.5)],
    ),
    "glm": Variant("glm", {"attention_bias": True, "partial_rotary_factor": 0.6, "rope_theta": 10000.0}),
    "glm4": Variant("glm4", {"attention_bias": True, "partial_rotary_factor": 0.6, "rope_theta": 10000.0}),
    "granite": Variant(
        "granite",
        {
            **WHOLE,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": Variant("olmo2", {**WHOLE, "rope_theta": 500000.0}),
    "olmo3": Variant(
        "olmo3",
        {
            **WHOLE,
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 0.1,
                "attention_factor": 1.2,
            },
        },
    ),
    "starcoder2": Variant(
        "starcoder2",
        {
            **WHOLE,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "sliding_window": 9,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": Variant(
        "cohere",
        {**WHOLE, "use_qk_norm": True, "logit_scale": 0.3, "rope_theta": 10000.0, "tie_word_embeddings": True},
    ),
    "cohere2": Variant(
        "cohere2",
        {
            **WHOLE,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "logit_scale": 0.3,
            "rope_theta": 50000.0,
            "tie_word_embeddings": True,
        },
    ),
    "stablelm": Variant(
        "stablelm",
        {
            **WHOLE,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.6,
            "rope_theta": 10000,
        },
    ),
    "stablelm-sequential": Variant(
        "stablelm",
        {
            **WHOLE,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "partial_rotary_factor": 0.4,
            "rope_theta": 10000,
        },
    ),
    "phi": Variant(
        "phi",
        {**WHOLE, "hidden_act": "gelu_new", "qk_layernorm": True, "partial_rotary_factor": 0.4, "rope_theta": 10000.0},
    ),
}

# Left out of `config.json` unless a variant names them: transformers derives them from the fields the hub's files have.
DERIVED = [
    "_sliding_window_pattern",
    "layer_types",
    "mlp_layer_types",
    "moe_layers",
    "no_rope_layers",
    "per_layer_config",
    "rope_parameters",
    "transformers_version",
]
# Fields with one entry for each layer.
PER_LAYER = ["layer_types", "no_rope_layers", "compress_ratios"]


def replaced(rules, name):
    """A name after substitutions."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def fnv1a64(text):
    """The 64-bit FNV-1a hash of a string."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def drawn(name, shape, offset, scale, seed):
    """The tensor that a name stands for."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = np.uint64(fnv1a64(name) ^ seed)
    with np.errstate(over="ignore"):
        z = start + np.arange(int(np.prod(shape)), dtype=np.uint64) * golden
        z = z + golden
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    z = z >> np.uint64(40)
    if offset == "i64":
        z, column = z.reshape(-1, shape[-1]), np.arange(shape[-1])
        return torch.from_numpy((z[:, :1].astype(np.int64) + column) % scale).reshape(shape)
    u = z.astype(np.float32) / np.float32(2**23) - np.float32(1)
    return torch.from_numpy((np.float32(offset) + np.float32(scale) * u).reshape(shape))


# Offset and scale by the end of a name; for `scale`, a function of the fan-in where it matters.
RULES = [
    (r"\.A_log$", -1.0, 1.0),
    (r"\.dt_bias$", 0.2, 0.8),
    (r"conv1d\.weight$", 0.2, 0.6),
    (r"(\.sinks|\.attn_sink)$", 0.0, 1.5),
    (r"e_score_correction_bias$", 0.0, 0.3),
    (r"(embed_tokens|embed_tokens_per_layer|embed|head|word_embeddings|embed_in|embed_out|lm_head)\.weight$", 0.0, 0.8),
    # Far from ties: a token whose experts depend on the last bit could not be compared.
    (r"(\.(mlp|block_sparse_moe|ffn)\.gate|\.router|\.router\.proj)\.weight$", 0.0, lambda fan_in: 4.0 / fan_in**0.5),
]


def moments(name, initial, variant):
    """Offset and scale of a tensor: by name, or else a vector varies around the constant it starts as (1 for most
    norms, 0 for norms that add the 1 themselves) and a matrix keeps the size of what it is multiplied with."""
    if initial.dtype == torch.int64:  # experts by token
        return "i64", variant.options["n_routed_experts"]
    fan_in = initial.shape[-2 if variant.transposed and ".experts." in name and initial.ndim == 3 else -1]
    for pattern, offset, scale in [*variant.rules, *RULES]:
        if re.search(pattern, name):
            return offset, float(f"{scale(fan_in) if callable(scale) else scale:.4g}")
    if name.endswith("bias"):
        return 0.0, 0.3
    if initial.ndim == 1 or "norm" in name:
        constant = initial.flatten()[0].item()
        assert bool((initial == constant).all()) and constant in (0.0, 1.0), f"{name}: no rule for its scale"
        return constant, 0.3
    return 0.0, float(f"{2.0 / fan_in**0.5:.4g}")


def checkpoint_of(variant, model, folder):
    """The tensors that save_pretrained writes, laid out as published checkpoints are."""
    model.save_pretrained(folder, max_shard_size="1GB")
    tensors, experts = load_file(pathlib.Path(folder) / "model.safetensors"), {}
    for name in list(tensors) if variant.fused else []:
        if apart := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
            module, n, projection = apart.groups()
            experts.setdefault(module, {}).setdefault(int(n), {})[projection] = tensors.pop(name)
    for module, apart in experts.items():
        apart = [apart[n] for n in range(len(apart))]
        tensors[f"{module}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in apart])
        tensors[f"{module}.down_proj"] = torch.stack([e["down"] for e in apart])
    return {replaced(variant.renamed, name): tensor for name, tensor in tensors.items()}


def configuration(variant, hidden, layers):
    """The fields of the model, at the sizes asked for."""
    options = {k: v for k, v in {**COMMON, **variant.options}.items() if v is not DROP}
    if hidden:
        count = "n_head" if "n_head" in options else "num_attention_heads"
        if {"head_dim", "qk_nope_head_dim"} & options.keys():
            options["hidden_size"] = -(-hidden // options[count]) * options[count]
        else:  # more heads rather than larger ones, which position embeddings are made for
            size = options["hidden_size"] // options[count]
            step = size * options.get("num_key_value_heads", options.get("num_kv_heads", 1))
            options["hidden_size"] = -(-hidden // step) * step
            options[count] = options["hidden_size"] // size
    if layers:
        count = "n_layer" if "n_layer" in options else "num_hidden_layers"
        was = options[count]
        for key, value in options.items():
            if key in PER_LAYER and isinstance(value, list):
                options[key] = [value[i % was] for i in range(layers)]
        if options.get("first_k_dense_replace") == was:  # no layer has experts
            options["first_k_dense_replace"] = layers
        if shared := options.get("num_kv_shared_layers"):  # with a layer of the same kind among those that share nothing
            kinds = options["layer_types"]
            fits = lambda n: set(kinds[layers - n :]) <= set(kinds[: layers - n])
            options["num_kv_shared_layers"] = next(n for n in range(shared, -1, -1) if fits(n))
        options[count] = layers
    return options


def published(variant, config, written, options):
    """The config that save_pretrained wrote, as the hub would have it."""
    if variant.parts:  # `tie_word_embeddings` is left out, as the hub does
        text = {k: v for k, v in written["text_config"].items() if k not in [*DERIVED, "tie_word_embeddings"]}
        return {"model_type": variant.wrapper, "text_config": text | options, **variant.parts}
    aliases = {ours for theirs, ours in config.attribute_map.items() if theirs in options}
    fields = {k: v for k, v in written.items() if k not in DERIVED and k not in aliases} | options
    if not variant.wrapper:
        return fields
    tied = fields.get("tie_word_embeddings", False)
    return {"model_type": variant.wrapper, "text_config": fields, "tie_word_embeddings": tied}


def documents(vocabulary, lengths, seed):
    """Random documents end to end, with supervised stretches in each: ids (T), offsets, mask (T)."""
    total = sum(lengths)
    draw = ((drawn("ids", [total], 0.0, 1.0, seed).double() + 1) / 2 * (vocabulary - 3)).long() + 3
    ids, mask, offsets = draw.tolist(), [], [0]
    for length in lengths:
        ids[offsets[-1]] = 1
        start = length // 2 if length < 25 else 9
        mask += [int(t >= start or (length > 8 and t in (1, 2))) for t in range(length)]
        offsets.append(offsets[-1] + length)
    return torch.tensor(ids), torch.tensor(offsets), torch.tensor(mask)


def forward(model, ids, offsets):
    """Logits (T, V), every document on its own."""
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist())
    return torch.cat([model(input_ids=ids[begin:end].unsqueeze(0), use_cache=False).logits[0] for begin, end in spans])


def mean_loss(logits, ids, mask):
    """Mean cross-entropy over the supervised targets: the logits at i predict the token at i + 1 of the document."""
    targets = mask.nonzero().squeeze(1)
    return torch.nn.functional.cross_entropy(logits[targets - 1], ids[targets])


@contextlib.contextmanager
def routing_gaps():
    """Collects by how much of itself the last chosen of every top-k is ahead of the first one left out."""
    gaps, topk = [], torch.topk

    def watched(values, k, dim=-1, **rest):
        if k < values.shape[dim] and dim in (-1, values.ndim - 1):
            last, left = topk(values.detach().double(), k + 1, dim=-1).values[..., -2:].unbind(-1)
            apart = (last - left) / torch.maximum(last.abs(), left.abs())
            gaps.extend(apart.where(last > left, 0.0)[left.isfinite()].tolist())
        return topk(values, k, dim=dim, **rest)

    method = torch.Tensor.topk
    torch.topk, torch.Tensor.topk = watched, watched
    try:
        yield gaps
    finally:
        torch.topk, torch.Tensor.topk = topk, method


def unwrappable(model):
    """Linears that PEFT cannot wrap, only adapt as parameters: they answer with a tuple, or one block at a time."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith(("Router", "GroupedLinear"))
    }


def scale_of(key, fan_in):
    """That of a tensor of an adapter: A keeps the size of what it multiplies, B makes the adapter matter."""
    return float(f"{1.5 / fan_in**0.5:.4g}") if "lora_A" in key else 0.3


class Adapter:
    """What of a model is adapted, and the adapter under the keys of its file.

    All linears but the head, all experts and all routers. Where the checkpoint stores experts apart, so does the
    adapter (`experts.<n>.gate_proj.lora_A.weight` and so on). PEFT puts these together for the parameters that
    transformers fuses, A of gate and up stacked and B block-diagonal, hence at twice the rank.
    """

    def __init__(self, variant, model, names, seed):
        self.variant = variant
        self.separate = any(re.search(r"\.experts\.\d+\.", name) for name in names)
        lettered = any(name.endswith(".experts.0.w1.weight") for name in names)
        self.projections = ["w1", "w3", "w2"] if lettered else ["gate_proj", "up_proj", "down_proj"]
        head = model.get_output_embeddings()
        linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
        if variant.parts:
            linears = {n for n in linears if ".language_model." in n}
        routers = {n for n, m in model.named_modules() if type(m).__name__.endswith("Router") and hasattr(m, "weight")}
        self.experts = [n for n, p in model.named_parameters() if re.search(r"\.experts\.(gate_up|down)_proj$", n)]
        # Where transformers fuses experts that the checkpoint stores apart, PEFT takes these names for experts wherever
        # they occur and loses other linears of the same name, also in a model of that type that has no experts. They
        # can be had as parameters, under the same keys.
        converted = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type) in _MOE_TARGET_MODULE_MAPPING
        taken = r"\.(gate|gate_proj|up_proj|down_proj|w1|w2|w3)$" if self.separate or converted else r"(?!)"
        self.modules = sorted(n for n in linears - unwrappable(model) if not re.search(taken, n))
        self.parameters = sorted(f"{n}.weight" for n in (linears | routers) - set(self.modules)) + self.experts
        self.routers = {self.key(n) for n in routers}
        self.tensors = self.described(model, linears | routers)
        self.state = {key: drawn(key, *rest, seed) for key, *rest in self.tensors}

    def key(self, module):
        """The key of a module of transformers."""
        return f"base_model.model.{replaced(self.variant.adapted, module)}"

    def described(self, model, modules):
        """[[key, shape, offset, scale]] of the file."""
        sizes = {}  # of what A and B multiply up to: experts, out, in
        for module in modules:
            sizes[self.key(module)] = (1, *model.get_submodule(module).weight.shape)
        for name in self.experts:
            module, parameter = name.rsplit(".", 1)
            experts, out, fan_in = model.get_parameter(name).shape
            inner = parameter == "gate_up_proj"
            if self.separate:
                for projection in self.projections[:2] if inner else self.projections[2:]:
                    size = (1, out // 2 if inner else out, fan_in)
                    sizes |= {f"{self.key(module)}.{n}.{projection}": size for n in range(experts)}
            else:
                # PEFT goes by a flag of the module, which Llama 4 lacks: there A multiplies the outputs.
                flagged = getattr(model.get_submodule(module), "is_transposed", False)
                size = (experts, fan_in, out) if flagged else (experts, out, fan_in)
                sizes[self.key(module) + (".base_layer" if inner else "")] = size
        shapes = {}
        for key, (experts, out, fan_in) in sorted(sizes.items()):
            shapes[f"{key}.lora_A.weight"] = [experts * RANK, fan_in]
            shapes[f"{key}.lora_B.weight"] = [out, RANK * experts]
        return [[key, shape, 0.0, scale_of(key, shape[1])] for key, shape in shapes.items()]

    def attach(self, model):
        """The adapted model."""
        doubled = {r".*\.experts\.gate_up_proj": 2} if self.separate else {}
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=self.modules if self.parameters or self.variant.parts else "all-linear",
            target_parameters=self.parameters or None,
            rank_pattern={k: v * RANK for k, v in doubled.items()},
            alpha_pattern={k: v * ALPHA for k, v in doubled.items()},
            task_type="CAUSAL_LM",
        )
        peft = get_peft_model(model, config).eval()
        outcome = set_peft_model_state_dict(peft, self.state)
        assert not outcome.unexpected_keys, outcome.unexpected_keys
        kept = self.apart(get_peft_model_state_dict(peft))
        assert kept.keys() == self.state.keys(), kept.keys() ^ self.state.keys()
        assert all(torch.equal(kept[k], v) for k, v in self.state.items()), "PEFT keeps another adapter"
        return peft

    def gradients(self, peft):
        """The gradients under the keys of the file."""
        named = {n.replace(".default", ""): p for n, p in peft.named_parameters() if p.requires_grad}
        return self.apart({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()})

    def apart(self, fused):
        """Tensors under the keys PEFT has for them, under those of the file."""
        out = {}
        for key, tensor in fused.items():
            module, side = re.fullmatch(r"base_model\.model\.(.*)(\.lora_[AB]\.weight)", key).groups()
            if not (self.separate and re.search(r"\.experts(\.base_layer)?$", module)):
                out[self.key(module) + side] = tensor.clone().contiguous()
                continue
            experts = self.key(module.removesuffix(".base_layer"))
            names = self.projections[:2] if module.endswith(".base_layer") else self.projections[2:]
            rank = RANK * len(names)
            count = (tensor.shape[0] if "lora_A" in side else tensor.shape[1]) // rank
            for n in range(count):
                if "lora_A" in side:  # (E, len(names) * R, in)
                    parts = tensor.unflatten(0, (count, rank))[n].chunk(len(names))
                else:  # (len(names) * out, len(names) * R, E): the blocks of the diagonal
                    rows = tensor.unflatten(1, (rank, count))[..., n].chunk(len(names))
                    parts = [row.chunk(len(names), dim=1)[i] for i, row in enumerate(rows)]
                out |= {f"{experts}.{n}.{name}{side}": part.clone().contiguous() for name, part in zip(names, parts)}
        return out


def continued(model, prompt, cached):
    """The ids that a model continues a prompt with, greedily, and how far each was ahead of the next best."""
    if cached:
        rules = transformers.GenerationConfig(
            max_new_tokens=GENERATED, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0
        )
        return model.generate(input_ids=prompt.unsqueeze(0), generation_config=rules)[0, len(prompt) :], None
    ids, ahead = prompt, []
    for _ in range(GENERATED):
        logits = forward(model, ids, torch.tensor([0, len(ids)]))[-1]
        first, second = logits.topk(2).values.tolist()
        ahead.append(first - second)
        ids = torch.cat([ids, logits.argmax().reshape(1)])
    return ids[len(prompt) :], min(ahead)


def balance(model, ids):
    """The unweighted load-balancing loss of one document; None where transformers has none."""
    try:
        return model(input_ids=ids.unsqueeze(0), use_cache=False, output_router_logits=True).aux_loss
    except (AttributeError, TypeError, IndexError):  # the last where no layer has a router
        return None


def write_rows(path, rows):
    """A JSON list, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_adapter(folder, name, peft, rows, state, weights):
    """`adapter_config.json` as PEFT saves it and what describes the tensors."""
    with tempfile.TemporaryDirectory() as place:
        peft.peft_config["default"].base_model_name_or_path = f"tiny-random/{name}"
        peft.save_pretrained(place)
        saved = json.loads((pathlib.Path(place) / "adapter_config.json").read_text())
    for key in ["target_modules", "target_parameters", "exclude_modules"]:  # sets, whose order changes from run to run
        saved[key] = sorted(saved[key]) if saved[key] else saved[key]
    write_rows(folder / "adapter_tensors.json", rows)
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if weights:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_model(variant, arguments, work):
    """A checkpoint with the weights of a variant: its rows of `tensors.json`."""
    options = configuration(variant, arguments.hidden, arguments.layers)
    config = AutoConfig.for_model(variant.model_type, **copy.deepcopy(options))
    if variant.parts:
        whole = copy.deepcopy(variant.parts) | {"tie_word_embeddings": config.tie_word_embeddings}
        config = AutoConfig.for_model(variant.wrapper, text_config=config.to_dict(), **whole)
    torch.manual_seed(0)
    fresh = variant.maker.from_config(config, **how(variant)).float()
    initial = checkpoint_of(variant, fresh, work)
    rows = [[name, list(t.shape), *moments(name, t, variant)] for name, t in sorted(initial.items())]
    weights = {name: drawn(name, *rest, arguments.seed) for name, *rest in rows}
    save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
    (work / "generation_config.json").unlink(missing_ok=True)
    written = published(variant, fresh.config, json.loads((work / "config.json").read_text()), options)
    (work / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    with tempfile.TemporaryDirectory() as again:
        kept = checkpoint_of(variant, load(variant, work), again)
    assert kept.keys() == weights.keys() and all(torch.equal(kept[k], v) for k, v in weights.items()), (
        "reads back changed"
    )
    return rows


def how(variant):
    """Which of its ways transformers computes the model."""
    return {"attn_implementation": variant.attention, "experts_implementation": "eager"}


def load(variant, work):
    """The model of a checkpoint, in fp32; every tensor must have found its place."""
    model, found = variant.maker.from_pretrained(
        work, dtype=torch.float32, output_loading_info=True, **how(variant)
    )
    assert not any(found.values()), found
    return model.eval()


class Tie(Exception):
    """Rounding alone may change what a model chooses: a token, or an expert."""


def make(name, variant, arguments):
    """One model with its adapters and references."""
    seed, folder = arguments.seed, arguments.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        work = pathlib.Path(place)
        rows = write_model(variant, arguments, work)
        model = load(variant, work)
        ids, offsets, mask = documents(model.config.get_text_config().vocab_size, arguments.lengths or variant.lengths, seed)
        first = ids[: offsets[1]]
        with routing_gaps() as gaps:
            with torch.no_grad():
                base = forward(model, ids, offsets)
                aux = balance(model, first)
            adapter = Adapter(variant, model, [name for name, *_ in rows], seed)
            peft = adapter.attach(model)
            logits = forward(peft, ids, offsets)
        loss = mean_loss(logits, ids, mask)
        loss.backward()
        reference = {"ids": ids, "offsets": offsets, "mask": mask, "base_logits": base}
        reference |= {"logits": logits.detach(), "loss": loss.detach().reshape(1)}
        gradients = adapter.gradients(peft)
        reference |= {f"grad.{k}": v for k, v in gradients.items()}
        dead = {k for k, v in gradients.items() if not v.abs().max() > 0}
        assert dead == {k for k in gradients if re.search(variant.untrained, k)}, f"{name}: no gradient for {sorted(dead)[:5]}"

        if aux is not None:
            peft.zero_grad()
            adapted = balance(peft, first)
            adapted.backward()
            reference["aux_loss"] = torch.stack([aux, adapted.detach()])
            of_routers = {k: v for k, v in adapter.gradients(peft).items() if k.split(".lora_")[0] in adapter.routers}
            reference |= {f"aux_grad.{k}": v for k, v in of_routers.items()}

        prompt = ids[offsets[2] : offsets[2] + PROMPT].clone()
        with torch.no_grad():
            answer, ahead = continued(peft, prompt, cached=False)
            cached, _ = continued(peft, prompt, cached=True)
        assert torch.equal(answer, cached), f"{name}: {answer} without a cache, {cached} with one"
        reference |= {"prompt": prompt, "generated": answer}

        write_adapter(folder / "adapter", name, peft, adapter.tensors, adapter.state, arguments.weights)
        if adapter.separate:
            reference["peft_logits"] = as_peft_has_it(
                name, load(variant, work), folder / "peft", ids, offsets, arguments
            )
        write_rows(folder / "tensors.json", rows)
        save_file({k: v.contiguous() for k, v in reference.items()}, folder / "reference.safetensors")
        shutil.copy(work / "config.json", folder)
        if arguments.weights:
            shutil.copy(work / "model.safetensors", folder)

        # What was saved is what was measured.
        for kind, expected in [("adapter", "logits"), ("peft", "peft_logits")]:
            if expected not in reference:
                continue
            shutil.copytree(folder / kind, work / kind)
            described = json.loads((work / kind / "adapter_tensors.json").read_text())
            state = {key: drawn(key, *rest, seed) for key, *rest in described}
            save_file(state, work / kind / "adapter_model.safetensors")
            with torch.no_grad():
                found = forward(PeftModel.from_pretrained(load(variant, work), work / kind), ids, offsets)
            assert torch.equal(found, reference[expected]), f"{name}: {kind} reads back as another adapter"

    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) // 1024
    moved = (reference["logits"] - base).abs().max().item()
    close = min(gaps, default=float("inf"))
    print(
        f"{name}: loss {loss.item():.3f}, logits within {logits.abs().max():.1f}, adapter moves {moved:.1f}, "
        f"next token ahead {ahead:.1e}, experts ahead {close:.1e}, {size} KiB",
        flush=True,
    )
    if ahead < 1e-3 or close < TIED:
        raise Tie(f"{name}: too near a tie to be compared; try another --seed")


def as_peft_has_it(name, model, folder, ids, offsets, arguments):
    """Logits with an adapter as PEFT itself makes it with `all-linear` and the fused experts."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        exclude_modules=sorted(unwrappable(model)) or None,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config).eval()
    rows = []
    for key, tensor in sorted(get_peft_model_state_dict(peft).items()):
        rows.append([key, list(tensor.shape), 0.0, scale_of(key, tensor.shape[1])])
    state = {key: drawn(key, *rest, arguments.seed) for key, *rest in rows}
    set_peft_model_state_dict(peft, state)
    write_adapter(folder, name, peft, rows, state, arguments.weights)
    with torch.no_grad():
        return forward(peft, ids, offsets)


def lengths(text):
    """Three numbers of tokens, the last with room for the prompt."""
    found = tuple(map(int, text.split(",")))
    if len(found) != 3 or min(found) < 2 or found[2] < PROMPT:
        raise argparse.ArgumentTypeError(f"three lengths of at least 2, the last at least {PROMPT}")
    return found


def chosen(text):
    """The variants that `text` names: variants or model_types with commas between them, or all."""
    asked = text.split(",")
    known = {"all", *VARIANTS, *(v.model_type for v in VARIANTS.values())}
    if unknown := sorted(set(asked) - known):
        raise argparse.ArgumentTypeError(f"no family {', '.join(unknown)}; there are all, {', '.join(VARIANTS)}")
    return {n: v for n, v in VARIANTS.items() if {"all", n, v.model_type} & set(asked)}


def settle():
    """Settings with which torch computes the same numbers in every run, without what its libraries have to say."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def main():
    """Makes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--family", type=chosen, default="all", help="only these variants, or all variants of these model_types: qwen3,phi"
    )
    parser.add_argument("--seed", type=int, default=0, help="another set of weights and documents")
    parser.add_argument("--hidden", type=int, help="hidden_size, rounded up to what the heads allow")
    parser.add_argument("--layers", type=int, help="num_hidden_layers; patterns of layers are repeated")
    parser.add_argument("--lengths", type=lengths, help="tokens of each of three documents, as in 230,7,90; the last over 16")
    parser.add_argument("--out", type=pathlib.Path, default=FIXTURES)
    parser.add_argument("--weights", action="store_true", help="also write the weights of model and adapters")
    arguments = parser.parse_args()
    if arguments.out == FIXTURES and (arguments.seed or arguments.hidden or arguments.layers or arguments.lengths):
        parser.error("the fixtures have their own seed and sizes: name another --out")
    settle()
    for name, variant in arguments.family.items():
        make(name, variant, arguments)


if __name__ == "__main__":
    main()
