"""Names of our settings in other trainers.

Aliases are accepted, reported once as a note, and absent from the resolved configuration. Two names of one
setting in one place are an error, except that of two switches one that is off yields to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from horizon_lm.config import adapter_names as names
from horizon_lm.config.yaml import Document, KeyPath
from horizon_lm.errors import ConfigError


@dataclass(frozen=True)
class Alias:
    """The canonical name, and the conversion of an alias's value (ValueError if there is none).

    remark: what the note on the alias adds.
    """

    key: str
    convert: Callable[[Any], Any] | None = None
    remark: str = ""


def _dtype(value: Any) -> Any:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(name, name) if name else name


def _flag(yes: str, no: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if (
            value not in (True, False, "auto")
            or isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            raise ValueError("expected true or false")
        return yes if value else no

    return convert


def _ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError("expected a share of all steps, at least 0 and below 1")
    return float(value)


def _flash(value: Any) -> Any:
    if isinstance(value, bool):
        return "flash_attention_2" if value else "sdpa"
    return {"fa2": "flash_attention_2", "disabled": "eager", "auto": "sdpa"}.get(value, value)


def _checkpointing(value: Any) -> Any:
    return _flag("recompute", "keep")(value)


def _choice(yes: str, no: str) -> Callable[[Any], str]:
    """Convert a switch whose two positions are two of our words."""

    def convert(value: Any) -> str:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return yes if value else no

    return convert


def _method(value: Any) -> Any:
    """Convert LLaMA-Factory's `stage` and Axolotl's `rl`; null is supervised tuning."""
    names = {None: "sft", "pt": "sft", "apo_zero": "apo"}
    if value in ("rm", "ppo", "grpo", "gdpo", "ebft"):
        raise ValueError("'horizon train' does not train reward models or with rollouts")
    return names.get(value, value) if value is None or isinstance(value, str) else value


def _weight(value: Any) -> Any:
    """Convert a weight of which 0 means none."""
    return None if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0 else value


ALIASES: dict[str, Alias] = {
    "base_model": Alias("model_name_or_path"),
    "model": Alias("model_name_or_path"),
    "model_name": Alias("model_name_or_path"),
    "model_path": Alias("model_name_or_path"),
    "revision": Alias("model_revision"),
    "tokenizer": Alias("tokenizer_name_or_path"),
    "tokenizer_name": Alias("tokenizer_name_or_path"),
    "torch_dtype": Alias("dtype", _dtype),
    "bf16": Alias("dtype", _flag("bfloat16", "float32")),
    "pure_bf16": Alias("dtype", _flag("bfloat16", "float32")),
    "fp32": Alias("dtype", _flag("float32", "bfloat16")),
    "full_determinism": Alias("deterministic"),
    "attn_impl": Alias("attn_implementation"),
    "torch_compile": Alias("compile"),
    "use_liger_kernel": Alias("kernels", _choice("liger", "none")),
    "enable_liger_kernel": Alias("kernels", _choice("liger", "none")),
    "flash_attn": Alias("attn_implementation", _flash),
    "flash_attention": Alias("attn_implementation", _flash),
    "dataset": Alias("datasets"),
    "dataset_name": Alias("datasets"),
    "train_file": Alias("datasets"),
    "dataset_path": Alias("datasets"),
    "eval_dataset": Alias("eval_datasets"),
    "test_datasets": Alias("eval_datasets"),
    "val_dataset": Alias("eval_datasets"),
    "validation_file": Alias("eval_datasets"),
    "max_train_samples": Alias("max_samples"),
    "val_set_size": Alias("val_size"),
    "split_dataset_ratio": Alias("val_size"),
    "evaluation_strategy": Alias("eval_strategy"),
    "eval_batch_size": Alias("per_device_eval_batch_size"),
    "assistant_only_loss": Alias("loss_on", _choice("assistant", "all")),
    "completion_only_loss": Alias("loss_on", _choice("completion", "all")),
    "train_on_inputs": Alias("loss_on", _choice("all", "auto")),
    "train_on_prompt": Alias("loss_on", _choice("all", "auto")),
    "mask_history": Alias("loss_on", _choice("last_assistant", "auto")),
    "chat_template_path": Alias("chat_template"),
    "preprocessing_num_workers": Alias("dataset_num_proc"),
    "dataset_processes": Alias("dataset_num_proc"),
    "dataset_prepared_path": Alias("dataset_cache_dir", lambda value: value or "auto"),
    "shuffle_buffer_size": Alias("buffer_size"),
    "neat_packing": Alias("packing_strategy", _choice("bfd", "wrapped")),
    "wandb_project": Alias("project"),
    "wandb_name": Alias("run_name"),
    "cutoff_len": Alias("max_length"),
    "sequence_len": Alias("max_length"),
    "max_seq_length": Alias("max_length"),
    "max_seq_len": Alias("max_length"),
    "block_size": Alias("max_length"),
    "sample_packing": Alias("packing"),
    "packed": Alias("packing"),
    "micro_batch_size": Alias("per_device_train_batch_size"),
    "batch_size": Alias("per_device_train_batch_size"),
    "num_epochs": Alias("num_train_epochs"),
    "epochs": Alias("num_train_epochs"),
    "lr": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "warmup_ratio": Alias("warmup_steps", _ratio),
    "num_warmup_steps": Alias("warmup_steps"),
    "clip_grad_norm": Alias("max_grad_norm"),
    "max_norm": Alias("max_grad_norm"),
    "gradient_clipping": Alias("max_grad_norm"),
    "optimizer": Alias("optim"),
    "finetuning_type": Alias("adapter", names.kind),
    "use_peft": Alias("adapter", names.switched("lora")),
    "use_dora": Alias("adapter", names.only_if_on("dora")),
    "peft_use_dora": Alias("adapter", names.only_if_on("dora")),
    "lora_model_dir": Alias("adapter_name_or_path"),
    "lora_rank": Alias("lora_r", remark="; lora_alpha does not follow it, and is 32 unless it is set"),
    "peft_use_rslora": Alias("use_rslora"),
    "lora_target": Alias("target_modules", names.targets),
    "lora_target_modules": Alias("target_modules", names.targets),
    "lora_target_linear": Alias("target_modules", names.only_if_on("all-linear")),
    "lora_modules_to_save": Alias("modules_to_save", names.texts),
    "additional_target": Alias("modules_to_save", names.texts),
    "load_in_4bit": Alias("base_dtype", names.only_if_on("nf4")),
    "load_in_8bit": Alias("base_dtype", names.only_if_on("int8")),
    "quantization_bit": Alias("base_dtype", names.bits),
    "unfrozen_parameters": Alias("train", names.from_the_start),
    "trainable_parameters": Alias("train", names.prefixes),
    "trainable_parameters_regex": Alias("train", names.texts),
    "freeze_parameters": Alias("freeze", names.prefixes),
    "freeze_parameters_regex": Alias("freeze", names.texts),
    "noisy_embedding_alpha": Alias("neftune_noise_alpha"),
    "neftune_alpha": Alias("neftune_noise_alpha"),
    "tokens": Alias("new_tokens", names.texts),
    "add_tokens": Alias("new_tokens", names.texts),
    "new_special_tokens": Alias("new_tokens", names.texts),
    "add_special_tokens": Alias("new_tokens", names.texts),
    "resume": Alias("resume_from_checkpoint"),
    "push_to_hub_model_id": Alias("hub_model_id"),
    "export_hub_model_id": Alias("hub_model_id"),
    "save_interval": Alias("save_steps"),
    "save_every": Alias("save_steps"),
    "max_checkpoints": Alias("save_total_limit"),
    "gradient_checkpointing": Alias("activations", _checkpointing),
    "activation_checkpointing": Alias("activations", _checkpointing),
    "stage": Alias("method", _method),
    "rl": Alias("method", _method),
    "rl_beta": Alias("beta"),
    "dpo_beta": Alias("beta"),
    "orpo_alpha": Alias("beta"),
    "pref_beta": Alias("beta"),
    "pref_loss": Alias("loss_type"),
    "dpo_loss_type": Alias("loss_type"),
    "dpo_loss_weights": Alias("loss_weights"),
    "dpo_label_smoothing": Alias("label_smoothing"),
    "dpo_use_weighting": Alias("use_weighting"),
    "pref_ftx": Alias("rpo_alpha", _weight),
    "kto_chosen_weight": Alias("desirable_weight"),
    "kto_desirable_weight": Alias("desirable_weight"),
    "kto_rejected_weight": Alias("undesirable_weight"),
    "kto_undesirable_weight": Alias("undesirable_weight"),
    "ref_model": Alias("ref_model_name_or_path"),
    "truncation_mode": Alias("truncation"),
}

_READ = "unneeded columns are never read"
_PADDED = "a batch is padded to its longest sequence"
_TYPE = "it is read from the model's files"
_LAYER = "the kind of layer tells"
_DOUBLE = "the scales of nf4 are always packed too"
_KERNEL = "PEFT's own layers are used"
DROPPED: dict[str, str] = {
    "model_type": _TYPE,
    "tokenizer_type": _TYPE,
    "base_model_config": _TYPE,
    "is_llama_derived_model": _TYPE,
    "is_mistral_derived_model": _TYPE,
    "tokenizer_use_fast": "the fast tokenizer is always used",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "strict": "unknown keys are always errors",
    "tf32": "float32 products follow torch's own setting",
    "local_rank": "the launcher says it",
    "ddp_timeout": "a lost rank is found by its heartbeat",
    "plot_loss_curve": "see plot_loss",
    "include_num_input_tokens_seen": "tokens are always counted",
    "gradient_checkpointing_kwargs": "there is one way to recompute a layer",
    "remove_unused_columns": _READ,
    "pad_to_sequence_len": _PADDED,
    "resize_vocab": "embeddings grow for new_tokens automatically",
    "overwrite_cache": "the token cache detects changed content and settings",
    "dataset_kwargs": "the format is detected from the columns",
    "hf_use_auth_token": "a token is looked up whenever one is needed",
    "precompute_ref_log_probs": "the reference's log-probabilities are always computed before the first step",
    "disable_dropout": "dropout is always off when preferences are trained on",
    "hub_strategy": "the model is uploaded once, at the end of the run",
    "lora_fan_in_fan_out": _LAYER,
    "lora_task_type": "the model is a causal language model",
    "double_quantization": _DOUBLE,
    "use_bnb_nested_quant": _DOUBLE,
    "bnb_4bit_use_double_quant": _DOUBLE,
    "bnb_4bit_compute_dtype": "packed weights are computed with in dtype",
    "quantization_method": "packed weights have the formats of bitsandbytes",
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
}

# Settings of other trainers without a counterpart -> the hint of the unknown-key error.
_PART = (
    "leave the key out and write 'train: [patterns]' or 'freeze: [patterns]', as in 'train: [layers.3[01]]'"
)
_ADAPTER = "leave the key out: a new adapter begins as PEFT's LoRA does; 'adapter_name_or_path' names another"
_EXPERTS = "leave the key out: 'target_modules: all-linear' includes fused experts and their routers"
_TARGETS = "leave the key out: a regular expression in target_modules names layers and modules"
_LIMIT = "leave the key out: max_length limits prompt and completion together"
_FIXED_REFERENCE = "leave the key out: the reference stays as it is"
_TOKEN = "leave the key out: the token comes from HF_TOKEN or 'hf auth login', never from a configuration"
_MIN_LR = (
    "leave the key out and write 'lr_scheduler_type: cosine_with_min_lr' and "
    "'lr_scheduler_kwargs: {min_lr_rate: ...}'"
)
_HOST = "leave the key out: weights and optimizer state are in host memory already"
_EPOCH_PARTS = "leave the key out and write eval_strategy, eval_steps, save_strategy and save_steps"
_SPIKES = (
    "leave the key out and write 'loss_spike: stop', which compares with recent losses (loss_spike_sigmas)"
)
_PROCESSOR = "leave the key out: the model's processor decides, by its processor_config.json"
_VIDEOS = "leave the key out: rows have pictures, not videos"
UNAVAILABLE: dict[str, str] = {
    "evals_per_epoch": _EPOCH_PARTS,
    "saves_per_epoch": _EPOCH_PARTS,
    "eval_table_size": "leave the key out: evaluation reports the loss only",
    "group_by_length": "leave the key out: 'packing: true' needs no padding",
    "train_sampling_strategy": "leave the key out: rows come in a seeded random order",
    "fsdp_config": _HOST,
    "relora": "leave the key out: adapters are not merged during a run",
    "qlora": "leave the key out and write 'adapter: lora' and 'base_dtype: nf4'",
    "create_new_adapter": _ADAPTER,
    "pissa_init": _ADAPTER,
    "pissa_convert": _ADAPTER,
    "peft_init_lora_weights": _ADAPTER,
    "init_lora_weights": _ADAPTER,
    "loftq_config": _ADAPTER,
    "target_parameters": _EXPERTS,
    "lora_target_parameters": _EXPERTS,
    "peft_layers_to_transform": _TARGETS,
    "layers_to_transform": _TARGETS,
    "peft_layer_replication": "leave the key out: layers are used once",
    "trainable_token_indices": "leave the key out: modules_to_save trains a module whole",
    "peft_trainable_token_indices": "leave the key out: modules_to_save trains a module whole",
    "loraplus_lr_ratio": "leave the key out and write 'lr_factors: {lora_B: 16}'",
    "loraplus_lr_embedding": "leave the key out and write 'lr_factors: {PATTERN: FACTOR}'",
    "quantization_type": "leave the key out: 'base_dtype: nf4' is the only format of four bits",
    "bnb_4bit_quant_type": "leave the key out: 'base_dtype: nf4' is the only format of four bits",
    "bnb_config_kwargs": "leave the key out: 'base_dtype: nf4' is the only format of four bits",
    "finetuned_lora_rank": "leave the key out and write lora_r",
    "xformers_attention": "leave the key out and choose attn_implementation",
    "sdp_attention": "leave the key out: attn_implementation is sdpa unless it is set",
    "s2_attention": "leave the key out and choose attn_implementation",
    "flex_attention": "leave the key out and write 'attn_implementation: flex_attention'",
    "wandb_entity": "leave the key out: set WANDB_ENTITY in the environment",
    "wandb_watch": "leave the key out: gradients are freed before wandb could watch them",
    "wandb_log_model": "leave the key out: the model is written to output_dir/model",
    "wandb_run_id": "leave the key out: set WANDB_RUN_ID in the environment",
    "use_wandb": "leave the key out and write 'report_to: wandb'",
    "debug": "leave the key out; 'horizon --debug' shows tracebacks",
    "eval_accumulation_steps": "leave the key out: evaluation keeps sums, not logits",
    "auto_find_batch_size": "leave the key out and write tokens_per_step: the planner cuts it",
    "fp16": "leave the key out and choose 'dtype: bfloat16' or 'dtype: float32'",
    "deepspeed": _HOST,
    "fsdp": _HOST,
    "max_prompt_length": _LIMIT,
    "max_completion_length": _LIMIT,
    "sync_ref_model": _FIXED_REFERENCE,
    "ref_model_sync_steps": _FIXED_REFERENCE,
    "ref_model_mixup_alpha": _FIXED_REFERENCE,
    "generate_during_eval": "leave the key out: 'horizon generate' completes prompts",
    "do_train": "leave the key out: 'horizon train' trains and 'horizon eval' evaluates",
    "do_eval": "leave the key out: 'horizon train' trains and 'horizon eval' evaluates",
    "freeze_trainable_layers": _PART,
    "freeze_trainable_modules": _PART,
    "freeze_extra_modules": _PART,
    "freeze_layers": _PART,
    "freeze_parameters_ratio": _PART,
    "special_tokens": "leave the key out: the tokenizer keeps its own; 'new_tokens: [...]' adds more",
    "template": "leave the key out: the tokenizer's own chat template is used; 'chat_template' replaces it",
    "dataset_text_field": "leave the key out and write 'datasets: [{path: ..., text_column: ...}]'",
    "dataset_train_split": "leave the key out and write 'datasets: [{path: ..., split: ...}]'",
    "dataset_config": "leave the key out and write 'datasets: [{path: ..., name: ...}]'",
    "dataset_format": "leave the key out and write 'datasets: [{path: ..., format: ...}]'",
    "hub_token": _TOKEN,
    "push_to_hub_token": _TOKEN,
    "hf_hub_token": _TOKEN,
    "push_to_hub_organization": "leave the key out and write 'hub_model_id: OWNER/NAME'",
    "cosine_min_lr_ratio": _MIN_LR,
    "min_lr_rate": _MIN_LR,
    "min_lr": _MIN_LR,
    "padding_free": "leave the key out: 'packing: true' needs no padding",
    "media_dir": "leave the key out and write 'datasets: [{path: ..., image_dir: ...}]'",
    "loss_watchdog_threshold": _SPIKES,
    "loss_watchdog_patience": _SPIKES,
    "eval_sample_packing": "leave the key out: evaluation data is packed as training data is",
    "save_only_model": "leave the key out: output_dir/model is the model alone; 'save_strategy: \"no\"' "
    "writes no checkpoints",
    "video_max_pixels": _VIDEOS,
    "video_min_pixels": _VIDEOS,
    "video_fps": _VIDEOS,
    "video_maxlen": _VIDEOS,
    "image_max_pixels": _PROCESSOR,
    "image_min_pixels": _PROCESSOR,
}


# Keys of an entry of `datasets` in Axolotl and LLaMA-Factory.
ENTRY_ALIASES: dict[str, str] = {
    "type": "format",
    "formatting": "format",
    "field": "text_column",
    "field_messages": "columns",
    "field_chosen": "columns",
    "field_rejected": "columns",
    "message_property_mappings": "tags",
    "subset": "name",
    "num_samples": "max_samples",
}
_ENTRY_TYPES = {"chat_template": "messages", "completion": "text", "pretrain": "text"}
# Axolotl's types of preference data, which name a chat template and columns: the columns tell.
_PREFERENCE_TYPES = {
    *("chatml", "llama3", "chat_template.default", "chat_template.argilla", "chat_template.argilla_chat")
}


def canonical_entry(values: Any) -> Any:
    """Rename the keys of an entry of `datasets` to ours. Raises ValueError for two names of one key."""
    if not isinstance(values, dict):
        return values
    values = _with_fields(values)
    result = dict(values)
    for alias, key in ENTRY_ALIASES.items():
        if alias not in result:
            continue
        value = result.pop(alias)
        is_field = alias.startswith("field_")  # several are one setting of ours
        if key in values or key in result and not is_field:
            raise ValueError(f"'{key}' and '{alias}' are the same setting")
        if is_field:
            value = {**result.get(key, {}), value: alias.removeprefix("field_")}
        if alias == "type" and isinstance(value, str):
            family = value.split(".")[0]
            value = _ENTRY_TYPES.get(family, family)
            if _PREFERENCE_TYPES & {family, values["type"]}:
                value = "auto"
        if alias == "message_property_mappings" and isinstance(value, dict):
            value = {f"{ours}_tag": theirs for ours, theirs in value.items()}
        result[key] = value
    return result


def _with_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Take the columns out of Axolotl's user-defined `type`, if its texts are those of the columns as they
    are: {field_prompt: ask, prompt_format: "{prompt}"}."""
    kind = values.get("type")
    if not isinstance(kind, dict) or "columns" in values:
        return values
    fields = {key.removeprefix("field_"): value for key, value in kind.items() if key.startswith("field_")}
    formats = {key: value for key, value in kind.items() if key not in {f"field_{name}" for name in fields}}
    if not fields or any(value != f"{{{key.removesuffix('_format')}}}" for key, value in formats.items()):
        return values
    rest = {key: value for key, value in values.items() if key != "type"}
    return {**rest, "columns": {value: name for name, value in fields.items()}}


def canonical_name(key: str) -> str:
    """Return the setting that `key` is an alias of, or `key` itself."""
    return ALIASES[key].key if key in ALIASES else key


def canonical_value(key: str, value: Any, place: str) -> Any:
    """Convert the value of an alias to that of its setting. Raises ConfigError."""
    convert = ALIASES[key].convert if key in ALIASES else None
    if convert is None:
        return value
    try:
        return convert(value)
    except (ValueError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "unsupported value"
        raise ConfigError(
            f"{place}: {key} is {value!r}: {reason}", f"correct it, or set {canonical_name(key)}"
        ) from None


def drop_or_note(key: str, place: str, value: Any) -> tuple[bool, str | None]:
    """Return whether `key: value` has no effect, and the note to print about it, if any."""
    if key in DROPPED:
        return True, f"{place}: '{key}' is ignored, {DROPPED[key]}"
    if key in names.SILENT | UNAVAILABLE.keys() and (value is None or value is False):
        return True, f"{place}: '{key}' is ignored, it is off"
    if key in ALIASES:
        return False, f"{place}: '{key}' is read as '{ALIASES[key].key}'{ALIASES[key].remark}"
    return False, None


def canonicalise(document: Document) -> tuple[Document, list[str]]:
    """Rename aliases to canonical names; return the document and a note per alias or ignored key.

    Values that an alias cannot have become `faults` of the result.
    """
    values: dict[str, Any] = {}
    where: dict[KeyPath, str] = {(): document.where.get((), "")}
    written: dict[str, str] = {}
    notes: list[str] = []
    faults: list[ConfigError] = []
    lost: set[str | int] = set()
    for key, value in names.expanded(document.values).items():
        place = document.where.get((key,), where[()])
        dropped, note = drop_or_note(key, place, value)
        if note:
            notes.append(note)
        if dropped:
            continue
        name = canonical_name(key)
        try:
            meant = canonical_value(key, value, place)
            if name in written:
                earlier = written[name]
                both = names.joined(name, values[name], meant)
                if both is not None:
                    values[name] = both
                    continue
                if name in (earlier, key) or document.values[earlier] is not False and value is not False:
                    raise conflict(earlier, key, place)
                if value is False:
                    continue
        except ConfigError as error:
            faults.append(error)
            lost.add(key)
            continue
        written[name] = key
        values[name] = meant
    for path, at in document.where.items():
        if path and path[0] in lost:
            continue
        head = tuple(canonical_name(str(part)) for part in path[:1])
        where[head + path[1:]] = at
    return Document(values, where, faults), notes


def conflict(first: str, second: str, place: str) -> ConfigError:
    """Build the error for two names of one setting in one place."""
    name = canonical_name(second)
    return ConfigError(f"{place}: '{first}' and '{second}' are the same setting", f"keep '{name}' only")
