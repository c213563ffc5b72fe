"""Arguments of trainers that streamed training has no equivalent of, each with the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import ProcessorMixin

from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.trainers.settings import OPTIMIZERS

_ALONE = "run one process on one GPU, with this argument unset"
_LOGITS = "compute the metric from the saved model; streamed training never has the logits of all tokens"
_FULL_EVAL = "leave it out; evaluation runs in the dtype of training"
# Keys of model_init_kwargs that have an equivalent. A device_map of None is ignored.
_INIT_KEYS = {"attn_implementation", "dtype", "torch_dtype", "revision", "trust_remote_code"}

# Fields of the configuration that must be unset: name -> the way out.
_FIELDS = {
    "fp16": "bf16=True",
    "fp16_full_eval": _FULL_EVAL,
    "bf16_full_eval": _FULL_EVAL,
    "auto_find_batch_size": "set per_device_train_batch_size; `horizon plan` finds one that fits",
    "deepspeed": _ALONE,
    "fsdp": _ALONE,
    "parallelism_config": _ALONE,
    "torch_compile": "HostModel.from_pretrained(..., compile=True) compiles the layers",
    "use_liger_kernel": "HostModel.from_pretrained(..., kernels='liger')",
    "label_smoothing_factor": "label_smoothing_factor=0; `horizon train` smooths labels",
    "activation_offloading": "HostModel.from_pretrained(..., boundaries='host') keeps layer inputs in RAM",
    "sync_ref_model": "leave it out; the reference is evaluated once, before training",
    "optim_args": "adam_beta1, adam_beta2, adam_epsilon; HostModel.from_pretrained(..., sgd_momentum=0.9)",
    "optim_target_modules": "HostModel.from_pretrained(..., freeze=[...]) names what is not trained",
    "debug": "leave it out; a gradient that is not finite stops the run",
}
# Arguments of the constructor that must be unset.
_ARGUMENTS = {
    "compute_metrics": _LOGITS,
    "preprocess_logits_for_metrics": _LOGITS,
    "compute_loss_func": "override compute_loss, which gets log-probabilities of the labels",
    "model_init": "pass a model",
    "optimizer_cls_and_kwargs": "choose the update by optim, adam_beta1, adam_beta2 and adam_epsilon",
    "quantization_config": "HostModel.from_pretrained(..., base_dtype='nf4') packs frozen weights",
}


def refuse(trainer: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first argument without an equivalent. given: the arguments by name."""
    for what, hint in _found(given, given["args"]):
        raise ConfigError(f"{trainer}: {what} is not supported", hint=hint)


def _found(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    for name, hint in _ARGUMENTS.items():
        if given.get(name) is not None:
            yield name, hint
    for name, hint in _FIELDS.items():
        value = getattr(args, name, None)
        if value:
            yield f"{name}={value}", hint
    for rule in (_model, _adapters, _optimizer, _data, _distribution):
        yield from rule(given, args)


def _model(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    if given.get("model") is None:
        yield "a trainer without a model", "pass a folder, a name on the Hub, a model object or a HostModel"
    if isinstance(given.get("ref_model"), nn.Module):
        yield "ref_model as a model object", "pass its folder or name; it is evaluated and freed first"
    chosen = getattr(args, "model_init_kwargs", None) or {}
    if (
        "float16" in str(chosen.get("dtype")).split(".")
        or getattr(given.get("model"), "dtype", None) == torch.float16
    ):
        yield "a model in float16", "dtype='bfloat16', or dtype='float32'"
    for key in sorted(key for key in chosen.keys() - _INIT_KEYS if chosen[key] is not None):
        yield (
            f"model_init_kwargs[{key!r}]",
            "HostModel.from_pretrained(...) has settings for device, memory and kernels; pass the model",
        )
    template = getattr(args, "chat_template_path", None)
    if template is not None and not (Path(template).is_file() and Path(template).suffix in (".jinja", ".j2")):
        yield (
            f"chat_template_path={template!r}, which adds tokens,",
            "pass a .jinja file, or a model and tokenizer after trl.clone_chat_template",
        )
    if "selective" in (getattr(args, "gradient_checkpointing_kwargs", None) or {}):
        yield (
            "gradient_checkpointing_kwargs['selective']",
            "HostModel.from_pretrained(..., activations=[...]) chooses the layers to recompute",
        )


def _adapters(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    model, peft_config = given.get("model"), given.get("peft_config")
    if getattr(model, "_hf_peft_config_loaded", False) and not _is_peft(model):
        yield "model with adapters of add_adapter()", "pass peft.get_peft_model(model, config)"
    if peft_config is None:
        return
    if isinstance(model, HostModel):
        yield (
            "peft_config with a HostModel",
            "HostModel.from_pretrained(..., adapter='lora'), or HostModel.from_pretrained(peft_model)",
        )
    elif _is_peft(model):
        yield (
            "peft_config with a PeftModel",
            "leave it out to train the adapter that the model has, or pass model.merge_and_unload()",
        )
    elif not hasattr(peft_config, "is_prompt_learning"):
        yield f"a {type(peft_config).__name__} as peft_config", "pass a peft.LoraConfig"
    elif peft_config.is_prompt_learning:
        yield f"peft_config of kind {peft_config.peft_type.value}", "pass a peft.LoraConfig"


def _is_peft(model: Any) -> bool:
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def _optimizer(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    if any(one is not None for one in given.get("optimizers") or ()):
        yield "optimizers", "choose the update by optim, and the schedule by lr_scheduler_type"
    name = str(getattr(args.optim, "value", args.optim))
    if name not in OPTIMIZERS:
        yield (
            f"optim={name}",
            f"choose one of {', '.join(OPTIMIZERS)}; HostModel.from_pretrained(..., "
            "moment_dtype='bfloat16') saves 4 bytes per parameter",
        )


def _data(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    has_reference = hasattr(args, "precompute_ref_log_probs")
    for name in ("train_dataset", "eval_dataset"):
        data = given.get(name)
        for one in data.values() if isinstance(data, dict) else [data]:
            columns = set(getattr(one, "column_names", None) or ())
            if columns & {"image", "images"}:
                yield f"{name} with pictures", "remove the columns image and images"
            if has_reference and isinstance(one, IterableDataset):
                yield (
                    f"{name} as an IterableDataset",
                    "pass a Dataset; the reference is evaluated on all of it before training",
                )
    if isinstance(given.get("processing_class"), ProcessorMixin):
        yield "processing_class with pictures or sound", "pass processing_class.tokenizer"


def _distribution(given: Mapping[str, Any], args: Any) -> Iterator[tuple[str, str]]:
    model = given.get("model")
    world = max(args.world_size, model.ranks.world if isinstance(model, HostModel) else 1)
    if world > 1:
        yield (
            f"a run of {world} processes",
            "start one process; `torchrun -m horizon_lm train CONFIG` trains on several GPUs",
        )
