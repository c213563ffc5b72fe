"""Vision-language models: the parts of a model that see pictures, and the inputs that carry them.

Such a model is a language model and, beside it, a vision tower and a projector whose outputs replace the
embeddings of placeholder tokens. No family is named here: the language model is the part that holds the input
embeddings, and what lies beside it is the vision part.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.config.patterns import compiled
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.model.pretrained import model_class
from horizon_lm.picture_batches import PictureInputs

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
_PER_IMAGE = ("image_grid_thw", "image_sizes")
_PIXELS = ("pixel_values", "pixel_attention_mask")
# What transformers calls the module between a tower and a language model.
_PROJECTORS = ("multi_modal_projector", "merger", "mlp1", "connector", "aligner", "embed_vision")


@dataclass(frozen=True)
class PictureParts:
    """Where a model's parts lie.

    base: the module whose forward calls its `get_image_features`. language: path of the language model.
    vision: paths of the modules beside it. projector: path of the one that makes token embeddings of a
    tower's output; empty if there is none by a known name. names: parameters of the vision part.
    inputs: those that carry pictures.
    """

    base: Any
    language: str
    vision: tuple[str, ...]
    projector: str
    names: frozenset[str]
    inputs: PictureInputs

    def is_vision(self, name: str) -> bool:
        """Whether the parameter or module of this name belongs to the vision part."""
        return name in self.names or any(name == path or name.startswith(f"{path}.") for path in self.vision)

    def is_projector(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the projector."""
        return bool(self.projector) and name.startswith(f"{self.projector}.")


def picture_parts(model: Any) -> PictureParts | None:
    """Find the parts of a vision-language model; None for a model of text alone."""
    base = getattr(model, "base_model", model)
    if not callable(getattr(base, "get_image_features", None)):
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    language, vision = "", []
    for child in base.children():
        if any(module is embedding for module in child.modules()):
            has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
            language = paths[id(child)] if has_layers else ""
        else:
            vision.append(paths[id(child)])
    if not language:
        return None
    prefix = paths[id(base)]
    own = {f"{prefix}.{name}" if prefix else name for name, _ in base.named_parameters(recurse=False)}
    inside = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{p}." for p in vision))}
    found = [path for path in paths.values() if path.rpartition(".")[2] in _PROJECTORS]
    projectors = [path for path in found if path.startswith(tuple(vision))]
    return PictureParts(
        base=base,
        language=language,
        vision=tuple(vision),
        projector=projectors[0] if len(projectors) == 1 else "",
        names=frozenset(own | inside),
        inputs=_inputs_of(type(model), model.config),
    )


def picture_inputs(config: Any) -> PictureInputs | None:
    """Which outputs of a processor the model of a transformers configuration takes; None for a model of text
    alone."""
    kind = model_class(config)._model_mapping.get(type(config), None)
    return _inputs_of(kind, config) if callable(getattr(kind, "get_image_features", None)) else None


def _inputs_of(kind: type, config: Any) -> PictureInputs:
    """kind: class of the model."""
    taken: set[str] = set()
    for name in ("forward", "get_image_features"):
        function = getattr(kind, name, None)
        taken |= set() if function is None else set(inspect.signature(function).parameters)
    placeholder = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return PictureInputs(
        per_token=tuple(name for name in _PER_TOKEN if name in taken),
        per_image=tuple(name for name in _PER_IMAGE if name in taken),
        pixels=tuple(name for name in _PIXELS if name in taken),
        placeholder=placeholder if isinstance(placeholder, int) else None,
        makes_positions=hasattr(kind, "get_rope_index") or "mm_token_type_ids" in taken,
    )


def vision_modules(model: Any) -> tuple[str, ...]:
    """Paths of the modules of the vision part; none for a model of text alone."""
    parts = picture_parts(model)
    return () if parts is None else parts.vision


def excluded_modules(model: Any) -> str | None:
    """An expression for names of modules of the vision part, as PEFT's `exclude_modules` takes it; None for a
    model of text alone."""
    paths = vision_modules(model)
    return rf"({'|'.join(map(re.escape, paths))})(\..*)?" if paths else None


def freeze_vision(
    model: Any, settings: ModelSettings, is_adapters: Callable[[str], bool] | None = None
) -> None:
    """Freeze the vision part, except for a projector that is to be trained.

    is_adapters: whether a name is the adapter's. With an adapter, its own parameters are trained, in the
    language model or in the projector. Raises ConfigError for a model without one projector, for parameters
    of the tower that would be trained, and if nothing is left to train.
    """
    parts = picture_parts(model)
    if settings.train_projector:
        _check_projector(model, parts)
    if parts is None:
        return
    _refuse_patterns(parts, settings)
    named = [(name, p) for name, p in model.named_parameters() if name in parts.names]
    if is_adapters is not None:
        _check_adapter(parts, settings, [name for name, p in named if p.requires_grad])
        return
    is_trained = any(parameter.requires_grad for parameter in model.parameters())  # not to be evaluated only
    for name, parameter in named:
        parameter.requires_grad_(settings.train_projector and parts.is_projector(name))
    if is_trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "no parameter is left to train: the vision tower is never trained",
            hint="let freeze and train leave some of the language model",
        )


def _check_projector(model: Any, parts: PictureParts | None) -> None:
    kind = getattr(model.config, "model_type", type(model).__name__)
    if parts is None:
        raise ConfigError(
            f"train_projector: {kind} has no projector: it is a text-only model", hint="leave it out"
        )
    others = [name for name in sorted(parts.names) if "deepstack" in name]
    if others:
        raise ConfigError(
            f"train_projector: the tower of {kind} has several projectors, between its layers ({others[0]})",
            hint="leave it out: the language model is trained",
        )
    if not parts.projector:
        raise ConfigError(
            f"train_projector: none of the modules of {kind} beside its language model is known as a "
            f"projector: {', '.join(parts.vision)}",
            hint="leave it out: the language model is trained",
        )


def _check_adapter(parts: PictureParts, settings: ModelSettings, trained: Sequence[str]) -> None:
    if settings.train_projector:
        name = parts.projector.rpartition(".")[2]
        raise ConfigError(
            "train_projector trains weights of the model, and an adapter is saved without them",
            hint=f"modules_to_save: [{name}] trains a copy of the projector, and saves it with the adapter",
        )
    odd = next((name for name in trained if not parts.is_projector(name)), None)
    if odd is not None:
        raise ConfigError(
            f"the adapter would train {odd}, a part of the vision tower, which is not trained",
            hint="name modules of the language model in target_modules and modules_to_save",
        )


def _refuse_patterns(parts: PictureParts, settings: ModelSettings) -> None:
    """Refuse patterns that contradict what is trained of the vision part."""
    for pattern in settings.train:
        expression = compiled(pattern, "train")
        names = sorted(name for name in parts.names if expression.search(name))
        tower = [n for n in names if not (parts.is_projector(n) and settings.train_projector)]
        if tower:
            way = f"train: ['{parts.language}.*{pattern}']"
            raise ConfigError(
                f"train: {pattern!r} matches {tower[0]}, a part of the vision tower, which is not trained",
                hint="train_projector: true" if parts.is_projector(tower[0]) else way,
            )
    for pattern in settings.freeze if settings.train_projector else ():
        expression = compiled(pattern, "freeze")
        odd = next((n for n in parts.names if parts.is_projector(n) and expression.search(n)), None)
        if odd is not None:
            raise ConfigError(
                f"freeze: {pattern!r} matches {odd}, and train_projector trains it",
                hint="leave one of them out",
            )


@contextmanager
def image_features_are(base: Any, features: Any) -> Iterator[list[int]]:
    """While open, `get_image_features` of the module returns `features`. Yields a list with an entry per
    call."""
    calls: list[int] = []

    def give(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return features

    base.get_image_features = give
    try:
        yield calls
    finally:
        base.__dict__.pop("get_image_features", None)


def refuse(model_type: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model_type} cannot be trained with pictures: {reason}",
        hint="docs/architectures.md lists the models that can",
    )
