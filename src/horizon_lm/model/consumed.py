"""Errors for objects without weights: a model object that was passed to `HostModel`, and a closed
`HostModel`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from torch import nn

from horizon_lm.errors import ConfigError
from horizon_lm.model.adapters import is_peft

# Methods that need weights, or would change the modules that HostModel runs -> what to use instead.
_HINTS = {
    "forward": "use HostModel.evaluate(micro_batches) or HostModel.train_step(micro_batches, lr=...)",
    "generate": "use HostModel.save_pretrained(folder), then AutoModelForCausalLM.from_pretrained(folder)",
    "save_pretrained": "use HostModel.save_pretrained(folder)",
    "push_to_hub": "use HostModel.save_pretrained(folder), then upload the folder",
    "state_dict": "use dict(HostModel.named_parameters())",
    "load_state_dict": "load the weights before HostModel.from_pretrained(model)",
    "_apply": "set device and dtype in HostModel.from_pretrained",
    "train": "HostModel.evaluate() runs without dropout and train_step() with it, whatever the mode",
    "activation_checkpointing_enable": "set activations='recompute' in HostModel.from_pretrained",
    "gradient_checkpointing_enable": "set activations='recompute' in HostModel.from_pretrained",
    "resize_token_embeddings": "resize before HostModel.from_pretrained(model)",
    "tie_weights": "tie weights before HostModel.from_pretrained(model)",
    "merge_and_unload": "use HostModel.save_pretrained(folder), then PeftModel.from_pretrained(base, folder)",
    "load_adapter": "load adapters before HostModel.from_pretrained(model)",
    "set_adapter": "set the adapter before HostModel.from_pretrained(model)",
    "disable_adapter": "use HostModel.evaluate(micro_batches, adapter=False)",
}
_SHOWN = {"forward": "a call", "_apply": "to()", "train": "train() or eval()"}
_MARK = "_handed_to_host_model"


class Closed:
    """Replaces the parts of a closed `HostModel`."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError("this HostModel is closed", hint="save it before close(), or load it again")


def check_model(model: nn.Module) -> None:
    """Raise ConfigError for a module that `HostModel` cannot consume."""
    name = type(model).__name__
    if _MARK in model.__dict__:
        raise ConfigError(
            f"this {name} was handed to HostModel before, and has no weights of its own any more",
            hint="use that HostModel, or load the model again",
        )
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        raise ConfigError(
            f"{name} is not a transformers model",
            hint="pass a folder, a name on the Hub, or what AutoModelForCausalLM.from_pretrained returns",
        )


def take_over(model: Any) -> Any:
    """Return another object over the same modules, parameters and buffers.

    So the caller's object can reject use (`refuse_use`) while ours still runs. Of a PeftModel its tuner and
    the model in it are other objects too.
    """
    own = copy.copy(model)
    for holder, name in _inner(own):
        holder.__dict__["_modules"] = {**holder._modules, name: copy.copy(holder._modules[name])}
    return own


def _base(peft_model: Any) -> Any:
    return peft_model.base_model.model


def _inner(model: Any) -> Iterator[tuple[Any, str]]:
    """The objects around the transformers model in a PeftModel, each with the name of the next."""
    if is_peft(model):
        yield model, "base_model"
        yield model._modules["base_model"], "model"


def refuse_use(model: nn.Module) -> None:
    """Make the caller's object, and its direct children, raise ConfigError if called, saved or moved.

    Grandchildren are shared and stay usable; so do the children of an object whose forward was replaced by
    its own, since that calls them. In a PeftModel the model does too.
    """
    if is_peft(model):
        refuse_use(_base(model))
    is_own = "forward" in model.__dict__
    below = {} if is_own else model._modules
    children = {name: copy.copy(child) for name, child in below.items() if child is not None}
    model.__dict__["_modules"] = {**model._modules, **children}
    for module in (model, *children.values()):
        for name in _HINTS:
            if hasattr(type(module), name):
                module.__dict__[name] = partial(_refuse, type(module).__name__, name)
        module.__dict__[_MARK] = True


def _refuse(kind: str, name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        f"this {kind} was handed to HostModel, which holds its weights; {_SHOWN.get(name, name + '()')} "
        "finds none here",
        hint=_HINTS[name],
    )
