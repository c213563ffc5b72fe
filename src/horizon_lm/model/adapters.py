"""Adapters of PEFT: put into a model, taken out of a `PeftModel`, switched off, and saved.

The layers of an adapter are PEFT's own, inside the transformers model; so are their names and files.
"""

from __future__ import annotations

import copy
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.config.patterns import nearest
from horizon_lm.errors import ConfigError, DataError, UnsupportedModelError
from horizon_lm.machine.libraries import load_peft
from horizon_lm.model.adapter_files import read_adapter_config, read_adapter_weights, tidy_config
from horizon_lm.model.configuration import reason_of
from horizon_lm.model.pictures import excluded_modules, freeze_vision
from horizon_lm.model.pretrained import seeded
from horizon_lm.model.targets import odd_target
from horizon_lm.model.trained import choose_trained

_PREFIX = "base_model.model."  # of the base model's names in a PeftModel
_CHANGE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin that write into the base
FAULTS = (ValueError, TypeError, KeyError, AttributeError, ImportError, re.error)
_REFUSED = (
    *("trainable_token_indices", "alora_invocation_tokens", "layer_replication"),
    "megatron_config",  # for which PEFT imports the module that the configuration names
)
# Kinds of PEFT whose parameters all lie in the layers they change.
_KINDS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "LN_TUNING")


class Adapter:
    """An adapter inside a model.

    peft_model: the `PeftModel` around the model. name: PEFT's name of the adapter that is trained.
    keeps_dtypes: whether its parameters are computed in the dtype they have, as in a PeftModel of the
    caller's, and not in that of the model. is_new: whether it was made just now, so that it changes nothing.
    """

    def __init__(self, peft_model: Any, *, keeps_dtypes: bool, is_new: bool = False) -> None:
        self.peft_model, self.keeps_dtypes, self.is_new = peft_model, keeps_dtypes, is_new
        self.name = str(peft_model.active_adapters[0])
        self._switches: list[Any] = [m for m in self.model.modules() if isinstance(m, _layer_classes())]

    @property
    def model(self) -> Any:
        """The transformers model with the adapter's layers in it."""
        return self.peft_model.base_model.model

    @property
    def config(self) -> Any:
        """PEFT's configuration of the adapter."""
        return self.peft_model.peft_config[self.name]

    @property
    def rewritten(self) -> frozenset[int]:
        """Ids of the modules of which PEFT takes a parameter away while they run, to add the adapter's to it
        (fused experts, routers)."""
        wrappers = [module for module in self._switches if hasattr(module, "parameter_name")]
        return frozenset(id(module.get_base_layer()) for module in wrappers)

    @property
    def base_name_or_path(self) -> str | None:
        """The folder or name of the base, as PEFT writes it into adapter_config.json."""
        return self.config.base_model_name_or_path or None

    @property
    def words(self) -> str:
        """Its kind, as in "lora r=16"."""
        kind = "dora" if getattr(self.config, "use_dora", False) else str(self.config.peft_type.value).lower()
        rank = getattr(self.config, "r", None)
        return kind if rank is None else f"{kind} r={rank}"

    def is_part(self, name: str) -> bool:
        """Whether a parameter, by its name in the model, is not one of the base."""
        return is_adapters(name, self.name)

    def magnitude(self, name: str, weight: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
        """Return the value with which a new DoRA's magnitude begins on the base's weights; None for any other
        parameter. name: in the model. weight: returns a parameter by its name in the model."""
        path, found, _ = name.partition(f".lora_magnitude_vector.{self.name}.weight")
        if not found or not self.is_new:
            return None
        dora = self.model.get_submodule(path).lora_magnitude_vector[self.name]
        base = weight(f"{path}.base_layer.weight")
        norm: torch.Tensor = dora.get_weight_norm(base, torch.zeros((), dtype=base.dtype), 1.0)
        return norm

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, the layers run as the base alone."""
        try:
            for module in self._switches:  # as PEFT's own switch, but for requires_grad
                module._disable_adapters = True
            yield
        finally:
            for module in self._switches:
                module._disable_adapters = False

    def names_in_files(self) -> dict[str, str]:
        """Name in adapter_model.safetensors -> name in the model."""
        from peft import get_peft_model_state_dict

        named = [name for name, _ in self.model.named_parameters() if self.is_part(name)]
        marks = {_PREFIX + name: torch.empty(0) for name in named}
        found: Any = get_peft_model_state_dict(
            self.peft_model, state_dict=dict(marks), adapter_name=self.name, save_embedding_layers=False
        )
        names = {id(mark): name.removeprefix(_PREFIX) for name, mark in marks.items()}
        return {key: names[id(mark)] for key, mark in found.items()}

    def save_config(self, folder: Path) -> None:
        """Write adapter_config.json into a folder."""
        config = copy.copy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tidy_config(folder)

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write PEFT's files into a new folder: adapter_config.json, adapter_model.safetensors, README.md.

        tensors: the adapter's parameters by their names in the model.
        """
        state = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        self.peft_model.save_pretrained(
            str(folder), selected_adapters=[self.name], state_dict=state, save_embedding_layers=False
        )
        if self.name != "default":  # PEFT's own folder for it
            for file in list((folder / self.name).iterdir()):
                shutil.move(str(file), str(folder / file.name))
            (folder / self.name).rmdir()
        tidy_config(folder)


def prepare(model: Any, settings: ModelSettings, *, has_values: bool = True) -> tuple[Any, Adapter | None]:
    """Put the adapter of the settings into `model`, and mark which parameters are trained.

    model: a transformers model, which is changed, or a PeftModel, which is taken as it is. has_values: false
    for fake and meta tensors, for which no adapter's weights are read. Returns the transformers model, and
    its adapter if it has one. Raises ConfigError, DataError and UnsupportedModelError.
    """
    adapter = _given(model, settings) if is_peft(model) else _added(model, settings, has_values)
    base = model if adapter is None else adapter.model
    if adapter is not None:
        _check(adapter)
    is_adapters = None if adapter is None else adapter.is_part
    choose_trained(base, settings, is_adapters)
    freeze_vision(base, settings, is_adapters)
    return base, adapter


def is_peft(model: Any) -> bool:
    """Whether `model` is a PeftModel. Does not import PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def is_adapters(name: str, adapter: str) -> bool:
    """Whether a name in a model belongs to the adapter's own parameters: PEFT writes the adapter's name
    behind its modules and parameters (`lora_A.default.weight`, `modules_to_save.default.weight`). Layers of
    fused experts lie in each other (`experts.base_layer.lora_A.default.weight`)."""
    parts = re.split(r"\.(?:base_layer|original_module)\.", name)[-1].split(".")
    return adapter in parts[1:]


def is_replaced(name: str) -> bool:
    """Whether a name in a model belongs to a module of the base that the adapter trains a copy of."""
    return "original_module" in name.split(".")


def base_name(name: str) -> str:
    """The name that a parameter of the base has without an adapter."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _layer_classes() -> tuple[type, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _given(model: Any, settings: ModelSettings) -> Adapter:
    """Take the adapter of a PeftModel."""
    peft = load_peft()
    if settings.has_adapter:
        raise ConfigError(
            f"the {type(model).__name__} has an adapter, and the settings ask for another",
            hint="leave adapter and adapter_name_or_path out, or pass the base model",
        )
    if isinstance(model, peft.PeftMixedModel):
        raise _refuse(f"a {type(model).__name__} mixes adapters of several kinds")
    if model.active_peft_config.is_prompt_learning:
        raise _refuse_kind(model.active_peft_config)
    active = list(model.active_adapters)
    if len(active) != 1:
        raise _refuse(
            f"the model has {len(active)} active adapters ({', '.join(active)})", "set_adapter(NAME)"
        )
    adapter = Adapter(model, keeps_dtypes=True)
    _check_is_distinct(adapter)
    if not any(p.requires_grad for p in adapter.model.parameters()):
        raise ConfigError(
            f"no parameter of the adapter {adapter.name!r} is trained",
            hint="PeftModel.from_pretrained(model, folder, is_trainable=True)",
        )
    return adapter


def _check_is_distinct(adapter: Adapter) -> None:
    """Refuse a name of an adapter by which its parameters cannot be told from the model's."""
    for path, module in adapter.model.named_modules():
        if adapter.name in module._modules and not isinstance(module, nn.ModuleDict):
            raise _refuse(
                f"it is called {adapter.name!r}, as a module of {path or 'the model'} is",
                "choose another name",
            )


def _added(model: Any, settings: ModelSettings, has_values: bool) -> Adapter | None:
    """Put a new adapter into a model, or one that was saved."""
    if "peft" in sys.modules and any(isinstance(m, _layer_classes()) for m in model.modules()):
        raise ConfigError(
            f"this {type(model).__name__} has layers of an adapter",
            hint="pass the PeftModel itself (peft.get_peft_model), not its base model; after a call that "
            "failed, load the model again",
        )
    if not settings.has_adapter:
        return None
    peft = load_peft()
    config, name = _configured(settings), settings.adapter_name_or_path
    if name is None:
        config.exclude_modules = excluded_modules(model)  # the vision part is not trained
    _check_config(config)
    weights = None if name is None or not has_values else read_adapter_weights(name, config)
    device = next(model.parameters()).device
    try:
        with warnings.catch_warnings(), seeded(settings.seed):
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # PEFT moves new parameters to the dtype of the base: fake ones cannot be moved
            with nullcontext() if has_values else torch.device("meta"):
                peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=has_values)
    except (*FAULTS, RuntimeError) as error:
        raise ConfigError(
            f"PEFT refuses the adapter: {reason_of(error)}",
            hint="target_modules: all-linear, or ends of the names of linear layers, as in [q_proj, v_proj]",
        ) from error
    if not has_values:
        _move_from_meta(model, device)
    adapter = Adapter(peft_model, keeps_dtypes=False, is_new=name is None)
    if name is None:
        _check_names(adapter, settings)
    if weights is not None:
        _load(adapter, str(name), weights)
    return adapter


def _move_from_meta(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta and device.type != "meta":
                moved = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)


def _configured(settings: ModelSettings) -> Any:
    """PEFT's configuration of the adapter that the settings ask for."""
    peft = load_peft()
    name = settings.adapter_name_or_path
    if name is None:
        targets = settings.target_modules
        alpha: Any = int(settings.lora_alpha) if settings.lora_alpha.is_integer() else settings.lora_alpha
        return peft.LoraConfig(
            r=settings.lora_r,
            lora_alpha=alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=list(settings.modules_to_save) or None,
            use_rslora=settings.use_rslora,
            use_dora=settings.adapter == "dora",
            task_type="CAUSAL_LM",
            revision=settings.model_revision,  # of the base, as PEFT reads it
        )
    config = read_adapter_config(name)
    kind = {"none": None, "lora": False, "dora": True}[settings.adapter]
    if kind is not None and (config.peft_type != "LORA" or bool(config.use_dora) != kind):
        found = "dora" if getattr(config, "use_dora", False) else str(config.peft_type.value).lower()
        raise ConfigError(
            f"adapter is {settings.adapter}, and adapter_name_or_path={name!r} holds a {found} adapter",
            hint="leave adapter out: the folder tells",
        )
    config.inference_mode = False
    return config


def _load(adapter: Adapter, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a saved adapter in. Raises DataError if they do not fit."""
    from peft import set_peft_model_state_dict

    for module in adapter.model.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and isinstance(module, _layer_classes()):
            copies.float()  # they have the dtype of the base, which would round the saved values
    try:
        result: Any = set_peft_model_state_dict(adapter.peft_model, weights, adapter_name=adapter.name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the adapter {name!r} does not fit the model: {reason_of(error)}",
            hint="name the model that it was trained on",
        ) from error
    missing = [name for name in result.missing_keys if is_adapters(name, adapter.name)]
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys]
        raise DataError(
            f"the adapter {name!r} does not fit the model: {len(missing)} of its weights are missing and "
            f"{len(result.unexpected_keys)} are unknown, {wrong[0]} for example",
            hint="name the model that it was trained on",
        )


def check_reads_nothing_else(config: Any) -> None:
    """Refuse an adapter that is only to be run if it could name other files or code to PEFT. Raises
    UnsupportedModelError."""
    kind = str(config.peft_type.value)
    if kind not in _KINDS or getattr(config, "megatron_config", None):
        what = f"an adapter of kind {kind}" if kind not in _KINDS else "an adapter with megatron_config"
        raise UnsupportedModelError(
            f"{what} may name other files or code, and is not loaded",
            hint=f"use PEFT itself; kinds that are loaded: {', '.join(kind.lower() for kind in _KINDS)}",
        )


def _check_config(config: Any) -> None:
    """Refuse an adapter whose layers cannot run one at a time."""
    if str(config.peft_type.value) not in _KINDS:
        raise _refuse_kind(config)
    for key in _REFUSED:
        if getattr(config, key, None):
            raise _refuse(f"{key} is set", f"leave {key} out; modules_to_save trains a module whole")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise _refuse(
            f"init_lora_weights={start!r} changes the base, which is not saved",
            "init_lora_weights=True, or save a base with these changes and begin from it",
        )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise _refuse(f"bias={bias!r} trains the base's own biases", "bias='none'")


def _check_names(adapter: Adapter, settings: ModelSettings) -> None:
    """Refuse a name of the settings that is that of no module, which PEFT passes over."""
    kinds = dict(zip(("target_modules", "modules_to_save"), _layer_classes(), strict=True))
    for key, kind in kinds.items():
        names = getattr(settings, key)  # PEFT's list of all-linear also names excluded modules
        found = [path for path, module in adapter.model.named_modules() if isinstance(module, kind)]
        for name in () if isinstance(names, str) else sorted(names):
            if not any(f".{path}".endswith(f".{name}") for path in found):
                raise _no_module(adapter, key, name)


def _no_module(adapter: Adapter, key: str, name: str) -> ConfigError:
    ends = sorted({path.split(".")[-1] for path, _ in adapter.model.named_modules()} - {"", "default"})
    way = f"the nearest names are {', '.join(nearest(name, ends))}"
    what = "matches no module"
    if key == "target_modules":
        what += " that could have an adapter"
        if name in ends:
            way = "name linear layers of the language model; all-linear takes them all"
    return ConfigError(f"{key}: {name!r} {what}", hint=way)


def _check(adapter: Adapter) -> None:
    """Refuse what cannot be trained in parts, by the adapter's layers."""
    _check_config(adapter.config)
    if any(getattr(module, "merged", False) for module in adapter.model.modules()):
        raise _refuse(
            "the adapter is merged into the model", "unmerge_adapter(), or load the base and the adapter"
        )
    model = adapter.model
    if (odd := odd_target(model)) is not None:
        raise _refuse(f"it changes {odd}, which is not linear", "list linear layers alone in target_modules")
    trained = (name for name, p in model.named_parameters() if p.requires_grad and not adapter.is_part(name))
    if (own := next(trained, None)) is not None:
        raise _refuse(
            f"{own} is trained too, and the adapter's folder would not hold it",
            "requires_grad_(False), or modules_to_save=[NAME], which trains a copy and saves it",
        )
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise _refuse(
            "it changes or trains the embedding table",
            "leave the embeddings out of target_modules and modules_to_save",
        )
    output: Any = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    is_changed = isinstance(output, _layer_classes())
    if is_changed and any(p is table for p in cast(nn.Module, output).parameters()):
        raise _refuse(
            "it changes the output layer, which is tied to the embedding table",
            "leave lm_head out of target_modules and modules_to_save",
        )


def _refuse_kind(config: Any) -> UnsupportedModelError:
    return _refuse(
        f"its kind is {config.peft_type.value}",
        f"choose one whose parameters lie in the layers: {', '.join(kind.lower() for kind in _KINDS)}",
    )


def _refuse(reason: str, hint: str = "train one LoRA adapter: adapter: lora") -> UnsupportedModelError:
    return UnsupportedModelError(f"the adapter cannot be trained layer by layer: {reason}", hint=hint)
