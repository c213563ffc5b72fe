"""Tiny causal language models of many architectures, for tests that compare gradients.

Every model is a few layers wide enough to exercise what is particular to its architecture: both kinds of
layer where kinds alternate (sliding and full attention, linear and full attention, dense and mixture of
experts), a sliding window shorter than the default batch, grouped key/value heads, experts that are routed.
All dropouts and router noises are 0, so that two runs of one model give the same bits.

``CASES`` holds the architectures in which nothing but hidden states goes from one decoder layer to the next.
``SHARED_STATE`` holds those that pass something else to a later layer (keys and values of an earlier layer,
one block used at several depths, top-k indices, ...). ``build`` and ``batch`` take the names of both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
LENGTH = 20
WINDOW = 8
TAGS = frozenset(
    {
        "dense",  # dense feed-forward in every layer, attention in every layer
        "moe",
        "hybrid",  # some layers without attention
        "gqa",  # fewer key/value heads than query heads
        "sliding",  # some layers attend within a window shorter than LENGTH
        "softcap",
        "parallel",  # attention and feed-forward side by side
        "learned-positions",
        "alibi",
        "tied",
        "untied",
        "aux",  # the loss holds the routers' load balancing loss
    }
)
KINDS = ("plain", "padded", "packed")


@dataclass(frozen=True)
class Case:
    """One architecture at its tiny size.

    ``attn`` is the attention implementation the class can run ("eager" where it has no sdpa).
    ``kinds`` are the kinds of batch its forward heeds: "packed" needs ``position_ids``.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    tags: frozenset[str]
    attn: str = "sdpa"
    kinds: frozenset[str] = frozenset(KINDS)


# Sizes used wherever the config class has a field (or an alias) of that name.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "initializer_range": 0.1,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # linear attention and state spaces
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_d_conv": 3,
    "state_size": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "conv_kernel": 3,
    "chunk_size": 8,
    # every dropout there is
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "activation_dropout": 0.0,
    "attn_pdrop": 0.0,
    "dropout": 0.0,
    "dropout_p": 0.0,
    "emb_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "embed_dropout": 0.0,
    "embedding_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "layerdrop": 0.0,
    "mlp_dropout": 0.0,
    "resid_dropout": 0.0,
    "resid_pdrop": 0.0,
    "residual_dropout": 0.0,
    "summary_first_dropout": 0.0,
}

CASES: dict[str, Case] = {}
SHARED_STATE: dict[str, Case] = {}


def _config(model_type: str, overrides: dict[str, Any], extra: dict[str, Any]) -> PreTrainedConfig:
    """``extra`` is for what the class takes without declaring a field of that name."""
    cls = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(cls)}

    def field(name: str) -> str:
        alias = cls.attribute_map.get(name, name)
        return alias if alias in fields else name

    values = {field(name): value for name, value in _SIZES.items() if field(name) in fields}
    overrides = {field(name): value for name, value in overrides.items()}
    if not set(overrides) <= fields:
        raise ValueError(f"{cls.__name__} has no {sorted(set(overrides) - fields)}")
    return cls(**(values | overrides | extra))


def _add(
    name: str,
    tags: str,
    *,
    into: dict[str, Case] = CASES,
    model_type: str | None = None,
    attn: str = "sdpa",
    kinds: str = "plain padded packed",
    extra: dict[str, Any] | None = None,
    **overrides: Any,
) -> None:
    if name in CASES or name in SHARED_STATE:
        raise ValueError(f"two cases named {name}")
    if not set(tags.split()) <= TAGS:
        raise ValueError(f"{name}: {sorted(set(tags.split()) - TAGS)} is not a tag")
    for tied in ("tied", "untied"):
        if tied in tags.split():
            overrides["tie_word_embeddings"] = tied == "tied"

    def config() -> PreTrainedConfig:
        return _config(model_type or name, overrides, extra or {})

    into[name] = Case(name, config, frozenset(tags.split()), attn, frozenset(kinds.split()))


_ALTERNATE = ["sliding_attention", "full_attention"] * 2
_AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "num_key_value_heads": 4}

# Attention in every layer, dense feed-forward.
_add("llama", "dense gqa untied")
_add("llama-tied", "dense gqa tied", model_type="llama", attention_bias=True, mlp_bias=True)
_add("mistral", "dense gqa sliding untied")
_add("mistral-tied", "dense gqa sliding tied", model_type="mistral")
_add("ministral", "dense gqa sliding untied", layer_types=_ALTERNATE)
_add("ministral3", "dense gqa sliding untied")
_add("qwen2", "dense gqa tied")
_add(
    "qwen2-sliding",
    "dense gqa sliding untied",
    model_type="qwen2",
    use_sliding_window=True,
    max_window_layers=2,
)
_add("qwen3", "dense gqa tied")
_add(
    "qwen3-sliding",
    "dense gqa sliding untied",
    model_type="qwen3",
    use_sliding_window=True,
    max_window_layers=2,
)
_add("gemma", "dense gqa tied")
_add("gemma2", "dense gqa sliding softcap tied", query_pre_attn_scalar=8, attn="eager")
_add(
    "gemma2-untied",
    "dense gqa sliding softcap untied",
    model_type="gemma2",
    query_pre_attn_scalar=8,
    attn="eager",
)
_add("gemma3_text", "dense gqa sliding tied", layer_types=_ALTERNATE, query_pre_attn_scalar=8)
_add(
    "gemma3_text-softcap",
    "dense gqa sliding softcap tied",
    model_type="gemma3_text",
    layer_types=_ALTERNATE,
    query_pre_attn_scalar=8,
    final_logit_softcapping=5.0,
)
_add("vaultgemma", "dense gqa sliding softcap tied", query_pre_attn_scalar=8, attn="eager")
_add("phi", "dense gqa parallel untied", qk_layernorm=True)
_add("phi3", "dense gqa sliding untied")
_add("stablelm", "dense gqa untied", use_qkv_bias=True)
_add(
    "stablelm-parallel",
    "dense gqa parallel untied",
    model_type="stablelm",
    use_parallel_residual=True,
    qk_layernorm=True,
)
_add("starcoder2", "dense gqa sliding tied")
_add("cohere", "dense gqa parallel tied", use_qk_norm=True)
_add("cohere2", "dense gqa parallel sliding tied")
_add(
    "cohere_compass_text",
    "dense gqa sliding tied",
    layer_types=_ALTERNATE,
    rope_parameters={kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _ALTERNATE[:2]},
    logit_scale=0.5,
)
_add("olmo", "dense gqa untied", clip_qkv=0.5)
_add("olmo2", "dense gqa untied")
_add("olmo3", "dense gqa sliding untied")
_add("granite", "dense gqa tied", **_MULTIPLIERS)
_add("granite_swa", "dense gqa sliding tied", layer_types=_ALTERNATE, attn="eager", **_MULTIPLIERS)
_add("hyperclovax", "dense gqa untied", **_MULTIPLIERS)
_add("glm", "dense gqa untied")
_add("glm4", "dense gqa untied")
_add("nemotron", "dense gqa untied")
_add("persimmon", "dense untied")
_add("smollm3", "dense gqa sliding tied", use_sliding_window=True)
_add("seed_oss", "dense gqa untied")
_add("exaone4", "dense gqa sliding untied")
_add("ernie4_5", "dense gqa tied", use_bias=True)
_add("hunyuan_v1_dense", "dense gqa untied")
_add("helium", "dense gqa untied")
_add("arcee", "dense gqa untied")
_add("apertus", "dense gqa untied")
_add("diffllama", "dense gqa untied")
_add("doge", "dense gqa sliding untied")
_add("bitnet", "dense gqa untied")
_add("cwm", "dense gqa sliding untied")
_add("jais2", "dense gqa untied")
_add("nanochat", "dense gqa softcap untied")
_add("minicpm3", "dense tied", num_key_value_heads=4, dim_model_base=16)
_add("youtu", "dense tied", num_key_value_heads=4)
_add("internlm3", "dense gqa untied", attention_bias=True, mlp_bias=True)
_add("iquestcoder", "dense gqa untied")
_add("modernbert-decoder", "dense sliding tied", local_attention=2 * WINDOW, layer_types=_ALTERNATE)

# Older decoders: learned positions, alibi, parallel residuals.
_add("gpt2", "dense learned-positions tied")
_add(
    "gpt2-untied",
    "dense learned-positions untied",
    model_type="gpt2",
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
)
_add(
    "gpt_neo",
    "dense sliding learned-positions tied",
    attention_types=[[["global", "local"], 2]],
    window_size=WINDOW,
    attn="eager",
)
_add("gpt_neox", "dense parallel untied")
_add("gpt_neox-sequential", "dense tied", model_type="gpt_neox", use_parallel_residual=False)
_add("gpt_neox_japanese", "dense tied", attn="eager")
_add("gptj", "dense parallel untied", rotary_dim=4, attn="eager")
_add("gpt_bigcode", "dense gqa learned-positions tied")
_add("codegen", "dense parallel untied", rotary_dim=4, attn="eager")
_add("opt", "dense learned-positions tied", ffn_dim=48)
_add("opt-projected", "dense learned-positions untied", model_type="opt", ffn_dim=48, word_embed_proj_dim=16)
_add("bloom", "dense alibi tied", kinds="plain padded", attn="eager")
_add("falcon", "dense gqa parallel tied")
_add(
    "falcon-alibi",
    "dense alibi tied",
    kinds="plain padded",
    model_type="falcon",
    alibi=True,
    parallel_attn=False,
    multi_query=False,
    bias=True,
)
_add(
    "falcon-new",
    "dense gqa parallel tied",
    model_type="falcon",
    new_decoder_architecture=True,
    num_kv_heads=2,
)
_add("mpt", "dense alibi tied", kinds="plain padded", attn="eager")
_add("biogpt", "dense learned-positions tied")
_add("xglm", "dense learned-positions tied", ffn_dim=48, attn="eager")
_add("openai-gpt", "dense learned-positions tied", attn="eager")
_add("ctrl", "dense tied", dff=48)

# Mixtures of experts.
_add("mixtral", "moe gqa untied", sliding_window=None)
_add("mixtral-sliding", "moe gqa sliding tied", model_type="mixtral")
_add("mixtral-aux", "moe gqa untied aux", model_type="mixtral", sliding_window=None, **_AUX)
_add("qwen2_moe", "moe gqa untied", mlp_only_layers=[1])
_add(
    "qwen2_moe-sliding-aux",
    "moe gqa sliding untied aux",
    model_type="qwen2_moe",
    use_sliding_window=True,
    max_window_layers=2,
    **_AUX,
)
_add("qwen3_moe", "moe gqa untied", mlp_only_layers=[1])
_add("qwen3_moe-aux", "moe gqa untied aux", model_type="qwen3_moe", mlp_only_layers=[1], **_AUX)
_add("phimoe", "moe gqa sliding untied", lm_head_bias=True)
_add("olmoe", "moe gqa untied")
_add("olmoe-aux", "moe gqa untied aux", model_type="olmoe", **_AUX)
_add("flex_olmo", "moe gqa untied")
_add("granitemoe", "moe gqa untied", **_MULTIPLIERS)
_add("granitemoeshared", "moe gqa untied", shared_intermediate_size=16, **_MULTIPLIERS)
_add("granitemoe_swa", "moe gqa sliding untied", layer_types=_ALTERNATE, attn="eager", **_MULTIPLIERS)
_add("glm4_moe", "moe gqa untied", use_qk_norm=True)
_add("glm4_moe_lite", "moe untied", num_key_value_heads=4)
_add("gpt_oss", "moe gqa sliding untied", attn="eager")
_add("gpt_oss-aux", "moe gqa sliding untied aux", model_type="gpt_oss", attn="eager", **_AUX)
_add("deepseek_v2", "moe untied", num_key_value_heads=4, moe_intermediate_size=16)
_add("deepseek_v3", "moe untied", num_key_value_heads=4)
_add(
    "dbrx",
    "moe gqa untied",
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ffn_config={"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 16},
)
_add(
    "llama4_text",
    "moe gqa sliding untied",
    intermediate_size_mlp=48,
    attention_chunk_size=WINDOW,
    interleave_moe_layer_step=2,
    no_rope_layer_interval=4,
)
_add("ernie4_5_moe", "moe gqa tied")
_add("hunyuan_v1_moe", "moe gqa untied")
_add("dots1", "moe gqa sliding untied", max_window_layers=2)
_add("jetmoe", "moe gqa tied")
_add("jetmoe-aux", "moe gqa tied aux", model_type="jetmoe", output_router_logits=True, aux_loss_coef=0.01)
_add("minimax_m2", "moe gqa untied")
_add("afmoe", "moe gqa sliding untied", mup_enabled=True)
_add("aria_text", "moe gqa untied")
_add("axk1", "moe untied", num_key_value_heads=4)
_add("cohere2_moe", "moe gqa sliding tied")
_add("exaone_moe", "moe gqa sliding untied")
_add("flint", "moe gqa sliding untied", attn="eager")
_add("hy_v3", "moe gqa untied")
_add("kolibri1", "moe gqa sliding untied", layer_types=_ALTERNATE)
_add("laguna", "moe gqa sliding untied", layer_types=_ALTERNATE)
_add("mellum", "moe gqa sliding untied", layer_types=_ALTERNATE)
_add("mimo_v2_flash", "moe gqa sliding untied", attn="eager")
_add("solar_open", "moe gqa untied")
_add("doge-moe", "moe gqa sliding untied", model_type="doge", is_moe=True)
_add("longcat_flash", "moe untied", num_layers=2, head_dim=4, num_key_value_heads=4, zero_expert_num=1)

# State spaces, linear attention, convolutions, alone or between attention layers.
_add("mamba", "tied", kinds="plain padded", attn="eager")
_add("mamba2", "untied", kinds="plain padded", attn="eager", num_heads=8, head_dim=8)
_add("falcon_mamba", "tied", kinds="plain padded", attn="eager")
_add("rwkv", "untied", kinds="plain", attn="eager")
_add(
    "xlstm",
    "softcap untied",
    attn="eager",
    kinds="plain",
    num_heads=4,
    ffn_round_up_to_multiple_of=8,
    chunk_size=4,
    mode="train",
)
_add("recurrent_gemma", "hybrid gqa sliding softcap tied")
_add("jamba", "moe hybrid gqa untied", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4)
_add("bamba", "hybrid gqa untied", attn_layer_indices=[1, 3])
_add(
    "bamba-z_loss",
    "hybrid gqa untied",
    model_type="bamba",
    attn_layer_indices=[1, 3],
    z_loss_coefficient=0.01,
)
_add(
    "falcon_h1",
    "hybrid gqa untied",
    mamba_d_ssm=32,
    embedding_multiplier=2.0,
    lm_head_multiplier=0.5,
    key_multiplier=0.7,
    attention_out_multiplier=0.8,
    ssm_out_multiplier=0.6,
)
_add(
    "granitemoehybrid",
    "moe hybrid gqa untied",
    layer_types=["mamba", "attention"] * 2,
    position_embedding_type="rope",
    shared_intermediate_size=16,
    **_MULTIPLIERS,
)
_add("lfm2", "hybrid gqa tied", layer_types=["conv", "full_attention"] * 2, block_multiple_of=8)
_add("lfm2_moe", "moe hybrid gqa tied", layer_types=["conv", "full_attention"] * 2)
_add("lfm3", "hybrid gqa sliding tied", layer_types=["conv", "sliding_attention", "conv", "full_attention"])
_add("minimax", "moe hybrid gqa sliding untied")
_add("minimax-aux", "moe hybrid gqa sliding untied aux", model_type="minimax", **_AUX)
_add(
    "nemotron_h",
    "moe hybrid gqa untied",
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    mamba_num_heads=4,
    mamba_head_dim=8,
    moe_shared_expert_intermediate_size=16,
)
_add("qwen3_next", "moe hybrid gqa untied")
_add("qwen3_next-aux", "moe hybrid gqa untied aux", model_type="qwen3_next", **_AUX)
_add("qwen3_5_text", "hybrid gqa untied")
_add("qwen3_5_moe_text", "moe hybrid gqa untied")
_add("olmo_hybrid", "hybrid gqa untied")
_add(
    "kimi_linear",
    "moe hybrid untied",
    num_key_value_heads=4,
    linear_head_dim=8,
    linear_num_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)
_add(
    "bailing_hybrid",
    "moe hybrid untied",
    num_key_value_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)

# Sparse attention indexers (no gradient reaches them), several residual streams, token ids in every layer.
_add(
    "gemma4_text-moe",
    "moe gqa sliding tied",
    model_type="gemma4_text",
    layer_types=_ALTERNATE,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=0,
    enable_moe_block=True,
    top_k_experts=2,
    extra={"global_head_dim": 8},
)
_add("deepseek_v32", "moe untied", **_INDEXER)
_add("axk2", "moe untied", **_INDEXER)
_add(
    "dots3_note_text",
    "moe sliding untied",
    layer_types=["sliding_attention", "indexed_attention"] * 2,
    shared_experts_intermediate_size=16,
    extra={
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    **_INDEXER,
)
_add(
    "deepseek_v4",
    "moe gqa sliding untied",
    attn="eager",
    num_key_value_heads=1,
    partial_rotary_factor=0.5,
    o_groups=2,
    o_lora_rank=8,
    index_topk=2,
    index_head_dim=8,
    index_n_heads=2,
    layer_types=[
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
)
_add(
    "inkling_text",
    "moe gqa sliding",
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    d_rel=4,
    rel_extent=32,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
)
_add(
    "minimax_m3_vl_text",
    "moe gqa untied",
    dense_intermediate_size=48,
    shared_intermediate_size=16,
    rotary_dim=4,
    index_n_heads=2,
    index_head_dim=8,
    index_block_size=4,
    index_topk_blocks=2,
    layer_types=["full_attention", "minimax_m3_sparse"] * 2,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
)
_add(
    "qwen4_exp_text",
    "moe hybrid gqa untied",
    hc_count=2,
    hc_lowrank=4,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
    layer_types=["linear_attention", "indexed_attention"] * 2,
)

# What goes from layer to layer besides hidden states: gemma3n and gemma4, keys and values (and inputs per
# layer); zamba, one transformer block at several depths, which reads the embeddings too; glm_moe_dsa and
# hy_v4, top-k indices; zaya, the router's state; inkling2, outputs of several layers before. hrm_text runs
# its stacks over and over.
_add(
    "gemma3n_text",
    "dense gqa sliding softcap tied",
    into=SHARED_STATE,
    layer_types=_ALTERNATE,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    laurel_rank=4,
)
_add(
    "gemma4_text",
    "dense gqa sliding tied",
    into=SHARED_STATE,
    layer_types=_ALTERNATE,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    extra={"global_head_dim": 8},
)
_add(
    "gemma4_unified_text",
    "dense gqa sliding tied",
    into=SHARED_STATE,
    layer_types=_ALTERNATE,
    num_kv_shared_layers=2,
    extra={"global_head_dim": 8},
)
_add(
    "zamba",
    "hybrid tied",
    into=SHARED_STATE,
    num_key_value_heads=4,
    n_mamba_heads=2,
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
)
_add(
    "zamba2",
    "hybrid tied",
    into=SHARED_STATE,
    num_key_value_heads=4,
    n_mamba_heads=4,
    adapter_rank=4,
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
)
_add(
    "glm_moe_dsa",
    "moe untied",
    into=SHARED_STATE,
    indexer_types=["full", "shared", "full", "shared"],
    **_INDEXER,
)
_add(
    "hy_v4",
    "moe untied",
    into=SHARED_STATE,
    attn="eager",
    indexer_types=["full", "shared", "full", "shared"],
    **_INDEXER,
)
_add(
    "inkling2_text",
    "moe gqa sliding softcap",
    into=SHARED_STATE,
    attn="eager",
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    d_rel=4,
    rel_extent=32,
    unpadded_vocab_size=VOCAB,
    n_layers_per_attn_res_block=2,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
)
_add(
    "zaya",
    "moe gqa sliding tied",
    into=SHARED_STATE,
    num_experts_per_tok=1,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
    router_hidden_size=16,
)
_add("hrm_text", "dense untied", into=SHARED_STATE)


def _find(name: str) -> Case:
    return CASES[name] if name in CASES else SHARED_STATE[name]


def _perturb(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Moves every weight a little, those that start as constants (norms, biases, sinks, ...) further.

    So do the saved buffers that start as constants, such as the routers' correction biases.
    """
    saved = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            constant = tensor.numel() == 1 or bool((tensor == tensor.flatten()[0]).all())
            if isinstance(tensor, torch.nn.Parameter):
                scale = 0.1 if constant else 0.001
            elif constant and tensor.is_floating_point() and name in saved:
                scale = 0.1
            else:
                continue
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def _from_config(config: PreTrainedConfig, dtype: torch.dtype, seed: int, attn: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype)


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The model of case ``name`` with random weights, in training mode; the same bits for the same seed.

    A lower ``dtype`` gives the float32 weights rounded, except those that ``from_pretrained`` leaves in
    float32 as well (``_keep_in_fp32_modules_strict``, and what the class creates in float32): a few
    architectures then have parameters of two dtypes.
    """
    case = _find(name)
    attn = "eager" if case.attn == "eager" else attn_implementation
    model = _from_config(case.config(), torch.float32, seed, attn)
    _perturb(model, torch.Generator().manual_seed(seed + 1))
    if dtype != torch.float32:
        weights = model.state_dict()
        model = _from_config(case.config(), dtype, seed, attn)
        strict = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
        with torch.no_grad():
            for key, tensor in (*model.named_parameters(), *model.named_buffers()):
                if key in weights and tensor.is_floating_point():
                    keep = any(re.search(pattern, key) for pattern in strict)
                    tensor.data = weights[key].to(torch.float32 if keep else tensor.dtype)
    return model.train()


def batch(
    name_or_config: str | PreTrainedConfig,
    batch_size: int = 2,
    length: int = LENGTH,
    seed: int = 1,
    kind: str = "plain",
) -> dict[str, torch.Tensor]:
    """Random ``input_ids`` and ``labels``.

    "padded" rows (all but the first) end in padding of different lengths: ``attention_mask`` is 0 there
    and ``labels`` -100. "packed" rows hold several sequences each: ``position_ids`` start again at 0 inside
    the row and there is no ``attention_mask``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
    if isinstance(name_or_config, str):
        case = _find(name_or_config)
        if kind not in case.kinds:
            raise ValueError(f"{case.name} takes no {kind} batch")
        config = case.config()
    else:
        config = name_or_config
    generator = torch.Generator().manual_seed(seed)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (batch_size, length), generator=generator)
    # The padding id as an ordinary token, inside the row: some embeddings give that row no gradient.
    ids[0, length // 2] = 0
    labels = ids.clone()
    out = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        mask = torch.ones_like(ids)
        for row in range(1, batch_size):
            cut = max(2, length - 3 * row - 2)
            mask[row, cut:] = 0
        ids[mask == 0] = 0
        labels[mask == 0] = -100
        out["attention_mask"] = mask
    elif kind == "packed":
        positions = torch.empty_like(ids)
        for row in range(batch_size):
            first = max(1, length // 2 - 3 * (row % 3) - 1)
            second = max(1, (length - first) // 2)
            parts = [first, second, length - first - second]
            positions[row] = torch.cat([torch.arange(part) for part in parts])
        out["position_ids"] = positions
    return out
