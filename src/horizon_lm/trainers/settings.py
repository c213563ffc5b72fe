"""From the arguments of a Trainer to a `HostModel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed

from horizon_lm.config import ModelSettings
from horizon_lm.config.python import model_settings
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.model.adapters import FAULTS
from horizon_lm.model.loading import base_of, load_model_of
from horizon_lm.optim.optimizer import group_rule

# Names of transformers -> ours. The implementation does not matter.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_anyprecision"), "adamw"),
    "sgd": "sgd",
    "lion_32bit": "lion",
}
# Arguments that a HostModel has as settings of its own.
_SHARED = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim", "neftune_noise_alpha")


def host_of(model: Any, args: TrainingArguments, peft_config: Any = None) -> HostModel:
    """Return `model`, or make it a HostModel as the arguments say.

    peft_config: of a new adapter, which gets the values that TRL's trainers give it. Raises ConfigError for a
    HostModel that was built with other settings, and the errors of `HostModel.from_pretrained`.
    """
    args._n_gpu = min(1, args.n_gpu)  # the engine uses one device
    if isinstance(model, HostModel):
        _check(model, args)
        return model
    base, own = (model, ModelSettings()) if isinstance(model, nn.Module) else base_of(model, ModelSettings())
    values = {**settings_of(args, base), "adapter_name_or_path": own.adapter_name_or_path}
    values["model_revision"] = values["model_revision"] or own.model_revision
    settings = model_settings("the trainer's model", values.pop("device"), values.pop("dtype"), values)
    loaded: Any = load_model_of(base, settings)
    _ask_for_router_loss(loaded, args)
    if peft_config is not None:
        loaded = _with_adapter(loaded, peft_config, args.seed)
    return HostModel(loaded, settings)


def _with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    """Return the PeftModel that TRL makes of a model. Raises ConfigError if PEFT refuses."""
    from peft import get_peft_model

    set_seed(seed)
    try:
        return get_peft_model(model, peft_config)
    except (*FAULTS, RuntimeError) as error:
        raise ConfigError(
            f"PEFT refuses peft_config: {error}",
            hint="correct it; target_modules='all-linear' fits all models",
        ) from error


def begins_adapter(model: Any) -> bool:
    """Whether a trainer's `model` has an adapter that its settings began and no step has changed."""
    if not isinstance(model, HostModel):
        return False
    return model.settings.begins_adapter and model.steps_done == 0


def decayed_otherwise(host: HostModel, names: Iterable[str]) -> list[str]:
    """List the trainable parameters that decay either here or in Trainer, whose are `names`."""
    skeleton = host.skeleton
    group = group_rule(
        {},
        decay_embeddings=host.settings.decay_embeddings,
        is_embedding=skeleton.is_embedding,
        is_norm=skeleton.is_norm,
    )
    trainable = [p for unit in skeleton.units for p in unit.trainable]
    mine = {p.name for p in trainable if group(p).decays}
    return sorted(mine ^ ({*names} & {p.name for p in trainable}))


def tokenizer_of(model: Any, args: Any) -> Any:
    """Load the tokenizer or processor of a model, as TRL's trainers do if none is given."""
    name, revision = model, (getattr(args, "model_init_kwargs", None) or {}).get("revision")
    if isinstance(model, str):
        name, _ = base_of(model, ModelSettings())
    else:
        name, revision = model.config._name_or_path, None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=_trust(args))


@contextmanager
def loaded_already(given: dict[str, Any]) -> Iterator[None]:
    """While open, hide `model_init_kwargs`, which TRL says that it ignores for a loaded model. It loads the
    tokenizer without revision then, so that one of a revision is loaded here."""
    args = given["args"]
    chosen = getattr(args, "model_init_kwargs", None)
    if not chosen:
        yield
        return
    if chosen.get("revision") and isinstance(given["model"], str) and not given.get("processing_class"):
        given["processing_class"] = tokenizer_of(given["model"], args)
    args.model_init_kwargs = None
    try:
        yield
    finally:
        args.model_init_kwargs = chosen


def settings_of(args: TrainingArguments, model: Any = None) -> dict[str, Any]:
    """Return the settings of `HostModel.from_pretrained` that the arguments amount to.

    model: decides on the dtype if the arguments do not.
    """
    chosen = dict(getattr(args, "model_init_kwargs", None) or {})
    dtype = chosen.get("dtype", chosen.get("torch_dtype"))
    if isinstance(model, nn.Module):
        loaded: Any = model
        dtype, attention = loaded.dtype, loaded.config._attn_implementation
    else:
        attention = chosen.get("attn_implementation") or "sdpa"
    if dtype == "auto":
        dtype = AutoConfig.from_pretrained(
            model, trust_remote_code=_trust(args), revision=chosen.get("revision")
        ).dtype
    is_bf16 = args.bf16 or str(dtype).removeprefix("torch.") == "bfloat16"
    recompute = getattr(args, "activation_checkpointing", None) or getattr(
        args, "gradient_checkpointing", False
    )
    return {
        # Launchers number the CPU, too.
        "device": "cpu" if args.device.type == "cpu" else str(args.device),
        "dtype": "bfloat16" if is_bf16 else "float32",
        "attn_implementation": attention,
        "experts_implementation": chosen.get("experts_implementation") or "auto",
        "trust_remote_code": _trust(args),
        "model_revision": chosen.get("revision"),
        "activations": "recompute" if recompute else "auto",
        "update": "deferred",
        "deterministic": args.full_determinism,
        "seed": args.seed,
        **{name: _shared(args)[name] for name in _SHARED},
    }


def _trust(args: Any) -> bool:
    chosen = getattr(args, "model_init_kwargs", None) or {}
    return bool(chosen.get("trust_remote_code", getattr(args, "trust_remote_code", False)))


def _shared(args: Any) -> dict[str, Any]:
    return {
        **{name: getattr(args, name) for name in _SHARED},
        "optim": OPTIMIZERS[str(getattr(args.optim, "value", args.optim))],
    }


def _check(host: HostModel, args: Any) -> None:
    """Raise ConfigError if the arguments do not fit the HostModel."""
    if host.settings.update_mode == "eager":
        raise ConfigError(
            "update: eager updates layers during the backward pass, and a Trainer updates after it",
            hint="HostModel.from_pretrained(..., update='deferred')",
        )
    place, asked = host.device, args.device
    if place.type != asked.type or None not in (place.index, asked.index) and place.index != asked.index:
        raise ConfigError(
            f"the HostModel is on {place}, the trainer's arguments say {asked}",
            hint=f"HostModel.from_pretrained(..., device='{asked}'); use_cpu=True is for one on the CPU, and "
            "CUDA_VISIBLE_DEVICES chooses the GPU of a trainer",
        )
    wanted = _shared(args)
    for name in _SHARED:
        mine, default = getattr(host.settings, name), type(args).__dataclass_fields__[name].default
        is_default = getattr(args, name) == default or name == "optim" and wanted[name] == "adamw"
        if not is_default and wanted[name] != mine:
            raise ConfigError(
                f"{name}={wanted[name]}, but the HostModel was built with {mine}",
                hint=f"HostModel.from_pretrained(..., {name}={wanted[name]!r})",
            )
    wants, has = _wants_router_loss(host.config, args), host.skeleton.has_router_loss
    if wants is not None and wants != has:
        raise ConfigError(
            f"the routers' auxiliary loss is {'on' if wants else 'off'} by router_aux_loss_coef, and "
            f"{'off' if wants else 'on'} in the HostModel",
            hint="set output_router_logits in the model's configuration before HostModel, or "
            f"router_aux_loss_coef={'0.0' if wants else getattr(host.config, 'router_aux_loss_coef', 0.01)}",
        )
    if wants and args.router_aux_loss_coef not in (None, host.config.router_aux_loss_coef):
        raise ConfigError(
            f"router_aux_loss_coef={args.router_aux_loss_coef:g}, but the HostModel's model has "
            f"{host.config.router_aux_loss_coef:g}",
            hint="set it in the model's configuration before HostModel",
        )


def _wants_router_loss(config: Any, args: Any) -> bool | None:
    """Whether TRL would add the auxiliary loss; None if the model's configuration decides."""
    if not hasattr(args, "router_aux_loss_coef") or not hasattr(config, "output_router_logits"):
        return None
    coefficient = args.router_aux_loss_coef
    return bool(getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient)


def _ask_for_router_loss(model: Any, args: Any) -> None:
    """Tell the model what TRL's loss would add: a non-zero coefficient turns the auxiliary loss on."""
    wants = _wants_router_loss(model.config, args)
    if wants is None:
        return
    model.config.output_router_logits = wants
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PeftModel
    if args.router_aux_loss_coef is not None:  # models keep a copy of it
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = args.router_aux_loss_coef
